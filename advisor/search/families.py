"""Families of candidates: settings that share their scores, and the schemes each one allows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from advisor.schemes import BF16, Scheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.methods.settings import QuantizationSettings

WEIGHT_METHODS: tuple[str, ...] = ("rtn", "gptq", "awq")
"""Methods that choose integer codes for the same storage: any of them may fill one module."""
ROTATABLE: tuple[str, ...] = ("rtn", "gptq")
"""Methods that a rotation goes with: it spreads what AWQ's scales would single out."""
TABLE_METHODS: tuple[str, ...] = ("mxfp4", "mxfp8", "nvfp4", "bnb")
"""Methods that choose codes of a table of values as GPTQ chooses those of integers."""
USUAL_DAMPING = 0.15
"""Of H, for GPTQ and for its descent. On text of the calibration's kind it hardly matters, on other
text it does: SmolLM2-135M, int4 g32 asym, calibrated on 32×256 tokens of technical English, KL on
24×256 others of it and of Wikipedia, without and with feedback among outputs:

    damping 0.05   0.0427  0.0374   0.1855  0.1870
    damping 0.15   0.0427  0.0382   0.1663  0.1618
    damping 0.5    0.0454  0.0417   0.1476  0.1526

The libraries' default of 0.01 is for more tokens."""
BEST = "best"
"""Family whose modules each take the method of least score."""


@dataclass(frozen=True, slots=True)
class Family:
    """Everything of a candidate but the module's bit widths; equal families share all scores.

    Attributes:
        method: ``rtn``, ``gptq``, ``awq``, or ``best``: of the three, per fused group, the one
            of least score. ``gguf`` where block types are all there is.
        symmetric: Grid of the integer options. None: each module of a mixture takes either under
            GPTQ; of the other methods, whose scores would cost as much again, the symmetric one.
        clip: ``none`` or ``mse``: search the range of each group; of several methods also ``gptq``,
            for its codes alone.
        damping: GPTQ's damping; ignored by the others.
        activation_order: GPTQ's act-order; ignored by the others.
        static_groups: GPTQ: act-order's order of work with groups of consecutive inputs, which
            every kernel runs; ignored by the others.
        samples: Calibration sequences used (a prefix of the statistics); None for all.
        mix: Of the calibration's sources: ``given``, ``equal`` or ``only SOURCE``.
        rotation: Of the residual stream: ``none`` or ``hadamard``.
        sequential: Codes fitted to what the quantized blocks before give; scores ignore it.
    """

    method: str
    symmetric: bool | None = True
    clip: str = "none"
    damping: float = USUAL_DAMPING
    activation_order: bool = False
    static_groups: bool = False
    samples: int | None = None
    mix: str = "given"
    rotation: str = "none"
    sequential: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods whose scores this family needs."""
        return WEIGHT_METHODS if self.method == BEST else (self.method,)

    def settings(self, base: QuantizationSettings) -> QuantizationSettings:
        """Return the method's settings with this family's choices in place."""
        return replace(
            base,
            damping=self.damping,
            clip=self.clip,
            static_groups=self.static_groups,
            sequential=self.sequential,
            calibration_mix=self.mix,
            rotation=self.rotation,
        )

    def to_dict(self) -> dict[str, str | int | float | bool | None]:
        """Return the choices by name."""
        return asdict(self)

    def describe(self) -> str:
        """Return the choices as a person reads them."""
        parts = [self.method]
        if self.method != "gguf":
            grids = {True: "sym", False: "asym", None: "sym or asym"}
            parts.append(grids[self.symmetric])
        if self.activation_order:
            parts.append("actorder")
        if self.static_groups:
            parts.append("static groups")
        if self.clip != "none":
            parts.append(f"clip {self.clip}")
        if self.method in ("gguf", *TABLE_METHODS) or "gptq" in self.methods:
            parts.append(f"damping {self.damping:g}")
        if self.sequential:
            parts.append("sequential")
        parts.append("all samples" if self.samples is None else f"{self.samples} samples")
        if self.rotation != "none":
            parts.append("rotated")
        if self.mix != "given":
            parts.append(f"calibrated on {self.mix}")
        return ", ".join(parts)


def clip_under(method: str, clip: str) -> str:
    """Return what a choice of clip search comes to for the codes of one method.

    Args:
        method: Of a module.
        clip: ``none``, ``mse``, or ``gptq``: under GPTQ alone.
    """
    if clip != "gptq":
        return clip
    return "mse" if method == "gptq" else "none"


def is_searchable(scheme: Scheme) -> bool:
    """Whether the scheme's codes may be chosen by any of the weight methods."""
    return scheme.is_integer and scheme.method in WEIGHT_METHODS and scheme.activation is None


def schemes_of(family: Family, options: Sequence[Scheme], method: str) -> tuple[Scheme, ...]:
    """Return the engine's options as one method of a family would fill them.

    Integer options keep their storage and take the method; options of another grid (symmetric or
    not) or column order are left out. Options that have a method of their own (NVFP4, MXFP4, GGUF,
    16-bit) belong to every family, as do FP8 and integers under rounded inputs: their codes are
    GPTQ's in a family of GPTQ, else rounded.

    Args:
        family: The family.
        options: What the engine mixes in one checkpoint.
        method: One of the family's methods.
    """
    grids = _grids(family, options, method)
    found: list[Scheme] = []
    for option in options:
        if option.method in WEIGHT_METHODS and not is_searchable(option):
            found.append(replace(option, method="gptq" if method == "gptq" else "rtn"))
            continue
        if not is_searchable(option):
            found.append(option)
            continue
        ordered = family.activation_order and method == "gptq"
        if option.symmetric not in grids or option.activation_order != ordered:
            continue
        found.append(replace(option, method=method, activation_order=ordered))
    return tuple(dict.fromkeys(found))


