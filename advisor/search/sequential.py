"""Quantize a block for the inputs that the already quantized blocks before it really give.

Scores, and codes by default, use the statistics of the unquantized model. A block that knows what
the quantized blocks before it pass on can make up for some of their error: its second moment H is
that of the inputs it will see, and its weights are first moved part of the way to those that, on
these inputs, give the outputs of the unquantized model.

Measured on SmolLM2-135M (re-parameterised; 32×256 calibration and 32×256 evaluation tokens of the
built-in text; damping 0.1), KL in nats per token by the share of the way that weights are moved,
for the mixtures at 120 MB and at 135 MB:

    unquantized model's statistics   0.0618   0.0424
    0 (only H of the prefix)         0.0631   0.0414
    0.3                              0.0529   0.0379
    0.5                              0.0560   0.0434
    0.7                              0.1128

All of the way fits the calibration text alone (0.82). A damping of 0.03 or 0.3 does about as well.
As the gain is no certainty, a search measures both and keeps the better.

AWQ's scales are found anew from what the quantized blocks pass on, GGUF's block types are fitted
to its second moment as GPTQ's codes are. AWQ alone on the small trained model (same numbers of
tokens), by the share of the way: int4 g64 0.0069 with the unquantized model's statistics, 0.0070
(0), 0.0062 (0.3), 0.0060 (0.5); int3 g64 0.0299, 0.0299, 0.0267, 0.0270.

Reference: GPTQ, arXiv:2210.17323, section 4 (inputs from quantized blocks); GPTAQ,
arXiv:2504.02692, section 3 (asymmetric calibration: outputs of the unquantized model as target).
Differs from the papers: the target is a damped least squares fit, applied in part.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from advisor.calibration.mixing import sequence_weights
from advisor.calibration.passes import BATCH_TOKENS
from advisor.calibration.spill import Spill
from advisor.calibration.tapes import LatestInputs
from advisor.errors import InputError
from advisor.evaluation.runtime import quantized_model
from advisor.models.allocator import drop_pages
from advisor.models.blocks import BlockRunner
from advisor.models.inspect import block_linears
from advisor.search.families import TABLE_METHODS
from advisor.search.prefix_inputs import PrefixInputs, PrefixSums

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.tokens import TokenSequences
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.models.rotation import Rotation
    from advisor.modelspec import LinearSpec
    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.schemes import Scheme


SEQUENTIAL_METHODS = frozenset({"gptq", "awq", "gguf", *TABLE_METHODS})
"""Methods whose codes depend on the inputs' second moments."""


def can_be_sequential(assignment: Mapping[str, Scheme]) -> bool:
    """Whether sequential codes exist: some method looks at its inputs, and SmoothQuant is absent.

    AWQ's scales are found anew behind the quantized blocks; SmoothQuant's, which weigh inputs
    against weights for the sake of quantized activations, are not.
    """
    methods = {scheme.method for scheme in assignment.values() if scheme.is_quantized}
    return bool(methods & SEQUENTIAL_METHODS) and "smoothquant" not in methods


