"""Codes of earlier finalists: taken over where nothing they depend on differs, and only there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme
from advisor.search.codes import CodePool
from advisor.search.realise import realise
from advisor.search.walk import Walk

SETTINGS = QuantizationSettings(descent=1)
G32, G16 = parse_scheme("gptq-int4-g32-asym"), parse_scheme("gptq-int4-g16-asym")


@pytest.fixture
def sequences():
    tokens = torch.randint(2, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    return TokenSequences(tokens, "random", "0" * 8, 0, hash_tokens(tokens))


@pytest.fixture
def store(random_llama, sequences, tmp_path):
    found = open_store(random_llama, sequences, root=tmp_path, prefixes=(4, 8))
    collect_statistics(random_llama, sequences, found, prefixes=(4, 8))
    return found


@pytest.fixture
def made(monkeypatch):
    """Count the linears that are really quantized."""
    counted = []
    real = Walk._quantize

    def count(walk, same, statistics):
        counted.append(len(same))
        return real(walk, same, statistics)

    monkeypatch.setattr(Walk, "_quantize", count)

    def take():
        total = sum(counted)
        counted.clear()
        return total

    return take


def assert_same(found, expected):
    assert list(found.weights) == list(expected.weights)
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name].codes, weight.codes), name
        assert torch.equal(found.weights[name].scales, weight.scales), name
        assert found.weights[name].scheme == weight.scheme


def test_only_what_differs_is_quantized_again(random_llama, store, made, tmp_path):
    names = [linear.name for linear in random_llama.linears]
    uniform = dict.fromkeys(names, G32)
    # Of gate and up only one: those that were quantized together must be so again.
    mixture = uniform | {names[3]: G16, names[4]: G16}
    pool = CodePool(tmp_path / "codes", most_bytes=10**9)
    first = realise(random_llama, uniform, SETTINGS, store, pool=pool)
    assert made() == len(names)
    second = realise(random_llama, mixture, SETTINGS, store, pool=pool)
    assert made() == 3
    third = realise(random_llama, uniform, SETTINGS, store, pool=pool)
    assert made() == 0
    assert_same(first, realise(random_llama, uniform, SETTINGS, store))
    assert_same(second, realise(random_llama, mixture, SETTINGS, store))
    assert_same(third, first)


@pytest.mark.parametrize(
    "changes", [{"damping": 0.3}, {"clip": "mse"}, {"descent": 2}, {"static_groups": True}], ids=str
)
def test_other_settings_are_other_codes(random_llama, store, made, tmp_path, changes):
    assignment = {linear.name: G32 for linear in random_llama.linears}
    pool = CodePool(tmp_path / "codes", most_bytes=10**9)
    realise(random_llama, assignment, SETTINGS, store, pool=pool)
    made()
    settings = replace(SETTINGS, **changes)
    found = realise(random_llama, assignment, settings, store, pool=pool)
    assert made() == len(assignment)
    assert_same(found, realise(random_llama, assignment, settings, store))


@pytest.mark.parametrize("name", ["gguf-q4_0", "nvfp4", "mxfp4", "bnb-nf4"])
@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"damping": 0.3}, True), ({"descent": 2}, True), ({"output_feedback": 0.7}, True),
        ({"clip": "mse"}, False), ({"static_groups": True}, False),
        ({"scale_dtype": "float32"}, False),
    ],
    ids=str,
)  # fmt: skip
def test_codes_of_tables_are_made_again_for_settings_that_they_read(
    random_llama, store, made, tmp_path, name, changes, again
):
    # Scales of tables are searched whatever the settings say, blocks search no clipping.
    assignment = dict.fromkeys((m.name for m in random_llama.linears), parse_scheme(name))
    pool = CodePool(tmp_path / "codes", most_bytes=10**9)
    first = realise(random_llama, assignment, SETTINGS, store, pool=pool)
    made()
    settings = replace(SETTINGS, **changes)
    found = realise(random_llama, assignment, settings, store, pool=pool)
    assert made() == (len(assignment) if again else 0)
    assert_same(found, realise(random_llama, assignment, settings, store))
    changed = [
        name for name in assignment
        if not torch.equal(found.weights[name].codes, first.weights[name].codes)
    ]  # fmt: skip
    assert bool(changed) == again


def test_samples_scales_and_prefixes_share_nothing(random_llama, store, sequences, made, tmp_path):
    assignment = {linear.name: G32 for linear in random_llama.linears}
    pool = CodePool(tmp_path / "codes", most_bytes=10**9)
    plain = realise(random_llama, assignment, SETTINGS, store, pool=pool)
    made()
    realise(random_llama, assignment, SETTINGS, store, samples=4, pool=pool)
    assert made() == len(assignment)
    behind = realise(
        random_llama, assignment, replace(SETTINGS, sequential=True), store,
        calibration=sequences, pool=pool,
    )  # fmt: skip
    assert made() == len(assignment)
    scaled = {name: parse_scheme("awq-int4-g32-asym") for name in assignment}
    for _ in range(2):
        realise(random_llama, scaled, SETTINGS, store, pool=pool)
        assert made() == len(assignment)
    assert any(
        not torch.equal(behind.weights[name].codes, plain.weights[name].codes)
        for name in assignment
    )


def test_a_full_pool_starts_anew_and_old_codes_stay_readable(random_llama, store, made, tmp_path):
    assignment = {linear.name: G32 for linear in random_llama.linears}
    pool = CodePool(tmp_path / "codes", most_bytes=0)
    first = realise(random_llama, assignment, SETTINGS, store, pool=pool)
    made()
    second = realise(random_llama, assignment, SETTINGS, store, pool=pool)
    assert made() == len(assignment)
    assert_same(second, first)
    assert list((tmp_path / "codes").iterdir()) == []  # the files have no names


@pytest.mark.parametrize(
    ("plain", "rounded"),
    [("nvfp4", "nvfp4-anvfp4"), ("mxfp4", "mxfp4-amxfp4"), ("rtn-fp8-gch", "rtn-fp8-gch-afp8"),
     ("gptq-int8-gch-sym", "gptq-int8-gch-sym-aint8")],
)  # fmt: skip
def test_what_is_done_to_inputs_makes_no_new_codes(
    random_llama, store, made, tmp_path, plain, rounded
):
    names = [linear.name for linear in random_llama.linears if linear.in_features % 32 == 0]
    settings = replace(SETTINGS, output_feedback=0.7)
    for first, second in ((plain, rounded), (rounded, plain)):
        pool = CodePool(tmp_path / "codes", most_bytes=10**9)
        realise(random_llama, dict.fromkeys(names, parse_scheme(first)), settings, store, pool=pool)
        assert made() == len(names)
        assignment = dict.fromkeys(names, parse_scheme(second))
        found = realise(random_llama, assignment, settings, store, pool=pool)
        assert made() == 0
        expected = realise(random_llama, assignment, settings, store)
        made()
        assert_same(found, expected)
        for name, weight in expected.weights.items():
            assert weight.extras.keys() == found.weights[name].extras.keys()
            for key, value in weight.extras.items():
                assert torch.equal(value, found.weights[name].extras[key])


def test_int4_under_fp8_inputs_has_codes_of_its_own(random_llama, store, made, tmp_path):
    names = [linear.name for linear in random_llama.linears]
    pool = CodePool(tmp_path / "codes", most_bytes=10**9)
    for name in ("gptq-int4-g16-sym", "gptq-int4-g16-sym-afp8", "gptq-int4-g16-sym-aint8"):
        assignment = dict.fromkeys(names, parse_scheme(name))
        realise(random_llama, assignment, SETTINGS, store, pool=pool)
        assert made() == (0 if name.endswith("aint8") else len(names))
