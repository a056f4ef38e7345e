"""Memory while serving: the cache to the byte, and the differences between engines."""

from __future__ import annotations

import pytest

from advisor.errors import InputError
from advisor.predict.memory import (
    Serving,
    kv_cache_bytes,
    serving_memory,
)
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.schemes import parse_scheme

GIB = 2**30


@pytest.fixture(scope="module")
def llama():
    return load_modelspec("meta-llama/Llama-3.1-8B")


@pytest.fixture(scope="module")
def gptq(llama):
    return checkpoint_size(llama, parse_scheme("gptq-int4-g128-sym"), "gptq")


def test_cache_of_grouped_query_attention(llama):
    # 32 layers x 8 KV heads x 128 x 2 (keys, values) x 2 bytes = 131072 bytes per token.
    assert kv_cache_bytes(llama, Serving("vllm"), 8192, 1) == GIB
    assert kv_cache_bytes(llama, Serving("vllm"), 1, 1) == 16 * 131072  # whole blocks of 16
    assert kv_cache_bytes(llama, Serving("vllm", kv_dtype="fp8"), 8192, 4) == 2 * GIB
    assert kv_cache_bytes(llama, Serving("transformers"), 100, 3) == 300 * 131072


def test_cache_of_latent_attention():
    spec = load_modelspec("deepseek-ai/DeepSeek-V3")
    latent = kv_cache_bytes(spec, Serving("vllm"), 4096, 1)
    assert latent == 61 * (512 + 64) * 2 * 4096
    # transformers caches keys (192) and values (128) of all 128 heads.
    expanded = kv_cache_bytes(spec, Serving("transformers"), 4096, 1)
    assert expanded == 61 * 128 * (192 + 128) * 2 * 4096
    # A latent has no heads to split: every device keeps it whole.
    assert kv_cache_bytes(spec, Serving("vllm", tensor_parallel=8), 4096, 1) == latent


def test_sliding_windows_bound_the_cache():
    spec = load_modelspec("google/gemma-3-1b-it")
    per_token = 2 * 256 * 2  # one KV head
    full = sum(layer.window is None for layer in spec.attention)
    expected = per_token * (full * 32768 + (26 - full) * 512)
    assert kv_cache_bytes(spec, Serving("transformers"), 32768, 1) == expected
    mistral = load_modelspec("mistralai/Mistral-7B-v0.1")
    # llama.cpp has no sliding cache for models whose layers all slide.
    ratio = kv_cache_bytes(mistral, Serving("llama.cpp"), 32768, 1) / kv_cache_bytes(
        mistral, Serving("transformers"), 32768, 1
    )
    assert ratio == 8


def test_tensor_parallelism_splits_weights_and_heads(llama, gptq):
    one = serving_memory(llama, gptq, "vllm", 8192, 1)
    four = serving_memory(llama, gptq, Serving("vllm", tensor_parallel=4), 8192, 1)
    sixteen = serving_memory(llama, gptq, Serving("vllm", tensor_parallel=16), 8192, 1)
    assert four.weights == pytest.approx(one.weights / 4, rel=0.001)
    assert four.kv_cache == one.kv_cache // 4
    assert sixteen.kv_cache == one.kv_cache // 8  # only 8 heads to share out
    assert four.overhead > one.overhead


def test_weights_in_memory_that_are_not_the_file(llama):
    packed = checkpoint_size(llama, parse_scheme("rtn-int4-g128-sym"), "compressed-tensors")
    plain = checkpoint_size(llama, parse_scheme("bf16"), "safetensors")
    inflated = serving_memory(llama, packed, "transformers", 1024, 1)
    assert inflated.weights == plain.weight_bytes
    assert "decompresses" in inflated.notes[0]
    assert serving_memory(llama, packed, "vllm", 1024, 1).weights == packed.weight_bytes
    gguf = checkpoint_size(llama, parse_scheme("gguf-q4_k_m"), "gguf")
    on_gpu = serving_memory(llama, gguf, "llama.cpp", 1024, 1)
    assert on_gpu.weights == gguf.weight_bytes - gguf.embedding_bytes


def test_chunked_prefill_bounds_activations(llama, gptq):
    def activations(serving, context):
        return serving_memory(llama, gptq, serving, context, 1).activations

    assert activations("vllm", 4096) == activations("vllm", 65536)
    whole = activations(Serving("vllm", prefill_chunk=0), 65536)
    assert whole > 10 * activations("vllm", 65536)
    assert activations("transformers", 65536) > 10 * activations("transformers", 4096)


def test_bad_requests(llama, gptq):
    with pytest.raises(InputError, match="Did you mean 'vllm'"):
        serving_memory(llama, gptq, "vlm", 1, 1)
    with pytest.raises(InputError, match="at least 1"):
        serving_memory(llama, gptq, "vllm", 0, 1)
    with pytest.raises(InputError, match="KV cache data type"):
        Serving("vllm", kv_dtype="fp7")
