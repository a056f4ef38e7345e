"""What every checkpoint format does, and what they share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from advisor.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.schemes import Scheme

HEAD = "lm_head"
_COARSEST, _NEGLIGIBLE = 0.05, 1e-6
"""Of a scale, what a cast may change; and of the median, which do not matter."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
FUSED_ALIASES: tuple[tuple[str, frozenset[str]], ...] = (
    ("qkv_proj", frozenset({"q_proj", "k_proj", "v_proj"})),
    ("gate_up_proj", frozenset({"gate_proj", "up_proj"})),
)
"""Modules that engines load as one, and the name under which they then look for its rules."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a checkpoint's header says of one tensor.

    Attributes:
        shape: Its shape.
        dtype: Its data type as safetensors names it: ``BF16``, ``I32``, ``F8_E4M3``, ... or a
            GGUF block type.
        stored_bytes: Bytes of its data, where shape and type do not say (GGUF).
    """

    shape: tuple[int, ...]
    dtype: str
    stored_bytes: int | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        return math.prod(self.shape) * _BITS.get(self.dtype, 8) // 8


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors of a checkpoint, and how to read one.

    Attributes:
        headers: Header of every tensor, by name.
        load: Returns one tensor by name.
    """

    headers: Mapping[str, TensorHeader]
    load: Callable[[str], Tensor]

    def modules_with(self, suffixes: Sequence[str]) -> tuple[str, ...]:
        """Return, sorted, the modules that have a tensor of any of these names."""
        found = set()
        for name in self.headers:
            for suffix in suffixes:
                if name.endswith(f".{suffix}"):
                    found.add(name[: -len(suffix) - 1])
        return tuple(sorted(found))


@dataclass(frozen=True, slots=True)
class Planned:
    """A weight that is yet to be made: all that decides whether a format can hold it.

    Attributes:
        scheme: Its scheme.
        shape: (out_features, in_features).
        consecutive: Whether its groups will be runs of neighbouring inputs.
    """

    scheme: Scheme
    shape: tuple[int, int]
    consecutive: bool = True


@dataclass(frozen=True, slots=True)
class Found:
    """Quantized modules of a checkpoint, as its loaders resolve them.

    Attributes:
        modules: Scheme by module path.
        problems: One complaint per fault, naming the module.
    """

    modules: Mapping[str, Scheme]
    problems: tuple[str, ...]


class CheckpointFormat(Protocol):
    """A format: a module with these names."""

    NAME: str
    SUFFIXES: tuple[str, ...]

    def problems(self, weights: Mapping[str, QuantizedWeight | Planned]) -> list[str]:
        """Return why these weights cannot be stored, one complaint per kind of offence."""
        ...

    def storage_scheme(self, scheme: Scheme) -> Scheme:
        """Return what can be read back of a scheme: everything but how codes were chosen."""
        ...

    def quantization_config(
        self, weights: Mapping[str, QuantizedWeight], unquantized: Sequence[str]
    ) -> dict[str, Any]:
        """Return ``quantization_config`` of config.json; ``unquantized`` linears stay 16-bit."""
        ...

    def companions(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return further JSON files that older loaders of the format read, by name."""
        ...

    def pack(
        self, name: str, weight: QuantizedWeight, config: Mapping[str, Any], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Return the stored tensors of one module, by full name."""
        ...

    def expects(self, name: str, config: Mapping[str, Any]) -> bool:
        """Return whether loaders expect a linear to be quantized, by the configuration alone."""
        ...

    def find_modules(self, config: Mapping[str, Any], stored: Stored) -> Found:
        """Resolve every module as the loaders do, and check the shapes of its tensors."""
        ...

    def unpack(
        self, name: str, scheme: Scheme, config: Mapping[str, Any], stored: Stored
    ) -> QuantizedWeight:
        """Return the weight of one module that :meth:`find_modules` found without fault."""
        ...


def exact_scales(scales: Tensor, dtype: torch.dtype, module: str) -> Tensor:
    """Return scales in the model's 16-bit data type, or another one that holds them exactly.

    Args:
        scales: float32.
        dtype: The model's data type. Beside float32 weights 16 bits are enough where they are
            exact: loaders cast. Where it is float16 they cast to that, whatever the file holds.
        module: Whose they are, for the message.

    Raises:
        InputError: The model computes in float16, which has no number near some scales.
    """
    if dtype == torch.float16:
        missed = ((scales.to(dtype).float() - scales).abs() > _COARSEST * scales.abs()) & (
            scales.abs() > _NEGLIGIBLE * scales.abs().median()  # groups of zeros have a scale of 1
        )
        if bool(missed.any()):
            raise InputError(
                f"{module}: the model computes in float16, which has no number near "
                f"{int(missed.sum())} of {scales.numel()} scales (first: "
                f"{float(scales[missed][0]):.1e}): loaders would change them. Keep this module in "
                "16 bits, or convert the model to bfloat16."
            )
    first = (dtype,) if dtype.itemsize == 2 else ()
    for candidate in (*first, torch.bfloat16, torch.float16):
        stored = scales.to(candidate)
        if torch.equal(stored.to(torch.float32), scales):
            return stored.contiguous()
    return scales.to(torch.float32).contiguous()


def is_consecutive(weight: QuantizedWeight | Planned) -> bool:
    """Return whether groups are runs of neighbouring inputs."""
    if isinstance(weight, Planned):
        return weight.consecutive
    if weight.group_index is None:
        return True
    width = weight.shape[1] // weight.scales.shape[1]
    usual = torch.arange(weight.shape[1], device=weight.group_index.device) // width
    return bool(torch.equal(weight.group_index.long(), usual))


def group_size_of(scheme: Scheme) -> int:
    """Return the group size as configuration files say it: -1 per channel."""
    return int(scheme.group_size or -1) if scheme.granularity == "group" else -1


def list_some(names: Sequence[str]) -> str:
    """Return how many modules are meant and the first of them."""
    return f"{len(names)} module{'s' if len(names) != 1 else ''} (first: {names[0]})"


def count_some(names: Sequence[str], one: str, many: str) -> str:
    """Return how many modules are meant and the first of them, with the verb that goes with it."""
    return f"{list_some(names)} {one if len(names) == 1 else many}"


def complain(complaints: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one line per rule broken: the rule, then how many modules break it."""
    return [f"{rule}, but {list_some(names)} cannot." for rule, names in complaints.items()]


def check_tensor(
    stored: Stored, module: str, suffix: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = ()
) -> str | None:
    """Return what is wrong with one tensor of a module, or None.

    Args:
        stored: The checkpoint.
        module: Path of the module.
        suffix: The tensor's name within it.
        shape: What its configuration and its neighbours demand.
        dtypes: Data types that loaders accept; empty for any floating type.
    """
    name = f"{module}.{suffix}"
    header = stored.headers.get(name)
    if header is None:
        return f"{module} has no {suffix}: the tensor {name!r} is missing."
    if header.shape != shape:
        return f"{module}: {suffix} has shape {list(header.shape)}, expected {list(shape)}."
    accepted = dtypes or ("F16", "BF16", "F32")
    if header.dtype not in accepted:
        return f"{module}: {suffix} is stored as {header.dtype}, expected {' or '.join(accepted)}."
    return None


def check_single(
    stored: Stored, module: str, suffix: str, dtypes: tuple[str, ...] = ()
) -> str | None:
    """Check a tensor of one number, with or without a dimension: loaders take both."""
    header = stored.headers.get(f"{module}.{suffix}")
    shape = () if header is not None and header.shape == () else (1,)
    return check_tensor(stored, module, suffix, shape, dtypes)


def first_fault(faults: Sequence[str | None], configured: str = "") -> list[str]:
    """Return a module's first fault with what the configuration says: the rest follow from it."""
    for fault in faults:
        if fault is not None:
            return [f"{fault.removesuffix('.')} ({configured})." if configured else fault]
    return []
