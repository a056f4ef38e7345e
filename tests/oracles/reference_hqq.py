"""Textbook twins of HQQ, float64, explicit loops.

The solver is of the article by Badri and Shaji (2023), section "Half-quadratic solver": the loss is
the sum of |W - Q|^p with p below 1, split with W_e; W_e is its proximal step (a generalised soft
threshold), z the mean of W_q - (W - W_e) / s. As in the authors' library beta stays, and the mean
|W - Q| of the whole weight says when to stop.
"""

from __future__ import annotations

import numpy as np

P, BETA, STEPS = 0.7, 10.0, 20


def threshold(error: float) -> float:
    """Generalised soft threshold: sign(x) relu(|x| - |x|^(p - 1) / beta)."""
    if error == 0:
        return 0.0
    kept = max(abs(error) - abs(error) ** (P - 1) / BETA, 0.0)
    return kept if error > 0 else -kept


def encode(group, scale: float, zero: float, levels: int) -> list[int]:
    """Codes: round(w / s + z), clamped."""
    return [min(max(round(value / scale + zero), 0), levels) for value in group]


def zero_points(groups, levels: int, steps: int = STEPS):
    """Scales of the ranges and zero points of all groups of a weight, and the number of steps."""
    scales = [(max(group) - min(group)) / levels for group in groups]
    zeros = [-min(group) / scale for group, scale in zip(groups, scales, strict=True)]
    least = float("inf")
    for step in range(steps):
        total = 0.0
        for index, (group, scale) in enumerate(zip(groups, scales, strict=True)):
            codes = encode(group, scale, zeros[index], levels)
            errors = [w - (c - zeros[index]) * scale for w, c in zip(group, codes, strict=True)]
            total += sum(abs(error) for error in errors)
            shifted = [
                c - (w - threshold(e)) / scale for w, c, e in zip(group, codes, errors, strict=True)
            ]
            zeros[index] = sum(shifted) / len(shifted)
        if total >= least:
            return scales, zeros, step + 1
        least = total
    return scales, zeros, steps


def regrid(weight, codes, scales, zeros, moment):
    """Move each group's scale and zero point to the least of tr((W - Q) H (W - Q)ᵀ), codes fixed.

    Group after group: with all other groups as they are, Q is linear in (s, s z) of this one, and
    the least squares solution under the metric H follows from H's Cholesky factor.
    """
    weight, codes = np.array(weight, np.float64), np.array(codes, np.float64)
    scales, zeros = np.array(scales, np.float64), np.array(zeros, np.float64)
    width = weight.shape[1] // scales.shape[1]
    root = np.linalg.cholesky(np.array(moment, np.float64)).T
    for row in range(len(weight)):
        for group in range(scales.shape[1]):
            span = slice(group * width, (group + 1) * width)
            spread = [np.repeat(part[row], width) for part in (scales, zeros)]
            rest = weight[row] - (codes[row] - spread[1]) * spread[0]
            rest[span] = weight[row, span]
            design = np.zeros((weight.shape[1], 2))
            design[span, 0], design[span, 1] = codes[row, span], -1.0
            found, *_ = np.linalg.lstsq(root @ design, root @ rest, rcond=None)
            scales[row, group], zeros[row, group] = found[0], found[1] / found[0]
    return scales, zeros
