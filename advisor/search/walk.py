"""The walk over a model that quantizes it: one input group after another, in execution order.

A group needs its statistics, and its weights as they are by then: rotated, with the scales of AWQ
or SmoothQuant folded in, and in sequential refinement fitted to what the quantized blocks pass on.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from advisor.calibration.coverage import FittedStatistics
from advisor.calibration.mixing import of_mix
from advisor.calibration.rotating import rotated
from advisor.calibration.statistics import LayerStatistics, scale_inputs
from advisor.errors import InputError
from advisor.methods.registry import quantize, quantize_each
from advisor.models.allocator import give_back
from advisor.models.device import CPU
from advisor.models.rotation import Rotation, rotation_of
from advisor.search.codes import codes_key
from advisor.search.families import couples_outputs, own_settings
from advisor.search.outer_codes import quantize_outer
from advisor.search.scaling import SCALING_METHODS, Folded, find_scales, stored_dtype
from advisor.search.scores import module_weight
from advisor.search.sequential import QuantizedPrefix, prefix_of
from advisor.search.stacking import is_stackable, quantize_group

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.tokens import TokenSequences
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.modelspec import LinearSpec
    from advisor.modelspec.outer import OuterModule
    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.schemes import Scheme
    from advisor.search.codes import CodePool


class Walk:
    """Quantizes a model's linears; memory holds one input group at a time.

    Attributes:
        replaced: Tensor name to its new value, for 16-bit tensors that changed, as a checkpoint
            stores them; like all codes, in host memory.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        assignment: Mapping[str, Scheme],
        settings: QuantizationSettings,
        store: Statistics | None,
        *,
        samples: int | None,
        calibration: TokenSequences | None,
        pool: CodePool | None,
    ) -> None:
        """Prepare; the arguments are those of :func:`advisor.search.realise.realise`.

        Raises:
            InputError: The linears that share an input are only in part AWQ or SmoothQuant, or
                codes cannot be rotated or sequential.
        """
        if store is not None:
            store = of_mix(store, settings.calibration_mix)
        self._loaded, self._settings, self._store, self._samples = loaded, settings, store, samples
        self._chosen = {n: scheme for n, scheme in assignment.items() if scheme.is_quantized}
        self._groups: dict[str, list[LinearSpec]] = {}
        for linear in loaded.linears:
            self._groups.setdefault(linear.input_group, []).append(linear)
        self._known: Callable[[LinearSpec], LayerStatistics] | None = None
        if store is not None:
            self._known = partial(FittedStatistics(store, loaded.linears).layer, samples=samples)
        self._rotation = self._rotate()
        self._prefix = prefix_of(
            loaded, self._chosen, settings, store, samples, calibration, self._rotation
        )
        self._scales: dict[str, Tensor] = {}
        if self._prefix is None:
            weight_of = partial(module_weight, loaded)
            self._scales = find_scales(
                loaded, self._chosen, self._groups, settings, self._known, weight_of
            )
        self._folded = Folded(loaded, self._scales)
        self._block = -1
        # Codes then depend on the module alone, and may be an earlier candidate's.
        self._alone = self._prefix is None and self._rotation is None and not self._scales
        self._stored = None if pool is None else pool.candidate(shared=self._alone)
        self._kept: dict[str, QuantizedWeight] = {}
        self.replaced: dict[str, Tensor] = {}

    @property
    def weights(self) -> Mapping[str, QuantizedWeight]:
        """Module path to codes, of what is quantized by now."""
        return self._kept if self._stored is None else self._stored

    def run(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Quantize everything but embedding and head.

        Args:
            progress: Called with (input groups done, in all).
        """
        block = -1
        for done, (group, members) in enumerate(self._groups.items()):
            if members[0].block != block:  # more often would cost more than it saves
                block = members[0].block
                give_back()
            units = self._units(members)
            if units or not self._alone:
                statistics = self._arrive(group, members)
                for key, same in units:
                    self._keep(key, _names(same), self._made(same, statistics))
            if progress is not None:
                progress(done + 1, len(self._groups))
        self._leave()
        if self._rotation is not None:
            dtype = stored_dtype(self._loaded)
            for name, tensor in self._rotation.outer().items():
                self.replaced[name] = tensor.to(CPU, dtype)

    def quantize_end(self, module: OuterModule, scheme: Scheme) -> None:
        """Quantize the embedding or the head."""
        key = codes_key([module.name], scheme, self._settings, self._samples)
        if self._stored is not None and self._stored.find([module.name], key):
            return
        found = quantize_outer(
            self._loaded, module, scheme, self._settings, self._store, self._samples
        )
        self._keep(key, [module.name], [found])

    def _units(self, members: Sequence[LinearSpec]) -> list[tuple[str, list[LinearSpec]]]:
        """Return what is left to quantize of an input's linears: by scheme, with their key."""
        by_scheme: dict[Scheme, list[LinearSpec]] = {}
        for linear in members:
            if linear.name in self._chosen:
                by_scheme.setdefault(self._chosen[linear.name], []).append(linear)
        units = [
            (codes_key(_names(same), scheme, self._settings, self._samples), same)
            for scheme, same in by_scheme.items()
        ]
        if self._stored is None:
            return units
        return [(key, same) for key, same in units if not self._stored.find(_names(same), key)]

    def _keep(self, key: str, names: Sequence[str], results: Sequence[QuantizedWeight]) -> None:
        for name, result in zip(names, results, strict=True):
            if self._stored is None:
                self._kept[name] = result.to(CPU)
            else:
                self._stored.add(name, key, result)

    def _arrive(self, group: str, members: Sequence[LinearSpec]) -> LayerStatistics | None:
        """Return an input group's statistics, having entered its block if that is a new one."""
        first, prefix = members[0], self._prefix
        entering = first.block != self._block
        statistics: LayerStatistics | None = None
        if prefix is not None:
            names = self._folded.names if entering else ()
            behind = {name: self._folded.tensor(name) for name in names}
            inputs = prefix.inputs(first, self.weights, behind)
            statistics = None if inputs is None else inputs.statistics
        if statistics is None and self._known is not None:
            statistics = self._known(first)
            if self._rotation is not None:
                statistics = rotated(self._rotation, first, statistics)
        if entering and not (prefix is None and self._rotation is None):
            self._enter(first.block)
        if statistics is not None and group in self._scales:
            statistics = scale_inputs(statistics, self._scales[group])
        return statistics

    def _enter(self, block: int) -> None:
        """Leave the block before and make this one's weights what they are to be quantized as."""
        self._leave()
        self._block = block
        tensors: dict[str, Tensor] = {}
        if self._rotation is not None:
            tensors = dict(self._rotation.block(self._loaded.linears, block))
        if self._prefix is not None:
            inside = {key: own for key, own in self._groups.items() if own[0].block == block}
            self._scales, tensors = self._fit_block(self._prefix, inside, tensors)
        self._folded = Folded(self._loaded, self._scales, tensors)

    def _leave(self) -> None:
        """Keep the changed tensors that stay in 16 bits."""
        dtype = stored_dtype(self._loaded)
        for name in self._folded.names:
            if name.removesuffix(".weight") not in self.weights:
                self.replaced[name] = self._folded.tensor(name).to(dtype).to(CPU)

    def _fit_block(
        self,
        prefix: QuantizedPrefix,
        groups: Mapping[str, Sequence[LinearSpec]],
        tensors: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return a block's scales, and its tensors fitted to the quantized prefix, not scaled yet.

        Args:
            prefix: Has entered the block.
            groups: The block's input groups.
            tensors: By name, those that a rotation has changed.
        """
        own = Folded(self._loaded, {}, tensors)
        moved: dict[str, Tensor] = {}
        for members in groups.values():
            inputs = prefix.entered(members[0])
            if inputs is None:
                continue
            for linear in members:
                if linear.name in self._chosen:
                    weight = own.weight(linear)
                    target = inputs.target(weight, self._settings.correction)
                    moved[f"{linear.name}.weight"] = target
            inputs.forget()

        def statistics_of(linear: LinearSpec) -> LayerStatistics:
            inputs = prefix.entered(linear)
            if inputs is not None:
                return inputs.statistics
            if self._known is None:
                raise InputError("experts need the statistics of the unquantized model.")
            return self._known(linear)

        def weight_of(linear: LinearSpec) -> Tensor:
            found = moved.get(f"{linear.name}.weight")
            return own.weight(linear) if found is None else found

        scales = find_scales(
            self._loaded, self._chosen, groups, self._settings, statistics_of, weight_of
        )
        return scales, {**tensors, **moved}

    def _made(
        self, same: Sequence[LinearSpec], statistics: LayerStatistics | None
    ) -> Sequence[QuantizedWeight]:
        """Return codes: an earlier candidate's that differ in their inputs alone, or new ones."""
        known = None
        if self._stored is not None:
            known = self._stored.twins(
                _names(same), self._chosen[same[0].name], statistics, self._settings, self._samples
            )
        return self._quantize(same, statistics) if known is None else known

    def _quantize(
        self, same: Sequence[LinearSpec], statistics: LayerStatistics | None
    ) -> Sequence[QuantizedWeight]:
        """Quantize linears that share an input and a scheme."""
        scheme = self._chosen[same[0].name]
        settings = own_settings(scheme, self._settings)
        weights = [self._folded.weight(linear) for linear in same]
        if statistics is not None and couples_outputs(scheme, settings):
            each = [self._with_gradient(statistics, linear) for linear in same]
            return quantize_each(weights, each, scheme, settings)
        if not is_stackable(scheme):
            return [quantize(weight, statistics, scheme, settings) for weight in weights]
        return quantize_group(weights, statistics, [scheme], settings, foldable=False)[0].weights

    def _with_gradient(self, statistics: LayerStatistics, linear: LinearSpec) -> LayerStatistics:
        """Return statistics with G of a linear as it is quantized; none if it took up scales."""
        if self._store is None or self._folded.rescales_outputs(linear):
            return replace(statistics, gradient_moment=None)
        found = self._store.with_gradient(statistics, linear)
        gradient = found.gradient_moment
        if gradient is None or gradient.ndim == 1 or self._rotation is None:
            return found
        return replace(found, gradient_moment=self._rotation.gradient_moment(linear, gradient))

    def _rotate(self) -> Rotation | None:
        """Return the rotation that the settings ask for."""
        settings = self._settings
        rotation = rotation_of(self._loaded.model, settings.rotation, settings.rotation_seed)
        unfit = {s.method for s in self._chosen.values()} & (SCALING_METHODS | {"gguf"})
        if rotation is not None and unfit:
            raise InputError(
                f"rotation={settings.rotation!r} goes with methods that fold no scales and with "
                f"safetensors checkpoints, but got {', '.join(sorted(unfit))}."
            )
        return rotation


def _names(linears: Sequence[LinearSpec]) -> list[str]:
    return [linear.name for linear in linears]
