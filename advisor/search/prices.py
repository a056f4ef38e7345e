"""What options cost: the exact bytes that a module, an embedding or a head adds to a checkpoint."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

from advisor.predict.gguf_types import row_bytes
from advisor.predict.size import SizeEstimate, checkpoint_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from advisor.modelspec import LinearSpec, ModelSpec
    from advisor.modelspec.outer import OuterModule
    from advisor.schemes import Scheme


class Prices:
    """Bytes of options, for one model and format."""

    def __init__(self, spec: ModelSpec, format_name: str, linears: Sequence[LinearSpec]) -> None:
        """Prepare.

        Args:
            spec: The model's tensors.
            format_name: Of the checkpoint.
            linears: The model's quantizable modules.
        """
        self._spec = spec
        self._format = format_name
        self._linears = linears
        self._shape = lru_cache(maxsize=None)(self._of_shape)
        self._outer = lru_cache(maxsize=None)(self._of_outer)

    def checkpoint(self, assignment: Mapping[str, Scheme]) -> SizeEstimate:
        """Return the exact size of a checkpoint."""
        quantized = {name: scheme for name, scheme in assignment.items() if scheme.is_quantized}
        return checkpoint_size(self._spec, quantized, self._format)

    def beside(self, ends: Mapping[str, Scheme], modules: Sequence[OuterModule]) -> int:
        """Return the bytes of a checkpoint beside what is allocated.

        Args:
            ends: Schemes of embedding and head, where those are allocated too.
            modules: They.
        """
        whole = checkpoint_size(self._spec, ends, self._format)
        allocated = sum(self.outer(module, ends[module.name]) for module in modules)
        unquantized = sum(self._width(linear.name) * linear.parameters for linear in self._linears)
        return whole.total_bytes - allocated - unquantized

    def module(self, linear: LinearSpec, scheme: Scheme) -> int:
        """Return what a linear adds to the file."""
        return self._shape(
            scheme, linear.in_features, linear.out_features, len(linear.name),
            self._width(linear.name),
        )  # fmt: skip

    def outer(self, module: OuterModule, scheme: Scheme) -> int:
        """Return what an embedding or a head adds to the file."""
        return self._outer(module, scheme)

    def extremes(
        self,
        modules: Iterable[tuple[Sequence[LinearSpec], Sequence[Scheme]]],
        ends: Iterable[tuple[OuterModule, Sequence[Scheme]]],
    ) -> tuple[SizeEstimate, SizeEstimate]:
        """Return the sizes of the smallest checkpoint and of the largest.

        Args:
            modules: Linears that share a scheme, and the schemes that they may have.
            ends: The same of embedding and head.
        """
        least: dict[str, Scheme] = {}
        most: dict[str, Scheme] = {}
        for members, schemes in modules:
            price = partial(self.module, members[0])
            low, high = min(schemes, key=price), max(schemes, key=price)
            least |= {linear.name: low for linear in members}
            most |= {linear.name: high for linear in members}
        for module, schemes in ends:
            price = partial(self.outer, module)
            least[module.name] = min(schemes, key=price)
            most[module.name] = max(schemes, key=price)
        return self.checkpoint(least), self.checkpoint(most)

    def _width(self, module: str) -> int:
        """Return the bytes of each weight of a module that stays as it is; GGUF's are 16-bit."""
        return 2 if self._format == "gguf" else self._spec.widths.get(f"{module}.weight", 2)

    def _of_outer(self, module: OuterModule, scheme: Scheme) -> int:
        linear = module.linear
        plain = self._width(module.name) * linear.parameters
        if not scheme.is_quantized:
            return plain
        if scheme.method == "gguf":
            return linear.out_features * row_bytes(scheme.weight, linear.in_features)
        return max(0, plain + self._growth(module.name, scheme))

    def _of_shape(
        self, scheme: Scheme, inputs: int, outputs: int, characters: int, width: int
    ) -> int:
        """Return what a linear of this shape, length of name and width adds to the file."""
        if not scheme.is_quantized:
            return width * inputs * outputs
        if scheme.method == "gguf":  # the embedding's type would change with a single module
            return outputs * row_bytes(scheme.weight, inputs)
        linear = next(
            m
            for m in self._linears
            if (m.in_features, m.out_features, len(m.name), self._width(m.name))
            == (inputs, outputs, characters, width)
        )
        return max(0, width * inputs * outputs + self._growth(linear.name, scheme))

    def _growth(self, name: str, scheme: Scheme) -> int:
        """Return by how many bytes a file grows, or shrinks, with one module quantized."""
        plain = checkpoint_size(self._spec, {}, self._format).total_bytes
        return checkpoint_size(self._spec, {name: scheme}, self._format).total_bytes - plain
