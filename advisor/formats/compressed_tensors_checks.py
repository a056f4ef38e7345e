"""What a module of a compressed-tensors checkpoint must hold, by its config group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.formats import compressed_tensors_microscaled as microscaled
from advisor.formats.base import check_single, check_tensor, first_fault
from advisor.formats.compressed_tensors_config import MICROSCALED, PACKED

if TYPE_CHECKING:
    from advisor.formats.base import Stored
    from advisor.schemes import Scheme


def check_module(
    name: str, scheme: Scheme, kind: str, stored: Stored, asymmetric: bool
) -> list[str]:
    """Return the faults of one module's tensors."""
    if scheme.weight in MICROSCALED:
        return microscaled.check(name, scheme, stored)
    main = "weight_packed" if kind == PACKED else "weight"
    header = stored.headers.get(f"{name}.{main}")
    if header is None or len(header.shape) != 2:
        return [f"{name} has no {main}: the tensor '{name}.{main}' is missing."]
    out_features, in_features = header.shape
    bits = int(scheme.bits)
    wrong: list[str | None] = []
    if kind == PACKED:
        if wrong_shape := check_tensor(stored, name, "weight_shape", (2,), ("I64", "I32")):
            return [wrong_shape]
        shape = stored.load(f"{name}.weight_shape").tolist()
        words = -(-shape[1] * bits // 32)
        wrong.append(check_tensor(stored, name, main, (shape[0], words), ("I32",)))
        out_features, in_features = shape
    else:
        expected = ("I8",) if scheme.is_integer else ("F8_E4M3",)
        wrong.append(check_tensor(stored, name, main, header.shape, expected))
    if scheme.granularity == "group" and in_features % int(scheme.group_size or 1):
        return [
            f"{name}: group_size={scheme.group_size} does not divide in_features={in_features}."
        ]
    scales = _scale_shape(scheme, out_features, in_features)
    if scheme.granularity == "tensor":
        wrong.append(check_single(stored, name, "weight_scale"))
    else:
        wrong.append(check_tensor(stored, name, "weight_scale", scales))
    if scheme.static_activation:
        wrong.append(check_single(stored, name, "input_scale"))
        if asymmetric:
            wrong.append(check_single(stored, name, "input_zero_point", ("I8",)))
    if kind == PACKED and not scheme.symmetric:
        zeros = (-(-out_features * bits // 32), scales[1])
        wrong.append(check_tensor(stored, name, "weight_zero_point", zeros, ("I32",)))
    elif scheme.is_integer and not scheme.symmetric:
        wrong.append(check_tensor(stored, name, "weight_zero_point", scales, ("I8",)))
    elif f"{name}.weight_zero_point" in stored.headers:
        wrong.append(f"{name}: config.json says symmetric, but there is a weight_zero_point.")
    return first_fault(wrong, f"config.json says {scheme}")


def _scale_shape(scheme: Scheme, out_features: int, in_features: int) -> tuple[int, ...]:
    """Return the shape of ``weight_scale``."""
    if scheme.granularity == "tensor":
        return (1,)
    if scheme.granularity == "channel":
        return (out_features, 1)
    size = int(scheme.group_size or 1)
    if scheme.granularity == "block":
        return (-(-out_features // size), -(-in_features // size))
    return (out_features, in_features // size)
