"""Other libraries' checkpoints for the grid at equal bytes: which, and how each is made.

Groups of 128 are asked for where they divide every module's inputs; else groups of 64, then of 32,
take their place, at a quarter of a bit more.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from cpu_cost import cost
from equal_bytes import weight_bytes

from advisor.backends.environments import environment_of, python_of
from advisor.backends.quantizing import Request, quantize
from advisor.backends.registry import get_backend
from advisor.formats.export import write_checkpoint
from advisor.formats.gguf import from_blocks
from advisor.predict.gguf_types import module_types
from advisor.schemes import parse_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel
    from advisor.modelspec import LinearSpec

AUTO_SCHEME, LLAMA_CPP = "AutoScheme", "llama.cpp"
_OPTIONS = "W2A16,W3A16,W4A16,W8A16"


@dataclass(frozen=True, slots=True)
class Peer:
    """A checkpoint to compare with.

    Attributes:
        library: Who makes it.
        scheme: What is asked for.
        level: About how many bits per weight: rows of one level are compared with each other.
        settings: Of the library, where they are not its usual ones.
        mixed: Whether its modules differ in bits.
        looks_at_text: Whether it depends on the calibration text.
    """

    library: str
    scheme: str
    level: float
    settings: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    mixed: bool = False
    looks_at_text: bool = True

    @property
    def name(self) -> str:
        """What tells it from the others; also a folder's name."""
        return f"{self.library}-{self.scheme}"


def _of(library: str, *rows: tuple[str, float], **more: bool) -> tuple[Peer, ...]:
    return tuple(Peer(library, scheme, level, **more) for scheme, level in rows)


PEERS: tuple[Peer, ...] = (
    *_of("gptqmodel", ("gptq-int3-g128-sym", 3), ("gptq-int3-g64-sym", 3.5),
         ("gptq-int3-g32-sym", 3.5), ("gptq-int4-g128-sym", 4), ("gptq-int4-g64-sym", 4.5),
         ("gptq-int4-g32-sym", 5), ("gptq-int8-g128-sym", 8)),
    *_of("llmcompressor", ("gptq-int3-g128-sym", 3), ("gptq-int3-g32-sym", 3.5),
         ("gptq-int4-g128-sym", 4), ("awq-int4-g128-asym", 4), ("gptq-int4-g32-sym", 4.5),
         ("gptq-int4-g32-asym", 4.5), ("awq-int4-g32-asym", 4.5), ("gptq-int5-g128-sym", 5),
         ("gptq-int8-g128-sym", 8)),
    *_of("bitsandbytes", ("bnb-nf4-dq", 4), ("bnb-nf4", 4.5), ("bnb-fp4", 4.5), ("llm.int8", 8),
         looks_at_text=False),
    *_of("hqq", ("hqq-int3-g64-asym", 3.5), ("hqq-int4-g64-asym", 4.5), ("hqq-int8-g64-asym", 8),
         looks_at_text=False),
    *_of(LLAMA_CPP, ("q3_k_s", 3.5), ("iq4_nl", 4.5), ("q4_0", 4.5), ("q4_k_s", 4.5),
         ("q8_0", 8)),
    *_of(LLAMA_CPP, ("q3_k_m", 4), ("q4_k_m", 5), ("q5_k_m", 5), mixed=True),
    *_of("auto-round", ("autoround-int3-g128-sym", 3), ("autoround-int4-g128-sym", 4),
         ("autoround-int4-g32-sym", 5)),
    *(Peer(AUTO_SCHEME, f"{bits:g} bits", level, {"avg_bits": bits, "options": _OPTIONS}, True)
      for bits, level in ((3.0, 3), (3.5, 3.5), (4.5, 4.5), (5.0, 5))),
)  # fmt: skip


def peers_for(linears: Sequence[LinearSpec], peers: Sequence[Peer] = PEERS) -> tuple[Peer, ...]:
    """Return the peers with groups that divide the inputs of all linears, each once."""
    fitting = next(
        (size for size in (128, 64, 32)
         if all(linear.in_features % size == 0 for linear in linears)), 128,
    )  # fmt: skip
    found = {}
    for peer in peers:
        scheme = peer.scheme.replace("-g128-", f"-g{fitting}-")
        found.setdefault((peer.library, scheme), replace(peer, scheme=scheme))
    return tuple(found.values())


