"""The largest context and batch that fit are the edge of what fits."""

from __future__ import annotations

from advisor.predict.ladder import largest_batch, largest_context
from advisor.predict.memory import serving_memory
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.schemes import parse_scheme

GIB = 2**30


def test_largest_context_and_batch_are_the_edge():
    llama = load_modelspec("meta-llama/Llama-3.1-8B")
    gptq = checkpoint_size(llama, parse_scheme("gptq-int4-g128-sym"), "gptq")
    limit = 10 * GIB
    context = largest_context(llama, gptq, "vllm", limit)
    assert serving_memory(llama, gptq, "vllm", context, 1).total <= limit
    assert serving_memory(llama, gptq, "vllm", context + 16, 1).total > limit
    batch = largest_batch(llama, gptq, "vllm", limit, 4096)
    assert serving_memory(llama, gptq, "vllm", 4096, batch).total <= limit
    assert serving_memory(llama, gptq, "vllm", 4096, batch + 1).total > limit
    assert largest_context(llama, gptq, "vllm", 4 * GIB) == 0
    assert largest_context(llama, gptq, "vllm", 10**15) == 131072  # what the model was made for
