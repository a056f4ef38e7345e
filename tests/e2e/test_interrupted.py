"""Ctrl-C during ``tune``, as a terminal sends it: before and after something was measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from advisor.plan.files import load_plan
from advisor.workflows.demonstration import example_model

OPTIONS = (
    "--gpu", "rtx-4090", "--engine", "vllm", "--max-size", "2.1MB", "--context", "256", "--samples",
    "8", "--sequence-length", "64", "--evaluation-sequences", "8", "--trials", "3",
)  # fmt: skip


def _listen():
    """Take SIGINT as in a terminal; a test run in the background has its children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def interrupted(tmp_path):
    """Run ``tune``, send SIGINT once its progress names a stage; (status, stdout, stderr)."""

    def run(stage, *more):
        command = [sys.executable, "-m", "advisor", "tune", str(example_model()), *OPTIONS]
        process = subprocess.Popen(
            [*command, "-o", str(tmp_path / "plan.yaml"), *more],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env=os.environ | {"ADVISOR_CACHE": str(tmp_path / "cache")}, preexec_fn=_listen,
        )  # fmt: skip
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith(stage):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=300)
        return process.returncode, out, "".join(seen) + err

    return run


def test_ctrl_c_before_anything_is_measured_is_no_answer(interrupted, tmp_path):
    code, out, err = interrupted("Statistics ...")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "stopped: interrupted before any candidate was measured, so no plan was written; the same "
        "command goes on where it stopped"
    )
    assert not (tmp_path / "plan.yaml").exists()
    code, out, _ = interrupted("Statistics ...", "--json", "--verbose")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "Interrupted"


def test_ctrl_c_later_keeps_the_best_so_far(interrupted, tmp_path):
    code, out, err = interrupted("Finalist 2")
    assert code == 0, err
    assert "(interrupted: best so far)" in out
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.search.stopped == "interrupted"
    assert plan.expected.basis == "measured"
