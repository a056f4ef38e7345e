"""Scores: for every module and every option, the layer's error and its effect on the model's KL.

A perturbation ΔW of a linear with inputs x and output gradients g (those of the true Fisher, see
:mod:`advisor.calibration.fisher`) changes the model's output distribution by about
½ E[(gᵀ ΔW x)²] nats of KL per token, the true Fisher's quadratic form. With g and x taken as
independent (Kronecker factors) this is ½ tr(G ΔW H ΔWᵀ) for the means G of g gᵀ and H of x xᵀ.
That sizes of x and g depend on each other is taken into account by the weights of H (see
:class:`advisor.calibration.statistics.LayerStatistics`). Modules are taken as independent, so
scores add up.

Codes are chosen on the first half of the calibration sequences and scored on the second half, as
a method that fits its codes to H (GPTQ, clipping) looks better on the H that it fitted than it
is; the final codes use all the samples asked for.

Measured on SmolLM2-135M (re-parameterised; 32×256 calibration and 32×256 evaluation tokens of the
built-in text; RTX 4090 and vLLM, fused groups; ranges not searched) at 118 MB, predicted and
measured KL in nats:

    mixture, GPTQ asymmetric, 4.61 bits         0.0519   0.0375
    mixture, best of methods, 4.61 bits         0.0617   0.0478 (10 sequences)
    uniform GPTQ int4 g64 asym                  0.0674   0.0513
    mixture, rounding with clip search          0.113    0.120  (10 sequences)
    uniform rounding int4 g64 asym              0.171    0.188  (10 sequences)

The order is right throughout; measured over predicted is 0.72 to 0.78 with GPTQ, 1.06 and 1.10
without: codes are scored without descent, without feedback among outputs and from half the samples,
so GPTQ's final codes are better than predicted. With unweighted moments, fitted and judged on the
same tokens, it was 0.4 to 1.5 over ten uniform GPTQ candidates. What is left out: cross terms
between modules.

GGUF types, and tables of values (NVFP4), are scored as GPTQ is, with feedback among columns alone:
on the small trained model (32×256 and 32×256 tokens) uniform q2_k was predicted at 0.0298 and
measured at 0.0169, the mixture at 3.43 bits at 0.0050 and 0.0030.

With NVFP4 among the options and ranges searched, the mixture (118 MB) was predicted at 0.0430 and
measured at 0.0326.

Where a kernel rounds inputs at run time (FP8, W8A8, W4A4), what that costs is added to the score of
the weight (:mod:`advisor.search.input_noise`).

What scoring leaves out to be fast, and what that changes (SmolLM2-135M, five of its 30 blocks, 350
scores of modules and options under GPTQ, Spearman 0.9996 with the exact ones): where a linear has
more outputs than inputs, GPTQ's errors are weighed by G's diagonal alone (0.979 to 1.024 of the
scores, 1.0004 of their sum); a clip search tries fewer ranges (with 6 of 10 the sums of 35 modules
are 1.00 to 1.01 times as large, for GPTQ on integers of 2 to 8 bits). Rows rounded by AWQ or to
nearest err alike: there the diagonal alone gave 0.53 to 1.26 of the scores, so G is kept whole, as
it is for keys under GPTQ.

Reference: Martens and Grosse, arXiv:1503.05671 (Kronecker-factored Fisher); Hassibi and Stork,
1993 (second-order effect of changed weights).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from advisor.calibration.rotating import rotated
from advisor.models.allocator import give_back
from advisor.models.folding import foldable_groups
from advisor.models.rotation import rotation_of
from advisor.numerics.microscaling import MICROSCALED_WIDTHS
from advisor.plan.hashing import sha256_json
from advisor.predict.gguf_types import base_type, stored_type
from advisor.search.families import bare, relevant_settings, scored_with
from advisor.search.halves import Halves
from advisor.search.input_noise import noise_terms
from advisor.search.score import ModuleScores, Score, score_change
from advisor.search.score_pages import ScorePages
from advisor.search.sifting import sample_of
from advisor.search.stacking import quantize_group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.models.rotation import Rotation
    from advisor.modelspec import LinearSpec
    from advisor.schemes import Scheme
    from advisor.search.input_noise import InputNoise

_VERSION = 7
"""Part of every cache key: raised when scores mean something else."""
_CLIP_STEPS = 6
"""Ranges tried in a clip search for scores; final codes try all of the settings'."""


