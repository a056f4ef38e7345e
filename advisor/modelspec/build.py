"""From a configuration to every tensor, linear and attention layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError, did_you_mean
from advisor.modelspec.architectures import BY_ARCHITECTURE
from advisor.modelspec.dimensions import (
    Dimensions,
    attention_layers,
    in_block,
    is_mixture_block,
    read_dimensions,
)
from advisor.modelspec.types import LinearSpec, ModelSpec, TensorRole, TensorSpec
from advisor.modelspec.vision import vision_tensors

if TYPE_CHECKING:
    from advisor.modelspec.rows import Family, Row

_ROLES: dict[str, TensorRole] = {
    "linear": "linear",
    "conv1d": "linear",
    "stacked": "linear",
    "embedding": "embedding",
    "norm": "norm",
    "router": "other",
    "parameter": "other",
}
_BARE = frozenset({"e_score_correction_bias", "sinks"})
"""Parameters stored under their own path, without ``.weight``."""


def known_architectures() -> tuple[str, ...]:
    """Return the architectures whose tensors are known, sorted."""
    return tuple(sorted(BY_ARCHITECTURE))


def build_modelspec(
    config: Mapping[str, Any],
    *,
    model_id: str,
    source: str = "config",
    where: str = "config.json",
    stored_untied: bool = False,
) -> ModelSpec:
    """Compute a model's tensors from its configuration.

    Args:
        config: config.json; multimodal ones hold the language model in ``text_config``.
        model_id: What the user named.
        source: ``config`` or ``catalogue``.
        where: File that the config came from, for messages.
        stored_untied: Whether the publisher's file repeats a tied head.

    Raises:
        InputError: Unknown architecture, or keys that are missing or are not sizes.
    """
    architecture, text, family = language_model(config, where)
    dimensions = read_dimensions(text, family, where)
    tensors: list[TensorSpec] = []
    linears: list[LinearSpec] = []
    wrapper = "language_model." if text is not config else ""
    for row in family.before:
        tensors.extend(_outside(row, dimensions))
    for block in range(dimensions.blocks):
        prefix = f"{family.blocks}.{block}."
        rows, expert_rows = _rows(text, family, dimensions, block)
        own = in_block(text, dimensions, block)
        for row in rows:
            _add(row, prefix, block, own, tensors, linears)
        _add_experts(expert_rows, prefix, block, dimensions, tensors, linears)
    for row in family.after:
        tensors.extend(_outside(row, dimensions))
    tensors.extend(_head(family, dimensions))
    if wrapper:
        tensors = [TensorSpec(wrapper + t.name, t.shape, t.role, t.block) for t in tensors]
        linears = [_wrapped(linear, wrapper) for linear in linears]
        tensors.extend(vision_tensors(config, where))
    return ModelSpec(
        id=model_id,
        architecture=architecture,
        config=config,
        tensors=tuple(tensors),
        linears=tuple(linears),
        tied_embeddings=dimensions.tied,
        dtype=stored_dtype(config),
        source=source,
        attention=attention_layers(text, family, dimensions),
        stored_untied=stored_untied,
        experts_per_token=int(text.get("num_experts_per_tok") or 0) if dimensions.experts else 0,
        experts=dimensions.experts,
    )


def language_model(config: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any], Family]:
    """Return the architecture's name, the language model's config and its family.

    Raises:
        InputError: No architecture is named, or none that is known.
    """
    names = config.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise InputError(
            f"{where} names no architecture. It must hold a list such as "
            '"architectures": ["LlamaForCausalLM"].'
        )
    name = names[0]
    text = config.get("text_config")
    if isinstance(text, Mapping):
        inner = text.get("architectures") or [name]
        family = BY_ARCHITECTURE.get(name) or BY_ARCHITECTURE.get(str(inner[0]))
        if family is not None:
            return name, text, family
    elif name in BY_ARCHITECTURE:
        return name, config, BY_ARCHITECTURE[name]
    raise InputError(
        f"unknown architecture {name!r} in {where}.{did_you_mean(name, BY_ARCHITECTURE)} "
        f"Known: {', '.join(known_architectures())}."
    )


def stored_dtype(config: Mapping[str, Any]) -> str:
    """Return the checkpoint's data type; ``bfloat16`` where the config does not say."""
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    for place in (config, inner):
        for key in ("torch_dtype", "dtype"):
            if isinstance(value := place.get(key), str):
                return value.removeprefix("torch.")
    return "bfloat16"


