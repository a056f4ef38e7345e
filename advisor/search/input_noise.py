"""What rounding inputs at run time costs, before any module is quantized.

A kernel that rounds a linear's inputs x to x + Δx adds W Δx to its outputs. To second order that is
½ E[(gᵀ W Δx)²] nats of KL per token (see :mod:`advisor.search.scores`), and with g and Δx taken as
independent, rounding errors of different inputs as uncorrelated, and those of W and of x as well,

    ½ Σ_j E[Δx_j²] (Wᵀ G W)_jj

is what it adds to the score of the weight. W is the 16-bit one, so that all storages share the sum:
quantized to 4 bits it differs by a tenth, its square by a hundredth. E[Δx_j²] follows from no sum
over inputs, as types differ in what shares a scale. So a few calibration sequences run once more,
and the very functions that simulate the kernels round what each linear reads; tokens weigh as they
do in H. Of an expert these are the tokens that are routed to it, all alike, or where they are few
those of all experts of its layer, each rounded as for the expert that reads it.

Measured on the small trained model (weights in 16 bits, all linears' inputs rounded; 4×256 tokens
for E[Δx²], KL on 32×256 held-out tokens), predicted, predicted with whole second moments of Δx, and
measured:

    fp8     0.00149   0.00149   0.00159
    int8    0.00052   0.00053   0.00052
    mxfp8   0.00178   0.00178   0.00193
    nvfp4   0.0187    0.0191    0.0203
    mxfp4   0.0393    0.0417    0.0419

Experts of the last block of two tiny random mixtures (OLMoE, Mixtral; 1024 tokens), predicted over
measured: 1.02 and 0.99 for fp8, 1.10 and 1.02 for int8. In earlier blocks the sums, like those of
changed weights and of linears that are no experts, miss the routers that choose other experts then.

Without the tokens' weights the sums were 1.04 to 1.12 times those. Whole mixtures of NVFP4, FP8
(both under inputs of their types) and 16 bits on the same model (vLLM on a B200, GPTQ's codes;
uniform nvfp4-anvfp4 0.0207 and 0.0216, uniform gptq-fp8-gch-afp8 0.0016 and 0.0018):

    bits per weight   4.90     5.95     6.87     7.92     8.94
    predicted         0.0140   0.0074   0.0036   0.0019   0.0011
    measured          0.0146   0.0085   0.0043   0.0021   0.0012
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save

from advisor.calibration.coverage import kind_of_expert
from advisor.calibration.rotating import rotated
from advisor.calibration.tapes import LatestInputs
from advisor.evaluation.runtime import activation_simulation
from advisor.methods.input_scales import INPUT_GLOBAL_SCALE, input_global_scale
from advisor.models.blocks import BlockRunner
from advisor.models.inspect import block_linears
from advisor.numerics.microscaling import MICROSCALED_WIDTHS
from advisor.plan.files import write_atomically
from advisor.plan.hashing import sha256_json
from advisor.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.statistics import LayerStatistics
    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel
    from advisor.models.rotation import Rotation
    from advisor.modelspec import LinearSpec

_TOKENS = 1024
"""Of which rounding errors are seen."""
_FEWEST_TOKENS = 64
"""That an expert must see for its own rounding errors to be known."""
_VERSION = 2
_KINDS = {
    "int8": Scheme("rtn", "int8", "channel", -1, True, activation="int8"),
    "fp8": Scheme("rtn", "fp8", "channel", -1, activation="fp8"),
    **{kind: Scheme(kind, kind, activation=kind) for kind in MICROSCALED_WIDTHS},
}
"""A scheme of every type that inputs are rounded to, one scale per token or short group."""


class InputNoise:
    """Mean squares of rounding errors by type, computed once and kept on disk by content."""

    def __init__(
        self,
        loaded: LoadedModel,
        store: Statistics,
        calibration: TokenSequences,
        folder: Path,
    ) -> None:
        """Open the book.

        Args:
            loaded: The 16-bit model; not modified.
            store: Its complete statistics.
            calibration: The sequences that those are of.
            folder: Where results are kept.
        """
        self._loaded = loaded
        self._store = store
        self._folder = folder
        count = min(calibration.sequences, math.ceil(_TOKENS / calibration.sequence_length))
        # Evenly spaced: sources of a mix come one after another.
        self._chosen = [i * calibration.sequences // count for i in range(count)]
        self._tokens = calibration.tokens[self._chosen]
        self._length = calibration.sequence_length
        self._known: dict[str, dict[str, Tensor]] = {}

    def mean_squares(
        self, linear: LinearSpec, scheme: Scheme, rotation: Rotation | None
    ) -> Tensor | None:
        """Return the mean squared rounding error of each of a linear's inputs.

        Args:
            linear: The linear.
            scheme: Rounds its inputs, with scales that are found at run time.
            rotation: Of the model that is quantized.

        Returns:
            float32 [in], per (weighted) token, of an expert per token routed to it. None where
            nothing is known: where groups do not divide the inputs; of inputs in blocks, or with
            one calibrated scale.
        """
        kind = scheme.activation
        if kind is None or scheme.static_activation or scheme.granularity == "block":
            return None
        if not _is_seen(linear, kind):
            return None
        found = self._of_kind(kind, rotation).get(linear.input_group)
        return None if found is None else found.to(self._loaded.device)

    def _of_kind(self, kind: str, rotation: Rotation | None) -> dict[str, Tensor]:
        seed = None if rotation is None else rotation.seed
        key = sha256_json([_VERSION, self._store.key, self._chosen, kind, seed])
        if key not in self._known:
            path = self._folder / f"inputs-{key}.safetensors"
            if path.is_file():
                self._known[key] = load_file(path)
            else:
                self._known[key] = self._compute(kind, rotation)
                self._folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, save(self._known[key]))
        return self._known[key]

    def _compute(self, kind: str, rotation: Rotation | None) -> dict[str, Tensor]:
        """Run the unquantized model over the chosen sequences, a block at a time."""
        loaded = self._loaded
        runner = BlockRunner(loaded.model)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            with runner.at_embedding():
                hidden = runner.embed(self._tokens.to(loaded.device))
            for block in range(len(runner.blocks)):
                own = block_linears(loaded.linears, block)
                linears = [linear for linear in own if _is_seen(linear, kind)]
                readers = {linear.input_group: linear for linear in linears}
                with LatestInputs(loaded.model, linears) as latest, runner.at_block(block):
                    hidden = runner.run(block, hidden)
                    rows = latest.take()
                experts = {g: linear for g, linear in readers.items() if linear.is_expert}
                for group in rows.keys() - experts.keys():
                    found[group] = self._of_rows(readers[group], rows[group], kind, rotation).cpu()
                found |= self._of_experts(experts, rows, kind, rotation)
        return found

    def _of_experts(
        self,
        experts: Mapping[str, LinearSpec],
        rows: Mapping[str, Tensor],
        kind: str,
        rotation: Rotation | None,
    ) -> dict[str, Tensor]:
        """Return the mean squares of a block's experts, by input group."""
        sums: dict[str, Tensor] = {}
        pools: dict[tuple[str, str], list[str]] = {}
        for group, linear in experts.items():
            pools.setdefault(kind_of_expert(linear), []).append(group)
            if group in rows and len(rows[group]):
                own = rows[group]
                means = self._of_rows(linear, own, kind, rotation, weighted=False)
                sums[group] = len(own) * means.double().cpu()
        found: dict[str, Tensor] = {}
        for groups in pools.values():
            seen = {group: len(rows[group]) for group in groups if group in sums}
            if not seen:
                continue
            pooled = torch.stack([sums[group] for group in seen]).sum(0) / sum(seen.values())
            for group in groups:
                enough = seen.get(group, 0) >= _FEWEST_TOKENS
                found[group] = (sums[group] / seen[group] if enough else pooled).float()
        return found

    def _of_rows(
        self,
        linear: LinearSpec,
        rows: Tensor,
        kind: str,
        rotation: Rotation | None,
        *,
        weighted: bool = True,
    ) -> Tensor:
        """Return the mean squares of what rounding does to rows [tokens, in]."""
        if rotation is not None:
            rows = rotation.inputs(linear, rows)
        simulation = self._simulation(linear, kind, rotation)
        weights = self._weights(linear) if weighted else None
        return weighted_mean_squares(simulation(rows) - rows, weights)

    def _simulation(
        self, linear: LinearSpec, kind: str, rotation: Rotation | None
    ) -> Callable[[Tensor], Tensor]:
        scheme, extras = _KINDS[kind], {}
        if kind == "nvfp4":
            statistics: LayerStatistics = self._store.layer(linear, gradients=False)
            if rotation is not None:
                statistics = rotated(rotation, linear, statistics)
            scale = input_global_scale(scheme, statistics, linear.in_features)
            extras = {INPUT_GLOBAL_SCALE: scale}
        simulation: Callable[[Tensor], Tensor] = activation_simulation(scheme, extras)
        return simulation

    def _weights(self, linear: LinearSpec) -> Tensor | None:
        """Return how much each of the chosen tokens counts, [tokens]; None for all alike."""
        found = self._store.weights(linear)
        if found is None:
            return None
        return found.reshape(-1, self._length)[self._chosen].reshape(-1)


