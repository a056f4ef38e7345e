"""Find the blocks and the quantizable linears of a loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.errors import InputError, join_errors
from advisor.models.architectures import Architecture, get_architecture
from advisor.modelspec import LinearSpec

if TYPE_CHECKING:
    from torch import nn


def architecture_of(model: nn.Module) -> Architecture:
    """Return the layout of a loaded model.

    Raises:
        InputError: The model's class is unknown.
    """
    return get_architecture(type(model).__name__)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks, in execution order."""
    return list(model.get_submodule(architecture_of(model).blocks).children())


def find_linears(model: nn.Module) -> tuple[LinearSpec, ...]:
    """Return every quantizable linear, in execution order.

    Raises:
        InputError: The architecture is unknown, or a block lacks a linear of its layout.
    """
    architecture = architecture_of(model)
    linears: list[LinearSpec] = []
    problems: list[str] = []
    for index, block in enumerate(find_blocks(model)):
        prefix = f"{architecture.blocks}.{index}"
        modules = dict(block.named_modules())
        for part in architecture.parts:
            weight = getattr(modules.get(part.name), "weight", None)
            if weight is None or weight.ndim != 2:
                problems.append(f"{prefix} has no linear named {part.name!r}.")
                continue
            linears.append(
                LinearSpec(
                    name=f"{prefix}.{part.name}",
                    in_features=weight.shape[1],
                    out_features=weight.shape[0],
                    block=index,
                    input_group=f"{prefix}.{part.input_group}",
                    fused_group=f"{prefix}.{part.fused_group}",
                )
            )
    if problems:
        name = type(model).__name__
        raise InputError(
            join_errors(problems) + f" The layout of {name} is not the one that this version knows."
        )
    return tuple(linears)


def block_linears(linears: tuple[LinearSpec, ...], block: int) -> tuple[LinearSpec, ...]:
    """Return the linears of one block, in execution order."""
    return tuple(linear for linear in linears if linear.block == block)
