"""A candidate answer of a search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from advisor.plan.hashing import sha256_json
from advisor.search.families import Family, finishing_settings, relevant_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Mixture:
    """A candidate answer: a scheme for every module, and what is known of it without measuring.

    Attributes:
        name: The scheme's name where all modules share one, else ``mixed-<bits>bpw``.
        family: The settings that its scores belong to.
        assignment: Module path to scheme, every quantizable module named.
        size_bytes: Bytes of the checkpoint's weight files.
        bits_per_weight: Bits per quantizable weight, scales and zero points included.
        predicted_kl: Sum of the modules' scores, nats per token; 0 where nothing was scored.
        format_name: Checkpoint format where it is not that of the mixtures.
        backend: Library that makes it, where that is not Advisor.
        published_loss: Relative loss of perplexity to expect by published evidence, where nothing
            was scored.
    """

    name: str
    family: Family
    assignment: Mapping[str, Scheme]
    size_bytes: int
    bits_per_weight: float
    predicted_kl: float
    format_name: str | None = None
    backend: str | None = None
    published_loss: float | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether every module has the same scheme."""
        return not self.name.startswith("mixed-")

    def identity(self, settings: QuantizationSettings) -> str:
        """Return a hash of all that its codes depend on, the statistics aside."""
        used = sorted(set(map(str, self.assignment.values())))
        own = self.family.settings(settings)
        needs = {
            str(scheme): relevant_settings(scheme, own, self.family.samples)
            for scheme in set(self.assignment.values())
        }
        named = {name: str(scheme) for name, scheme in self.assignment.items()}
        content: dict[str, object] = {"modules": named, "settings": [needs[name] for name in used]}
        for scheme in set(self.assignment.values()):
            content |= finishing_settings(scheme, own)
        if self.backend is not None:
            content["backend"] = self.backend
        if own.sequential:
            content["sequential"] = [own.correction, own.correction_damping]
        return sha256_json(content)

    def sequentially(self) -> Mixture:
        """Return the same assignment with every block fitted to the quantized ones before it."""
        return replace(self, family=replace(self.family, sequential=True))
