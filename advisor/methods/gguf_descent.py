"""Coordinate descent on the codes and the fields of GGUF blocks, each the best for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.methods.descent_steps import Work, choose_codes
from advisor.methods.gguf_state import SMALLEST_FACTOR

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.methods.descent_steps import Couplings
    from advisor.methods.gguf_state import BlockState

_SHIFTS = (0, -3, -2, -1, 1, 2, 3)
"""Distances at which other whole numbers are tried as a group's scale."""


def descend_blocks(weight: Tensor, state: BlockState, couplings: Couplings, passes: int) -> None:
    """Lower tr((W - Q) H (W - Q)ᵀ) in place, block by block.

    Of every block first the factors take their best values for codes and whole numbers as they
    are; then of every group in turn the scale and the minimum, and the code of each column. What a
    file cannot hold is rounded, and kept only if the error falls.

    Args:
        weight: W, float32 [columns, rows].
        state: Changed.
        couplings: Of a damped H, for the state's groups.
        passes: Times over all columns.

    Reference: CDQuant, arXiv:2406.17542, section 3; see :func:`advisor.methods.descent.descend`.
    """
    size, width = state.kind.weights, state.kind.width
    groups = size // width
    error = weight - state.weight()
    work = Work(width, weight, couplings.blocks)
    for _ in range(passes):
        for block in range(len(state.d)):
            span = slice(block * size, (block + 1) * size)
            distance = couplings.shares[span] @ error
            _refit_factors(state, distance, couplings, block)
            for place in range(groups):
                group = block * groups + place
                columns = slice(group * width, (group + 1) * width)
                ahead = distance[place * width :]
                if state.kind.scale_levels:
                    _refit_group(state, ahead, couplings, group)
                work.distance.copy_(ahead[:width])
                choose_codes(state.codes, couplings, work, group, columns)
                if columns.stop < span.stop:
                    fallen = work.fallen * state.codes.scales[group]
                    far = couplings.shares[columns.stop : span.stop, columns]
                    ahead[width:].addmm_(far, fallen)
            torch.sub(weight[span], state.values(block), out=error[span])


def _refit_factors(state: BlockState, distance: Tensor, couplings: Couplings, block: int) -> None:
    """Move ``d`` and ``dmin`` of a block to where the error is least, as far as float16 has it.

    Args:
        state: Changed.
        distance: The rows of ``couplings.shares`` times the error, of the block's columns, float32
            [weights, rows]; kept up to date.
        couplings: Of all columns.
        block: Which one.
    """
    kind = state.kind
    groups = kind.weights // kind.width
    span = slice(block * groups, (block + 1) * groups)
    columns = slice(block * kind.weights, (block + 1) * kind.weights)
    shares, diagonal = couplings.shares[columns, columns], couplings.diagonal[columns]
    up = state.codes.steps[columns] * state.s[span].repeat_interleave(kind.width, 0)
    up_moved, weighted = shares @ up, up * diagonal
    aa, ar = (weighted * up_moved).sum(0), (weighted * distance).sum(0)
    old = state.d[block]
    if state.dmin is None:
        rise = _rounded(old, ar / aa.clamp_min(1e-30), positive=False) - old
        gain = 2 * rise * ar - rise.square() * aa
        rise = torch.where(gain > 0, rise, torch.zeros_like(rise))
    else:
        down = -state.m[span].repeat_interleave(kind.width, 0)
        down_moved = shares @ down
        bb, br = (down * diagonal * down_moved).sum(0), (down * diagonal * distance).sum(0)
        ab = (weighted * down_moved).sum(0)
        determinant = aa * bb - ab.square()
        solvable = determinant > 1e-6 * aa * bb
        safe = torch.where(solvable, determinant, torch.ones_like(determinant))
        first = torch.where(solvable, (bb * ar - ab * br) / safe, ar / aa.clamp_min(1e-30))
        second = torch.where(solvable, (aa * br - ab * ar) / safe, torch.zeros_like(br))
        positive = kind.scale_levels > 0
        rise = _rounded(old, first, positive=positive) - old
        sink = _rounded(state.dmin[block], second, positive=positive) - state.dmin[block]
        gain = 2 * (rise * ar + sink * br)
        gain = gain - rise.square() * aa - sink.square() * bb - 2 * rise * sink * ab
        rise, sink = (torch.where(gain > 0, part, torch.zeros_like(part)) for part in (rise, sink))
        state.dmin[block] += sink
        distance.addcmul_(down_moved, -sink)
    state.d[block] = old + rise
    state.codes.scales[span] = state.s[span] * state.d[block]
    distance.addcmul_(up_moved, -rise)


