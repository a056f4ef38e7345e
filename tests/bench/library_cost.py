"""Run a library on a job and return the CPU seconds that its own call took, in one thread."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from advisor.backends.environments import environment_of, python_of
from advisor.backends.jobs import Job, job_scheme
from advisor.backends.registry import get_backend
from advisor.schemes import parse_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.calibration.tokens import TokenSequences

_HIDDEN = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}


def library_cost(
    library: str,
    model: Path,
    scheme: str,
    calibration: TokenSequences,
    settings: dict[str, Any] | None = None,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return (CPU seconds of the call and of AWQ's search, AWQ's scales by linears' names)."""
    backend = get_backend(library)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        tokens, cost = work / "tokens.json", work / "cost.json"
        tokens.write_text(json.dumps(calibration.tokens.tolist()), encoding="utf-8")
        job = Job(
            backend=library, model=str(model.resolve()), output=str(work / "out"),
            result=str(work / "result.json"), scheme=job_scheme(parse_scheme(scheme)),
            tokens=str(tokens), settings={**backend.settings, **(settings or {})},
            device="cpu", threads=1, seed=0,
        )  # fmt: skip
        path = work / "job.json"
        path.write_text(job.model_dump_json(), encoding="utf-8")
        worker = Path(__file__).with_name("library_cost_worker.py")
        command = [str(python_of(environment_of(backend))), str(worker),
                   str(backend.worker.parent), str(path), str(cost)]  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if key not in _HIDDEN}
        done = subprocess.run(
            command, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
            check=False, cwd=work,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"{library} failed:\n{done.stderr[-3000:]}")
        scales = work / "cost.scales.safetensors"
        found = load_file(scales) if scales.is_file() else {}
        return json.loads(cost.read_text(encoding="utf-8")), found