def _grids(family: Family, options: Sequence[Scheme], method: str) -> set[bool | None]:
    """Return the grids, symmetric or not, that a method of a family may use."""
    if family.symmetric is not None:
        return {family.symmetric}
    offered = {option.symmetric for option in options if is_searchable(option)}
    return offered if method == "gptq" or True not in offered else {True}


def with_16_bit(options: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """Return the options and 16-bit: every format can leave a module as it is."""
    return (*options, BF16) if BF16 not in options else tuple(options)


def relevant_settings(
    scheme: Scheme, settings: QuantizationSettings, samples: int | None
) -> dict[str, object]:
    """Return those settings that the scheme's codes depend on, so that scores are shared.

    Args:
        scheme: The module's scheme.
        settings: All settings.
        samples: Prefix of the calibration sequences.
    """
    settings = own_settings(scheme, settings)
    every = settings.to_dict()
    names = {
        "rtn": ("clip", "scale_dtype"),
        "gptq": ("clip", "scale_dtype", "damping", "static_groups"),
        "awq": ("clip", "scale_dtype", "scale_steps"),
        "gguf": ("damping",),
        **dict.fromkeys(TABLE_METHODS, ("clip", "damping")),
    }.get(scheme.method)
    if not scheme.is_quantized:
        return {}
    result = every if names is None else {name: every[name] for name in names}
    if result.get("clip", "none") != "none":
        result = result | {name: every[name] for name in ("clip_shrink", "clip_steps")}
    rounded = scheme.method == "rtn" and scheme.activation is None
    needs_statistics = not rounded or settings.clip != "none"
    if needs_statistics and settings.calibration_mix != "given":
        result = result | {"calibration_mix": settings.calibration_mix}
    if settings.rotation != "none":
        result = result | {"rotation": [settings.rotation, settings.rotation_seed]}
    return result | ({"samples": samples} if needs_statistics else {})


def bare(scheme: Scheme) -> Scheme:
    """Return the scheme whose codes a scheme has: its inputs are rounded at run time alone.

    SmoothQuant, and int4 under FP8 inputs, choose other codes for such inputs.

    Args:
        scheme: Any.
    """
    for_inputs = scheme.method == "smoothquant" or (
        scheme.is_integer and scheme.activation == "fp8"
    )
    if scheme.activation is None or for_inputs:
        return scheme
    return replace(scheme, activation=None, static_activation=False)


def own_settings(scheme: Scheme, settings: QuantizationSettings) -> QuantizationSettings:
    """Return the settings that a module of a scheme is quantized with.

    Scales of tables of values are always searched, whatever the family does with integers: the
    groups are short, which costs seconds, halves the error of NVFP4 rounded to the nearest, and
    saves 8 % of NF4's KL with feedback (the small trained model). Other modules' are as the
    candidate's settings say of their method.

    Args:
        scheme: The module's scheme.
        settings: Of the candidate.
    """
    table = scheme.method in TABLE_METHODS
    return replace(settings, clip="mse" if table else clip_under(scheme.method, settings.clip))


def scored_with(
    scheme: Scheme, settings: QuantizationSettings, samples: int | None
) -> tuple[QuantizationSettings, int | None]:
    """Return the settings and samples that a scheme's scores are made with.

    Options beside a family's own integers (tables of values, FP8, what rounds its inputs) cost
    several times what those do, and what a family chooses moves their scores little: all families
    share the scores under usual settings. Final codes heed the family's.

    Args:
        scheme: A module's.
        settings: Of a family.
        samples: Of a family.
    """
    if not scheme.is_quantized or is_searchable(scheme) or scheme.method == "gguf":
        return own_settings(scheme, settings), samples
    usual = replace(
        settings, damping=USUAL_DAMPING, clip="gptq", static_groups=True, calibration_mix="given"
    )
    return own_settings(scheme, usual), None


def is_measured_alone(scheme: Scheme) -> bool:
    """Whether a uniform candidate of the scheme is none of a family's own (see ``offers``)."""
    return scheme.is_quantized and not is_searchable(scheme) and scheme.method != "gguf"


def finishing_settings(scheme: Scheme, settings: QuantizationSettings) -> dict[str, list[float]]:
    """Return what else the scheme's final codes depend on; scores do without.

    Args:
        scheme: The module's scheme.
        settings: All settings.
    """
    if scheme.method not in ("gptq", "gguf", "hqq", *TABLE_METHODS):
        return {}
    finishing: dict[str, list[float]] = {}
    if settings.descent:
        finishing["descent"] = [settings.descent, settings.descent_damping]
    if couples_outputs(scheme, settings):
        finishing["output_feedback"] = [settings.output_feedback, settings.output_damping]
    return finishing


def couples_outputs(scheme: Scheme, settings: QuantizationSettings) -> bool:
    """Whether a linear's codes depend on its own output gradients: each is quantized alone then."""
    plain = scheme.method == "gptq" and scheme.is_integer and scheme.activation != "fp8"
    other = scheme.method in ("gguf", "hqq", *TABLE_METHODS)
    return (plain or other) and settings.output_feedback > 0
