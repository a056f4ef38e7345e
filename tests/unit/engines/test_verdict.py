"""Which kernel runs what, where: the facts that people get wrong."""

from __future__ import annotations

from dataclasses import replace

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
from advisor.hardware.catalogue import find_profile
from advisor.hardware.profile import HardwareProfile
from advisor.modelspec import LinearSpec
from advisor.predict.models import load_modelspec
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
        # Exllama itself asks for sm_60; the loaders ask for sm_75 before it is reached.
        ("vllm", "gptq-int4-g128-sym", "7.0", "none", None),
        ("vllm", "gptq-int4-g128-sym", "9.0", "weight-only", "machete"),
        ("vllm", "gptq-int4-g64-sym", "9.0", "weight-only", "machete"),
        ("vllm", "gptq-int4-g32-sym", "9.0", "weight-only", "marlin"),
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
        ("vllm", "gptq-int3-g128-sym", "8.0", "none", None),
        # What the format gptq has no kernel for goes into compressed-tensors.
        ("vllm", "rtn-int4-g256-asym", "8.0", "weight-only", "triton-w4a16"),
        ("vllm", "gptq-int4-g16-sym", "8.0", "weight-only", "exllama"),
        ("vllm", "gptq-int8-g128-asym", "9.0", "weight-only", "machete"),
        # Formats that left: the release decides.
        ("vllm", "bnb-nf4", "8.9", "none", None),
        ("vllm==0.27.1", "bnb-nf4", "8.9", "weight-only", "bitsandbytes-4bit"),
        ("vllm==0.28", "bnb-nf4", "8.9", "none", None),
        ("vllm==0.27", "llm.int8", "8.9", "native", "bitsandbytes-int8"),
        ("vllm", "gguf-q4_k_m", "8.9", "none", None),
        ("vllm==0.23", "gguf-q4_k_m", "8.9", "weight-only", "gguf"),
        ("vllm==0.24", "gguf-q4_k_m", "8.9", "none", None),
        # Block FP8: CUTLASS from Hopper on; on Ada Marlin came before Triton with 0.29.
        ("vllm", "rtn-fp8-b128-afp8", "9.0", "native", "cutlass-fp8-block"),
        ("vllm", "rtn-fp8-b128-afp8", "8.9", "weight-only", "marlin-fp8-block"),
        ("vllm==0.28", "rtn-fp8-b128-afp8", "8.9", "native", "triton-fp8-block"),
        ("vllm", "rtn-fp8-b128-afp8", "8.6", "weight-only", "marlin-fp8"),
        ("vllm", "rtn-fp8-gch", "9.0", "weight-only", "marlin-fp8-w8a16"),
        # The loader knows one MXFP4: inputs are rounded too where the GPU can.
        ("vllm", "mxfp4", "8.0", "weight-only", "marlin-mxfp4"),
        ("vllm", "mxfp4", "7.5", "none", None),
        ("vllm", "mxfp4", "10.0", "none", None),
        ("vllm", "mxfp4-amxfp4", "10.0", "native", "flashinfer-mxfp4"),
        ("vllm", "mxfp4-amxfp4", "9.0", "weight-only", "marlin-mxfp4"),
        ("vllm", "mxfp8-amxfp8", "12.0", "native", "flashinfer-mxfp8"),
        ("vllm", "mxfp8", "7.5", "weight-only", "marlin-mxfp8"),
        ("vllm", "nvfp4-anvfp4", "10.0", "native", "cutlass-nvfp4"),
        ("vllm", "nvfp4-anvfp4", "9.0", "weight-only", "marlin-nvfp4"),
        ("vllm", "llm.int8", "7.0", "none", None),
        ("vllm", "hqq-int4-g64-asym", "8.9", "none", None),
        # Marlin alone is left for GPTQ, from sm_80 on.
        ("sglang", "gptq-int4-g128-sym", "7.5", "none", None),
        ("sglang==0.5.19", "gptq-int4-g128-sym", "7.5", "weight-only", "gptq-gemm"),
        ("sglang==0.5.19", "gptq-int3-g128-sym", "8.0", "weight-only", "gptq-gemm"),
        ("sglang", "gptq-int3-g128-sym", "8.0", "none", None),
        ("sglang", "gptq-int4-g128-asym", "8.0", "weight-only", "marlin"),
        ("sglang", "gptq-int4-g128-sym-afp8", "9.0", "none", None),
        ("sglang", "smoothquant-int8-gch-sym-aint8", "7.5", "none", None),
        ("sglang", "smoothquant-int8-gch-sym-aint8", "8.0", "native", "int8-scaled-mm"),
        ("sglang", "nvfp4-anvfp4", "10.0", "native", "flashinfer-nvfp4"),
        ("sglang", "nvfp4-anvfp4", "9.0", "weight-only", "marlin-nvfp4"),
        ("sglang==0.5.21", "nvfp4-anvfp4", "9.0", "none", None),
        ("sglang", "mxfp4", "9.0", "none", None),
        ("sglang", "rtn-fp8-b128-afp8", "8.6", "none", None),
        ("tensorrt-llm", "gptq-int4-g128-sym", "7.5", "none", None),
        # W4A16 is not listed for Blackwell.
        ("tensorrt-llm", "awq-int4-g128-asym", "9.0", "weight-only", "w4a16"),
        ("tensorrt-llm", "awq-int4-g128-asym", "10.0", "none", None),
        ("tensorrt-llm", "rtn-fp8-gch-afp8", "8.9", "none", None),
        ("tensorrt-llm", "rtn-fp8-gtensor-afp8", "8.9", "native", "fp8"),
        ("transformers", "bnb-nf4", "6.1", "weight-only", "bitsandbytes-4bit"),
        ("transformers", "llm.int8", "7.0", "none", None),
        ("transformers", "rtn-int8-gch-sym-aint8", "8.0", "emulated", "decompressed"),
        # Without a release it is the one that Advisor brings along, not the newest.
        ("transformers", "rtn-int5-g32-asym", "8.0", "emulated", "decompressed-asymmetric"),
        ("transformers==5.22", "rtn-int5-g32-asym", "8.0", "emulated", "decompressed-asymmetric"),
        ("transformers==5.23", "rtn-int5-g32-asym", "8.0", "none", None),
        ("transformers==5.24", "rtn-int5-g32-sym", "8.0", "emulated", "decompressed"),
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
        ("vllm", "gptq-int4-g16-sym", "weight-only", "cpu-wna16"),
        ("vllm", "gptq-int4-g64-sym-actorder", "weight-only", "cpu-wna16"),
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


