"""What each engine adds to the weights while serving: figures, and how far to trust them."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.engines.releases import engine_name
from advisor.errors import InputError, did_you_mean

MIB = 2**20


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """One engine's habits.

    Attributes:
        context_bytes: Driver context, libraries and allocator slack on a GPU.
        graph_bytes: CUDA graphs and persistent buffers.
        prefill_chunk: Tokens of one prefill step, over all sequences; None: whole prompts.
        kv_block: Tokens that a sequence's cache is rounded up to.
        logit_bytes: Bytes per vocabulary entry of one sampled row.
        logit_rows: Rows of logits at least, whatever the batch.
        window_slack: Tokens a sliding-window layer keeps beyond its window.
        slides: Whether sliding-window layers keep only their window in ``all`` models, or only in
            models that mix them with full layers (``mixed``).
        latent: Whether multi-head latent attention is cached as its latent.
        sources: Where the figures come from.
    """

    context_bytes: int
    graph_bytes: int
    prefill_chunk: int | None
    kv_block: int
    logit_bytes: int
    logit_rows: int
    window_slack: int
    slides: str
    latent: bool
    sources: tuple[str, ...]


ENGINES: dict[str, EngineMemory] = {
    "vllm": EngineMemory(
        context_bytes=500 * MIB,
        graph_bytes=600 * MIB,
        prefill_chunk=2048,
        kv_block=16,
        # FP32 logits and probabilities, sorted copies and int64 indices: with 256 rows and Llama
        # 3's vocabulary 0.79 GB, most of the 1.2 GiB that its start-up profile prints.
        logit_bytes=24,
        logit_rows=1,
        window_slack=2048,
        slides="all",
        latent=True,
        sources=(
            "vLLM documentation: chunked prefill, max_num_batched_tokens 2048, blocks of 16",
            "assumption: CUDA context 0.5 GiB, graphs 0.6 GiB (enforce_eager saves the latter)",
        ),
    ),
    "sglang": EngineMemory(
        context_bytes=500 * MIB,
        graph_bytes=800 * MIB,
        prefill_chunk=4096,
        kv_block=1,
        logit_bytes=16,
        logit_rows=1,
        window_slack=4096,
        slides="mixed",
        latent=True,
        sources=(
            "SGLang documentation: chunked_prefill_size by GPU memory, 2048 to 8192; pages of 1",
            "assumption: CUDA context 0.5 GiB, graphs 0.8 GiB",
        ),
    ),
    "transformers": EngineMemory(
        context_bytes=500 * MIB,
        graph_bytes=0,
        prefill_chunk=None,
        kv_block=1,
        logit_bytes=12,
        logit_rows=1,
        window_slack=0,
        slides="all",
        latent=False,
        sources=(
            "transformers documentation: DynamicCache, sliding layers keep their window",
            "assumption: CUDA context and libraries 0.5 GiB; logits of the last token only",
        ),
    ),
    "llama.cpp": EngineMemory(
        context_bytes=300 * MIB,
        graph_bytes=0,
        prefill_chunk=512,
        kv_block=256,
        logit_bytes=4,
        logit_rows=512,
        window_slack=512,
        slides="mixed",
        latent=True,
        sources=(
            "llama.cpp: ubatch 512, cache padded to 256, compute buffer with 512 rows of logits",
            "assumption: CUDA context 0.3 GiB",
        ),
    ),
    "tensorrt-llm": EngineMemory(
        context_bytes=500 * MIB,
        graph_bytes=600 * MIB,
        prefill_chunk=8192,
        kv_block=32,
        logit_bytes=12,
        logit_rows=1,
        window_slack=0,
        slides="all",
        latent=True,
        sources=(
            "TensorRT-LLM documentation: max_num_tokens 8192, 32 tokens per cache block",
            "assumption: CUDA context 0.5 GiB, engine and graph buffers 0.6 GiB",
        ),
    ),
}

CPU_CONTEXT_BYTES = 150 * MIB
"""Assumption: interpreter and libraries where no GPU takes part."""

PARALLEL_BYTES = 256 * MIB
"""Assumption: communication buffers of each GPU under tensor parallelism."""

KV_BYTES_PER_ELEMENT: dict[str, float] = {
    "16-bit": 2.0, "bf16": 2.0, "fp16": 2.0, "auto": 2.0, "fp8": 1.0, "int8": 1.0,
    "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32, "q4_0": 18 / 32,
}  # fmt: skip
"""Bytes of one cached number, block scales included (llama.cpp's ``--cache-type-k``)."""


def engine_memory(engine: str) -> EngineMemory:
    """Return an engine's habits.

    Raises:
        InputError: Unknown engine.
    """
    name = engine_name(engine)
    if name not in ENGINES:
        raise InputError(
            f"unknown engine {engine!r}.{did_you_mean(engine, ENGINES)} "
            f"Known: {', '.join(ENGINES)}."
        )
    return ENGINES[name]


def kv_bytes_per_element(dtype: str) -> float:
    """Return the bytes of one cached number.

    Raises:
        InputError: Unknown data type of the cache.
    """
    if dtype not in KV_BYTES_PER_ELEMENT:
        raise InputError(
            f"unknown KV cache data type {dtype!r}.{did_you_mean(dtype, KV_BYTES_PER_ELEMENT)} "
            f"Known: {', '.join(KV_BYTES_PER_ELEMENT)}."
        )
    return KV_BYTES_PER_ELEMENT[dtype]
