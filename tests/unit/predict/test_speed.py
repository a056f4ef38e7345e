"""Speed: the signs and the orders that published measurements show."""

from __future__ import annotations

import pytest

from advisor.hardware.catalogue import find_profile
from advisor.hardware.profile import HardwareProfile
from advisor.predict.advise import predict
from advisor.predict.models import load_modelspec
from advisor.schemes import parse_scheme


@pytest.fixture(scope="module")
def llama():
    return load_modelspec("meta-llama/Llama-3.1-8B")


def candidate(spec, scheme, gpu, engine, batch=1, context=1024):
    hardware = gpu if isinstance(gpu, HardwareProfile) else find_profile(gpu)
    return predict(
        spec, parse_scheme(scheme), hardware, engine, batch=batch, context=context
    ).candidate


def decode(spec, scheme, gpu, engine, batch=1):
    return candidate(spec, scheme, gpu, engine, batch).speed.decode.expected


def test_the_engine_matters_more_than_the_method(llama):
    speeds = {
        engine: [decode(llama, s, "a100-sxm-80", engine) for s in ("bf16", "gptq-int4-g128-sym")]
        for engine in ("transformers", "vllm")
    }
    assert max(speeds["transformers"]) < min(speeds["vllm"])
    assert speeds["transformers"][1] == pytest.approx(speeds["transformers"][0], rel=0.3)
    assert speeds["vllm"][1] > 1.4 * speeds["vllm"][0]


def test_bitsandbytes_is_slower_on_an_h100_and_faster_on_a_small_card(llama):
    large = [candidate(llama, s, "h100-sxm", "transformers") for s in ("bnb-nf4", "llm.int8")]
    assert large[0].speedup == pytest.approx(30.14 / 40.99, rel=0.15)
    assert large[1].speedup == pytest.approx(12.24 / 40.99, rel=0.25)
    assert candidate(llama, "bnb-nf4", "rtx3060-12", "transformers").speedup > 1.2


def test_weight_only_int8_loses_at_a_large_batch(llama):
    assert candidate(llama, "rtn-int8-gch-sym", "h100-sxm", "vllm").speedup > 1.1
    assert candidate(llama, "rtn-int8-gch-sym", "h100-sxm", "vllm", 128).speedup == pytest.approx(
        0.65, abs=0.12
    )
    assert candidate(llama, "rtn-fp8-gch-afp8", "h100-sxm", "vllm", 128).speedup > 1.05


def test_int8_tensor_cores_pay_in_prefill(llama):
    int8, weight_only, sixteen = (
        candidate(llama, scheme, "a100-sxm-80", "vllm", context=4096).speed.prefill.expected
        for scheme in ("smoothquant-int8-gch-sym-aint8", "rtn-int8-gch-sym", "bf16")
    )
    assert int8 > 1.3 * sixteen
    assert weight_only < sixteen


def test_no_int4_rate_drives_weight_only_speed(llama):
    # The A100 has 1248 INT4 TOPS; W4A16 computes in 16 bits.
    four = candidate(llama, "gptq-int4-g128-sym", "a100-sxm-80", "vllm", context=4096)
    sixteen = candidate(llama, "bf16", "a100-sxm-80", "vllm", context=4096)
    assert four.speed.prefill.expected <= sixteen.speed.prefill.expected


def test_16_bits_are_read_at_full_speed_where_float16_arithmetic_is_slow(llama):
    """A P40 has 0.18 TFLOPS in float16 and 11.8 in float32, in which engines multiply there."""
    plain = candidate(llama, "bf16", "p40", "llama.cpp", batch=1, context=128).speed
    assert plain.bound == "memory"
    read = find_profile("p40").bandwidth_gb_s / (2e-9 * llama.parameters)
    assert 0.6 * read < plain.decode.expected < 1.1 * read
    ratio = decode(llama, "gguf-q4_0", "p40", "llama.cpp") / plain.decode.expected
    assert 2 < ratio < 4  # of the bytes


def test_an_interval_holds_its_middle_and_words_say_the_bound(llama):
    speed = candidate(llama, "bf16", "l4", "vllm").speed
    assert speed.decode.low < speed.decode.expected < speed.decode.high
    assert speed.bound == "memory"
    assert "memory-bound" in speed.words


def test_decode_is_slower_with_a_longer_context(llama):
    short, long = (
        candidate(llama, "bf16", "a100-sxm-80", "vllm", context=c).speed.decode.expected
        for c in (1024, 65536)
    )
    assert long < 0.8 * short


def test_unknown_bandwidth_is_said_not_guessed(llama):
    cpu = HardwareProfile(id="x", name="Some CPU", vendor="AMD", kind="cpu",
                          instruction_sets=("avx2",))  # fmt: skip
    found = candidate(llama, "bf16", cpu, "transformers")
    assert found.speed.decode is None
    assert found.speedup is None
    assert "not known" in found.speed.words
    assert found.to_dict()["decode_tokens_per_s"] is None


@pytest.mark.parametrize("gpu", [
    "cpu-arm-server-8ch", "cpu-avx2-ddr5-2ch", "cpu-avx2-ddr4-2ch", "cpu-icx-8ch", "cpu-spr-8ch",
    "cpu-apple-m1",
])  # fmt: skip
@pytest.mark.parametrize("model", ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"])
def test_gguf_is_faster_than_16_bits_on_every_cpu(model, gpu):
    """Decoding waits for memory there; a guess at arithmetic once said 0.75 times on ARM."""
    spec = load_modelspec(model)
    gains = [
        candidate(spec, name, gpu, "llama.cpp").speedup
        for name in ("gguf-q8_0", "gguf-q4_k_m")
    ]  # fmt: skip
    assert 1.3 < gains[0] < gains[1] < 4
