"""The backends: other libraries that quantize, what each makes, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from advisor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advisor.schemes import Granularity

_HERE = Path(__file__).parent
Setting = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Makes:
    """Schemes that a backend makes: any of these values together.

    Attributes:
        method: The method.
        format: Format of the checkpoint.
        weights: Data types of weights.
        granularities: What one scale may cover.
        symmetric: Kinds of grid; None where the data type has no choice.
        activations: Data types of inputs; None for 16-bit.
        activation_order: Whether GPTQ's act-order may be asked for.
        double_quantization: Whether scales may be quantized too.
        needs_text: Whether it looks at calibration text.
        cuda_only: Whether it does this on CUDA devices only.
    """

    method: str
    format: str
    weights: tuple[str, ...]
    granularities: tuple[Granularity, ...] = ("group", "channel")
    symmetric: tuple[bool | None, ...] = (True, False)
    activations: tuple[str | None, ...] = (None,)
    activation_order: bool = False
    double_quantization: bool = False
    needs_text: bool = True
    cuda_only: bool = False


@dataclass(frozen=True, slots=True)
class Backend:
    """One library.

    Attributes:
        name: Its name on the package index.
        module: What to import.
        makes: What it makes.
        needs: What it runs on, in words.
        settings: Its own settings that a user may change, with the values that it has here.
        cuda_only: Whether it quantizes on CUDA devices only.
        no_isolation: Whether it builds against an installed torch, which then comes first.
        pythons: Oldest and newest Python that its lock file is for.
        remark: What is known of its results, in a sentence, or an empty string.
    """

    name: str
    module: str
    makes: tuple[Makes, ...]
    needs: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    cuda_only: bool = False
    no_isolation: bool = False
    pythons: tuple[tuple[int, int], tuple[int, int]] = ((3, 11), (3, 13))
    remark: str = ""

    @property
    def requirements(self) -> Path:
        """The lock file that comes with Advisor: every package pinned and hashed."""
        return _HERE / "requirements" / f"{self.name}.txt"

    @property
    def worker(self) -> Path:
        """The script that does the work inside the library's environment."""
        return _HERE / "workers" / f"worker_{self.name.replace('-', '_')}.py"

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods whose checkpoints it writes."""
        return tuple(dict.fromkeys(one.method for one in self.makes))


_CT = "compressed-tensors"
_GPTQ_BITS = ("int2", "int3", "int4", "int8")
_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
_EIGHT_BITS = Makes("smoothquant", _CT, ("int8",), ("channel",), (True,), ("int8",))
_NO_CHOICE: tuple[None, ...] = (None,)

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "gptqmodel",
            "gptqmodel",
            (
                Makes("gptq", "gptq", _GPTQ_BITS, activation_order=True),
                Makes("awq", "awq", ("int4",), ("group",), (False,), cuda_only=True),
            ),
            "CPU (GPTQ), CUDA",
            {"damp_percent": 0.05, "act_group_aware": True, "mse": 0.0},
            no_isolation=True,
        ),
        Backend(
            "llmcompressor",
            "llmcompressor",
            (
                Makes("gptq", _CT, _INTEGERS),
                Makes("gptq", _CT, ("int8",), ("channel",), (True,), ("int8",)),
                Makes("awq", _CT, ("int4", "int8")),
                _EIGHT_BITS,
                Makes("rtn", _CT, _INTEGERS, needs_text=False),
                Makes("rtn", _CT, ("int8",), ("channel",), (True,), ("int8",), needs_text=False),
                Makes(
                    "rtn", _CT, ("fp8",), ("channel",), _NO_CHOICE, (None, "fp8"), needs_text=False
                ),
            ),
            "CPU, CUDA",
            {
                "dampening_frac": 0.01,
                "block_size": 128,
                "actorder": "static",
                "n_grid": 20,
                "duo_scaling": "true",
                "smoothing_strength": 0.5,
            },
        ),
        Backend(
            "bitsandbytes",
            "bitsandbytes",
            (
                Makes(
                    "bnb", "bitsandbytes", ("nf4", "fp4"), ("none",), _NO_CHOICE,
                    double_quantization=True, needs_text=False,
                ),
                Makes(
                    "llm.int8", "bitsandbytes", ("int8",), ("none",), _NO_CHOICE, needs_text=False
                ),
            ),
            "CPU, CUDA",
            {"int8_threshold": 6.0},
        ),
        Backend(
            "hqq",
            "hqq",
            (Makes("hqq", "safetensors", _GPTQ_BITS, ("group",), (False,), needs_text=False),),
            "CPU, CUDA",
            remark="HQQ's zero points are fractions, which no format that servers share can hold: "
            "the weights are written back in 16 bits",
        ),
        Backend(
            "auto-round",
            "auto_round",
            (Makes("autoround", "gptq", _GPTQ_BITS),),
            "CPU (slow), CUDA",
            # lr 0 is its own choice, 1 / iters; its light recipe is iters=50 with lr=0.005.
            # target_bits and options: AutoScheme chooses among the scheme and the options.
            {"iters": 200, "lr": 0.0, "batch_size": 8, "target_bits": 0.0, "options": ""},
        ),
        Backend(
            "auto-gptq",
            "auto_gptq",
            (Makes("gptq", "gptq", _GPTQ_BITS, activation_order=True),),
            "CUDA; Python 3.11, transformers 4.51",
            {"damp_percent": 0.01, "static_groups": False},
            cuda_only=True,
            pythons=((3, 11), (3, 11)),
        ),
        Backend(
            "autoawq",
            "awq",
            (Makes("awq", "awq", ("int4",), ("group",), (False,)),),
            "CUDA; transformers 4.51",
            {"duo_scaling": True, "apply_clip": True},
            cuda_only=True,
            pythons=((3, 11), (3, 12)),
        ),
    )
}  # fmt: skip


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
