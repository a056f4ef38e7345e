"""Tapes: hooks that sum what passes through a block's linears while they are open."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from advisor.calibration.moments import SecondMoment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from advisor.modelspec import LinearSpec


class _Tape:
    """Hooks that are removed on exit, also after an exception."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class InputTape(_Tape):
    """Sums of the inputs of linears: H, absolute maximum and absolute sum, once per group."""

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[LinearSpec],
        device: torch.device,
        *,
        moments: bool = True,
    ) -> None:
        """Hook the first linear of every input group.

        An expert of a mixture is run on the tokens routed to it alone, so its sums say for how
        many tokens they stand.

        Args:
            model: The model that runs.
            linears: Linears whose inputs are summed.
            device: Where the inputs will be.
            moments: False leaves out H, where a backward pass will weigh it.
        """
        super().__init__()
        self._routed: dict[str, int] = {}
        self._moments: dict[str, SecondMoment] = {}
        self._maxima: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        for linear in linears:
            group = linear.input_group
            if group in self._maxima:
                continue
            if moments:
                self._moments[group] = SecondMoment(linear.in_features, device)
            if linear.is_expert:
                self._routed[group] = 0
            self._maxima[group] = torch.zeros(linear.in_features, device=device)
            self._sums[group] = torch.zeros(linear.in_features, device=device)
            module = model.get_submodule(linear.name)
            self._handles.append(module.register_forward_pre_hook(self._hook(group)))

    def _hook(self, group: str) -> Any:
        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).to(torch.float32)
            if group in self._moments:
                self._moments[group].add(rows)
            if group in self._routed:
                self._routed[group] += len(rows)
            magnitudes = rows.abs()
            maximum = self._maxima[group]
            torch.maximum(maximum, magnitudes.amax(0), out=maximum)
            self._sums[group] += magnitudes.sum(0)

        return record

    def take(self) -> dict[str, Tensor]:
        """Return the sums since the last call as ``<group>/<kind>`` and start again."""
        taken: dict[str, Tensor] = {}
        for group, moment in self._moments.items():
            taken[f"{group}/moment"] = moment.take()
        for group in self._maxima:
            taken[f"{group}/maximum"] = self._maxima[group].cpu().clone()
            taken[f"{group}/sum"] = self._sums[group].cpu().clone()
            self._maxima[group].zero_()
            self._sums[group].zero_()
        for group, tokens in self._routed.items():
            taken[f"{group}/tokens"] = torch.tensor(tokens)
            self._routed[group] = 0
        return taken


class _AllSeen(Exception):
    """Ends a run whose inputs are all known."""


class LatestInputs(_Tape):
    """The inputs that the last run gave to linears, once per group."""

    def __init__(self, model: nn.Module, linears: Sequence[LinearSpec]) -> None:
        """Hook the first linear of every input group."""
        super().__init__()
        self._rows: dict[str, Tensor] = {}
        self._last: str | None = None
        for group, linear in {linear.input_group: linear for linear in linears[::-1]}.items():
            module = model.get_submodule(linear.name)
            self._handles.append(module.register_forward_pre_hook(self._hook(group)))

    def _hook(self, group: str) -> Any:
        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].detach()
            self._rows[group] = rows.reshape(-1, rows.shape[-1]).to(torch.float32)
            if group == self._last:
                raise _AllSeen

        return record

    @contextmanager
    def until(self, group: str) -> Iterator[None]:
        """End the run within when this group's inputs are known: what follows is not computed.

        Args:
            group: That the run comes to last; one that it does not come to ends nothing.
        """
        self._last = group
        try:
            yield
        except _AllSeen:
            pass
        finally:
            self._last = None

    def take(self) -> dict[str, Tensor]:
        """Return group -> float32 [tokens, in] in the order of the run, and forget them."""
        taken, self._rows = self._rows, {}
        return taken


