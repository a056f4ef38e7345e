"""Textbook twin of HQQ's solver, from the article: float64, one group at a time, explicit loops.

Badri and Shaji (2023), section "Half-quadratic solver": the loss is the sum of |W - Q|^p with p
below 1, split with W_e; W_e is its proximal step (a generalised soft threshold), z the mean of
W_q - (W - W_e) / s; beta grows by kappa.
"""

from __future__ import annotations

P, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20


def threshold(error: float, beta: float) -> float:
    """Generalised soft threshold: sign(x) relu(|x| - |x|^(p - 1) / beta)."""
    if error == 0:
        return 0.0
    kept = max(abs(error) - abs(error) ** (P - 1) / beta, 0.0)
    return kept if error > 0 else -kept


def encode(group, scale: float, zero: float, levels: int) -> list[int]:
    """Codes: round(w / s + z), clamped."""
    return [min(max(round(value / scale + zero), 0), levels) for value in group]


def zero_points(group, levels: int, steps: int = STEPS) -> tuple[float, list[tuple[float, float]]]:
    """Scale of the range, and every iterate of the zero point with its mean squared error."""
    low, high = min(group), max(group)
    scale = (high - low) / levels
    zero, beta, found = -low / scale, BETA, []
    for _ in range(steps):
        codes = encode(group, scale, zero, levels)
        errors = [value - (code - zero) * scale for value, code in zip(group, codes, strict=True)]
        found.append((zero, sum(error * error for error in errors) / len(errors)))
        kept = [threshold(error, beta) for error in errors]
        zero = sum(
            code - (value - part) / scale
            for value, code, part in zip(group, codes, kept, strict=True)
        ) / len(group)
        beta *= KAPPA
    return scale, found
