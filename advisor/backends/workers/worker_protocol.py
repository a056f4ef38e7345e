"""What every worker shares: the job it reads, the events it writes, the result it leaves.

A worker runs inside the environment of its library, as ``python worker_NAME.py job.json``, and
never sees Advisor. On standard output it writes one JSON object a line::

    {"event": "progress", "stage": "Quantizing", "done": 3, "total": 30}
    {"event": "error", "message": "ValueError: ..."}
    {"event": "result"}

Whatever the library prints goes to standard error. The worker ends when its standard input is
closed: then whoever started it is gone.
"""

import json
import os
import sys
import threading
import time
import traceback

JOB_VERSION = 1
_KEYS = {
    "job_version": int, "backend": str, "model": str, "output": str, "result": str,
    "scheme": dict, "options": list, "together": list, "tokens": (str, type(None)),
    "settings": dict, "device": str, "threads": int, "seed": int,
}  # fmt: skip
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "compressed-tensors")
_events = None


class BadJob(Exception):
    """The job cannot be done; the message is all that a person needs."""


def emit(event, **fields):
    """Write one event."""
    if _events is not None:
        _events.write(json.dumps({"event": event, **fields}) + "\n")
        _events.flush()


def progress(stage, done, total):
    """Say how far a stage is."""
    emit("progress", stage=stage, done=int(done), total=int(total))


def main(backend, quantize):
    """Read the job, do it, leave its result.

    The exit status is 0, or 1 for a failure, or 2 for a job that cannot be done.

    Args:
        backend: Name that the job must have.
        quantize: Called with the job; writes the checkpoint to ``job["output"]`` and returns
            sentences that a person should know of the result.
    """
    global _events
    _events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no event
    try:
        job = _read_job(backend)
    except BadJob as error:
        emit("error", message=str(error))
        raise SystemExit(2) from None
    _prepare(job)
    started = time.monotonic()
    try:
        notes = quantize(job)
    except BadJob as error:
        emit("error", message=str(error))
        raise SystemExit(2) from None
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        emit("error", message=f"{type(error).__name__}: {text}" if text else type(error).__name__)
        raise SystemExit(1) from None
    _write_result(job, list(notes or ()), time.monotonic() - started)
    emit("result")


def load_tokens(job):
    """Return the calibration tokens: lists of token ids, all of one length."""
    if job["tokens"] is None:
        raise BadJob(f"{job['scheme']['name']} needs calibration tokens, but the job has none.")
    with open(job["tokens"], encoding="utf-8") as handle:
        return json.load(handle)


def device_of(job):
    """Return ``cuda`` or ``cpu``: ``auto`` takes CUDA where torch sees a device."""
    import torch

    available = torch.cuda.is_available()
    if job["device"] == "cuda" and not available:
        raise BadJob(f"{job['backend']} was to run on CUDA, and torch sees no such device here.")
    return "cuda" if available and job["device"] != "cpu" else "cpu"


def model_dtype(folder):
    """Return the data type that config.json names, as torch calls it."""
    config = _json_of(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def refuse_own_code(job):
    """Refuse a model that brings code, for a library that runs it without being asked to.

    Raises:
        BadJob: config.json names code of its own.
    """
    named = _json_of(job["model"]).get("auto_map")
    if named:
        raise BadJob(
            f"{job['backend']} would run the code that the model's folder brings (auto_map of "
            f"config.json: {', '.join(sorted(named))}). Use another backend, or remove auto_map "
            "where transformers knows the architecture."
        )


def older_copy(job, folder):
    """Make a folder of links to the model, with its configuration as transformers 4 reads it.

    transformers 5 writes dtype and rope_parameters for what was torch_dtype, rope_theta and
    rope_scaling. Version 4 passes over what it does not know: it would take the usual rope_theta
    for the model's own without a word.

    Raises:
        BadJob: The rotary embedding differs between kinds of layers.
    """
    source = os.path.abspath(job["model"])
    for name in os.listdir(source):
        if name != "config.json":
            os.symlink(os.path.join(source, name), os.path.join(folder, name))
    config = _json_of(source)
    rope = dict(config.get("rope_parameters") or {})
    kinds = sorted(key for key, value in rope.items() if isinstance(value, dict))
    if kinds:
        raise BadJob(
            f"{job['backend']} runs on transformers 4, where all layers have one rotary "
            f"embedding, but config.json has rope_parameters for {', '.join(kinds)}. "
            "Use another backend."
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            config.setdefault(key, rope.pop(key))
    if rope.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", rope)
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    _write_json(config, folder)
    return folder


def keep_config(job, dropped=()):
    """Put the model's own configuration back, with what the library says of its quantization.

    Args:
        job: The job.
        dropped: Keys of the quantization's configuration that loaders do not take.
    """
    said, own = _json_of(job["output"]), _json_of(job["model"])
    quantization = said["quantization_config"]
    for key in dropped:
        quantization.pop(key, None)
    if "torch_dtype" in said:  # what is stored now, under the key that the model has for it
        own["torch_dtype" if "torch_dtype" in own else "dtype"] = said["torch_dtype"]
    _write_json(own | {"quantization_config": quantization}, job["output"])


def _json_of(folder):
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as handle:
        return json.load(handle)


def _write_json(document, folder):
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as handle:
        json.dump(document, handle, indent=2)


def _read_job(backend):
    if len(sys.argv) != 2:
        raise BadJob(f"a worker takes one argument, the job's file, but got {len(sys.argv) - 1}.")
    try:
        with open(sys.argv[1], encoding="utf-8") as handle:
            job = json.load(handle)
    except (OSError, ValueError) as error:
        raise BadJob(f"the job {sys.argv[1]} cannot be read: {error}") from None
    if not isinstance(job, dict):
        raise BadJob(f"a job must be a JSON object, but this is a {type(job).__name__}.")
    wrong = [key for key, kind in _KEYS.items() if key not in job or not isinstance(job[key], kind)]
    if wrong:
        raise BadJob(f"the job lacks, or has of a wrong kind: {', '.join(wrong)}.")
    if job["job_version"] != JOB_VERSION:
        raise BadJob(f"the worker reads job_version {JOB_VERSION}, but got {job['job_version']}.")
    if job["backend"] != backend:
        raise BadJob(f"this is the worker of {backend}, but the job is for {job['backend']}.")
    return job


def _prepare(job):
    threading.Thread(target=_watch_parent, daemon=True).start()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["OMP_NUM_THREADS"] = str(job["threads"])


def _watch_parent():
    """End with the process that started this one: it holds the other end of standard input."""
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        return
    os._exit(3)


def _write_result(job, notes, seconds):
    import importlib.metadata as metadata

    versions = {}
    for name in (*_LIBRARIES, job["backend"]):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    result = {
        "result_version": 1,
        "backend": job["backend"],
        "version": versions.get(job["backend"], "unknown"),
        "versions": versions,
        "seconds": seconds,
        "peak_memory_bytes": _peak_memory(),
        "notes": notes,
    }
    temporary = job["result"] + ".tmp"
    with open(temporary, "w", encoding="utf-8") as handle:
        json.dump(result, handle)
    os.replace(temporary, job["result"])


def _peak_memory():
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