def engines_for(peer: Peer, wanted: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the engines that our answer beside a peer is for, of those wanted (None: any)."""
    engines = (LLAMA_CPP,) if peer.library == LLAMA_CPP else ("vllm", "transformers")
    return tuple(engine for engine in engines if wanted is None or engine in wanted)


def make(
    peer: Peer,
    folder: Path,
    loaded: LoadedModel,
    calibration: TokenSequences,
    ggml: Path | None,
) -> tuple[int, float]:
    """Make a checkpoint; return the bytes that it takes and the CPU seconds spent.

    Args:
        peer: What to make.
        folder: Folder to make.
        loaded: The 16-bit model.
        calibration: The tokens it looks at.
        ggml: llama.cpp's library of quantizers (``libggml-base.so``).
    """
    if peer.library == LLAMA_CPP:
        if ggml is None:
            raise ImportError("llama.cpp's rows need --ggml libggml-base.so")
        with cost() as spent:
            _llama_cpp(peer, folder, loaded, calibration, ggml)
        return weight_bytes(folder), spent.cpu_s
    if peer.library == AUTO_SCHEME:
        with cost() as spent:
            _auto_scheme(peer, folder, loaded, calibration)
        return weight_bytes(folder), spent.cpu_s
    request = Request(get_backend(peer.library), parse_scheme(peer.scheme), peer.settings)
    tokens = calibration if peer.looks_at_text else None
    with cost() as spent:
        result = quantize(request, loaded.folder, folder, loaded.linears, tokens)
    held = [re.search(r"would take (\d+) bytes", note) for note in result.notes]
    quantized = next((int(found.group(1)) for found in held if found), None)
    if quantized is None:
        return weight_bytes(folder), spent.cpu_s
    # Written back in 16 bits: counted is what the library holds, and the rest of the model.
    return weight_bytes(folder) - 2 * quantizable(loaded) + quantized, spent.cpu_s


def quantizable(loaded: LoadedModel) -> int:
    """Return the number of weights in a model's linears."""
    return sum(linear.parameters for linear in loaded.linears)


def _auto_scheme(
    peer: Peer, folder: Path, loaded: LoadedModel, calibration: TokenSequences
) -> None:
    """Run the worker in auto-round's environment; it saves into a folder of its own naming."""
    work = folder.with_name(f"{folder.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    tokens, job = work / "tokens.json", work / "job.json"
    tokens.write_text(json.dumps(calibration.tokens.tolist()), encoding="utf-8")
    backend = get_backend("auto-round")
    job.write_text(
        json.dumps(
            {"model": str(loaded.folder.resolve()), "output": str(work.resolve() / "out"),
             "tokens": str(tokens), "settings": {**backend.settings, **peer.settings},
             "threads": 1, "seed": 0}
        ),
        encoding="utf-8",
    )  # fmt: skip
    worker = Path(__file__).with_name("auto_scheme_worker.py")
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    command = [str(python_of(environment_of(backend))), str(worker), str(job)]
    with (work / "log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    made = next(path.parent for path in sorted((work / "out").glob("**/config.json")))
    shutil.move(made, folder)
    shutil.rmtree(work)


def _llama_cpp(
    peer: Peer, folder: Path, loaded: LoadedModel, calibration: TokenSequences, ggml: Path
) -> None:
    """Quantize with llama.cpp's own code and an importance matrix; write a GGUF file.

    Embedding and head are quantized by llama.cpp's rule, without importance: its matrices hold the
    inputs of the blocks' linears, unless asked for the head's.
    """
    importance = _importance(loaded, calibration)
    weights = {}
    for name, kind in module_types(peer.scheme, loaded.linears).items():
        group = next(linear.input_group for linear in loaded.linears if linear.name == name)
        weight = loaded.tensor(f"{name}.weight").float()
        weights[name] = from_blocks(kind, ggml_blocks(weight, kind, importance[group], ggml))
    write_checkpoint(loaded.folder, folder, format="gguf", weights=weights)


def _importance(loaded: LoadedModel, calibration: TokenSequences) -> dict[str, torch.Tensor]:
    """Return the mean square of every linear's inputs by input group, as llama-imatrix has it."""
    sums: dict[str, torch.Tensor] = {}
    readers = {linear.input_group: linear.name for linear in loaded.linears}

    def watch(group: str):
        def add(_, inputs):
            rows = inputs[0].flatten(0, -2).float()
            sums[group] = sums.get(group, torch.zeros(rows.shape[1])) + rows.square().sum(0)

        return add

    hooks = [
        loaded.model.get_submodule(name).register_forward_pre_hook(watch(group))
        for group, name in readers.items()
    ]
    with torch.no_grad():
        for batch in calibration.tokens.split(4):
            loaded.model.model(batch)
    for hook in hooks:
        hook.remove()
    return {group: total / calibration.tokens.numel() for group, total in sums.items()}


def ggml_blocks(
    weight: torch.Tensor, kind: str, importance: torch.Tensor, library: Path
) -> torch.Tensor:
    """Return the blocks that llama.cpp's code makes of a weight, uint8 [out, bytes]."""
    import gguf as package

    quantize_chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    chosen = package.GGMLQuantizationType[kind.upper()]
    rows, columns = weight.shape
    values = np.ascontiguousarray(weight.numpy())
    counted = np.ascontiguousarray(importance.float().numpy())
    block, size = package.GGML_QUANT_SIZES[chosen]
    output = np.zeros((rows, columns // block * size), np.uint8)
    quantize_chunk(
        int(chosen), values.ctypes.data, output.ctypes.data, 0, rows, columns, counted.ctypes.data
    )
    return torch.from_numpy(output)
