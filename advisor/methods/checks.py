"""Checks before any costly work: shapes, group sizes, finite values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.errors import InputError, join_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from advisor.calibration.statistics import LayerStatistics
    from advisor.schemes import Scheme

_USUAL_GROUP_SIZES = (128, 64, 32, 16)
_SMALL, _LOST = 1e-3, 0.2
"""Below what magnitude weights are judged, and what share of their squares may be lost: a type of
two bits loses an eighth of a weight that it can store."""


def group_width(scheme: Scheme, in_features: int) -> int:
    """Return the number of inputs that share a scale: the group size, or all of them."""
    return int(scheme.group_size or 1) if scheme.granularity == "group" else in_features


def check_group_sizes(shapes: Mapping[str, tuple[int, int]], schemes: Sequence[Scheme]) -> None:
    """Check that every group size divides the inputs of every module.

    Args:
        shapes: (out_features, in_features) by module name.
        schemes: The schemes that each of the modules will be quantized to.

    Raises:
        InputError: Lists each group size and in_features that do not go together, how many
            modules they concern, the first of them, and sizes that would do.
    """
    complaints: list[str] = []
    for size in dict.fromkeys(s.group_size for s in schemes if s.granularity == "group"):
        if size is None:
            continue
        offenders: dict[int, list[str]] = {}
        for name, (_, in_features) in shapes.items():
            if in_features % size:
                offenders.setdefault(in_features, []).append(name)
        for in_features, names in offenders.items():
            fitting = [str(s) for s in _USUAL_GROUP_SIZES if in_features % s == 0]
            advice = "Use one scale per channel (-gch)."
            if fitting:
                advice = f"Use --group-size {' or '.join(fitting[:2])}."
            where = f"{len(names)} module{'s' if len(names) > 1 else ''}"
            complaints.append(
                f"group_size must divide in_features, but got group_size={size} for {where} with "
                f"in_features={in_features} (first: {names[0]}). {advice}"
            )
    if complaints:
        raise InputError(join_errors(complaints))


def prepare_weight(weight: Tensor, schemes: Sequence[Scheme]) -> Tensor:
    """Return a weight as float32 after checking it against the schemes.

    Args:
        weight: Shape [out, in], any floating type; not modified, and possibly returned as it is.
        schemes: What it will be quantized to.

    Raises:
        InputError: It is not a matrix of finite numbers, or a group size does not divide.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise InputError(
            "a weight is a floating point matrix [out_features, in_features], "
            f"but got {weight.dtype} of shape {list(weight.shape)}."
        )
    check_group_sizes({"this weight": (weight.shape[0], weight.shape[1])}, schemes)
    values = weight.detach().to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise InputError("the weight has values that are not finite: the checkpoint is damaged.")
    return values


def refuse_lost(values: Tensor, found: Callable[[], Tensor], why: str, advice: str) -> None:
    """Reject weights so small that rounding to the nearest loses most of them.

    Args:
        values: float32 [out, in].
        found: Returns what the nearest codes stand for; asked only where weights are small.
        why: What a type cannot store, for the message.
        advice: The next step.

    Raises:
        InputError: More than a fifth of the squared weights is missed, and all are below 1e-3.
    """
    largest = float(values.abs().amax())
    if not 0 < largest < _SMALL:
        return
    # In double: squares of weights below 1e-19 leave float32's range.
    missed, whole = (part.double().square().sum() for part in (found() - values, values))
    if float(missed) > _LOST * float(whole):
        raise InputError(
            f"{why}, but the largest weight here is {largest:.1e}, and {float(missed / whole):.0%} "
            f"of the squared weights would be lost. {advice}"
        )


def require_statistics(
    statistics: LayerStatistics | None, in_features: int, method: str
) -> LayerStatistics:
    """Return the statistics, or say that the method cannot do without them.

    Raises:
        InputError: There are none, they count no tokens, or are of another number of inputs.
    """
    if statistics is None:
        raise InputError(
            f"{method} needs calibration statistics, but got none. Use rtn or collect."
        )
    if statistics.tokens < 1:
        raise InputError(
            f"{method} needs at least one calibration token, but the statistics have 0."
        )
    if tuple(statistics.second_moment.shape) != (in_features, in_features):
        raise InputError(
            f"the statistics are of {statistics.second_moment.shape[0]} inputs, "
            f"but the weight has {in_features}."
        )
    return statistics
