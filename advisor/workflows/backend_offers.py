"""``tune --backends``: the best candidates of each named library, made in their turn.

Each library makes its best uniform candidate, and a mixture of its own where it knows how.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from advisor.backends.jobs import JobResult
from advisor.backends.mixtures import TARGET
from advisor.backends.quantizing import Request, check_ready, quantize
from advisor.backends.registry import get_backend
from advisor.backends.requests import check_request, rule_of, shape_problems
from advisor.errors import AdvisorError, BackendError, InputError, join_errors
from advisor.models.device import release_cached
from advisor.plan.hashing import sha256_json
from advisor.predict.size import checkpoint_size
from advisor.search.outside import Outside, Wanted
from advisor.workflows.backend_choices import (
    Server,
    possible_schemes,
    schemes_of,
    worth_making,
)
from advisor.workflows.backend_plans import backend_choice, read_made, with_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from advisor.backends.registry import Backend
    from advisor.calibration.tokens import TokenSequences
    from advisor.hardware.profile import HardwareProfile
    from advisor.models.load import LoadedModel
    from advisor.modelspec import ModelSpec
    from advisor.plan.schema import Plan
    from advisor.search.mixture import Mixture
    from advisor.search.realise import Realised

_RESULT = "backend-result.json"
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class BackendOffers:
    """Makes the best candidates of each library, as small and as fast as the search asks for.

    Attributes:
        backends: The libraries.
        loaded: The 16-bit model.
        spec: Its tensors.
        hardware: What will serve it.
        engine: Engine's name.
        calibration: Tokens that the libraries calibrate on: those of the search.
        folder: Where their checkpoints are kept, so that a search that goes on finds them.
        progress: Told of a library's steps: (library, stage, done, in all).
        device: Where they compute: ``auto``, or ``cpu`` to leave accelerators alone.
        failures: (library, scheme, why) of candidates that could not be made.
    """

    backends: Sequence[Backend]
    loaded: LoadedModel
    spec: ModelSpec
    hardware: HardwareProfile
    engine: str
    calibration: TokenSequences
    folder: Path
    progress: Callable[[str, str, int, int], None]
    device: str = "auto"
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    _made: dict[tuple[str, str], tuple[Request, JobResult]] = field(default_factory=dict)

    def __call__(self, wanted: Wanted) -> Iterator[Outside]:
        """Make the best uniform candidate of each library and its own mixture, one by one.

        Args:
            wanted: What they must be.
        """
        for backend in self.backends:
            requests, why_not = self._requests(backend, wanted)
            if why_not:
                self.failures.append((backend.name, "none", why_not))
            for request in requests:
                try:
                    yield self._candidate(request)
                except AdvisorError as error:
                    _logger.warning("%s", error)
                    self.failures.append((backend.name, _described(request), str(error)))

    def predicted_bytes(self, max_bytes: int | None) -> int:
        """Return what the candidates will add to the disk; what an earlier run made is there."""
        wanted = Wanted(max_bytes, lambda *_: True)
        found = 0
        for backend in self.backends:
            for request in self._requests(backend, wanted)[0]:
                if (self._place(request) / _RESULT).is_file():
                    continue
                carried = rule_of(backend, request.scheme).format
                size = checkpoint_size(self.spec, request.scheme, carried).total_bytes
                found += max_bytes if request.options and max_bytes is not None else size
        return found

    def _requests(self, backend: Backend, wanted: Wanted) -> tuple[list[Request], str]:
        """Return what to ask of a library, and why nothing uniform, or an empty string."""
        server = Server(self.spec, self.hardware, self.engine)
        found, why_not = worth_making(backend, server, wanted)
        seed = self.calibration.seed
        requests = [
            Request(backend, scheme, settings, self.device, seed) for scheme, settings in found
        ]
        return requests, why_not

    def _place(self, request: Request) -> Path:
        """Return the folder of a candidate: named by all that it depends on."""
        key = sha256_json(
            {
                "lock": request.lock_sha256,
                "scheme": str(request.scheme),
                "settings": request.all_settings,
                "model": self.loaded.fingerprint,
                "tokens": self.calibration.sha256,
                "seed": request.seed,
            }
        )
        return self.folder / f"{request.backend.name}-{key[:16]}"

    def _candidate(self, request: Request) -> Outside:
        """Make a candidate, or find it where an earlier run made it."""
        name, output = request.backend.name, self._place(request)
        kept = output / _RESULT
        if kept.is_file():
            result = JobResult.model_validate(json.loads(kept.read_text(encoding="utf-8")))
        else:
            shutil.rmtree(output, ignore_errors=True)  # without a result it was not finished
            release_cached(self.loaded.device)
            result = quantize(
                request,
                self.loaded.folder,
                output,
                self.loaded.linears,
                self.calibration,
                progress=lambda stage, done, total: self.progress(name, stage, done, total),
            )
            kept.write_text(result.model_dump_json(), encoding="utf-8")
        mixture, checkpoint = read_made(request, output, self.spec)
        self._made[name, mixture.name] = (request, result)

        def load() -> Realised:
            from advisor.search.realise import Realised
            from advisor.workflows.checkpoints import contents

            return Realised(*contents(checkpoint, self.loaded))

        return Outside(mixture, load)

    def planned(self, plan: Plan, mixture: Mixture) -> Plan:
        """Return the plan of an answer that a library made."""
        request, result = self._made[mixture.backend or "", mixture.name]
        rule = check_request(request.backend, request.scheme, self.spec.linears, {}, "auto")
        choice = backend_choice(request, result.version, result.versions)
        return with_backend(plan, choice, needs_text=rule.needs_text)


def _described(request: Request) -> str:
    """Return what was asked for, in words."""
    if not request.options:
        return str(request.scheme)
    choice = ", ".join(map(str, (request.scheme, *request.options)))
    return f"mixture of {choice} at {request.all_settings[TARGET]} bits"


def check_backend_names(names: Sequence[str]) -> None:
    """Refuse libraries that there are not.

    Raises:
        InputError: Lists every unknown one.
    """
    unknown = []
    wanted = dict.fromkeys(part.strip() for given in names for part in given.split(",") if part)
    for name in wanted:
        try:
            get_backend(name)
        except InputError as error:
            unknown.append(str(error))
    if unknown:
        raise InputError(join_errors(unknown))


def named_backends(names: Sequence[str], server: Server, device: str = "auto") -> list[Backend]:
    """Return the libraries that a user named, if each can work here and make what is served.

    Args:
        names: As given; a comma separates several.
        server: What will serve the model.
        device: Where they are to compute: ``auto`` or ``cpu``.

    Raises:
        InputError: One is unknown, or makes nothing that the engine runs; all are listed.
        BackendError: One is not installed, or needs CUDA where there is none; all are listed.
    """
    wanted = dict.fromkeys(part.strip() for name in names for part in name.split(",") if part)
    backends, unfit, unable = [], [], []
    for name in wanted:
        try:
            backend = get_backend(name)
            check_backend_ready(backend, server, device)
            backends.append(backend)
        except InputError as error:
            unfit.append(str(error))
        except BackendError as error:
            unable.append(str(error))
    if unfit:
        raise InputError(join_errors(unfit))
    if unable:
        raise BackendError(join_errors(unable))
    return backends


def check_backend_ready(backend: Backend, server: Server, device: str = "auto") -> None:
    """Refuse a library that can make nothing here, or nothing that will be served.

    Raises:
        InputError: Its groups divide no module, or the engine runs nothing that it makes.
        BackendError: It needs CUDA and there is none, or it is not installed.
    """
    linears = server.spec.linears
    rules = sorted(backend.makes, key=lambda rule: rule.cuda_only)
    schemes = [scheme for rule in rules for scheme in schemes_of(rule)]
    fitting = [scheme for scheme in schemes if not shape_problems(scheme, linears)]
    advice = f"Leave {backend.name} out of --backends"
    if not fitting:
        raise InputError(f"{shape_problems(schemes[0], linears)[0]} {advice}.")
    check_ready(Request(backend, fitting[0], {}, device), linears)
    if not possible_schemes(backend, server):
        raise InputError(
            f"{backend.name} makes nothing of this model that {server.engine} runs on "
            f"{server.hardware.name}. {advice}, or name another --engine."
        )
