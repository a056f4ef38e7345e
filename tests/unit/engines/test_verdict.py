"""Which kernel runs what, where: the facts that people get wrong."""

from __future__ import annotations

import pytest

from advisor.engines import (
    default_engine,
    engine_names,
    format_for,
    fused_conflicts,
    load_engine,
    mixture_options,
    verdict,
)
from advisor.errors import InputError
from advisor.hardware.profile import HardwareProfile
from advisor.modelspec import LinearSpec
from advisor.schemes import parse_scheme


def nvidia(capability: str) -> HardwareProfile:
    return HardwareProfile(
        id="test-gpu", name=f"GPU {capability}", vendor="NVIDIA", kind="gpu",
        compute_capability=capability,
    )  # fmt: skip


CPU = HardwareProfile(
    id="test-cpu", name="CPU", vendor="Intel", kind="cpu",
    instruction_sets=("avx2", "avx512f", "avx512bw", "avx512_vnni"),
)  # fmt: skip


def linear(name: str, inputs: int, outputs: int, fused: str | None = None) -> LinearSpec:
    return LinearSpec(name, inputs, outputs, 0, fused or name, fused or name)


@pytest.mark.parametrize(
    ("engine", "scheme", "capability", "support", "kernel"),
    [
        # Documentation says Ampere, the code says Turing.
        ("vllm", "gptq-int4-g128-sym", "7.5", "weight-only", "marlin"),
        ("vllm", "gptq-int4-g128-sym", "7.0", "weight-only", "exllama"),
        ("vllm", "gptq-int4-g128-sym", "9.0", "weight-only", "machete"),
        ("vllm", "gptq-int4-g64-sym", "9.0", "weight-only", "marlin"),
        ("vllm", "gptq-int4-g128-sym", "12.0", "weight-only", "marlin"),
        ("vllm", "awq-int4-g128-asym", "7.0", "none", None),
        ("vllm", "awq-int4-g128-asym", "8.6", "weight-only", "marlin"),
        # FP8 on Ampere saves memory, no compute.
        ("vllm", "rtn-fp8-gch-afp8", "8.0", "weight-only", "marlin-fp8"),
        ("vllm", "rtn-fp8-gch-afp8", "8.9", "native", "cutlass-fp8"),
        ("vllm", "rtn-fp8-gch-afp8", "7.0", "none", None),
        # INT8 W8A8: Turing to Hopper, gone on Blackwell.
        ("vllm", "smoothquant-int8-gch-sym-aint8", "7.5", "native", "cutlass-int8"),
        ("vllm", "smoothquant-int8-gch-sym-aint8", "12.0", "none", None),
        # Per-group weight scales have no INT8 kernel.
        ("vllm", "rtn-int8-g128-sym-aint8", "8.0", "none", None),
        # Marlin reads zero points of 4 bits only.
        ("vllm", "gptq-int8-g128-asym", "8.0", "none", None),
        ("vllm", "gptq-int4-g128-sym-afp8", "9.0", "native", "cutlass-w4a8"),
        ("vllm", "gptq-int4-g128-sym-afp8", "8.9", "none", None),
        ("vllm", "gptq-int3-g128-sym", "8.0", "weight-only", "gptq-gemm"),
        ("vllm", "nvfp4-anvfp4", "10.0", "native", "cutlass-nvfp4"),
        ("vllm", "nvfp4-anvfp4", "9.0", "weight-only", "marlin-nvfp4"),
        ("vllm", "llm.int8", "7.0", "none", None),
        ("vllm", "hqq-int4-g64-asym", "8.9", "none", None),
        ("sglang", "gptq-int4-g128-sym", "7.5", "weight-only", "gptq-gemm"),
        ("sglang", "nvfp4-anvfp4", "9.0", "none", None),
        ("tensorrt-llm", "gptq-int4-g128-sym", "7.5", "none", None),
        # W4A16 is not listed for Blackwell.
        ("tensorrt-llm", "awq-int4-g128-asym", "9.0", "weight-only", "w4a16"),
        ("tensorrt-llm", "awq-int4-g128-asym", "10.0", "none", None),
        ("tensorrt-llm", "rtn-fp8-gch-afp8", "8.9", "none", None),
        ("tensorrt-llm", "rtn-fp8-gtensor-afp8", "8.9", "native", "fp8"),
        ("transformers", "bnb-nf4", "6.1", "weight-only", "bitsandbytes-4bit"),
        ("transformers", "llm.int8", "7.0", "none", None),
        ("transformers", "rtn-int8-gch-sym-aint8", "8.0", "emulated", "decompressed"),
        ("transformers", "gguf-q4_k_m", "8.0", "emulated", "gguf-dequantized"),
        ("llama.cpp", "gguf-q4_k_m", "6.1", "weight-only", "ggml-quantized"),
        ("llama.cpp", "gptq-int4-g128-sym", "8.9", "none", None),
    ],
)
def test_kernel(engine, scheme, capability, support, kernel):
    found = verdict(engine, parse_scheme(scheme), nvidia(capability), ())
    assert (found.support, found.name) == (support, kernel)
    assert found.reason
    assert found.source


