"""Settings: how a method searches for its codes, beside what the scheme already decides."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from advisor.errors import InputError

SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_COARSEST = 0.05
"""Of a scale, that rounding may change: bfloat16 changes it by 0.004 at most."""
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True, slots=True)
class QuantizationSettings:
    """Settings of the quantizers; each method reads those it knows.

    Attributes:
        damping: GPTQ, GGUF, micro-scaled types, NF4: added to H's diagonal, as a fraction of its
            mean; in (0, 1].
        column_block: GPTQ: columns updated at once; results do not depend on it beyond rounding.
        static_groups: GPTQ: work in activation order, but keep groups of consecutive inputs with
            scales chosen beforehand; for schemes that are not ``actorder`` themselves.
        descent: Methods with damping: passes of coordinate descent over codes and scales (of GGUF
            blocks: all fields) afterwards; 0 for none.
        descent_damping: Methods with damping: as ``damping``, for these passes; in (0, 1].
        output_feedback: Methods with damping: how far off-diagonals of the output gradients' second
            moment are believed, in [0, 1]: rows make up for each other's errors
            (:mod:`advisor.methods.coupled`); 0 for independent rows.
        output_damping: Methods with damping: added to that moment's diagonal, as a fraction of its
            mean; above 0.
        clip: Search a smaller range per group that lowers the error (``mse``: of the weights,
            weighted by what each of their errors costs), keep the whole range (``none``), or
            search under GPTQ alone (``gptq``: plans', resolved before a method is called).
        clip_shrink: Smallest share of the range that the clip search tries at 2 bits, less far from
            1 at more; in (0, 1].
        clip_steps: Number of ranges tried.
        scale_steps: AWQ: number of exponents tried in [0, 1].
        smoothing: SmoothQuant: migration strength alpha in [0, 1].
        sequential: Fit each block to the inputs that the quantized blocks before it give, not to
            those of the unquantized model (see :mod:`advisor.search.sequential`).
        correction: Sequential: how far weights are moved, before they are quantized, towards those
            that make up for the quantized blocks before them; in [0, 1].
        correction_damping: Sequential: regularisation of that fit, as a fraction of the mean
            diagonal of the inputs' second moment; above 0.
        calibration_mix: Whose inputs codes are fitted to, where the calibration text has several
            sources: ``given``, ``equal``, or ``only SOURCE`` (:mod:`advisor.calibration.mixing`).
        rotation: Of the residual stream, folded into all weights: ``none`` or ``hadamard``
            (:mod:`advisor.models.rotation`).
        rotation_seed: Of that rotation.
        scale_dtype: Data type in which scales are stored; codes are chosen with rounded scales.
    """

    damping: float = 0.01
    column_block: int = 128
    static_groups: bool = False
    descent: int = 0
    descent_damping: float = 0.05
    output_feedback: float = 0.0
    output_damping: float = 0.1
    clip: str = "none"
    clip_shrink: float = 0.5
    clip_steps: int = 20
    scale_steps: int = 20
    smoothing: float = 0.5
    sequential: bool = False
    correction: float = 0.3
    correction_damping: float = 0.1
    calibration_mix: str = "given"
    rotation: str = "none"
    rotation_seed: int = 0
    scale_dtype: str = "bfloat16"

    def round_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """Return float32 scales as they will be read back from the checkpoint."""
        return scales.to(SCALE_DTYPES[self.scale_dtype]).to(torch.float32)

    def store_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """Return float32 scales as they will be read back, none of them lost.

        Scales a million times smaller than the largest may be: their weights are nothing beside
        the others. Those too large come back infinite.

        Args:
            scales: float32, not negative.

        Raises:
            InputError: The data type is too coarse for scales that small.
        """
        stored = self.round_scales(scales)
        missed = (stored - scales).abs() > _COARSEST * scales
        missed &= stored.isfinite() & (scales > _NEGLIGIBLE * scales.max())
        if bool(missed.any()):
            others = [name for name in SCALE_DTYPES if name not in (self.scale_dtype, "float16")]
            raise InputError(
                f"{self.scale_dtype} is too coarse for {int(missed.sum())} of {scales.numel()} "
                f"scales (smallest: {float(scales[missed].min()):.1e}). "
                f"Use scale_dtype {' or '.join(others)}."
            )
        return stored

    def to_dict(self) -> dict[str, object]:
        """Return the settings by name, as the plan holds them."""
        return asdict(self)
