from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from advisor.calibration.corpora import builtin_corpus
from advisor.calibration.tokens import check_disjoint, draw_sequences, mix_sequences, overlap
from advisor.errors import InputError


@dataclass(frozen=True)
class Text:
    documents: tuple[str, ...]
    name: str = "test"
    sha256: str = "0" * 64
    sources: tuple[str, ...] = ()


class Chunks:
    """A tokenizer whose tokens are so many letters each, by a number of their own."""

    bos_token_id = None

    def __init__(self, size):
        self.size, self.known = size, {}

    def __call__(self, text, add_special_tokens=True, verbose=True):
        starts = range(0, len(text), self.size)
        parts = [text[start : start + self.size] for start in starts]
        return {"input_ids": [self.known.setdefault(part, len(self.known)) for part in parts]}


class Letters:
    """A tokenizer whose tokens are the letters themselves."""

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": start + [ord(letter) for letter in text]}


def numbered(count, first=0):
    """Text whose letters are all different."""
    return Text(("".join(chr(1000 + first + index) for index in range(count)),))


def draw(text, sequences=4, sequence_length=10, seed=0, tokenizer=None):
    return draw_sequences(
        text, tokenizer or Letters(), sequences=sequences, sequence_length=sequence_length,
        seed=seed, role="calibration",
    )  # fmt: skip


def test_windows_do_not_overlap():
    drawn = draw(numbered(100), 10)
    assert sorted(drawn.tokens.flatten().tolist()) == list(range(1000, 1100))
    assert drawn.tokens.shape == (10, 10)


def test_fewer_are_the_first_of_more():
    many, few = draw(numbered(100), 8), draw(numbered(100), 3)
    assert torch.equal(many.tokens[:3], few.tokens)
    assert many.first(3).sha256 == few.sha256
    assert many.sha256 != few.sha256


def test_seeds():
    assert draw(numbered(100)).sha256 == draw(numbered(100)).sha256
    assert draw(numbered(100), seed=1).sha256 != draw(numbered(100)).sha256


def test_documents_are_laid_end_to_end():
    text = Text(("abcdefg", "hijklmnopqrst"))
    assert draw(text, 2).tokens.flatten().sort().values.tolist() == [
        ord("a") + i for i in range(20)
    ]


def test_sequences_begin_as_the_tokenizer_begins_texts():
    drawn = draw(numbered(100), 11, tokenizer=Letters(bos=7))
    assert drawn.tokens[:, 0].tolist() == [7] * 11
    assert drawn.tokens.shape == (11, 10)
    assert 7 not in drawn.tokens[:, 1:]


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(InputError, match="99 tokens: enough for 9 sequences of 10 tokens, but 10"):
        draw(numbered(99), 10)


@pytest.mark.parametrize(("sequences", "length"), [(0, 10), (1, 1), (-1, 10)])
def test_impossible_numbers(sequences, length):
    with pytest.raises(InputError, match="at least 1 sequence"):
        draw(numbered(99), sequences, length)


def test_overlap_is_found_at_any_offset():
    calibration = draw(numbered(16000), 40, 400)
    shifted = draw(numbered(16000, first=8037), 40, 400)
    # 7963 letters are shared; windows that straddle a cut of either draw are not.
    assert 0.2 < overlap(calibration, shifted) < 0.49
    with pytest.raises(InputError, match="overlaps calibration text 'test'"):
        check_disjoint(calibration, shifted)
    assert overlap(calibration, calibration) == 1.0


def test_disjoint_texts_pass():
    assert check_disjoint(draw(numbered(4000), 40, 100), draw(numbered(4000, 4000), 40, 100)) == 0


def test_a_few_shared_windows_are_allowed():
    shared = draw(numbered(16000, first=15840), 40, 400)
    assert 0 < check_disjoint(draw(numbered(16000), 40, 400), shared) < 0.01


def test_sequences_shorter_than_the_window():
    assert overlap(draw(numbered(100)), draw(numbered(100))) == 1.0


def english(name, tokenizer, length=2048, extra=""):
    """Sequences of a built-in text, behind other text."""
    corpus = builtin_corpus(name)
    text = Text((extra, *corpus.documents)) if extra else Text(corpus.documents)
    ids = sum(len(tokenizer(document)["input_ids"]) for document in text.documents)
    return draw(text, ids // length, length, tokenizer=tokenizer)


def test_phrases_that_recur_are_no_overlap_where_tokens_are_bytes():
    calibration, evaluation = (english(name, Letters()) for name in ("calibration", "evaluation"))
    assert calibration.characters_per_token == 1
    found = windows_in_both(calibration.tokens, evaluation.tokens, 32)
    assert found > 0.02, "so many phrases of 32 letters recur"
    assert check_disjoint(calibration, evaluation) == 0
    assert windows_in_both(calibration.tokens, evaluation.tokens, 128) == 0


def windows_in_both(calibration, evaluation, width):
    known = {tuple(window) for row in calibration.tolist() for window in windows(row, width)}
    asked = [window for row in evaluation.tolist() for window in windows(row, width)]
    return sum(window in known for window in asked) / len(asked)


def windows(row, width):
    return [tuple(row[start : start + width]) for start in range(len(row) - width + 1)]


@pytest.mark.parametrize(("size", "window"), [(1, 128), (2, 65), (4, 33)])
def test_a_copied_chapter_is_found_whatever_a_token_is(size, window):
    # Copied to where whole tokens begin, as words do in real text.
    tokenizer = Chunks(size)
    copied = "".join(builtin_corpus("fiction-evaluation").documents)[:8000]
    calibration = english("calibration", tokenizer, 512, extra=copied)
    evaluation = english("evaluation", tokenizer, 512, extra=copied)
    with pytest.raises(InputError, match=f"windows of {window} tokens"):
        check_disjoint(calibration, evaluation)
    clean = english("evaluation", tokenizer, 512)
    assert check_disjoint(calibration, clean) < 0.001


def test_how_much_text_a_token_is_goes_through_mixes_and_parts():
    short, long = draw(numbered(100)), draw(numbered(400), tokenizer=Chunks(4))
    mixed = mix_sequences([short.first(1), long.first(3)], "both")
    assert (short.characters_per_token, long.characters_per_token) == (1, 4)
    assert mixed.characters_per_token == (1 + 3 * 4) / 4
    assert mixed.first(2).characters_per_token == mixed.characters_per_token
    unknown = replace(short, characters_per_token=None)
    assert mix_sequences([unknown, long], "both").characters_per_token == 4
    assert mix_sequences([unknown], "one").characters_per_token is None