class _WeightedInputs:
    """One input group: H of its inputs, each token weighted by its output gradients."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._moment = SecondMoment(size, device)
        self._weight = 0.0
        self._calls: list[tuple[Tensor, Tensor]] = []
        self.weights: list[Tensor] = []

    def enter(self, rows: Tensor) -> None:
        """Remember the inputs [tokens, in] of a call of the group's linears."""
        self._calls.append((rows, torch.zeros(len(rows), device=rows.device)))

    @property
    def current(self) -> Tensor:
        """Weights of the latest call's tokens, to be added to."""
        return self._calls[-1][1]

    def end_batch(self) -> None:
        """Sum the calls whose gradients have all arrived."""
        for rows, weights in self._calls:
            self._moment.add(rows.to(torch.float32) * weights.sqrt()[:, None])
            self._weight += float(weights.sum(dtype=torch.float64))
            self.weights.append(weights.cpu())
        self._calls.clear()

    def take(self) -> dict[str, Tensor]:
        """Return the sums since the last call and start again."""
        weight, self._weight = self._weight, 0.0
        return {
            "moment": self._moment.take(),
            "weight": torch.tensor(weight, dtype=torch.float64),
        }


class GradientTape(_Tape):
    """Sums of a backward pass: of output gradients, and of the inputs weighted by them.

    Of every linear G or its diagonal, Σ g gᵀ; of every input group H = Σ w x xᵀ, where w is the sum
    of |g|² over the linears that read x.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[LinearSpec],
        full: Mapping[str, bool],
        device: torch.device,
    ) -> None:
        """Hook every linear.

        Args:
            model: The model that runs, with gradients enabled.
            linears: Linears whose output gradients are summed.
            full: By name, whether the whole moment is kept or only its diagonal.
            device: Where the gradients will be.
        """
        super().__init__()
        self._moments: dict[str, SecondMoment] = {}
        self._diagonals: dict[str, Tensor] = {}
        self._inputs: dict[str, _WeightedInputs] = {}
        for linear in linears:
            if full[linear.name]:
                self._moments[linear.name] = SecondMoment(linear.out_features, device)
            else:
                self._diagonals[linear.name] = torch.zeros(linear.out_features, device=device)
            module = model.get_submodule(linear.name)
            if linear.input_group not in self._inputs:
                self._inputs[linear.input_group] = _WeightedInputs(linear.in_features, device)
                self._handles.append(
                    module.register_forward_pre_hook(self._enter(linear.input_group))
                )
            hook = self._hook(linear.name, linear.input_group)
            self._handles.append(module.register_forward_hook(hook))

    def _enter(self, group: str) -> Any:
        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].detach()
            self._inputs[group].enter(rows.reshape(-1, rows.shape[-1]))

        return record

    def _hook(self, name: str, group: str) -> Any:
        def watch(_module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            weights = self._inputs[group].current

            def record(gradient: Tensor) -> None:
                rows = gradient.detach().reshape(-1, gradient.shape[-1]).to(torch.float32)
                squares = rows.square()
                weights.add_(squares.sum(1))
                if name in self._moments:
                    self._moments[name].add(rows)
                else:
                    self._diagonals[name] += squares.sum(0)

            output.register_hook(record)  # type: ignore[no-untyped-call]

        return watch

    def end_batch(self) -> None:
        """Take note that a backward pass has ended: all gradients of its calls have arrived."""
        for inputs in self._inputs.values():
            inputs.end_batch()

    def take_inputs(self) -> dict[str, Tensor]:
        """Return the weighted sums of inputs since the last call as ``<group>/<kind>``."""
        return {
            f"{group}/{kind}": value
            for group, inputs in self._inputs.items()
            for kind, value in inputs.take().items()
        }

    def take(self) -> dict[str, Tensor]:
        """Return the sums by linear: packed moments, or diagonals; and every token's weight."""
        taken = {name: moment.take() for name, moment in self._moments.items()}
        taken.update({name: diagonal.cpu().clone() for name, diagonal in self._diagonals.items()})
        for group, inputs in self._inputs.items():
            if inputs.weights:
                taken[f"{group}/weights"] = torch.cat(inputs.weights)
            inputs.weights.clear()
        return taken
