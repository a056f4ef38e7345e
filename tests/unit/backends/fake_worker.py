"""A worker without a library: what it does is in the scheme's place of the job's settings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def emit(**event):
    print(json.dumps(event), flush=True)


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    act = job["settings"].get("act", "succeed")
    emit(event="progress", stage="Loading", done=1, total=1)
    if act == "fail":
        print("Traceback: many lines\n  of it", file=sys.stderr)
        emit(event="error", message="ValueError: the model\nis odd")
        sys.exit(1)
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "exit":
        sys.exit(7)
    if act == "sleep":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(job["result"] + ".pids").write_text(f"{os.getpid()} {child.pid}")
        emit(event="progress", stage="Sleeping", done=0, total=1)
        time.sleep(600)
    if act == "watch":
        Path(job["result"] + ".started").touch()
        while sys.stdin.buffer.read(4096):
            pass
        Path(job["result"] + ".closed").touch()
        sys.exit(3)
    if act == "garbage":
        print("Loading checkpoint shards: 100%")
        print('{"event": "weather", "sky": "blue"}')
        print('{"event": "progress", "stage": "Quantizing"}')
        print("[1, 2]\nnull\n\xff", flush=True)
    if act == "round":
        round_to_gptq(job)
    emit(event="progress", stage="Quantizing", done=2, total=2)
    if act == "silent":
        return
    tokens = None if job["tokens"] is None else json.loads(Path(job["tokens"]).read_text())
    result = {
        "result_version": 1, "backend": job["backend"], "version": "9.9",
        "versions": {"torch": "0"}, "seconds": 1.5, "peak_memory_bytes": 1000,
        "notes": [f"tokens: {None if tokens is None else [len(tokens), len(tokens[0])]}",
                  f"PYTHONPATH: {os.environ.get('PYTHONPATH')}"],
    }  # fmt: skip
    if act == "misfit":
        result["colour"] = "blue"
    Path(job["result"]).write_text(json.dumps(result))
    if act == "linger":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(job["result"] + ".pids").write_text(f"{os.getpid()} {child.pid}")
    emit(event="result")
    if act == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if act == "linger":
        time.sleep(600)


def round_to_gptq(job):
    """Stand in for a library: copy the checkpoint that the test has prepared."""
    if keep := job["settings"].get("keep"):
        shutil.copyfile(sys.argv[1], keep)
    Path("logs").mkdir()  # as gptqmodel does, wherever it stands
    Path("logs/gptq_log.log").write_text("layer 0\n")
    mixed = bool(job["options"]) and job["settings"].get("prepared_mixture")
    source = Path(mixed or job["settings"]["prepared"])
    for file in source.iterdir():
        shutil.copyfile(file, Path(job["output"]) / file.name)
    # Libraries save tokenizers anew, and not as they were.
    (Path(job["output"]) / "tokenizer_config.json").write_text("{}")
    (Path(job["output"]) / "added_tokens.json").write_text("{}")


main()
