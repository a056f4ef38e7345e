"""Have a backend quantize a model: checks, the job, the worker, a folder that appears whole."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.backends.environments import environment_of, installed_version, python_of
from advisor.backends.jobs import Job, JobResult, job_scheme
from advisor.backends.mixtures import further_schemes, together
from advisor.backends.requests import check_request
from advisor.backends.running import run_worker
from advisor.errors import BackendError
from advisor.formats.folder import atomic_folder, check_output
from advisor.hardware.cpu import detect_cpu, whole_cores
from advisor.plan.folders import cache_root
from advisor.plan.hashing import TOKENIZER_FILES, sha256_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from advisor.backends.registry import Backend, Setting
    from advisor.calibration.tokens import TokenSequences
    from advisor.modelspec import LinearSpec
    from advisor.schemes import Scheme

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a backend.

    Attributes:
        backend: The library.
        scheme: What to make.
        settings: Settings that differ from the backend's usual ones.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: For libraries that draw at random.
        timeout_s: Seconds after which it is ended; None for no limit.
    """

    backend: Backend
    scheme: Scheme
    settings: Mapping[str, Setting]
    device: str = "auto"
    seed: int = 0
    timeout_s: float | None = None

    @property
    def lock_sha256(self) -> str:
        """Hash of the lock file that the environment is made of."""
        return sha256_file(self.backend.requirements)

    @property
    def options(self) -> tuple[Scheme, ...]:
        """What the library may choose beside the scheme, module by module."""
        return further_schemes(self.scheme, self.settings)

    @property
    def all_settings(self) -> dict[str, Setting]:
        """Every setting, the usual ones too."""
        return {**self.backend.settings, **self.settings}


def check_ready(request: Request, linears: Sequence[LinearSpec]) -> None:
    """Refuse, before any work, what cannot be done here.

    Raises:
        InputError: The scheme, a setting or a shape breaks a rule of the backend.
        BackendError: It needs CUDA and there is none, or it is not installed.
    """
    check_request(request.backend, request.scheme, linears, request.settings, request.device)
    if installed_version(request.backend) is None:
        name = request.backend.name
        raise BackendError(f"{name} is not installed. Run: advisor backends install {name}")


def quantize(
    request: Request,
    model: Path,
    output: Path,
    linears: Sequence[LinearSpec],
    calibration: TokenSequences | None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> JobResult:
    """Have a backend make a checkpoint of a model; the folder appears whole or not at all.

    Args:
        request: What to make, and of which library.
        model: Folder of the 16-bit model.
        output: Folder to make.
        linears: The model's quantizable modules.
        calibration: The tokens it calibrates on, exactly these.
        progress: Called with (stage, done, in all).

    Raises:
        InputError: The scheme, a setting, a shape or the output breaks a rule.
        BackendError: It cannot run here, or it failed; the message names its log.
    """
    check_output(output)
    check_ready(request, linears)
    backend = request.backend
    work = cache_root().absolute() / "backends" / f"{backend.name}-{os.getpid()}-{time.time_ns()}"
    work.mkdir(parents=True)
    tokens = None
    if calibration is not None:
        tokens = work / "tokens.json"
        tokens.write_text(json.dumps(calibration.tokens.tolist()), encoding="utf-8")
    with atomic_folder(output) as partial:
        job = Job(
            backend=backend.name,
            model=str(model.resolve()),
            output=str(partial.resolve()),
            result=str(work / "result.json"),
            scheme=job_scheme(request.scheme),
            options=tuple(map(job_scheme, request.options)),
            together=together(linears) if request.options else (),
            tokens=None if tokens is None else str(tokens),
            settings=request.all_settings,
            device=request.device,  # type: ignore[arg-type]
            threads=_threads(),
            seed=request.seed,
        )
        command = [str(python_of(environment_of(backend))), str(backend.worker.resolve())]
        result = run_worker(command, job, work, timeout_s=request.timeout_s, progress=progress)
        if not (partial / "config.json").is_file():
            raise BackendError(f"{backend.name} wrote no config.json. Its log: {work}")
        _own_tokenizer(model, partial)
        for path in partial.iterdir():
            # safetensors keeps files to their owner; servers often run as someone else.
            if path.is_file():
                shutil.copymode(partial / "config.json", path)
    shutil.rmtree(work, ignore_errors=True)
    return result


def _own_tokenizer(model: Path, output: Path) -> None:
    """Put the model's own tokenizer in place of what a library has made of it."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (model / name).is_file():
            shutil.copyfile(model / name, output / name)
        else:
            (output / name).unlink(missing_ok=True)


def _threads() -> int:
    """Return the threads a worker may use: as many as this process was given."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return whole_cores(detect_cpu().cores)
