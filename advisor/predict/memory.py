"""Device memory while serving: weights, KV cache, activations and what the engine itself takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.engines.releases import engine_name
from advisor.errors import InputError
from advisor.predict.memory_data import (
    CPU_CONTEXT_BYTES,
    PARALLEL_BYTES,
    EngineMemory,
    engine_memory,
    kv_bytes_per_element,
)

if TYPE_CHECKING:
    from advisor.modelspec import AttentionLayer, ModelSpec
    from advisor.predict.size import SizeEstimate

_DECOMPRESSED = ("compressed-tensors", "gguf")
"""Formats that transformers turns into 16-bit weights before it computes."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Peak bytes on each device.

    Attributes:
        weights: Weights as the engine holds them, which may differ from the file.
        kv_cache: Keys and values of every sequence at full context.
        activations: Largest transient of a prefill step, logits included.
        overhead: Driver context, libraries, graphs, communication.
        total: Their sum.
        notes: Why the weights differ from the file, and what was assumed.
    """

    weights: int
    kv_cache: int
    activations: int
    overhead: int
    total: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, int]:
        """Return the parts by name."""
        return {
            "weights": self.weights,
            "kv_cache": self.kv_cache,
            "activations": self.activations,
            "overhead": self.overhead,
            "total": self.total,
        }


@dataclass(frozen=True, slots=True)
class Serving:
    """How the model is served.

    Attributes:
        engine: Engine's name.
        kv_dtype: Data type of the KV cache: ``16-bit``, ``fp8``, ``q8_0``, ...
        tensor_parallel: Devices that share the model.
        prefill_chunk: Tokens of one prefill step; None takes the engine's default, 0 prefills
            whole prompts.
        device: ``gpu`` or ``cpu``.
    """

    engine: str
    kv_dtype: str = "16-bit"
    tensor_parallel: int = 1
    prefill_chunk: int | None = None
    device: str = "gpu"

    def __post_init__(self) -> None:
        """Reject what cannot be served."""
        engine_memory(self.engine)
        kv_bytes_per_element(self.kv_dtype)
        if self.tensor_parallel < 1:
            raise InputError(f"tensor_parallel must be at least 1, but got {self.tensor_parallel}.")
        if self.device not in ("gpu", "cpu"):
            raise InputError(f"device must be gpu or cpu, but got {self.device!r}.")


def serving_memory(
    spec: ModelSpec,
    size: SizeEstimate,
    engine: str | Serving,
    context: int,
    batch: int,
) -> MemoryEstimate:
    """Predict the peak memory of each device.

    Args:
        spec: The model.
        size: Its checkpoint, from :func:`advisor.predict.size.checkpoint_size`.
        engine: Engine's name, or how it serves in detail.
        context: Tokens of every sequence, prompt and answer.
        batch: Sequences at once.

    Raises:
        InputError: Unknown engine, or a context or batch below 1.
    """
    serving = engine if isinstance(engine, Serving) else Serving(engine)
    if context < 1 or batch < 1:
        raise InputError(f"context and batch must be at least 1, but got {context} and {batch}.")
    data = engine_memory(serving.engine)
    weights, notes = runtime_weights(spec, size, serving)
    cache = kv_cache_bytes(spec, serving, context, batch)
    activations = activation_bytes(spec, size, serving, context, batch)
    overhead = _overhead_bytes(data, serving)
    return MemoryEstimate(
        weights=weights,
        kv_cache=cache,
        activations=activations,
        overhead=overhead,
        total=weights + cache + activations + overhead,
        notes=(*notes, *data.sources),
    )


def runtime_weights(
    spec: ModelSpec, size: SizeEstimate, serving: Serving
) -> tuple[int, tuple[str, ...]]:
    """Return the bytes of the weights on each device, and why they differ from the file."""
    total, notes = size.weight_bytes, []
    quantizable = size.quantizable_bytes
    embedding, head = size.embedding_bytes, size.head_bytes
    quantized = size.decompressed_bytes > size.weight_bytes
    if engine_name(serving.engine) == "transformers" and quantized and size.format in _DECOMPRESSED:
        total, quantizable = size.decompressed_bytes, 2 * spec.quantizable_parameters
        notes.append(
            f"transformers decompresses {size.format} weights to 16 bits at the first forward: "
            "no memory is saved."
        )
    elif engine_name(serving.engine) == "llama.cpp" and serving.device == "gpu":
        if spec.tied_embeddings:
            notes.append("llama.cpp keeps a second copy of the tied embedding in host memory.")
        else:
            total -= embedding
            embedding = 0
            notes.append("llama.cpp keeps the input embedding in host memory.")
    elif spec.tied_embeddings and head and engine_name(serving.engine) in ("vllm", "sglang"):
        total -= head
        head = 0
        notes.append("The head in the file repeats the embedding; the engine shares one copy.")
    parts = serving.tensor_parallel
    if parts > 1:
        split = quantizable + embedding + head
        total = (total - split) + math.ceil(split / parts)
        notes.append(f"Norms, routers and vision towers are on each of the {parts} devices.")
    return total, tuple(notes)


def kv_cache_bytes(spec: ModelSpec, serving: Serving, context: int, batch: int) -> int:
    """Return the bytes of the KV cache on each device.

    Raises:
        InputError: The model's attention is not known.
    """
    if not spec.attention:
        raise InputError(f"the attention of {spec.id} is not known: no KV cache can be computed.")
    data = engine_memory(serving.engine)
    width = kv_bytes_per_element(serving.kv_dtype)
    mixed = len({layer.window for layer in spec.attention}) > 1
    elements = 0.0
    for layer in spec.attention:
        tokens = _kept_tokens(layer, data, serving, context, mixed=mixed)
        elements += tokens * _elements_per_token(layer, data, serving.tensor_parallel)
    return math.ceil(elements * width) * batch


def _kept_tokens(
    layer: AttentionLayer, data: EngineMemory, serving: Serving, context: int, *, mixed: bool
) -> int:
    tokens = context
    if layer.window is not None and (data.slides == "all" or mixed):
        slack = data.window_slack
        if slack and serving.prefill_chunk:
            slack = serving.prefill_chunk
        tokens = min(context, layer.window + slack)
    return math.ceil(tokens / data.kv_block) * data.kv_block


def _elements_per_token(layer: AttentionLayer, data: EngineMemory, parts: int) -> float:
    if layer.is_latent:
        if data.latent:
            return layer.elements_per_token  # every device keeps the whole latent
        return layer.expanded_elements / parts
    heads = math.ceil(layer.kv_heads / parts)
    return layer.elements_per_token * heads / layer.kv_heads


def activation_bytes(
    spec: ModelSpec, size: SizeEstimate, serving: Serving, context: int, batch: int
) -> int:
    """Return the bytes of the largest transient of a step on each device.

    A block holds four hidden-sized vectors per token (residual, normalised, attention in and out)
    beside the larger of its attention's and its feed-forward part's inner vectors; logits are in
    FP32. Attention itself is tiled and adds nothing (FlashAttention, SDPA).
    """
    data = engine_memory(serving.engine)
    chunk = data.prefill_chunk if serving.prefill_chunk is None else serving.prefill_chunk
    tokens = context * batch
    if chunk:
        tokens = min(tokens, max(chunk, batch))
    inner = spec.inner_width / serving.tensor_parallel
    step = tokens * (4 * spec.hidden_size + inner) * 2
    rows = max(batch, min(data.logit_rows, tokens))
    logits = rows * spec.vocabulary_size * data.logit_bytes / serving.tensor_parallel
    workspace = 0
    if size.format == "bitsandbytes":
        # A matrix is dequantized whole before a product with more than a few rows.
        workspace = 2 * max(
            (kind.in_features * kind.out_features for kind in spec.shape_classes), default=0
        )
    return math.ceil(step + logits) + workspace // serving.tensor_parallel


def _overhead_bytes(data: EngineMemory, serving: Serving) -> int:
    if serving.device == "cpu":
        return CPU_CONTEXT_BYTES
    shared = PARALLEL_BYTES if serving.tensor_parallel > 1 else 0
    return data.context_bytes + data.graph_bytes + shared
