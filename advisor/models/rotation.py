"""Rotate the residual stream of a decoder, folded into its weights: no kernel knows of it.

RMSNorm without its weight commutes with an orthogonal R: norm(x R) = norm(x) R. So norm weights
are folded into the linears that read them, the embedding and every linear that writes into the
stream put out x R, and every linear that reads it, the head too, undoes R. The function stays;
outliers of single channels are spread over all of them, which suits coarse grids.

The statistics of a rotated model follow in closed form, without a forward pass: for a norm's
weight w, inputs x become Rᵀ (x / w), so H becomes Rᵀ D⁻¹ H D⁻¹ R with D = diag(w); output
gradients of what writes into the stream become Rᵀ g, so G becomes Rᵀ G R.

Head and embedding differ after rotation, as the final norm's weight is folded into the head
alone. A model with a tied head would have to store both; it is refused, with what that costs.

Measured on SmolLM2-135M (re-parameterised, its head untied for this; 32×256 calibration and 16×128
evaluation tokens of the built-in text; seed 0), KL in nats per token, plain and rotated:

    GPTQ int4 g64 symmetric, static groups    0.155 [0.138, 0.171]    0.109 [0.094, 0.123]
    GPTQ int4 g32 symmetric, static groups    0.122 [0.108, 0.135]    0.086 [0.073, 0.100]
    rounding, int4 g64 symmetric              0.501 [0.453, 0.549]    0.942 [0.861, 1.024]

So it may lower GPTQ's error by three tenths, and it may double that of rounding, which loses that
the channels that matter were few: it is one option of a search that scores and measures it.
Untying this model's head would cost 56.6 MB beside some 113 MB of everything else, for which a
mixture buys far more: hence tied heads are refused.

Reference: QuaRot, arXiv:2404.00456, section 4 (stage 1a); SpinQuant, arXiv:2405.16406 (R1);
SliceGPT, arXiv:2401.15024, theorem 1 (invariance). Differs from them: no rotation is applied at
run time, and where the width has no Hadamard matrix of order 2^k the odd factor's is replaced by a
random orthogonal one (Kronecker product).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from advisor.errors import InputError
from advisor.models.casting import casting_of
from advisor.models.inspect import architecture_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from advisor.models.architectures import Architecture
    from advisor.modelspec import LinearSpec

HADAMARD = "hadamard"
NONE = "none"
ROTATIONS = (NONE, HADAMARD)
_VALUES_AT_ONCE = 1 << 24
_SMALLEST_SHARE = 1e-8
"""Of the largest norm weight, below which a channel cannot be read back from the statistics."""


@lru_cache(maxsize=2)
def rotation_matrix(size: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix whose entries are all about as large, float64; shared.

    A Hadamard matrix of the largest power of two in ``size``, Kronecker a random orthogonal matrix
    of what is left, rows with random signs.

    Args:
        size: Of the residual stream.
        seed: Of the signs, and of the orthogonal factor.
    """
    power = size & -size
    generator = torch.Generator().manual_seed(seed)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        top = torch.cat([hadamard, hadamard], 1)
        hadamard = torch.cat([top, torch.cat([hadamard, -hadamard], 1)])
    rest = torch.randn(size // power, size // power, generator=generator, dtype=torch.float64)
    orthogonal, triangle = torch.linalg.qr(rest)
    orthogonal = (orthogonal * triangle.diagonal().sign()).contiguous()
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    return signs[:, None] * torch.kron(orthogonal, hadamard / power**0.5)


def rotation_problem(model: nn.Module) -> str | None:
    """Return why a model cannot be rotated, or None."""
    architecture = architecture_of(model)
    if not architecture.writers:
        return f"{type(model).__name__} normalises what its blocks put out: nothing folds there"
    embedding = model.get_parameter(f"{architecture.embedding}.weight")
    if embedding is model.get_parameter(f"{architecture.head}.weight"):
        return (
            "embedding and head are one tensor, which a rotation makes two: "
            f"{2 * embedding.numel() / 1e6:.1f} MB more in 16 bits"
        )
    for name in _norms(model, architecture):
        weight = (_parameter(model, f"{name}.weight") + architecture.norm_offset).abs()
        if float(weight.min()) <= _SMALLEST_SHARE * float(weight.max()):
            return f"{name} has weights next to zero, which cannot be divided by"
    return None


def _norms(model: nn.Module, architecture: Architecture) -> Iterator[str]:
    """Yield the norms that read the stream, the final one last."""
    folds = [fold.producer for fold in architecture.folds if fold.kind == "norm"]
    for index in range(len(list(model.get_submodule(architecture.blocks).children()))):
        yield from (f"{architecture.blocks}.{index}.{name}" for name in folds)
    yield architecture.final_norm


def _parameter(model: nn.Module, name: str) -> Tensor:
    """Return a parameter in float64, where the model computes."""
    casting = casting_of(model)
    return casting.stored(model.get_parameter(name)).to(casting.device).to(torch.float64)


@dataclass(frozen=True)
class Rotation:
    """A rotation of one model; the model itself is never modified.

    Attributes:
        model: The unquantized model.
        seed: Of the matrix.
    """

    model: nn.Module
    seed: int

    def __post_init__(self) -> None:
        """Refuse a model that cannot be rotated.

        Raises:
            InputError: See :func:`rotation_problem`.
        """
        if (problem := rotation_problem(self.model)) is not None:
            raise InputError(f"rotation={HADAMARD!r} is not possible here: {problem}.")

    @cached_property
    def matrix(self) -> Tensor:
        """R, float64 [hidden, hidden], where the model computes; the stream x becomes x R."""
        config: Any = self.model.config
        made = rotation_matrix(int(config.hidden_size), self.seed)
        return made.to(casting_of(self.model).device)

    @cached_property
    def _architecture(self) -> Architecture:
        return architecture_of(self.model)

    def _norm_of(self, linear: LinearSpec) -> str | None:
        """Return the norm whose output a linear reads, or None."""
        prefix = f"{self._architecture.blocks}.{linear.block}."
        for fold in self._architecture.folds:
            if fold.kind == "norm" and prefix + fold.input_group == linear.input_group:
                return prefix + fold.producer
        return None

    def _writes(self, linear: LinearSpec) -> bool:
        prefix = f"{self._architecture.blocks}.{linear.block}."
        return linear.name.removeprefix(prefix) in self._architecture.writers

    def _scale(self, norm: str) -> Tensor:
        """Return what a norm multiplies by, float64 [hidden]."""
        return _parameter(self.model, f"{norm}.weight") + self._architecture.norm_offset

    def weight(self, linear: LinearSpec) -> Tensor:
        """Return a linear's weight in the rotated model, float32 [out, in]."""
        found = _parameter(self.model, f"{linear.name}.weight")
        if (norm := self._norm_of(linear)) is not None:
            found = (found * self._scale(norm)) @ self.matrix
        if self._writes(linear):
            found = self.matrix.T @ found
        return found.to(torch.float32)

    def inputs(self, linear: LinearSpec, rows: Tensor) -> Tensor:
        """Return what a linear reads in the rotated model for what it reads in the original.

        Args:
            linear: Any linear that reads the input.
            rows: Shape [tokens, in].
        """
        norm = self._norm_of(linear)
        if norm is None:
            return rows
        turn = self.matrix / self._scale(norm)[:, None]
        return rows @ turn.to(rows)

    def second_moment(self, linear: LinearSpec, moment: Tensor) -> Tensor:
        """Return Σ x xᵀ of the inputs that the linear has in the rotated model, float32."""
        norm = self._norm_of(linear)
        if norm is None:
            return moment
        turn = (self.matrix / self._scale(norm)[:, None]).to(moment.device)
        found = turn.T @ moment.double() @ turn
        return (0.5 * (found + found.T)).float()

    def gradient_moment(self, linear: LinearSpec, moment: Tensor) -> Tensor:
        """Return Σ g gᵀ of the linear's outputs in the rotated model, float32.

        Of a diagonal alone, the diagonal of what it becomes, the rest taken as zero.
        """
        if not self._writes(linear):
            return moment
        turn = self.matrix.to(moment.device)
        if moment.ndim == 1:
            return (moment.double() @ turn.square()).float()
        return (turn.T @ moment.double() @ turn).float()

    def stream(self, hidden: Tensor) -> Tensor:
        """Return the rotated stream, [..., hidden]."""
        return hidden @ self.matrix.to(hidden)

    def block(self, linears: tuple[LinearSpec, ...], block: int) -> dict[str, Tensor]:
        """Return every tensor of one block that the rotation changes, float32.

        Args:
            linears: All of the model's.
            block: Its number.
        """
        found = {}
        for linear in linears:
            if linear.block != block:
                continue
            found[f"{linear.name}.weight"] = self.weight(linear)
            bias = getattr(self.model.get_submodule(linear.name), "bias", None)
            if bias is not None and self._writes(linear):
                turned = self.matrix.T @ _parameter(self.model, f"{linear.name}.bias")
                found[f"{linear.name}.bias"] = turned.float()
            if (norm := self._norm_of(linear)) is not None:
                found[f"{norm}.weight"] = self._plain_norm(norm)
        return found

    def outer(self) -> dict[str, Tensor]:
        """Return embedding, final norm and head of the rotated model, float32, in host memory."""
        layout = self._architecture
        embedding, head = f"{layout.embedding}.weight", f"{layout.head}.weight"
        folded = self._scale(layout.final_norm)[:, None] * self.matrix
        return {
            embedding: self._turned_rows(embedding, self.matrix),
            f"{layout.final_norm}.weight": self._plain_norm(layout.final_norm).cpu(),
            head: self._turned_rows(head, folded),
        }

    def _turned_rows(self, name: str, turn: Tensor) -> Tensor:
        """Return a tensor of many rows times a matrix, some rows at a time."""
        stored = casting_of(self.model).stored(self.model.get_parameter(name))
        parts = torch.split(stored, max(1, _VALUES_AT_ONCE // stored.shape[1]))
        return torch.cat([(part.to(turn.device).double() @ turn).float().cpu() for part in parts])

    def tensors(self, linears: tuple[LinearSpec, ...]) -> dict[str, Tensor]:
        """Return every tensor of the model that the rotation changes, float32."""
        found = self.outer()
        for block in sorted({linear.block for linear in linears}):
            found |= self.block(linears, block)
        return found

    def _plain_norm(self, norm: str) -> Tensor:
        """Return the stored weight of a norm that multiplies by one."""
        weight = self.model.get_parameter(f"{norm}.weight")
        value = 1.0 - self._architecture.norm_offset
        return torch.full(weight.shape, value, device=self.matrix.device)


def rotation_of(model: nn.Module, kind: str, seed: int) -> Rotation | None:
    """Return the rotation that settings name, or None for none.

    Raises:
        InputError: There is no such rotation, or the model cannot be rotated.
    """
    if kind not in ROTATIONS:
        raise InputError(f"rotation must be one of {', '.join(ROTATIONS)}, but got {kind!r}.")
    return Rotation(model, seed) if kind == HADAMARD else None