def _rounded(old: Tensor, change: Tensor, *, positive: bool) -> Tensor:
    """Return a changed factor in float16, not zero, the old one where it is out of range."""
    wanted = old + change
    found = wanted.clamp(-65504, 65504).to(torch.float16).float()
    usable = wanted.isfinite() & (found.abs() >= SMALLEST_FACTOR)
    if positive:
        usable &= found > 0
    return torch.where(usable, found, old)


def _refit_group(state: BlockState, distance: Tensor, couplings: Couplings, group: int) -> None:
    """Move a group's scale and minimum to the whole numbers of least error near them.

    For the scale and its neighbours, the minimum that goes best with each is rounded.

    Args:
        state: Changed.
        distance: The rows of ``couplings.shares`` times the error, of the group's columns and of
            the block's columns after them, float32 [columns, rows]; kept up to date.
        couplings: Of all columns.
        group: Which one.
    """
    kind = state.kind
    width, levels = kind.width, kind.scale_levels
    first = group * width
    shares = couplings.shares[first : first + len(distance), first : first + width]
    diagonal = couplings.diagonal[first : first + width]
    steps = state.codes.steps[first : first + width]
    d, s, m = state.d[first // kind.weights], state.s[group], state.m[group]
    moved, weighted = shares @ steps, steps * diagonal
    qq, qr = (weighted * moved[:width]).sum(0), (weighted * distance[:width]).sum(0)
    ones_moved = shares.sum(1, keepdim=True)
    pull, across = ((diagonal * part[:width]).sum(0) for part in (distance, moved))
    curve = (diagonal * ones_moved[:width]).sum()
    dmin = None if state.dmin is None else state.dmin[first // kind.weights]
    low, high = (1, levels) if kind.has_minimum else (-levels, levels - 1)
    ideal = torch.round(qr / (d * qq).where(qq > 0, torch.ones_like(qq)))
    best, best_shift, best_sink = (torch.zeros_like(s) for _ in range(3))
    for wanted in (ideal, *(torch.full_like(s, float(shift)) for shift in _SHIFTS)):
        new = (s + wanted).clamp(low, high)
        new = torch.where(new == 0, s, new)
        change = d * (new - s)
        # What the error falls by: 2 c·(q·H·E) - c²·(q·H·q) for the scale, the minimum on top of it.
        gain = 2 * change * qr - change.square() * qq
        sink = torch.zeros_like(s)
        if dmin is not None:
            left = pull - change * across
            sink = torch.round(m - left / (dmin * curve).clamp_min(1e-30)).clamp(0, levels) - m
            sink = torch.where(dmin > 0, sink, torch.zeros_like(sink))
            gain = gain - 2 * dmin * sink * left - (dmin * sink).square() * curve
        better = gain > best
        best = torch.where(better, gain, best)
        best_shift = torch.where(better, new - s, best_shift)
        best_sink = torch.where(better, sink, best_sink)
    state.s[group] = s + best_shift
    state.codes.scales[group] = state.s[group] * d
    distance.addcmul_(moved, -(d * best_shift))
    if dmin is not None:
        state.m[group] = m + best_sink
        distance.addcmul_(ones_moved, dmin * best_sink)