def _is_seen(linear: LinearSpec, kind: str) -> bool:
    """Whether there is something to learn: groups divide its inputs."""
    return linear.in_features % MICROSCALED_WIDTHS.get(kind, 1) == 0


def weighted_mean_squares(errors: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean square of each column of errors [tokens, in], float32 [in].

    Args:
        errors: Rounding errors.
        weights: How much each token counts, [tokens], not negative; None for all alike.
    """
    squares = errors.float().square()
    if weights is None:
        return squares.mean(0)
    total = float(weights.sum(dtype=torch.float64))
    if total <= 0:
        return squares.mean(0)
    return weights.to(squares) @ squares / total


def noise_terms(
    weight: Tensor, mean_squares: Tensor, statistics: LayerStatistics
) -> tuple[float, float]:
    """Return what rounding errors of inputs add to a module's KL, and to its outputs.

    Args:
        weight: In 16 bits, as float32 [out, in].
        mean_squares: Of the errors, float32 [in].
        statistics: Of the module; without gradients, every output counts as much as another.

    Returns:
        ½ Σ_j E[Δx_j²] (Wᵀ G W)_jj, nats per token, and Σ_j E[Δx_j²] (Wᵀ W)_jj.
    """
    squares, gradient = weight.square(), statistics.gradient_moment
    outputs = float((squares.sum(0, dtype=torch.float64) * mean_squares.double()).sum())
    if gradient is None:
        return 0.5 * outputs, outputs
    if gradient.ndim == 1:
        columns = gradient.double() @ squares.double()
    else:
        columns = (gradient @ weight).mul_(weight).sum(0, dtype=torch.float64)
    total = float((columns * mean_squares.double()).sum())
    return max(0.0, 0.5 * total / max(1, statistics.gradient_tokens)), outputs
