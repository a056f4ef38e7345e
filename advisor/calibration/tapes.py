"""Tapes: hooks that sum what passes through a block's linears while they are open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from advisor.calibration.moments import SecondMoment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
        self, model: nn.Module, linears: Sequence[LinearSpec], device: torch.device
    ) -> None:
        """Hook the first linear of every input group.

        Args:
            model: The model that runs.
            linears: Linears whose inputs are summed.
            device: Where the inputs will be.
        """
        super().__init__()
        self._moments: dict[str, SecondMoment] = {}
        self._maxima: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        for linear in linears:
            group = linear.input_group
            if group in self._moments:
                continue
            self._moments[group] = SecondMoment(linear.in_features, device)
            self._maxima[group] = torch.zeros(linear.in_features, device=device)
            self._sums[group] = torch.zeros(linear.in_features, device=device)
            module = model.get_submodule(linear.name)
            self._handles.append(module.register_forward_pre_hook(self._hook(group)))

    def _hook(self, group: str) -> Any:
        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).to(torch.float32)
            self._moments[group].add(rows)
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
            taken[f"{group}/maximum"] = self._maxima[group].cpu().clone()
            taken[f"{group}/sum"] = self._sums[group].cpu().clone()
            self._maxima[group].zero_()
            self._sums[group].zero_()
        return taken


class LatestInputs(_Tape):
    """The inputs that the last run gave to linears, once per group."""

    def __init__(self, model: nn.Module, linears: Sequence[LinearSpec]) -> None:
        """Hook the first linear of every input group."""
        super().__init__()
        self._rows: dict[str, Tensor] = {}
        for group, linear in {linear.input_group: linear for linear in linears[::-1]}.items():
            module = model.get_submodule(linear.name)
            self._handles.append(module.register_forward_pre_hook(self._hook(group)))

    def _hook(self, group: str) -> Any:
        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].detach()
            self._rows[group] = rows.reshape(-1, rows.shape[-1]).to(torch.float32)

        return record

    def take(self) -> dict[str, Tensor]:
        """Return group -> float32 [tokens, in], and forget them."""
        taken, self._rows = self._rows, {}
        return taken


class GradientTape(_Tape):
    """Sums of the gradients at the outputs of linears: G, or its diagonal."""

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
        for linear in linears:
            if full[linear.name]:
                self._moments[linear.name] = SecondMoment(linear.out_features, device)
            else:
                self._diagonals[linear.name] = torch.zeros(linear.out_features, device=device)
            module = model.get_submodule(linear.name)
            self._handles.append(module.register_forward_hook(self._hook(linear.name)))

    def _hook(self, name: str) -> Any:
        def record(gradient: Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1]).to(torch.float32)
            if name in self._moments:
                self._moments[name].add(rows)
            else:
                self._diagonals[name] += rows.square().sum(0)

        def watch(_module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(record)  # type: ignore[no-untyped-call]

        return watch

    def take(self) -> dict[str, Tensor]:
        """Return the sums by linear: packed moments, or diagonals."""
        taken = {name: moment.take() for name, moment in self._moments.items()}
        taken.update({name: diagonal.cpu().clone() for name, diagonal in self._diagonals.items()})
        return taken
