from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from advisor.calibration.tokens import check_disjoint, draw_sequences, overlap
from advisor.errors import InputError


@dataclass(frozen=True)
class Text:
    documents: tuple[str, ...]
    name: str = "test"
    sha256: str = "0" * 64
    sources: tuple[str, ...] = ()


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
    calibration = draw(numbered(4000), 40, 100)
    shifted = draw(numbered(4000, first=2037), 40, 100)
    # 1963 letters are shared; windows that straddle a cut of either draw are not.
    assert 0.2 < overlap(calibration, shifted) < 0.49
    with pytest.raises(InputError, match="overlaps calibration text 'test'"):
        check_disjoint(calibration, shifted)
    assert overlap(calibration, calibration) == 1.0


def test_disjoint_texts_pass():
    assert check_disjoint(draw(numbered(4000), 40, 100), draw(numbered(4000, 4000), 40, 100)) == 0


def test_a_few_shared_windows_are_allowed():
    shared = draw(numbered(4000, first=3960), 40, 100)
    assert 0 < check_disjoint(draw(numbered(4000), 40, 100), shared) < 0.01


def test_sequences_shorter_than_the_window():
    assert overlap(draw(numbered(100)), draw(numbered(100))) == 1.0
