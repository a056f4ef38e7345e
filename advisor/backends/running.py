"""Run a worker: its events, its log, a time limit, and no process that outlives us."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from advisor.backends.jobs import Job, JobResult, read_result
from advisor.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_JOB, _LOG = "job.json", "worker.log"
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 5.0
_HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables that would show a worker another environment's packages."""


@dataclass(slots=True)
class _Heard:
    """What a worker has said so far."""

    error: str | None = None
    finished: bool = False


def run_worker(
    command: Sequence[str],
    job: Job,
    folder: Path,
    *,
    timeout_s: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> JobResult:
    """Give a job to a worker and wait for its result.

    The worker runs in the job's folder, so that what its library writes where it stands (gptqmodel
    a folder of logs) is not left in the user's.

    A worker that has left its result has done its work, even if its library's threads keep it from
    ending or crash as it ends: hours of quantizing are not thrown away for that.

    Whatever ends the wait (the limit, Ctrl-C, another error) ends the worker and all that it
    started. Should this process be killed, the worker sees its input close and ends itself.

    Args:
        command: The interpreter and the worker's script.
        job: What to do.
        folder: Where the job and the log are written and the worker runs; it exists.
        timeout_s: Seconds after which the worker is ended; None for no limit.
        progress: Called with (stage, done, in all).

    Raises:
        BackendError: The worker failed, was killed or took too long: one line, with the log.
    """
    folder = folder.absolute()
    log = folder / _LOG
    (folder / _JOB).write_text(job.model_dump_json(), encoding="utf-8")
    environment = {name: text for name, text in os.environ.items() if name not in _HIDDEN}
    heard = _Heard()
    with log.open("ab") as handle:
        try:
            process = subprocess.Popen(
                [*command, str(folder / _JOB)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=handle,
                cwd=folder,
                env=environment | {"PYTHONNOUSERSITE": "1"},
                start_new_session=True,
            )
        except OSError as error:
            raise BackendError(f"{job.backend} could not be started: {error}.") from error
        try:
            _listen(process, heard, handle, timeout_s, progress, job.backend, log)
        finally:
            _end(process)
    if heard.error is not None or not heard.finished:
        raise BackendError(f"{job.backend} failed: {_reason(process, heard)} Its log: {log}")
    return read_result(Path(job.result), job.backend)


def _listen(
    process: subprocess.Popen[bytes],
    heard: _Heard,
    log: IO[bytes],
    timeout_s: float | None,
    progress: Callable[[str, int, int], None] | None,
    name: str,
    path: Path,
) -> None:
    """Take the worker's events until its result, or until it closes its output and ends."""
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        if deadline is not None and time.monotonic() > deadline:
            raise BackendError(
                f"{name} was stopped: it took longer than {timeout_s:g} s. Its log: {path}"
            )
        try:
            line = lines.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            if process.poll() is None:
                continue
            line = None  # ended, though something that it started holds its output open
        if line is None:
            break
        _take(line, heard, log, progress)
        if heard.finished:  # all is on disk; what it does to end is its own affair
            break
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_SECONDS)


def _read(stream: IO[bytes] | None, lines: queue.Queue[bytes | None]) -> None:
    """Pass lines on; None at the end."""
    if stream is not None:
        with contextlib.suppress(ValueError, OSError):  # closed by the other thread
            for line in stream:
                lines.put(line)
    lines.put(None)


def _take(
    line: bytes,
    heard: _Heard,
    log: IO[bytes],
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Take one line: an event, or something a library printed, which belongs into the log."""
    try:
        event = json.loads(line)
        kind = event["event"]
        if kind == "progress":
            step = (str(event["stage"]), int(event["done"]), int(event["total"]))
        elif kind == "error":
            heard.error = " ".join(str(event["message"]).split())
        elif kind == "result":
            heard.finished = True
        else:
            raise KeyError(kind)
    except (ValueError, KeyError, TypeError):
        log.write(line)
        log.flush()
        return
    if kind == "progress" and progress is not None:
        progress(*step)


def _reason(process: subprocess.Popen[bytes], heard: _Heard) -> str:
    if heard.error is not None:
        return heard.error if heard.error.endswith((".", "!", "?")) else f"{heard.error}."
    code = process.returncode
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"it was killed by {name}{hint}."
    return f"it ended with exit status {code} and said nothing."


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a worker and what it started: politely, then not."""
    if process.poll() is None:
        for number in ("SIGTERM", "SIGKILL"):
            _signal(process, number)
            try:
                process.wait(_GRACE_SECONDS)
                break
            except subprocess.TimeoutExpired:
                continue
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _signal(process: subprocess.Popen[bytes], name: str) -> None:
    number = getattr(signal, name, None)
    if os.name == "posix" and number is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
    else:
        process.kill()
