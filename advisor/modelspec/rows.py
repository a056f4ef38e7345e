"""Rows of the table of architectures: which modules a block has, and their shapes by name.

A size is a name of :func:`advisor.modelspec.dimensions.dimensions` ("hidden", "queries", ...), or
several joined by "+". A flag is a key of config.json, with the family's default; "yes" is always
true, "" never, and a leading "!" negates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

RowKind = Literal["linear", "conv1d", "embedding", "norm", "router", "parameter", "stacked"]


@dataclass(frozen=True, slots=True)
class Row:
    """One module (or bare parameter) of a table.

    Attributes:
        path: Path below the block, or the whole path outside the blocks.
        kind: ``linear`` stores [out, in], ``conv1d`` [in, out]; ``stacked`` is a parameter that
            holds one matrix [in, out] per expert; ``router`` and ``parameter`` stay 16-bit.
        sizes: For matrices (in, out), otherwise the shape.
        bias: Flag: whether there is a bias.
        reads: Suffix of the input group; the path itself where empty.
        fused: Suffix of the group that engines fuse; the path itself where empty.
        when: Flag: whether the row exists at all.
    """

    path: str
    kind: RowKind
    sizes: tuple[str, ...]
    bias: str = ""
    reads: str = ""
    fused: str = ""
    when: str = "yes"


def linear(
    path: str,
    inputs: str,
    outputs: str,
    bias: str = "",
    reads: str = "",
    fused: str = "",
    when: str = "yes",
) -> Row:
    """Return a row of a quantizable matrix."""
    return Row(path, "linear", (inputs, outputs), bias, reads, fused, when)


def norm(path: str, size: str = "hidden", bias: str = "", when: str = "yes") -> Row:
    """Return a row of a normalisation."""
    return Row(path, "norm", (size,), bias, when=when)


@dataclass(frozen=True, slots=True)
class Family:
    """One row per architecture: its modules in execution order.

    Attributes:
        architectures: Names in ``architectures`` of config.json.
        attention: Rows of the attention, norms included.
        mlp: Rows of a dense feed-forward part.
        moe: Rows of a mixture's feed-forward part beside its experts.
        expert: Rows of one expert; paths hold ``{expert}``.
        before: Rows before the blocks: the embeddings.
        after: Rows after the blocks, without the head.
        blocks: Path of the list of blocks.
        head: Path of the head.
        head_bias: Flag of the head's bias.
        tied: Default of ``tie_word_embeddings``.
        flags: Defaults of the flags that are keys of config.json.
        grouped: Whether ``num_key_value_heads`` means anything.
        keys: Name in this config of what is elsewhere called otherwise.
        required: Keys that have no default.
    """

    architectures: tuple[str, ...]
    attention: tuple[Row, ...]
    mlp: tuple[Row, ...] = ()
    moe: tuple[Row, ...] = ()
    expert: tuple[Row, ...] = ()
    before: tuple[Row, ...] = (Row("model.embed_tokens", "embedding", ("vocabulary", "hidden")),)
    after: tuple[Row, ...] = (norm("model.norm"),)
    blocks: str = "model.layers"
    head: str = "lm_head"
    head_bias: str = ""
    tied: bool = False
    flags: Mapping[str, bool] = field(default_factory=dict)
    grouped: bool = True
    keys: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "intermediate_size",
    )


def attention(qkv_bias: str = "", output_bias: str = "", output: str = "o_proj") -> tuple[Row, ...]:
    """Return the rows of a grouped-query attention with separate projections."""
    group = {"reads": "self_attn.qkv", "fused": "self_attn.qkv_proj"}
    return (
        linear("self_attn.q_proj", "hidden", "queries", qkv_bias, **group),
        linear("self_attn.k_proj", "hidden", "keys", qkv_bias, **group),
        linear("self_attn.v_proj", "hidden", "values", qkv_bias, **group),
        linear(f"self_attn.{output}", "queries", "hidden", output_bias),
    )


def gated(
    path: str = "mlp",
    size: str = "intermediate",
    bias: str = "",
    when: str = "yes",
    reads: str = "",
) -> tuple[Row, ...]:
    """Return the rows of a gated feed-forward part (gate, up, down).

    ``reads`` names the input group where it is not the part's own: in parallel blocks attention
    and feed-forward read the same normalised input.
    """
    group = {"reads": reads or f"{path}.gate_up", "fused": f"{path}.gate_up_proj", "when": when}
    return (
        linear(f"{path}.gate_proj", "hidden", size, bias, **group),
        linear(f"{path}.up_proj", "hidden", size, bias, **group),
        linear(f"{path}.down_proj", size, "hidden", bias, when=when),
    )


def experts(
    path: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Row, ...]:
    """Return the rows of one expert of a mixture."""
    # An expert reads only the tokens routed to it, so each has an input group of its own; engines
    # stack all of a block's experts into one kernel, so they share one scheme.
    inside = f"{path}.experts.{{expert}}"
    group = {"reads": f"{inside}.gate_up", "fused": f"{path}.experts"}
    return (
        linear(f"{inside}.{gate}", "hidden", "expert", **group),
        linear(f"{inside}.{up}", "hidden", "expert", **group),
        linear(f"{inside}.{down}", "expert", "hidden", fused=f"{path}.experts"),
    )


LLAMA_NORMS = (norm("input_layernorm"), norm("post_attention_layernorm"))
QK_NORMS = (norm("self_attn.q_norm", "head"), norm("self_attn.k_norm", "head"))