def test_formats_that_left_are_named_with_their_release_and_the_way_back():
    found = verdict("vllm", parse_scheme("bnb-nf4"), nvidia("8.9"), ())
    assert found.reason == (
        "vLLM 0.32 reads no bitsandbytes checkpoint since release 0.28 (it is in the plugin "
        "vllm-bnb-plugin now): for an older server use --engine vllm==0.27"
    )
    assert "pull request 43529" in found.source
    assert "new in release 0.24, this is 0.23" in str(
        verdict("vllm==0.23", parse_scheme("gptq-int4-g128-sym"), nvidia("8.0"), ()).rejected
    )
    on_blackwell = verdict("vllm", parse_scheme("mxfp4"), nvidia("10.0"), ())
    assert "runs up to sm_99, this GPU is sm_100 (from sm_100 on the loader" in on_blackwell.reason


def test_act_order_goes_where_a_release_reads_it():
    ordered = parse_scheme("gptq-int4-g128-sym-actorder")
    assert format_for("vllm", ordered) == "compressed-tensors"
    assert format_for("vllm==0.29", ordered) == "gptq"
    assert format_for("vllm", parse_scheme("gptq-int4-gch-sym-actorder")) == "gptq"


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("vllm==0.22", "read from releases 0.23 to 0.32, but got 0.22"),
        ("vllm==0.33.1", "read from releases 0.23 to 0.32, but got 0.33.1"),
        ("vllm==new", "a release is digits and dots, but got 'new'"),
        ("llama.cpp==1", "the rules of llama.cpp tell no releases apart"),
        ("vlm==0.27", "unknown engine 'vlm==0.27'.*Did you mean 'vllm'"),
    ],
)
def test_releases_that_no_rule_knows(engine, words):
    with pytest.raises(InputError, match=words):
        load_engine(engine)


def test_a_patch_release_has_the_rules_of_its_minor():
    assert load_engine("vllm==0.32.4").label == "vLLM 0.32.4"
    assert load_engine("vllm").label == "vLLM 0.32"


def test_an_engine_may_mean_another_release_than_the_newest():
    usual = load_engine("transformers")
    assert (usual.name, usual.label) == ("transformers", "transformers 5.17")
    newest = load_engine("transformers==5.24")
    assert (newest.name, newest.label) == ("transformers==5.24", "transformers 5.24")


