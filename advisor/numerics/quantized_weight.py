"""QuantizedWeight: the only thing that methods hand to formats."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.numerics.int4_fp8 import dequantize_int4_fp8

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.schemes import Scheme


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Codes of one linear's weight and all that turns them back into numbers.

    An affine weight is ``scales[o, g] * (codes[o, i] - zero_points[o, g])`` with
    ``g = group_index[i]``; a codebook weight is ``scales[o, g] * codebook[codes[o, i]]``; int4 for
    FP8 inputs is what :mod:`advisor.numerics.int4_fp8` makes of codes and scales. Values
    are exactly those that a loader of the checkpoint computes, so scales are already rounded to
    the data type they are stored in.

    Attributes:
        scheme: How the codes were made.
        codes: uint8, shape [out, in]. Integer grids count from 0: a symmetric b-bit grid has the
            constant zero point 2^(b-1) and ``zero_points`` is None. FP8 and E2M1 codes are the
            bit pattern.
        scales: float32, shape [out, groups]: groups is 1 per channel; [1, 1] per tensor; for
            blocks [ceil(out / n), ceil(in / n)].
        zero_points: uint8, shape [out, groups], or None on symmetric grids and codebooks. HQQ's are
            not integers: float32.
        group_index: int32, shape [in]: the group of each input. None means consecutive groups of
            ``in // groups``. Codes stay in the model's own column order, act-order or not.
        codebook: float32, shape [entries], or None.
        extras: State that only the scheme's own format stores (nested scales of bitsandbytes,
            global scales of NVFP4, fields of GGUF blocks). ``minimums``, float32 [out, groups],
            are subtracted at last.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None = None
    group_index: Tensor | None = None
    codebook: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return the weight with all that belongs to it on a device."""

        def moved(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device)

        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zero_points=moved(self.zero_points),
            group_index=moved(self.group_index),
            codebook=moved(self.codebook),
            extras={name: value.to(device) for name, value in self.extras.items()},
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that the codes stand for, shape [out, in]."""
        out_features, in_features = self.shape
        if self.scheme.is_integer and self.scheme.activation == "fp8":
            return dequantize_int4_fp8(self.codes, self.scales).to(dtype)
        if self.scheme.weight in ("fp8", "mxfp8"):
            values = self.codes.view(torch.float8_e4m3fn).to(torch.float32)
        elif self.codebook is not None:
            values = self.codebook[self.codes.long()]
        else:
            values = self.codes.to(torch.float32)
        if self.scheme.granularity == "tensor":
            return ((values - self._zero(values)) * self.scales).to(dtype)
        if self.scheme.granularity == "block":
            size = self.scheme.group_size or 1
            scales = self.scales.repeat_interleave(size, 0).repeat_interleave(size, 1)
            return (values * scales[:out_features, :in_features]).to(dtype)
        minimums = self.extras.get("minimums")
        if self.group_index is not None:
            index = self.group_index.long()
            scales, zeros = self.scales[:, index], self._zero(values, index)
            minimums = None if minimums is None else minimums[:, index]
        else:
            values = values.view(out_features, self.scales.shape[1], -1)
            scales, zeros = self.scales.unsqueeze(2), self._zero(values)
            zeros = zeros.unsqueeze(2) if zeros.ndim else zeros
            minimums = None if minimums is None else minimums.unsqueeze(2)
        result = values.sub_(zeros).mul_(scales)
        if minimums is not None:
            result.sub_(minimums)
        return result.view(out_features, in_features).to(dtype)

    def _zero(self, values: Tensor, index: Tensor | None = None) -> Tensor:
        """Zero point of every weight, or a scalar."""
        if not self.scheme.is_integer:
            return torch.zeros((), dtype=values.dtype, device=values.device)
        if self.zero_points is None:
            half = 2 ** (int(self.scheme.bits) - 1)
            return torch.full((), half, dtype=values.dtype, device=values.device)
        zero_points = self.zero_points.to(values.dtype)
        return zero_points if index is None else zero_points[:, index]


def split_rows(stacked: QuantizedWeight, heights: Sequence[int]) -> tuple[QuantizedWeight, ...]:
    """Undo the stacking of weights with one scale row per output channel, or one for all.

    What else a GGUF weight has, the fields of its blocks, is split as well.
    """
    if len(heights) == 1:
        return (stacked,)
    codes = torch.split(stacked.codes, list(heights))
    shared = stacked.scheme.granularity == "tensor"
    scales: Sequence[Tensor] = [stacked.scales] * len(heights)
    if not shared:
        scales = torch.split(stacked.scales, list(heights))
    zeros: Sequence[Tensor | None] = [None] * len(heights)
    if stacked.zero_points is not None:
        zeros = torch.split(stacked.zero_points, list(heights))
    extras: list[dict[str, Tensor]] = [dict(stacked.extras) for _ in heights]
    if stacked.scheme.method == "gguf":
        for name, value in stacked.extras.items():
            for own, part in zip(extras, torch.split(value, list(heights)), strict=True):
                own[name] = part.contiguous()
    return tuple(
        replace(
            stacked,
            codes=code.contiguous(),
            scales=scale.contiguous(),
            zero_points=zero,
            extras=own,
        )
        for code, scale, zero, own in zip(codes, scales, zeros, extras, strict=True)
    )
