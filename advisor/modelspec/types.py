"""The values: tensors, linears, attention layers and the model that holds them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

TensorRole = Literal["embedding", "head", "linear", "bias", "norm", "other"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the 16-bit checkpoint.

    Attributes:
        name: Name in the checkpoint, for example ``model.layers.0.mlp.up_proj.weight``.
        shape: Its shape, as stored.
        role: What it is; only ``linear`` tensors are quantized by default.
        block: Index of the transformer block, or None outside the blocks.
        width: Bytes of each element in the model's files; 2 where those were not read.
    """

    name: str
    shape: tuple[int, ...]
    role: TensorRole
    block: int | None = None
    width: int = 2

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


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
class AttentionLayer:
    """What one block keeps of every token while serving.

    Attributes:
        elements_per_token: Numbers cached per token: keys and values of every KV head, or the
            latent of multi-head latent attention, which has no heads.
        window: Tokens kept at most (sliding-window attention); None keeps the whole context.
        kv_heads: KV heads, which tensor parallelism splits; 1 for a latent, which it copies.
        is_latent: Whether the cache is a latent (DeepSeek's multi-head latent attention).
        expanded_elements: Numbers per token in an engine that caches the keys and values of every
            head instead of the latent; 0 where there is no latent.
    """

    elements_per_token: int
    window: int | None
    kv_heads: int
    is_latent: bool = False
    expanded_elements: int = 0


@dataclass(frozen=True, slots=True)
class ShapeClass:
    """Quantizable linears of one shape, counted together.

    Attributes:
        in_features: Length of an input row.
        out_features: Length of an output row.
        is_expert: Whether they are experts of a mixture.
        count: How many there are.
        name_characters: Sum of the lengths of their names, for file headers.
        first: Name of the first, for messages.
    """

    in_features: int
    out_features: int
    is_expert: bool
    count: int
    name_characters: int
    first: str


@dataclass(frozen=True)
class ModelSpec:
    """A language model's identity, configuration and tensors.

    Attributes:
        id: What the user named: folder, Hugging Face id or catalogue id.
        architecture: ``architectures[0]`` of config.json, for example ``LlamaForCausalLM``.
        config: config.json as it is (for multimodal models, also with ``text_config``).
        tensors: Every tensor of the model, the head of a tied model not counted.
        linears: Every quantizable linear, in execution order.
        tied_embeddings: Whether the head is the embedding.
        dtype: Stored data type of the checkpoint, for example ``bfloat16``.
        source: Where the shapes came from: ``config``, ``safetensors`` or ``catalogue``.
        attention: What each block caches while serving; empty where unknown.
        stored_untied: Whether the publisher's file stores a tied head a second time.
        experts_per_token: Experts that one token visits in a mixture, else 0.
        experts: Routed experts of each mixture block, else 0.
    """

    # Not slotted: the summaries below are computed once per model, on first use.
    id: str
    architecture: str
    config: Mapping[str, Any]
    tensors: tuple[TensorSpec, ...]
    linears: tuple[LinearSpec, ...]
    tied_embeddings: bool
    dtype: str
    source: str
    attention: tuple[AttentionLayer, ...] = ()
    stored_untied: bool = False
    experts_per_token: int = 0
    experts: int = 0

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, a tied head counted once."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @cached_property
    def quantizable_parameters(self) -> int:
        """Number of weights of the quantizable linears."""
        return sum(kind.in_features * kind.out_features * kind.count for kind in self.shape_classes)

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token reads: of a mixture, only the routed share of the experts."""
        experts = sum(
            kind.in_features * kind.out_features * kind.count
            for kind in self.shape_classes
            if kind.is_expert
        )
        if not self.experts:
            return self.parameters
        return self.parameters - experts + experts * self.experts_per_token // self.experts

    @cached_property
    def shape_classes(self) -> tuple[ShapeClass, ...]:
        """The linears, counted by shape: mixtures have tens of thousands of equal ones."""
        counted: dict[tuple[int, int, bool], list[Any]] = {}
        for linear in self.linears:
            key = (linear.in_features, linear.out_features, linear.is_expert)
            entry = counted.setdefault(key, [0, 0, linear.name])
            entry[0] += 1
            entry[1] += len(linear.name)
        return tuple(ShapeClass(*key, *entry) for key, entry in counted.items())

    @cached_property
    def unquantized_tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor that no linear owns: embeddings, norms, biases, routers, vision towers."""
        return tuple(tensor for tensor in self.tensors if tensor.role != "linear")

    @cached_property
    def widths(self) -> Mapping[str, int]:
        """Bytes of each element of the tensors that are not in 16 bits, by name."""
        return {tensor.name: tensor.width for tensor in self.tensors if tensor.width != 2}

    @cached_property
    def inner_width(self) -> int:
        """Widest set of vectors per token inside a block, of a mixture those of its own experts.

        One and a half times the outputs of the linears that read one input: the gate's and the
        up-projection's vectors are both there while their product, half as wide, is made.
        """
        groups: dict[tuple[int, str], float] = {}
        ends = {self.linears[0].block, self.linears[-1].block} if self.linears else set()
        for linear in self.linears:
            if linear.block not in ends:
                continue
            if linear.is_expert and self.experts:
                key = (linear.block, linear.fused_group)
                width = linear.out_features * self.experts_per_token / self.experts
            else:
                key, width = (linear.block, linear.input_group), float(linear.out_features)
            groups[key] = groups.get(key, 0.0) + width
        return math.ceil(1.5 * max(groups.values(), default=0.0))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """Configuration of the language model, inside a multimodal one or the whole."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @cached_property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        config = self.text_config
        return int(config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 0)

    @cached_property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return next((t.shape[0] for t in self.tensors if t.role == "embedding"), 0)

    @property
    def longest_context(self) -> int | None:
        """Positions that the model was made for; None where the config does not say.

        Reference: vLLM ``config/model.py`` (``_get_and_verify_max_len``): scaled rotary embeddings
        reach further than ``max_position_embeddings``, unless that counts the scaling already.
        """
        config = self.text_config
        value = config.get("max_position_embeddings") or config.get("n_positions")
        if not value:
            return None
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        kind, factor = rope.get("rope_type") or rope.get("type"), float(rope.get("factor") or 1)
        if kind == "yarn":
            value = rope.get("original_max_position_embeddings") or value
        elif kind not in ("linear", "dynamic") or "gemma3" in str(config.get("model_type")):
            factor = 1.0
        return int(value * factor)

    @cached_property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return 1 + max((linear.block for linear in self.linears), default=-1)