def test_every_rejected_kernel_is_named_with_its_reasons():
    found = verdict("vllm", parse_scheme("gptq-int4-g128-sym-afp8"), nvidia("8.9"), ())
    assert "needs exactly sm_90, this GPU is sm_89" in found.reason
    assert {entry.kernel for entry in found.rejected} >= {"cutlass-w4a8", "machete", "marlin"}
    assert all(entry.reasons and entry.source for entry in found.rejected)


def test_what_each_of_several_devices_holds_decides():
    # Qwen2.5-72B's intermediate size is 231 groups of 128: two devices would cut one in half.
    spec = load_modelspec("Qwen/Qwen2.5-72B")
    scheme = parse_scheme("gptq-int4-g128-sym")
    one, two = find_profile("h100-sxm"), find_profile("2x h100-sxm")
    assert verdict("vllm", scheme, one, spec.linears).support == "weight-only"
    found = verdict("vllm", scheme, two, spec.linears)
    assert found.support == "none"
    assert "in_features=29568, of which each device gets 14784); use group size 64" in found.reason
    assert verdict("vllm", parse_scheme("gptq-int4-g64-sym"), two, spec.linears).name
    # llama.cpp gives whole layers to devices, so that nothing is cut.
    whole = verdict("llama.cpp", parse_scheme("gguf-q4_k_m"), two, spec.linears)
    assert whole == verdict("llama.cpp", parse_scheme("gguf-q4_k_m"), one, spec.linears)
    offered = mixture_options("vllm", two, spec.linears)
    cut = {m.name for m in spec.linears if m.name.endswith("down_proj")}
    assert offered.unfit[parse_scheme("gptq-int4-g128-asym")] == cut
    assert not offered.unfit.get(parse_scheme("gptq-int4-g64-asym"))


def test_documentation_and_code_are_both_kept():
    found = verdict("vllm", parse_scheme("gptq-int4-g128-sym"), nvidia("7.5"), ())
    assert "not on Turing" in (found.conflict or "")
    assert "decided by the code" in (found.conflict or "")


def test_a_shape_moves_only_the_module_it_concerns():
    linears = (linear("a", 4096, 4096), linear("b", 4096, 4096), linear("odd", 4096, 4104))
    found = verdict("vllm", parse_scheme("gptq-int4-g128-sym"), nvidia("8.9"), linears)
    assert found.name == "marlin"
    assert [(module.name, module.kernel) for module in found.modules] == []  # padded
    found = verdict("vllm==0.23", parse_scheme("gptq-int4-g128-sym"), nvidia("8.9"), linears)
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
    of_transformers = {s.weight for s in mixture_options("transformers", CPU).schemes}
    assert {"int2", "int3", "int4", "int5", "int8"} <= of_transformers
    newest = mixture_options("transformers==5.24", CPU).schemes
    assert not [str(s) for s in newest if s.symmetric is False]
    narrow = (linear("a", 576, 200), linear("b", 576, 576))
    found = verdict("vllm", parse_scheme("rtn-int4-g64-sym"), CPU, narrow)
    assert found.kept_16bit == ("a",)
    assert "out_features % 32" in found.reason
    with pytest.raises(InputError, match="mixed bit widths"):
        mixture_options("tensorrt-llm", nvidia("9.0"))


def test_vllm_on_cpus_runs_no_quantized_experts():
    """Seen without AMX: "No WNA16 MoE backend supports the deployment configuration"."""
    scheme = parse_scheme("rtn-int4-g32-sym")
    dense = linear("q", 256, 256)
    few = replace(linear("experts.0.w1", 256, 128), is_expert=True)
    found = verdict("vllm", scheme, CPU, (dense, few))
    assert (found.support, found.kept_16bit) == ("weight-only", ("experts.0.w1",))
    assert "cpu-wna16 runs no experts of a mixture" in found.reason
    # Of the same shape, most of them experts.
    many = [replace(linear(f"experts.{i}.w1", 256, 256), is_expert=True) for i in range(4)]
    refused = verdict("vllm", scheme, CPU, (dense, *many))
    assert refused.support == "none"
    assert "4 of 5 modules fit no kernel" in refused.reason
    assert verdict("vllm", scheme, nvidia("8.9"), (dense, *many)).kept_16bit == ()
    options = mixture_options("vllm", CPU, (dense, *many))
    assert parse_scheme("gptq-int4-g32-sym") not in options.schemes


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
