"""Let a model whose weights lie in 16 bits compute in float32, one part at a time.

A part is a block, or a module outside the blocks that has parameters of its own (embedding, final
norm, head). While a part runs, its parameters are what it computes with: float32 copies of the
stored ones, or other values that were put in their place (a quantized weight, dequantized). When
it is done they are the stored ones again. So memory holds one part in float32, whatever runs the
model: :class:`advisor.models.blocks.BlockRunner`, or its own ``forward``.

Where the model computes on another device than the CPU, stored parameters stay where they are, and
a part's copies are made on the device: it holds one part, too. 16-bit values are moved before they
are cast, so that half as many bytes pass.

Works for any tree of modules: nothing here knows what a block is made of.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from advisor.models.architectures import ARCHITECTURES
from advisor.models.inspect import find_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from advisor.models.mapped import MappedWeights

_ATTRIBUTE = "advisor_casting"
_CAST_AT_ONCE = 1 << 21
"""Values of a mapped tensor that are cast before their pages are dropped."""


@dataclass(slots=True)
class _Held:
    """A parameter that computes: its stored value, and how many want it so."""

    stored: Tensor
    count: int = 1


class Casting:
    """What a model's parameters become while they compute.

    Attributes:
        dtype: What the model computes in.
        device: Where it computes.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        mapped: MappedWeights | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Watch the parts of a model from now on.

        Args:
            model: Not watched yet.
            dtype: Parameters of narrower floating types are cast to it.
            mapped: The files that parameters are views of, if they are.
            device: Where the model is to compute; by default where its first parameter is.
        """
        self.dtype = dtype
        self.device = device or next(model.parameters()).device
        self._mapped = mapped
        self._replaced: dict[Tensor, Callable[[], Tensor]] = {}
        self._held: dict[Tensor, _Held] = {}
        self._versions: dict[Tensor, int] = {}
        for parameter in model.parameters():
            self._versions[parameter] = parameter._version
        self._idle: frozenset[nn.Module] = frozenset()
        for module, recurse in _parts(model):
            module.register_forward_pre_hook(self._before(recurse))
            module.register_forward_hook(self._after(recurse), always_call=True)

    def read(self, parameter: Tensor, device: torch.device | None = None) -> Tensor:
        """Return a stored parameter in the type that is computed in; not to be written to.

        Args:
            parameter: Which one.
            device: Where it is wanted; by default where the model computes.
        """
        stored = self.stored(parameter)
        value = self._cast(parameter, stored, device or self.device)
        self._release(parameter, stored)
        return value

    def stored(self, parameter: Tensor) -> Tensor:
        """Return a parameter as it is stored, whether or not it computes now."""
        held = self._held.get(parameter)
        return parameter.detach() if held is None else held.stored

    def release(self, parameter: Tensor) -> None:
        """Drop a stored parameter's pages from memory, if it is mapped and was not changed."""
        self._release(parameter, self.stored(parameter))

    @contextmanager
    def hold(self, *modules: nn.Module) -> Iterator[None]:
        """Let modules stay ready to compute, with all that is below them, between their calls."""
        taken: list[Tensor] = []
        try:
            for module in modules:
                for tensor in module.parameters():
                    self._take(tensor)
                    taken.append(tensor)
            yield
        finally:
            for parameter in taken:
                self._give_back(parameter)

    @contextmanager
    def replace(self, values: Mapping[Tensor, Callable[[], Tensor]]) -> Iterator[None]:
        """Compute with other values for a while.

        Args:
            values: By parameter: makes its value, each time that its part is about to run.

        Raises:
            RuntimeError: A parameter is held or replaced already.
        """
        if any(parameter in self._held or parameter in self._replaced for parameter in values):
            raise RuntimeError("a parameter that computes or is replaced cannot be replaced")
        self._replaced.update(values)
        try:
            yield
        finally:
            for parameter in values:
                del self._replaced[parameter]

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute in another type for a while: with 16-bit weights as they are, where it is theirs.

        Raises:
            RuntimeError: A parameter is held, in the type that is computed in now.
        """
        if self._held:
            raise RuntimeError("the type to compute in cannot change while parameters are held")
        before, self.dtype = self.dtype, dtype
        try:
            yield
        finally:
            self.dtype = before

    @contextmanager
    def idle(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Cast nothing when these parts are called: their ``forward`` does not compute."""
        before, self._idle = self._idle, frozenset(modules)
        try:
            yield
        finally:
            self._idle = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Casting:
        """Return itself: the hooks of a copied model are those of the model."""
        return self

    def _before(self, recurse: bool) -> Any:
        def take(module: nn.Module, _arguments: Any) -> None:
            if module not in self._idle:
                for parameter in module.parameters(recurse):
                    self._take(parameter)

        return take

    def _after(self, recurse: bool) -> Any:
        def give_back(module: nn.Module, _arguments: Any, _output: Any) -> None:
            if module not in self._idle:
                for parameter in module.parameters(recurse):
                    self._give_back(parameter)

        return give_back

    def _take(self, parameter: Tensor) -> None:
        held = self._held.get(parameter)
        if held is not None:
            held.count += 1
            return
        stored = parameter.data
        make = self._replaced.get(parameter)
        if make is None:
            value = self._cast(parameter, stored, self.device)
        else:
            value = make().detach().to(self.device).to(self.dtype)
        self._held[parameter] = _Held(stored)
        if value is not stored:
            parameter.data = value
            self._release(parameter, stored)

    def _give_back(self, parameter: Tensor) -> None:
        held = self._held.get(parameter)
        if held is None:  # taking it failed, which is the error to be seen
            return
        held.count -= 1
        if held.count == 0:
            parameter.data = held.stored
            self._release(parameter, held.stored)
            del self._held[parameter]

    def _cast(self, parameter: Tensor, stored: Tensor, device: torch.device) -> Tensor:
        """Return a value on a device, in the type that is computed in; a wider one keeps its own.

        Of a large mapped tensor, an embedding or a head, both are never in memory whole.
        """
        narrow = stored.is_floating_point() and stored.dtype.itemsize < self.dtype.itemsize
        dtype = self.dtype if narrow else stored.dtype
        if not narrow and stored.device == device:
            return stored
        mapped = self._mapped if self._is_as_stored(parameter) else None
        if mapped is None or stored.numel() <= _CAST_AT_ONCE or not stored.is_contiguous():
            return stored.to(device).to(dtype)
        value = torch.empty(stored.shape, dtype=dtype, device=device)
        source, target = stored.view(-1), value.view(-1)
        for start in range(0, len(source), _CAST_AT_ONCE):
            stop = min(start + _CAST_AT_ONCE, len(source))
            target[start:stop] = source[start:stop].to(device)
            mapped.release(stored, start * stored.itemsize, stop * stored.itemsize)
        return value

    def _is_as_stored(self, parameter: Tensor) -> bool:
        """Whether nobody has written to a parameter."""
        return parameter._version == self._versions.get(parameter)

    def _release(self, parameter: Tensor, stored: Tensor) -> None:
        """Drop the pages of a stored value, unless someone has written to it."""
        if self._mapped is not None and self._is_as_stored(parameter):
            self._mapped.release(stored)


def _parts(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Yield every part and whether all below it belongs to it.

    A model of an unknown architecture has no blocks, only modules.
    """
    blocks = find_blocks(model) if type(model).__name__ in ARCHITECTURES else []
    inside = {module for block in blocks for module in block.modules()}
    for block in blocks:
        yield block, True
    for module in model.modules():
        if module not in inside and any(True for _ in module.parameters(recurse=False)):
            yield module, False


def casting_of(model: nn.Module) -> Casting:
    """Return what watches a model; one that nothing watches yet computes as it is."""
    found = getattr(model, _ATTRIBUTE, None)
    if isinstance(found, Casting):
        return found
    return watch(model, next(model.parameters()).dtype)


def watch(
    model: nn.Module,
    dtype: torch.dtype,
    mapped: MappedWeights | None = None,
    device: torch.device | None = None,
) -> Casting:
    """Watch a model from now on, see :class:`Casting`."""
    casting = Casting(model, dtype, mapped, device)
    setattr(model, _ATTRIBUTE, casting)
    return casting
