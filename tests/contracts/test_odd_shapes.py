"""Rows that no usual group divides: every method quantizes them, or says what would do."""

from __future__ import annotations

import pytest
import torch

import advisor
from advisor.budgets import Budgets
from advisor.calibration.statistics import LayerStatistics
from advisor.engines import mixture_options, verdict
from advisor.errors import InputError
from advisor.hardware.catalogue import find_profile
from advisor.hardware.profile import HardwareProfile
from advisor.methods import registry
from advisor.methods.settings import QuantizationSettings
from advisor.modelspec import LinearSpec
from advisor.schemes import parse_scheme
from advisor.search.fallbacks import shape_fallbacks

CASES = {
    "rtn": ("rtn-int4-g64-sym", "rtn-int4-gch-asym", "rtn-fp8-gch", "rtn-fp8-b128"),
    "gptq": ("gptq-int4-g64-sym", "gptq-int4-gch-sym", "gptq-fp8-b32-afp8"),
    "awq": ("awq-int4-g64-asym", "awq-int4-gch-sym"),
    "smoothquant": ("smoothquant-int8-gch-sym-aint8",),
    "hqq": ("hqq-int4-g64-asym",),
    "bnb": ("bnb-nf4", "bnb-fp4-dq", "bnb-nf4-g32"),
    "llm.int8": ("llm.int8",),
    "gguf": ("gguf-q4_0", "gguf-q4_k"),
    "mxfp4": ("mxfp4",),
    "mxfp8": ("mxfp8",),
    "nvfp4": ("nvfp4",),
}
PER_ROW = ("gch", "-fp8-", "llm.int8")
"""What has no groups along a row, or pads the last one."""
CPU = HardwareProfile(
    id="cpu", name="CPU", vendor="Intel", kind="cpu", instruction_sets=("avx2", "avx512f")
)


def linear(name: str, inputs: int, outputs: int) -> LinearSpec:
    return LinearSpec(name, inputs, outputs, 0, name, name)


def test_every_method_has_cases():
    assert set(CASES) == set(registry.method_names())


@pytest.mark.parametrize("in_features", [90, 96, 284])
@pytest.mark.parametrize("name", [name for names in CASES.values() for name in names])
def test_a_method_quantizes_an_odd_row_or_says_what_would_do(name, in_features):
    generator = torch.Generator().manual_seed(in_features)
    inputs = torch.randn(600, in_features, generator=generator)
    statistics = LayerStatistics(600, inputs.T @ inputs, inputs.abs().amax(0), inputs.abs().sum(0))
    weight = 0.05 * torch.randn(48, in_features, generator=generator)
    scheme = parse_scheme(name)
    try:
        found = registry.quantize(weight, statistics, scheme, QuantizationSettings())
    except InputError as error:
        text = str(error)
        assert f"in_features={in_features}" in text
        assert "Use " in text or "16" in text.rpartition(".")[0], text
        assert not any(word in name for word in PER_ROW)
        assert (in_features, name) not in {(96, "gguf-q4_0"), (96, "mxfp4"), (96, "bnb-nf4-g32")}
        return
    assert found.shape == weight.shape
    relative = (found.dequantize() - weight).norm() / weight.norm()
    assert relative < (0.25 if scheme.bits == 4 else 0.05)
    if scheme.granularity == "group":
        assert in_features % int(scheme.group_size) == 0


ODD = [linear("attn", 256, 512), linear("up", 256, 284), linear("down", 284, 256)]


def test_one_odd_module_takes_no_group_size_from_the_others():
    options = mixture_options("transformers", find_profile("rtx-4090"), ODD)
    grouped = parse_scheme("gptq-int4-g128-sym")
    assert grouped in options.schemes
    assert options.unfit[grouped] == {"down"}
    assert parse_scheme("gptq-int8-gch-sym") not in options.unfit


def test_modules_that_no_kernel_takes_are_named():
    # Marlin, Exllama and Triton take outputs by 8 at least; 284 is no multiple.
    options = mixture_options("vllm", find_profile("rtx-4090"), ODD)
    assert "up" in options.unfit[parse_scheme("gptq-int4-g64-sym")]


def test_what_fits_no_module_is_ruled_out_with_the_rule():
    options = mixture_options("llama.cpp", CPU, [linear("attn", 90, 90)])
    assert [str(scheme) for scheme in options.schemes] == ["bf16"]
    assert all("in_features % 32 == 0, but it is 90" in why for _, why in options.ruled_out)


