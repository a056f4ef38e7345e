"""The backends: other libraries that quantize, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from advisor.errors import InputError, did_you_mean

_REQUIREMENTS = Path(__file__).parent / "requirements"


@dataclass(frozen=True, slots=True)
class Backend:
    """One library.

    Attributes:
        name: Its name on the package index.
        module: What to import.
        makes: Methods whose checkpoints it writes.
        needs: What it runs on, in words.
        cuda_only: Whether it quantizes on CUDA devices only.
        no_isolation: Whether it builds against an installed torch, which then comes first.
    """

    name: str
    module: str
    makes: tuple[str, ...]
    needs: str
    cuda_only: bool = False
    no_isolation: bool = False

    @property
    def requirements(self) -> Path:
        """The pinned requirements that come with Advisor."""
        return _REQUIREMENTS / f"{self.name}.txt"


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("gptqmodel", "gptqmodel", ("gptq", "awq"), "CPU (GPTQ), CUDA", no_isolation=True),
        Backend(
            "llmcompressor", "llmcompressor", ("gptq", "rtn", "smoothquant", "fp8"), "CPU, CUDA"
        ),
        Backend("bitsandbytes", "bitsandbytes", ("bnb", "llm.int8"), "CPU, CUDA"),
        Backend("hqq", "hqq", ("hqq",), "CPU, CUDA"),
        Backend("auto-round", "auto_round", ("autoround",), "CPU, CUDA"),
        Backend("auto-gptq", "auto_gptq", ("gptq",), "CUDA; transformers 4.51", cuda_only=True),
        Backend("autoawq", "awq", ("awq",), "CUDA; transformers 4.51", cuda_only=True),
    )
}


def get_backend(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        InputError: Unknown backend.
    """
    backend = BACKENDS.get(name.strip().lower())
    if backend is None:
        raise InputError(
            f"unknown backend {name!r}: use one of {', '.join(BACKENDS)}."
            f"{did_you_mean(name, BACKENDS)}"
        )
    return backend
