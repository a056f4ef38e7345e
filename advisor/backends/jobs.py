"""The job that a worker is given and the result that it leaves: the border between two worlds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from advisor.errors import BackendError
from advisor.plan.schema import Strict

if TYPE_CHECKING:
    from pathlib import Path

    from advisor.schemes import Scheme


class JobScheme(Strict):
    """A scheme with its parts, so that a worker need not parse names."""

    name: str
    method: str
    weight: str
    bits: float
    granularity: str
    group_size: int | None
    symmetric: bool | None
    activation_order: bool
    activation: str | None
    double_quantization: bool


class Job(Strict):
    """What a worker is to do."""

    job_version: Literal[1] = 1
    backend: str
    model: str
    """Folder of the 16-bit model."""
    output: str
    """Folder that the library saves to."""
    result: str
    """File that the result goes to."""
    scheme: JobScheme
    options: tuple[JobScheme, ...] = ()
    """What the library may choose beside the scheme, module by module."""
    together: tuple[tuple[str, ...], ...] = ()
    """Modules that must share a scheme, where it chooses."""
    tokens: str | None
    """File with the calibration tokens: a JSON list of equally long lists of ids."""
    settings: dict[str, bool | int | float | str]
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(ge=1)
    seed: int = Field(ge=0)


class JobResult(Strict):
    """What a worker says of the checkpoint that it left."""

    result_version: Literal[1]
    backend: str
    version: str
    versions: dict[str, str]
    seconds: float = Field(ge=0)
    """Wall time from the finished start of the interpreter to the saved checkpoint."""
    peak_memory_bytes: int | None
    """Largest resident size of the process; None where the system does not say."""
    notes: tuple[str, ...] = ()


def job_scheme(scheme: Scheme) -> JobScheme:
    """Return a scheme as a job holds it."""
    return JobScheme(
        name=str(scheme),
        method=scheme.method,
        weight=scheme.weight,
        bits=scheme.bits,
        granularity=scheme.granularity,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        activation_order=scheme.activation_order,
        activation=scheme.activation,
        double_quantization=scheme.double_quantization,
    )


def read_result(path: Path, backend: str) -> JobResult:
    """Read a worker's result.

    Raises:
        BackendError: There is none, or it is not of that form.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        result = JobResult.model_validate(document)
    except FileNotFoundError:
        raise BackendError(f"{backend} ended without a result.") from None
    except (OSError, ValueError, ValidationError) as error:
        detail = str(error).splitlines()[0]
        raise BackendError(f"{backend} left a result that cannot be read: {detail}.") from error
    if result.backend != backend:
        raise BackendError(f"{backend} left a result of {result.backend}.")
    return result