def fits(scheme: Scheme, linear: LinearSpec) -> bool:
    """Whether a scheme's groups divide a module's inputs."""
    if scheme.weight in MICROSCALED_WIDTHS:
        return linear.in_features % MICROSCALED_WIDTHS[scheme.weight] == 0
    if scheme.method == "gguf":
        return stored_type(base_type(scheme.weight), linear.in_features) == scheme.weight
    if scheme.granularity != "group" or not scheme.group_size:
        return True
    return linear.in_features % scheme.group_size == 0


class ScoreBook:
    """Scores by scheme and settings, computed once and kept on disk by content."""

    def __init__(
        self,
        loaded: LoadedModel,
        store: Statistics,
        folder: Path,
        noise: InputNoise | None = None,
    ) -> None:
        """Open the book.

        Args:
            loaded: The 16-bit model.
            store: Its complete statistics.
            folder: Where scores are kept.
            noise: What rounding inputs at run time costs; without, schemes that do it have no
                scores.
        """
        self._loaded = loaded
        self._store = store
        self._noise = noise
        self._pages = ScorePages(folder)
        self._halves = Halves(store, loaded.linears)
        self._sample = sample_of(loaded.linears)
        self._foldable = {folding.input_group for folding in foldable_groups(loaded.model)}

    @property
    def fitted_samples(self) -> int | None:
        """Sequences that codes are fitted to for scoring; the rest judge. None: no such split."""
        return self._halves.fitted_samples

    def missing(
        self, schemes: Iterable[Scheme], settings: QuantizationSettings, samples: int | None
    ) -> list[Scheme]:
        """Return the schemes whose scores are not known yet."""
        return [s for s in dict.fromkeys(schemes) if self._find(s, settings, samples) is None]

    def is_same(
        self,
        scheme: Scheme,
        settings: QuantizationSettings,
        samples: int | None,
        others: tuple[QuantizationSettings, int | None],
    ) -> bool:
        """Whether a scheme's scores under other settings and samples are the same ones."""
        return self._key(scheme, settings, samples) == self._key(scheme, *others)

    def scores(
        self,
        schemes: Sequence[Scheme],
        settings: QuantizationSettings,
        samples: int | None,
        progress: Callable[[int, int], None] | None = None,
        *,
        sampled: bool = False,
    ) -> dict[Scheme, ModuleScores]:
        """Return the scores of every scheme, computing those that are missing in one pass.

        One input group's statistics and weights are in memory at a time.

        Args:
            schemes: Options; 16-bit ones score zero.
            settings: The methods' settings.
            samples: Prefix of the calibration sequences that codes are fitted to; None for all.
            progress: Called with (input groups done, in all).
            sampled: Score the modules of some blocks alone (:mod:`advisor.search.sifting`).
        """
        wanted = dict.fromkeys(schemes)
        missing = [s for s in wanted if self._find(s, settings, samples, sampled) is None]
        found: dict[Scheme, dict[str, Score]] = {
            scheme: dict(self._find(scheme, settings, samples, sampled=True) or {})
            for scheme in missing
        }
        groups = self._groups(sampled) if any(s.is_quantized for s in missing) else []
        together: dict[tuple[QuantizationSettings, int | None], list[Scheme]] = {}
        for scheme in missing:
            together.setdefault(scored_with(scheme, settings, samples), []).append(scheme)
        for done, members in enumerate(groups):
            for own, alike in together.items():
                left = {s: found[s] for s in alike if members[0].name not in found[s]}
                self._score_group(members, left, *own)
            give_back()
            if progress is not None:
                progress(done + 1, len(groups))
        for scheme in missing:
            if not scheme.is_quantized:
                found[scheme] = {linear.name: Score(0, 0) for linear in self._loaded.linears}
            self._pages.keep(self._key(scheme, settings, samples, sampled), scheme, found[scheme])
        return {s: self._find(s, settings, samples, sampled) or {} for s in schemes}

    def _groups(self, sampled: bool) -> list[list[LinearSpec]]:
        """Return the modules by shared input, in execution order."""
        groups: dict[str, list[LinearSpec]] = {}
        for linear in self._loaded.linears:
            if not sampled or linear.block in self._sample:
                groups.setdefault(linear.input_group, []).append(linear)
        return list(groups.values())

    def _score_group(
        self,
        members: Sequence[LinearSpec],
        found: Mapping[Scheme, dict[str, Score]],
        settings: QuantizationSettings,
        samples: int | None,
    ) -> None:
        schemes = [s for s in found if s.is_quantized and fits(s, members[0])]
        if not schemes:
            return
        fitted, judges = self._halves.statistics(members, samples, settings.calibration_mix)
        weights = [module_weight(self._loaded, linear) for linear in members]
        foldable = members[0].input_group in self._foldable
        rotation = rotation_of(self._loaded.model, settings.rotation, settings.rotation_seed)
        if rotation is not None:
            weights = [rotation.weight(linear) for linear in members]
            fitted = rotated(rotation, members[0], fitted)
            judges = [rotated(rotation, *pair) for pair in zip(members, judges, strict=True)]
            foldable = False
        # Both lower all scores by about the same share, and would be most of their cost.
        steps = min(settings.clip_steps, _CLIP_STEPS)
        settings = replace(settings, descent=0, output_feedback=0.0, clip_steps=steps)
        stored = {scheme: bare(scheme) for scheme in schemes}
        for method in dict.fromkeys(scheme.method for scheme in schemes):
            batch = list(dict.fromkeys(s for s in stored.values() if s.method == method))
            results = quantize_group(
                weights, fitted, batch, settings, foldable=foldable, share_scales=True
            )
            for scheme, result in zip(batch, results, strict=True):
                alike = [own for own in schemes if stored[own] == scheme]
                for index, linear in enumerate(members):
                    delta = result.dequantize(index) - weights[index]
                    score = score_change(delta, judges[index])
                    for own in alike:
                        found[own][linear.name] = score
        for weight, linear, judge in zip(weights, members, judges, strict=True):
            self._add_noise(weight, linear, judge, found, rotation)

    def _add_noise(
        self,
        weight: Tensor,
        linear: LinearSpec,
        judge: LayerStatistics,
        found: Mapping[Scheme, dict[str, Score]],
        rotation: Rotation | None,
    ) -> None:
        """Add what rounding a linear's inputs costs to its scores; drop them if that is unknown."""
        known: dict[str, tuple[float, float] | None] = {}
        for scheme, scores in found.items():
            if scheme.activation is None or linear.name not in scores:
                continue
            if scheme.activation not in known:
                squares = None
                if self._noise is not None:
                    squares = self._noise.mean_squares(linear, scheme, rotation)
                known[scheme.activation] = (
                    None if squares is None else noise_terms(weight, squares, judge)
                )
            terms, score = known[scheme.activation], scores.pop(linear.name)
            if terms is not None:
                scores[linear.name] = Score(score.kl + terms[0], score.error + terms[1])

    def _key(
        self,
        scheme: Scheme,
        settings: QuantizationSettings,
        samples: int | None,
        sampled: bool = False,
    ) -> str:
        settings, samples = scored_with(scheme, settings, samples)
        if samples is not None and self.fitted_samples is not None:
            samples = min(samples, self.fitted_samples)
        elif self.fitted_samples is not None:
            samples = self.fitted_samples
        content: dict[str, object] = {
            "version": _VERSION,
            "statistics": self._store.key,
            "scheme": str(scheme),
            "settings": relevant_settings(scheme, settings, samples),
        }
        if sampled:
            content["blocks"] = list(self._sample)
        return sha256_json(content)

    def _find(
        self,
        scheme: Scheme,
        settings: QuantizationSettings,
        samples: int | None,
        sampled: bool = False,
    ) -> dict[str, Score] | None:
        found = self._pages.find(self._key(scheme, settings, samples, sampled))
        if found is None and sampled:
            found = self._pages.find(self._key(scheme, settings, samples))
            names = {linear.name for group in self._groups(sampled) for linear in group}
            return found and {name: score for name, score in found.items() if name in names}
        return found


def module_weight(loaded: LoadedModel, linear: LinearSpec) -> Tensor:
    """Return a module's 16-bit weight in float32, shape [out, in]."""
    return loaded.tensor(f"{linear.name}.weight").float()