@pytest.mark.parametrize(
    ("engine", "scheme", "reason"),
    [
        ("transformers", "gptq-int8-gch-sym", r"no offered group size (32, 64, 128) divides"),
        ("llama.cpp", "bf16", "GGUF blocks of 32 do not divide in_features=284"),
    ],
)
def test_a_plan_says_what_odd_modules_got_instead(engine, scheme, reason):
    hardware = find_profile("rtx-4090")
    offered = mixture_options(engine, hardware, ODD)
    usual = next(s for s in offered.schemes if s.is_quantized)
    assignment = {"attn": usual, "up": usual, "down": parse_scheme(scheme)}
    (row,) = shape_fallbacks(engine, hardware, ODD, offered, assignment)
    assert (row.modules, row.first, row.scheme) == (1, "down", scheme)
    assert reason in row.reason


@pytest.mark.parametrize(
    "scheme", ["smoothquant-int8-gch-sym-aint8", "rtn-fp8-gch-afp8", "bnb-nf4"]
)
def test_what_has_no_groups_to_begin_with_is_no_fallback(scheme):
    hardware = find_profile("rtx-4090")
    offered = mixture_options("vllm", hardware, ODD)
    assignment = {linear.name: parse_scheme(scheme) for linear in ODD}
    assert shape_fallbacks("vllm", hardware, ODD, offered, assignment) == ()


def test_bitsandbytes_on_a_cpu_needs_whole_blocks_in_a_row():
    """Seen with 0.50.2: other rows load, and fail in the first forward pass."""
    narrow = [linear("attn", 96, 96)]
    assert verdict("transformers", parse_scheme("bnb-nf4"), CPU, narrow).support == "none"
    found = verdict("transformers", parse_scheme("bnb-nf4-g32"), CPU, narrow)
    assert (found.support, found.kept_16bit) == ("weight-only", ())
    gpu = verdict("transformers", parse_scheme("bnb-nf4"), find_profile("rtx-4090"), narrow)
    assert gpu.support == "weight-only"


def test_a_search_gives_each_module_what_divides_it(llama_builder, tmp_path):
    """Rows of 284 in two of fourteen modules: per channel there, groups elsewhere, and so said."""
    folder = llama_builder(hidden_size=128, intermediate_size=284)
    tuning = advisor.tune(
        folder, gpu="rtx-4090", engine="transformers", output=tmp_path / "plan.yaml", samples=8,
        budgets=Budgets(max_size_bytes=330_000), sequence_length=32, evaluation_sequences=4,
        trials=2, context=64, sequential=False,
    )  # fmt: skip
    plan = tuning.result.plan
    mixture = next(f.mixture for f in tuning.result.finalists if not f.mixture.is_uniform)
    odd = {name: s for name, s in mixture.assignment.items() if name.endswith("down_proj")}
    assert len(odd) == 2
    assert all(scheme.granularity != "group" for scheme in odd.values())
    others = [s for name, s in mixture.assignment.items() if name not in odd]
    assert any(scheme.granularity == "group" for scheme in others)
    rows = [f for f in plan.fallbacks if f.first.endswith("down_proj")]  # one for each scheme
    assert sum(row.modules for row in rows) == 2
    assert all(parse_scheme(row.scheme).granularity != "group" for row in rows)
    reason = "no offered group size (32, 64, 128) divides in_features=284"
    assert {row.reason for row in rows} == {reason}
    made = advisor.apply(tuning.plan_path, tmp_path / "out")
    assert made.quantized_modules >= 12
    assert advisor.verify(tuning.plan_path, tmp_path / "out").passed


def test_an_engine_without_any_fitting_scheme_says_why(llama_builder, tmp_path):
    folder = llama_builder(hidden_size=90, intermediate_size=180, num_attention_heads=3,
                           num_key_value_heads=3)  # fmt: skip
    with pytest.raises(InputError, match=r"offers no scheme.*% 32 == 0, but it is 90"):
        advisor.tune(
            folder, gpu="cpu", engine="llama.cpp", output=tmp_path / "plan.yaml", samples=4,
            sequence_length=32, evaluation_sequences=4, trials=1, context=64,
        )  # fmt: skip
