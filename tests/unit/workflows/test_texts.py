"""Mixes of texts, conversations, slices: drawn, and drawn again from a plan."""

from __future__ import annotations

import json

import pytest
import torch

from advisor.calibration.corpora import GENERAL_SHARES
from advisor.calibration.tokens import check_disjoint, share_out
from advisor.errors import InputError
from advisor.workflows.texts import describe, draw, parse_slices, redraw

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer(random_llama_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(random_llama_folder)


@pytest.fixture
def texts(tmp_path):
    paths = []
    for word in ("fox", "table", "value"):
        path = tmp_path / f"{word}.txt"
        path.write_text(" ".join(f"{word} {i % 97}" for i in range(4000)), encoding="utf-8")
        paths.append(str(path))
    return paths


def _drawn(sources, tokenizer, count=20):
    return draw(sources, tokenizer, role="calibration", sequences=count, sequence_length=32, seed=3)


def test_a_mix_has_its_proportions_in_every_prefix(texts, tokenizer):
    a, b, c = texts
    mixed = _drawn([f"{a}@3", f"{b}@1", f"{c}@1"], tokenizer)
    words = [tokenizer.decode(row) for row in mixed.tokens]
    assert [sum(word in text for text in words) for word in ("fox", "table", "value")] == [12, 4, 4]
    for prefix in (5, 10, 15):
        foxes = sum("fox" in text for text in words[:prefix])
        assert abs(foxes - 0.6 * prefix) <= 1
    alone = _drawn([a], tokenizer, 12)
    rows = {tuple(row.tolist()) for row in mixed.tokens}
    assert all(tuple(row.tolist()) in rows for row in alone.tokens), "a draw of each text alone"


def test_every_sequence_knows_its_source(texts, tokenizer):
    a, b, _ = texts
    for named in ([a, b], [f"{a}@3", f"{b}@1"]):
        drawn = _drawn(named, tokenizer)
        assert set(drawn.sources) == {a, b}
        for row, source in zip(drawn.tokens, drawn.sources, strict=True):
            words = tokenizer.decode(row)
            assert ("fox" in words[:24]) == (source == a)
        again = redraw(describe(drawn), tokenizer, "calibration")
        assert again.sources == drawn.sources
    assert drawn.of_source(a).sequences == 15


def test_a_mix_is_drawn_again_from_its_plan(texts, tokenizer):
    mixed = _drawn([f"{texts[0]}@0.7", f"{texts[1]}@0.3"], tokenizer)
    again = redraw(describe(mixed), tokenizer, "calibration")
    assert torch.equal(again.tokens, mixed.tokens)
    with open(texts[1], "a", encoding="utf-8") as file:
        file.write(" more")
    with pytest.raises(InputError, match="has changed"):
        redraw(describe(mixed), tokenizer, "calibration")


def test_bad_weights(texts, tokenizer):
    with pytest.raises(InputError, match="only 1 of 2"):
        _drawn([f"{texts[0]}@2", texts[1]], tokenizer)
    with pytest.raises(InputError, match="above 0"):
        _drawn([f"{texts[0]}@0", f"{texts[1]}@1"], tokenizer)
    with pytest.raises(InputError, match="at least as many"):
        _drawn([f"{text}@1" for text in texts], tokenizer, 2)


@pytest.mark.parametrize(
    ("count", "weights", "shares"),
    [
        (10, [1, 1], [5, 5]),
        (10, [99, 1], [9, 1]),
        (7, [1, 1, 1], [3, 2, 2]),
        (3, [8, 1, 1], [1] * 3),
    ],
)
def test_shares(count, weights, shares):
    assert sorted(share_out(count, weights)) == sorted(shares)
    assert sum(share_out(count, weights)) == count


def test_conversations_go_through_the_chat_template(tmp_path, tokenizer):
    path = tmp_path / "chat.jsonl"
    row = {"messages": [{"role": "user", "content": "jumps " * 60}]}
    path.write_text("\n".join([json.dumps(row)] * 20), encoding="utf-8")
    with pytest.raises(InputError, match="no chat template"):
        _drawn([str(path)], tokenizer, 4)
    tokenizer.chat_template = TEMPLATE
    text = "".join(tokenizer.decode(row) for row in _drawn([str(path)], tokenizer, 40).tokens)
    assert "<user>jumps" in text
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r'"messages" list; line 1 of .*bad\.jsonl'):
        _drawn([str(bad)], tokenizer, 4)


