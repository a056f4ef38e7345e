"""ModelSpec: every tensor's name and shape of a language model, without its weights (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TensorRole = Literal["embedding", "head", "linear", "bias", "norm", "other"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the 16-bit checkpoint.

    Attributes:
        name: Name in the checkpoint, for example ``model.layers.0.mlp.up_proj.weight``.
        shape: Its shape, as stored.
        role: What it is; only ``linear`` tensors are quantized by default.
        block: Index of the transformer block, or None outside the blocks.
    """

    name: str
    shape: tuple[int, ...]
    role: TensorRole
    block: int | None = None


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One quantizable matrix product.

    Attributes:
        name: Module path, for example ``model.layers.0.self_attn.q_proj``.
        in_features: Length of an input row.
        out_features: Length of an output row.
        block: Index of the transformer block.
        input_group: Key shared by the linears that read the same input (q, k and v).
        fused_group: Key shared by the linears that engines fuse, which must share a scheme
            (``model.layers.0.self_attn.qkv_proj``); the name itself where nothing is fused.
        is_expert: Whether it is one expert of a mixture, used by a part of the tokens.
    """

    name: str
    in_features: int
    out_features: int
    block: int
    input_group: str
    fused_group: str
    is_expert: bool = False

    @property
    def parameters(self) -> int:
        """Number of weights, the bias not counted."""
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A language model's identity, configuration and tensors.

    Attributes:
        id: What the user named: folder, Hugging Face id or catalogue id.
        architecture: ``architectures[0]`` of config.json, for example ``LlamaForCausalLM``.
        config: config.json as it is (for multimodal models, also with ``text_config``).
        tensors: Every stored tensor.
        linears: Every quantizable linear, in execution order.
        tied_embeddings: Whether the head is the embedding.
        dtype: Stored data type of the checkpoint, for example ``bfloat16``.
        source: Where the shapes came from: ``config``, ``safetensors`` or ``catalogue``.
    """

    id: str
    architecture: str
    config: Mapping[str, Any]
    tensors: tuple[TensorSpec, ...]
    linears: tuple[LinearSpec, ...]
    tied_embeddings: bool
    dtype: str
    source: str