def _rows(
    config: Mapping[str, Any], family: Family, dimensions: Dimensions, block: int
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Return a block's rows, and the rows of each of its experts."""
    if is_mixture_block(config, family, dimensions.experts, block):
        return (*family.attention, *family.moe), family.expert
    return (*family.attention, *family.mlp), ()


def _add_experts(
    rows: tuple[Row, ...],
    prefix: str,
    block: int,
    dimensions: Dimensions,
    tensors: list[TensorSpec],
    linears: list[LinearSpec],
) -> None:
    """Append every expert's matrices: tens of thousands, so that all is computed once per row."""
    plans = []
    for row in rows:
        inputs, outputs = (dimensions.size(size) for size in row.sizes)
        head, tail = (prefix + row.path).split("{expert}")
        group = row.reads.rpartition("{expert}")[2] or tail
        plans.append((head, tail, inputs, outputs, group, prefix + row.fused))
    for expert in range(dimensions.experts):
        for head, tail, inputs, outputs, group, fused in plans:
            name = f"{head}{expert}{tail}"
            reads = f"{head}{expert}{group}"
            tensors.append(TensorSpec(name + ".weight", (outputs, inputs), "linear", block))
            linears.append(LinearSpec(name, inputs, outputs, block, reads, fused, True))


def _add(
    row: Row,
    prefix: str,
    block: int,
    dimensions: Dimensions,
    tensors: list[TensorSpec],
    linears: list[LinearSpec],
) -> None:
    """Append one row's tensors and linears."""
    if not dimensions.flag(row.when):
        return
    path = prefix + row.path
    sizes = tuple(dimensions.size(size) for size in row.sizes)
    if row.kind == "stacked":
        _add_stacked(row, prefix, block, dimensions.experts, sizes, tensors, linears)
        return
    shape = sizes[::-1] if row.kind in ("linear", "router") else sizes
    bare = row.path.rpartition(".")[2] in _BARE
    tensors.append(TensorSpec(path if bare else f"{path}.weight", shape, _ROLES[row.kind], block))
    if dimensions.flag(row.bias):
        tensors.append(TensorSpec(f"{path}.bias", (sizes[-1],), "bias", block))
    if row.kind in ("linear", "conv1d"):
        linears.append(
            LinearSpec(
                name=path,
                in_features=sizes[0],
                out_features=sizes[1],
                block=block,
                input_group=prefix + (row.reads or row.path),
                fused_group=prefix + (row.fused or row.path),
                is_expert=".experts." in row.path,
            )
        )


def _add_stacked(
    row: Row,
    prefix: str,
    block: int,
    experts: int,
    sizes: tuple[int, ...],
    tensors: list[TensorSpec],
    linears: list[LinearSpec],
) -> None:
    """Append a parameter that holds all experts, and one linear for each of them."""
    path = prefix + row.path
    tensors.append(TensorSpec(path, (experts, *sizes), "linear", block))
    tensors.append(TensorSpec(f"{path}_bias", (experts, sizes[1]), "bias", block))
    parent, _, projection = path.rpartition(".")
    for expert in range(experts):
        name = f"{parent}.{expert}.{projection}"
        linears.append(LinearSpec(name, sizes[0], sizes[1], block, name, parent, True))


def _outside(row: Row, dimensions: Dimensions) -> Iterator[TensorSpec]:
    if not dimensions.flag(row.when):
        return
    sizes = tuple(dimensions.size(size) for size in row.sizes)
    shape = sizes[::-1] if row.kind in ("linear", "router") else sizes
    yield TensorSpec(f"{row.path}.weight", shape, _ROLES[row.kind])
    if dimensions.flag(row.bias):
        yield TensorSpec(f"{row.path}.bias", (sizes[-1],), "bias")


def _head(family: Family, dimensions: Dimensions) -> Iterator[TensorSpec]:
    if not dimensions.tied:
        shape = (dimensions.size("vocabulary"), dimensions.size("embedding"))
        yield TensorSpec(f"{family.head}.weight", shape, "head")
    if dimensions.flag(family.head_bias):
        yield TensorSpec(f"{family.head}.bias", (dimensions.size("vocabulary"),), "bias")


def _wrapped(linear: LinearSpec, wrapper: str) -> LinearSpec:
    return LinearSpec(
        wrapper + linear.name,
        linear.in_features,
        linear.out_features,
        linear.block,
        wrapper + linear.input_group,
        wrapper + linear.fused_group,
        linear.is_expert,
    )