def test_a_data_set_that_cannot_be_read_is_one_line(tokenizer):
    with pytest.raises(InputError, match=r"hf:nobody/nothing"):
        _drawn(["hf:nobody/nothing"], tokenizer, 4)


def test_slices():
    assert parse_slices(["code=a", "code=b", "ru=c=d"]) == {"code": ["a", "b"], "ru": ["c=d"]}
    with pytest.raises(InputError, match=r"(?s)2 problems.*'code'.*'=x'"):
        parse_slices(["code", "=x"])


def _general(tokenizer, count, **settings):
    return draw(
        ["builtin:general"], tokenizer, role="calibration", sequences=count, seed=3,
        **{"sequence_length": 64} | settings,
    )  # fmt: skip


def test_the_general_text_has_its_shares_in_every_prefix(tokenizer):
    drawn = _general(tokenizer, 32)
    parts = {
        name: {
            tuple(row.tolist())
            for row in draw(
                [f"builtin:{name}"], tokenizer, role="calibration", sequences=16,
                sequence_length=64, seed=3,
            ).tokens
        }
        for name in GENERAL_SHARES
    }  # fmt: skip
    found = [
        next(name for name, rows in parts.items() if tuple(row.tolist()) in rows)
        for row in drawn.tokens
    ]
    total = sum(GENERAL_SHARES.values())
    for prefix in (8, 16, 32):
        for name, weight in GENERAL_SHARES.items():
            assert abs(found[:prefix].count(name) - prefix * weight / total) <= 1
    assert set(drawn.sources) == {"builtin:general"}, "one text, not a mix to choose from"
    again = redraw(describe(drawn), tokenizer, "calibration")
    assert torch.equal(again.tokens, drawn.tokens)


def test_the_general_text_is_drawn_as_far_as_each_of_its_parts_goes(tokenizer):
    drawn = _general(tokenizer, 8, sequence_length=2048, most=4000)
    assert 8 < drawn.sequences < 4000
    assert redraw(describe(drawn), tokenizer, "calibration").sha256 == drawn.sha256
    longer = _general(tokenizer, drawn.sequences, sequence_length=2048)
    assert torch.equal(longer.tokens, drawn.tokens)
    with pytest.raises(InputError, match=r"calibration \(builtin:"):
        _general(tokenizer, drawn.sequences + 4, sequence_length=2048)
    assert _general(tokenizer, 2).sequences == 2, "fewer than parts: from all of it"


def test_the_general_text_takes_its_place_in_a_mix(texts, tokenizer):
    mixed = _drawn(["builtin:general@3", f"{texts[0]}@1"], tokenizer, 16)
    assert [mixed.sources.count(name) for name in ("builtin:general", texts[0])] == [12, 4]
    assert redraw(describe(mixed), tokenizer, "calibration").sha256 == mixed.sha256


def test_the_default_texts_are_of_several_kinds_and_judge_technical_english(tokenizer):
    settings = {"sequences": 8, "sequence_length": 64, "seed": 3}
    calibration = draw((), tokenizer, role="calibration", **settings)
    assert calibration.corpus == "builtin:general"
    assert calibration.sha256 == _general(tokenizer, 8).sha256
    judged = draw((), tokenizer, role="evaluation", **settings)
    assert judged.corpus == "builtin:evaluation"
    check_disjoint(calibration, judged)