@pytest.mark.parametrize(
    ("engine", "scheme", "support", "kernel"),
    [
        ("vllm", "gptq-int4-g64-sym", "weight-only", "cpu-wna16-gptq"),
        ("vllm", "gptq-int4-gch-sym", "weight-only", "cpu-wna16-gptq"),
        ("vllm", "gptq-int4-g16-sym", "none", None),
        ("vllm", "gptq-int4-g64-sym-actorder", "none", None),
        ("vllm", "rtn-int4-g64-asym", "weight-only", "cpu-wna16"),
        ("vllm", "gptq-int4-g64-asym", "weight-only", "cpu-wna16"),
        ("vllm", "rtn-int4-gch-sym", "weight-only", "cpu-wna16"),
        ("vllm", "awq-int4-g64-asym", "weight-only", "cpu-wna16-awq"),
        ("vllm", "gptq-int8-g64-sym", "none", None),
        ("vllm", "rtn-int8-gch-sym", "none", None),
        ("vllm", "gptq-int3-g64-sym", "none", None),
        ("vllm", "rtn-fp8-gch", "none", None),
        ("vllm", "rtn-fp8-gtensor-afp8", "none", None),
        ("vllm", "rtn-fp8-gch-afp8", "emulated", "cpu-fp8"),
        ("vllm", "bnb-nf4", "none", None),
        ("vllm", "rtn-int8-gch-sym-aint8", "native", "cpu-int8"),
        ("vllm", "bf16", "native", "onednn-cpu"),
        ("transformers", "gptq-int4-g64-sym", "weight-only", "gptqmodel-torch"),
        ("transformers", "rtn-int8-gch-sym-aint8", "emulated", "decompressed"),
        ("transformers", "bnb-nf4", "weight-only", "bitsandbytes-4bit"),
        ("sglang", "bf16", "none", None),
        ("tensorrt-llm", "bf16", "none", None),
    ],
)
def test_kernel_on_a_cpu(engine, scheme, support, kernel):
    found = verdict(engine, parse_scheme(scheme), CPU, ())
    assert (found.support, found.name) == (support, kernel)


def test_every_rejected_kernel_is_named_with_its_reasons():
    found = verdict("vllm", parse_scheme("gptq-int4-g128-sym-afp8"), nvidia("8.9"), ())
    assert "needs exactly sm_90, this GPU is sm_89" in found.reason
    assert {entry.kernel for entry in found.rejected} >= {"cutlass-w4a8", "machete", "marlin"}
    assert all(entry.reasons and entry.source for entry in found.rejected)


def test_documentation_and_code_are_both_kept():
    found = verdict("vllm", parse_scheme("gptq-int4-g128-sym"), nvidia("7.5"), ())
    assert "not on Turing" in (found.conflict or "")
    assert "decided by the code" in (found.conflict or "")


def test_a_shape_moves_only_the_module_it_concerns():
    linears = (linear("a", 4096, 4096), linear("b", 4096, 4096), linear("odd", 4096, 4104))
    found = verdict("vllm", parse_scheme("gptq-int4-g128-sym"), nvidia("8.9"), linears)
    assert found.name == "marlin"
    assert [(module.name, module.kernel) for module in found.modules] == [("odd", "exllama")]
    assert "out_features % 64" in found.modules[0].reason


