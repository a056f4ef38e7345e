"""Fold a rescaling of a linear's inputs into whatever produces them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.errors import InputError
from advisor.models.inspect import architecture_of, config_of, find_linears
from advisor.modelspec.architectures import BY_ARCHITECTURE
from advisor.modelspec.dimensions import read_dimensions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from advisor.modelspec import LinearSpec


@dataclass(frozen=True, slots=True)
class Folding:
    """An input group whose channels can be rescaled without changing the model's function.

    Attributes:
        input_group: The group, as in ``LinearSpec.input_group``.
        producer: Module whose output channels are the group's inputs.
        producer_kind: ``norm`` or ``linear``.
        linears: Every linear that reads the group; all must be scaled together.
        norm_offset: What the norm adds to its stored weight (1 in Gemma).
        rows: Rows (start, stop) of a linear producer that make these channels; None for all.
    """

    input_group: str
    producer: str
    producer_kind: str
    linears: tuple[str, ...]
    norm_offset: float = 0.0
    rows: tuple[int, int] | None = None


def foldable_groups(model: nn.Module) -> tuple[Folding, ...]:
    """Return the input groups whose scales fold into their producer, in execution order.

    The output projection of attention is left out where several query heads share a value head:
    its inputs then are copies of the value channels, and only equal scales would fold. Groups that
    a block does not have (the dense part of a mixture) are left out too.
    """
    architecture = architecture_of(model)
    content, name = config_of(model), type(model).__name__
    dimensions = read_dimensions(content, BY_ARCHITECTURE[name], f"the configuration of {name}")
    folds = [fold for fold in architecture.folds if dimensions.flag(fold.when)]
    members: dict[str, list[LinearSpec]] = {}
    blocks = 0
    for linear in find_linears(model):
        members.setdefault(linear.input_group, []).append(linear)
        blocks = max(blocks, linear.block + 1)
    foldings = []
    for index in range(blocks):
        prefix = f"{architecture.blocks}.{index}"
        for fold in folds:
            for expert in range(dimensions.experts if "{expert}" in fold.input_group else 1):
                group = f"{prefix}.{fold.input_group.format(expert=expert)}"
                if group not in members:
                    continue
                size = members[group][0].in_features
                part = fold.part
                foldings.append(
                    Folding(
                        input_group=group,
                        producer=f"{prefix}.{fold.producer.format(expert=expert)}",
                        producer_kind=fold.kind,
                        linears=tuple(linear.name for linear in members[group]),
                        norm_offset=architecture.norm_offset if fold.kind == "norm" else 0.0,
                        rows=None if part is None else (part * size, (part + 1) * size),
                    )
                )
    return tuple(foldings)


def fold_scales(
    tensors: Mapping[str, Tensor], folding: Folding, scales: Tensor
) -> dict[str, Tensor]:
    """Multiply a group's weight columns by scales and divide their producer by them.

    Args:
        tensors: Tensors by name (``<module>.weight``, ``<module>.bias``), at least those of the
            folding's linears and its producer; not modified.
        folding: What to fold.
        scales: Positive scale of every input channel, shape [in].

    Returns:
        New tensors under the names they replace, in the data types they had. The linears' biases
        do not change; the producer's bias is divided too.

    Raises:
        InputError: A scale is not positive and finite.
    """
    names = folded_tensors(folding, producer_has_bias=f"{folding.producer}.bias" in tensors)
    # A producer may itself be a member of another group that was folded before: the caller passes
    # the current tensors, so foldings compose in any order.
    return {name: fold_tensor(name, tensors[name], folding, scales) for name in names}


def folded_tensors(folding: Folding, *, producer_has_bias: bool) -> tuple[str, ...]:
    """Return the names of the tensors that a folding changes."""
    names = [f"{name}.weight" for name in (*folding.linears, folding.producer)]
    if producer_has_bias:
        names.append(f"{folding.producer}.bias")
    return tuple(names)


def fold_tensor(name: str, tensor: Tensor, folding: Folding, scales: Tensor) -> Tensor:
    """Return one of the tensors that a folding changes, as :func:`fold_scales` would.

    Args:
        name: Its name: the weight of one of the folding's linears, or a tensor of its producer.
        tensor: Its current value; not modified.
        folding: What to fold.
        scales: Positive scale of every input channel, shape [in].

    Raises:
        InputError: A scale is not positive and finite.
    """
    if not bool((scales > 0).all() and scales.isfinite().all()):
        raise InputError(f"scales of {folding.input_group} must be positive and finite.")
    factors = scales.float().to(tensor.device)
    module = name.rpartition(".")[0]
    if module in folding.linears:
        return (tensor.float() * factors).to(tensor.dtype)
    if folding.producer_kind == "norm":
        offset = 0.0 if name.endswith(".bias") else folding.norm_offset
        return ((tensor.float() + offset) / factors - offset).to(tensor.dtype)
    start, stop = folding.rows or (0, tensor.shape[0])
    scaled = tensor.float().clone()
    scaled[start:stop] /= factors if name.endswith(".bias") else factors[:, None]
    return scaled.to(tensor.dtype)
