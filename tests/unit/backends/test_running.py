from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from advisor.backends.jobs import Job, job_scheme
from advisor.backends.running import run_worker
from advisor.errors import BackendError
from advisor.schemes import parse_scheme

FAKE = Path(__file__).parent / "fake_worker.py"


@pytest.fixture
def job(tmp_path):
    def make(act: str) -> Job:
        return Job(
            backend="fake",
            model="model",
            output=str(tmp_path / "out"),
            result=str(tmp_path / "result.json"),
            scheme=job_scheme(parse_scheme("gptq-int4-g64-sym")),
            tokens=None,
            settings={"act": act},
            threads=1,
            seed=0,
        )

    return make


@pytest.fixture
def run(job, tmp_path):
    def go(act: str, **options):
        return run_worker([sys.executable, str(FAKE)], job(act), tmp_path, **options)

    return go


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_the_result_comes_back_and_every_step_is_told(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    steps = []
    result = run("succeed", progress=lambda *step: steps.append(step))
    assert (result.version, result.seconds, result.peak_memory_bytes) == ("9.9", 1.5, 1000)
    assert steps == [("Loading", 1, 1), ("Quantizing", 2, 2)]
    assert "PYTHONPATH: None" in result.notes


def test_a_failure_is_one_line_that_names_the_log(run, tmp_path):
    with pytest.raises(BackendError) as error:
        run("fail")
    log = tmp_path / "worker.log"
    assert str(error.value) == f"fake failed: ValueError: the model is odd. Its log: {log}"
    assert "many lines\n  of it" in log.read_text()


def test_what_is_no_event_goes_into_the_log(run, tmp_path):
    steps = []
    assert run("garbage", progress=lambda *step: steps.append(step)).version == "9.9"
    assert steps == [("Loading", 1, 1), ("Quantizing", 2, 2)]
    log = (tmp_path / "worker.log").read_text(errors="replace")
    assert "Loading checkpoint shards" in log
    assert "weather" in log
    assert "[1, 2]\nnull" in log


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("die", "it was killed by SIGKILL (out of memory?)."),
        ("exit", "it ended with exit status 7 and said nothing."),
        ("silent", "it ended with exit status 0 and said nothing."),
    ],
)
def test_an_end_without_words_is_described(run, act, said):
    with pytest.raises(BackendError, match="fake failed: ") as error:
        run(act)
    assert said in str(error.value)


def test_a_result_of_another_form_is_refused(run):
    with pytest.raises(BackendError, match="left a result that cannot be read"):
        run("misfit")


def test_too_long_is_ended_with_all_that_it_started(run, tmp_path):
    started = time.monotonic()
    with pytest.raises(BackendError, match=r"took longer than 3 s\. Its log: "):
        run("sleep", timeout_s=3)
    assert time.monotonic() - started < 60
    pids = [int(pid) for pid in (tmp_path / "result.json.pids").read_text().split()]
    assert wait_until(lambda: not any(map(is_running, pids)))


@pytest.mark.parametrize("act", ["crash", "linger"])
def test_who_has_left_a_result_has_done_the_work(run, tmp_path, act, monkeypatch):
    """torch and its threads may crash, or wait for each other, while an interpreter ends."""
    monkeypatch.setattr("advisor.backends.running._GRACE_SECONDS", 2.0)
    started = time.monotonic()
    assert run(act).version == "9.9"
    assert time.monotonic() - started < 60
    if act == "linger":
        pids = [int(pid) for pid in (tmp_path / "result.json.pids").read_text().split()]
        assert wait_until(lambda: not any(map(is_running, pids)))


def test_ctrl_c_ends_the_worker(run, tmp_path):
    def interrupt(stage, done, total):
        if stage == "Sleeping":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("sleep", progress=interrupt)
    pids = [int(pid) for pid in (tmp_path / "result.json.pids").read_text().split()]
    assert len(pids) == 2
    assert wait_until(lambda: not any(map(is_running, pids)))


def test_the_worker_sees_when_we_are_killed(job, tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from advisor.backends.jobs import Job\n"
        "from advisor.backends.running import run_worker\n"
        "job = Job.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "run_worker([sys.executable, sys.argv[2]], job, Path(sys.argv[3]))\n"
    )
    (tmp_path / "given.json").write_text(job("watch").model_dump_json())
    arguments = [str(tmp_path / "given.json"), str(FAKE), str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments])
    assert wait_until((tmp_path / "result.json.started").exists, 120)
    process.kill()
    process.wait()
    assert wait_until((tmp_path / "result.json.closed").exists, 60)


def test_no_interpreter_is_said(job, tmp_path):
    with pytest.raises(BackendError, match="fake could not be started"):
        run_worker([os.fspath(tmp_path / "python")], job("succeed"), tmp_path)