class QuantizedPrefix:
    """Walks over the blocks once, beside the unquantized model, each run with its codes.

    Inputs within a block are those of its unquantized weights, as in GPTQ libraries without
    ``true_sequential``. Memory holds one block's sums; hidden states lie in memory-mapped files.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokens: Tensor,
        folder: Path,
        settings: QuantizationSettings,
        weights: Callable[[LinearSpec], Tensor] | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        """Embed the tokens.

        Args:
            loaded: The 16-bit model; not modified.
            tokens: Calibration tokens, int64 [sequences, length].
            folder: Where the hidden states are kept meanwhile.
            settings: ``correction_damping`` is used.
            weights: How much each token counts in the sums of a linear's inputs, [sequences,
                length], not negative; None for all alike.
            rotation: Of the model that is quantized; the unquantized one is run as it is.
        """
        self._loaded = loaded
        self._runner = BlockRunner(loaded.model)
        self._damping = settings.correction_damping
        self._tokens = tokens
        self._rotation = rotation
        self._weights = weights or (lambda linear: torch.ones(tokens.shape))
        self._block = -1
        self._inputs: dict[str, PrefixInputs] = {}
        size = max(1, BATCH_TOKENS // tokens.shape[1])
        self._batches = [slice(i, min(i + size, len(tokens))) for i in range(0, len(tokens), size)]
        self._exact = self._states(folder, "sequential-exact")
        self._quantized = self._states(folder, "sequential-quantized")
        with self._runner.at_embedding():
            for part in self._batches:
                embedded = self._runner.embed(tokens[part].to(loaded.device))
                turned = embedded if rotation is None else rotation.stream(embedded)
                self._exact[part], self._quantized[part] = embedded, turned

    def inputs(
        self,
        linear: LinearSpec,
        weights: Mapping[str, QuantizedWeight],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> PrefixInputs | None:
        """Return what a linear reads; None for an expert of a mixture.

        The router gives an expert other tokens in the quantized model than in the unquantized one,
        so there are no pairs of inputs; experts keep the statistics of the latter.

        Args:
            linear: Of the block that the last call asked for, or of a later one.
            weights: Codes of every quantized linear in the blocks before.
            tensors: By name, what else is changed there: norms that took up scales, 16-bit linears.
        """
        while self._block < linear.block:
            if self._block >= 0:
                self._leave(weights, tensors or {})
            self._block += 1
            self._enter()
        return self._inputs.get(linear.input_group)

    def entered(self, linear: LinearSpec) -> PrefixInputs | None:
        """Return what a linear of the block that was entered last reads; None for an expert."""
        return self._inputs.get(linear.input_group)

    def _states(self, folder: Path, name: str) -> Tensor:
        """Return room for the hidden states; nothing is left on disk, however this ends."""
        config: Any = self._loaded.model.config
        shape = (*self._tokens.shape, int(config.hidden_size))
        spill = Spill(folder, name, shape, self._loaded.dtype)
        states = spill.create()
        spill.publish()
        spill.delete()  # the mapping keeps the file's content
        return states

    def _enter(self) -> None:
        """Sum what the block's linears read, and take the unquantized model past the block."""
        loaded = self._loaded
        self._inputs = {}  # those of the block before are as large as what is summed here
        own = block_linears(loaded.linears, self._block)
        linears = [linear for linear in own if not linear.is_expert]
        sums = {
            linear.input_group: PrefixSums(linear.in_features, loaded.device) for linear in linears
        }
        readers = {linear.input_group: linear for linear in linears}
        weights = {group: self._weights(linear) for group, linear in readers.items()}
        turned = self._turned()
        with (
            LatestInputs(loaded.model, linears) as latest,
            # Tensors that a rotation changes are not held: both models run in turn.
            nullcontext() if turned else self._runner.at_block(self._block),
            torch.no_grad(),
        ):
            for part in self._batches:
                hidden = self._exact[part].to(loaded.device)
                passed_on = self._runner.run(self._block, hidden)
                exact = latest.take()
                last = next(reversed(exact), "")
                if self._rotation is not None:
                    exact = {
                        group: self._rotation.inputs(readers[group], rows)
                        for group, rows in exact.items()
                    }
                with quantized_model(loaded.model, {}, turned), latest.until(last):
                    self._runner.run(self._block, self._quantized[part].to(loaded.device))
                for group, rows in latest.take().items():
                    counted = weights[group][part].reshape(-1).to(rows)
                    sums[group].add(exact[group], rows, counted)
                # Not before: a block without a norm in front reads the states where they lie.
                self._exact[part] = passed_on
                drop_pages(self._exact[part], self._quantized[part])
        for group in list(sums):
            self._inputs[group] = sums.pop(group).finish(self._damping)

    def _turned(self) -> dict[str, Tensor]:
        """Return the tensors of the block that a rotation changes."""
        if self._rotation is None:
            return {}
        return self._rotation.block(self._loaded.linears, self._block)

    def _leave(self, weights: Mapping[str, QuantizedWeight], tensors: Mapping[str, Tensor]) -> None:
        """Take the quantized model past the block."""
        loaded = self._loaded
        names = [linear.name for linear in block_linears(loaded.linears, self._block)]
        own = {name: weights[name] for name in names if name in weights}
        prefix = names[0].split(f".{self._block}.")[0] + f".{self._block}."
        kept = {
            name: tensor
            for name, tensor in {**self._turned(), **tensors}.items()
            if name.startswith(prefix) and name.removesuffix(".weight") not in own
        }
        with (
            quantized_model(loaded.model, own, kept),
            self._runner.at_block(self._block),
            torch.no_grad(),
        ):
            for part in self._batches:
                hidden = self._quantized[part].to(loaded.device)
                self._quantized[part] = self._runner.run(self._block, hidden)
                drop_pages(self._quantized[part])


def prefix_of(
    loaded: LoadedModel,
    chosen: Mapping[str, Scheme],
    settings: QuantizationSettings,
    store: Statistics | None,
    samples: int | None,
    calibration: TokenSequences | None,
    rotation: Rotation | None,
) -> QuantizedPrefix | None:
    """Return the walk over quantized blocks, where the settings ask for it.

    Args:
        loaded: The 16-bit model.
        chosen: Module path to quantized scheme.
        settings: ``sequential``, the mix, and those of the fit.
        store: Statistics, which say how much tokens weigh.
        samples: Prefix of the calibration sequences to use; None for all.
        calibration: The sequences.
        rotation: Of the model that is quantized.

    Raises:
        InputError: Codes cannot be sequential, or what they need is missing.
    """
    if not settings.sequential:
        return None
    if not can_be_sequential(chosen):
        methods = sorted({scheme.method for scheme in chosen.values()})
        raise InputError(
            "sequential=True needs a method that looks at its inputs in some module "
            f"({', '.join(sorted(SEQUENTIAL_METHODS))}) and smoothquant in none, "
            f"but got {', '.join(methods)}."
        )
    if calibration is None or store is None:
        raise InputError("sequential=True needs the calibration text and its statistics.")
    used = calibration if samples is None else calibration.first(samples)
    shares = sequence_weights(used, settings.calibration_mix)
    kept = shares > 0

    def weights(linear: LinearSpec) -> Tensor:
        """Weigh a token by its sequence's share in the mix and by its gradients."""
        own = store.weights(linear)
        rows = shares[:, None].expand(used.tokens.shape)
        if own is not None:
            rows = rows * own.reshape(-1, rows.shape[1])[: len(rows)]
        return rows[kept]

    return QuantizedPrefix(
        loaded, used.tokens[kept], store.work_folder, settings, weights, rotation
    )