def test_a_module_that_no_kernel_takes_stays_in_16_bits():
    linears = (linear("a", 4096, 4096), linear("b", 4096, 4096), linear("odd", 4096, 4100))
    found = verdict("vllm", parse_scheme("gptq-int4-g128-sym"), nvidia("8.9"), linears)
    assert found.support == "weight-only"
    assert found.kept_16bit == ("odd",)
    assert found.to_dict()["kept_16bit"] == ["odd"]


def test_fused_modules_are_judged_by_their_sum():
    # 48 + 8 + 8 outputs: none is a multiple of 64 alone, their fused product is.
    linears = tuple(linear(n, 128, o, "qkv") for n, o in (("q", 48), ("k", 8), ("v", 8)))
    scheme = parse_scheme("gptq-int4-g128-sym")
    assert verdict("vllm", scheme, nvidia("8.0"), linears).name == "marlin"
    assert verdict("transformers", scheme, nvidia("8.0"), linears).name != "marlin"


def test_a_group_size_that_does_not_divide_rules_out():
    found = verdict(
        "vllm", parse_scheme("gptq-int4-g128-sym"), nvidia("8.0"), (linear("q", 576, 576),)
    )
    assert found.support == "none"
    assert "128" in found.reason
    assert "576" in found.reason


def test_unknown_engine_gets_a_suggestion():
    with pytest.raises(InputError, match="Did you mean 'vllm'"):
        load_engine("vlm")


def test_every_engine_file_is_valid_and_every_mixture_runs_somewhere():
    assert set(engine_names()) == {"llama.cpp", "sglang", "tensorrt-llm", "transformers", "vllm"}
    for name in engine_names():
        for mixture in load_engine(name).mixtures:
            for scheme in mixture.schemes:
                parse_scheme(scheme)


def test_formats_follow_the_engine():
    scheme = parse_scheme("rtn-int4-g128-sym")
    assert format_for("vllm", scheme) == "compressed-tensors"
    assert format_for("transformers", scheme) == "gptq"
    assert format_for("llama.cpp", scheme) is None
    assert format_for("vllm", parse_scheme("awq-int4-g128-sym")) == "compressed-tensors"


def test_mixtures_hold_only_what_runs_on_the_device():
    names = [str(scheme) for scheme in mixture_options("vllm", nvidia("8.0")).schemes]
    assert "gptq-int4-g32-sym" in names
    assert "bf16" in names
    cpu = [str(scheme) for scheme in mixture_options("vllm", CPU).schemes]
    assert "gptq-int4-g64-sym" in cpu
    assert "gptq-int4-g64-asym" in cpu
    assert not any(name.startswith(("gptq-int8", "gptq-int3")) for name in cpu)
    narrow = (linear("a", 576, 200), linear("b", 576, 576))
    found = verdict("vllm", parse_scheme("rtn-int4-g64-sym"), CPU, narrow)
    assert found.kept_16bit == ("a",)
    assert "out_features % 32" in found.reason
    with pytest.raises(InputError, match="mixed bit widths"):
        mixture_options("tensorrt-llm", nvidia("9.0"))


def test_default_engine():
    assert default_engine(nvidia("8.9")) == "vllm"
    assert default_engine(nvidia("6.1")) == "llama.cpp"
    assert default_engine(CPU) == "transformers"


def test_fused_modules_must_share_a_scheme():
    linears = (*tuple(linear(name, 128, 64, "qkv") for name in "qkv"), linear("o", 128, 128))
    four, eight = parse_scheme("gptq-int4-g128-sym"), parse_scheme("gptq-int8-g128-sym")
    mixed = {"q": four, "k": four, "v": eight, "o": eight}
    assert len(fused_conflicts("vllm", mixed, linears)) == 1
    assert "v gptq-int8-g128-sym" in fused_conflicts("vllm", mixed, linears)[0]
    assert fused_conflicts("transformers", mixed, linears) == ()
    assert fused_conflicts("vllm", {"q": four, "k": four, "v": four}, linears) == ()
