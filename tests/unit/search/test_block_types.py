"""Mixtures of GGUF block types, from the search to the file."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from advisor.budgets import Budgets
from advisor.calibration.collect import open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.evaluation.measure import measure
from advisor.evaluation.reference import Reference
from advisor.evaluation.runtime import quantized_model
from advisor.formats.export import write_checkpoint
from advisor.hardware.catalogue import find_profile
from advisor.models.load import load_model
from advisor.plan.folders import cache_root
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.schemes import parse_scheme
from advisor.search.assignment import (
    assignment_of,
    by_block_type,
    samples_of,
    scheme_choice,
    settings_of,
)
from advisor.search.realise import realise
from advisor.search.tune import tune

Q2_K = parse_scheme("gguf-q2_k")


def _sequences(seed, count):
    tokens = torch.randint(2, 300, (count, 48), generator=torch.Generator().manual_seed(seed))
    return TokenSequences(tokens, f"random {seed}", "0" * 8, seed, hash_tokens(tokens))


@pytest.fixture
def wide(llama_builder):
    """Rows of 256, which k-quants need."""
    return llama_builder(hidden_size=256, intermediate_size=256)


def _read_back(choice, linears):
    plan = SimpleNamespace(scheme=choice)
    return assignment_of(plan, linears)


@pytest.mark.parametrize("others", [0, 3, 9])
def test_a_module_of_q2_k_is_that_block_type_and_not_the_file_types_choice(wide, others):
    linears = load_model(wide).linears
    assignment = {m.name: Q2_K for m in linears}
    assignment |= {m.name: parse_scheme("gguf-q4_k") for m in linears[:others]}
    choice = scheme_choice("mixed", "gguf", assignment)
    assert _read_back(choice, linears) == assignment


def test_a_file_type_for_the_whole_model_still_mixes(wide):
    linears = load_model(wide).linears
    found = by_block_type({m.name: Q2_K for m in linears}, linears)
    assert {str(scheme) for scheme in found.values()} == {"gguf-q2_k", "gguf-q3_k"}


def test_named_block_types_fall_back_where_rows_do_not_fill_them(random_llama):
    linears = random_llama.linears
    found = by_block_type({m.name: Q2_K for m in linears}, linears, [linears[0].name])
    assert str(found[linears[0].name]) == "gguf-iq4_nl"


def test_a_small_mixture_is_written_as_it_was_measured(wide, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "cache"))
    loaded, spec = load_model(wide), load_modelspec(wide)
    sizes = [
        checkpoint_size(spec, {m.name: parse_scheme(name) for m in loaded.linears}, "gguf")
        for name in ("gguf-q2_k", "gguf-q3_k")
    ]
    limit = sum(size.total_bytes for size in sizes) // 2
    result = tune(
        loaded, spec, find_profile("rtx-4090"), "llama.cpp", Budgets(max_size_bytes=limit),
        calibration=_sequences(1, 16), evaluation=_sequences(2, 8), workdir=tmp_path / "work",
        trials=4, context=64,
    )  # fmt: skip
    plan = result.plan
    assignment = assignment_of(plan, loaded.linears)
    chosen = next(f for f in result.finalists if f.measurement.kl == plan.expected.kl)
    assert assignment == dict(chosen.mixture.assignment)
    assert Q2_K in assignment.values()
    assert chosen.mixture.family.method == "gguf"
    settings = settings_of(plan)
    assert settings.descent
    assert settings.output_feedback
    made = realise(
        loaded, assignment, settings, open_store(loaded, _sequences(1, 16)),
        samples=samples_of(plan), calibration=_sequences(1, 16),
    )  # fmt: skip
    reference = Reference.compute(loaded, _sequences(2, 8), cache_root())
    with quantized_model(loaded.model, made.weights, made.replaced) as quantized:
        assert measure(quantized, reference).kl == plan.expected.kl
    folder = tmp_path / "out"
    write_checkpoint(wide, folder, format="gguf", weights=made.weights, replaced=made.replaced)
    written = (folder / "model.gguf").stat().st_size
    assert written <= limit
    assert written == pytest.approx(plan.expected.size_bytes, rel=0.005)
