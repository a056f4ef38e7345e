"""Every shipped worker: old enough syntax, its own library alone, and one line for a bad job."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from advisor.backends.jobs import Job, job_scheme
from advisor.backends.registry import BACKENDS
from advisor.schemes import parse_scheme

NAMES = sorted(BACKENDS)
_ANY = ("torch", "transformers", "worker_protocol")


def job_of(backend: str, tmp_path: Path, /, **changes) -> dict[str, object]:
    job = Job(
        backend=backend,
        model=str(tmp_path / "model"),
        output=str(tmp_path / "out"),
        result=str(tmp_path / "result.json"),
        scheme=job_scheme(parse_scheme("gptq-int4-g64-sym")),
        tokens=None,
        settings=dict(BACKENDS[backend].settings),
        threads=1,
        seed=0,
    )
    return json.loads(job.model_dump_json()) | changes


def ask(backend: str, arguments: list[str]) -> tuple[int, list[dict[str, object]]]:
    """Run a worker; every line that it writes must be an event."""
    command = [sys.executable, str(BACKENDS[backend].worker), *arguments]
    with subprocess.Popen(
        command,
        text=True,
        stdin=subprocess.PIPE,  # open while it works: a worker ends when it is closed
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        return process.wait(timeout=60), [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", [*NAMES, "protocol"])
def test_it_compiles_under_python_3_10_and_imports_its_library_alone(name):
    path = (
        BACKENDS[NAMES[0]].worker.with_name("worker_protocol.py")
        if name == "protocol"
        else BACKENDS[name].worker
    )
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    own = () if name == "protocol" else (BACKENDS[name].module,)
    assert found - set(sys.stdlib_module_names) <= {*_ANY, *own}, found
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in top for alias in node.names if isinstance(node, ast.Import)}
    # A bad job is refused at once, before a library is imported.
    assert names <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scheme": "gptq-int4-g64-sym"}, "the job lacks, or has of a wrong kind: scheme."),
        ({"job_version": 2}, "the worker reads job_version 1, but got 2."),
        ({"backend": "another"}, "but the job is for another."),
    ],
)
def test_it_refuses_a_bad_job_with_one_line(name, changes, said, tmp_path):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job_of(name, tmp_path, **changes)))
    code, events = ask(name, [str(path)])
    assert code == 2
    assert len(events) == 1
    assert events[0]["event"] == "error"
    assert said in str(events[0]["message"])
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("name", NAMES[:1])
def test_it_refuses_what_is_no_job(name, tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    for arguments, said in (
        ([], "takes one argument"),
        ([str(tmp_path / "none.json")], "cannot be read"),
        ([str(tmp_path / "broken.json")], "cannot be read"),
        ([str(tmp_path / "list.json")], "must be a JSON object, but this is a list"),
    ):
        code, events = ask(name, arguments)
        assert code == 2
        assert said in str(events[0]["message"])


def test_code_of_the_models_own_is_refused_where_the_library_would_run_it(tmp_path):
    (tmp_path / "model").mkdir()
    config = {"model_type": "llama", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "job.json").write_text(json.dumps(job_of("auto-gptq", tmp_path)))
    code, events = ask("auto-gptq", [str(tmp_path / "job.json")])
    assert code == 2
    assert "would run the code that the model's folder brings" in str(events[0]["message"])
    assert "AutoConfig" in str(events[0]["message"])


@pytest.mark.parametrize("name", ["autoawq", "auto-round"])
def test_code_of_the_models_own_is_not_trusted(name):
    """These libraries trust it unless they are told not to."""
    tree = ast.parse(BACKENDS[name].worker.read_text(encoding="utf-8"))
    keywords = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
    ]
    assert [value.value for value in keywords if isinstance(value, ast.Constant)] == [False]


@pytest.fixture
def protocol(monkeypatch):
    monkeypatch.syspath_prepend(str(BACKENDS["autoawq"].worker.parent))
    return importlib.import_module("worker_protocol")


def test_transformers_4_gets_the_models_own_rotary_embedding(protocol, tmp_path):
    config = {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0},
    }
    model, folder, output = (tmp_path / name for name in ("model", "older", "output"))
    for place in (model, folder, output):
        place.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_text("weights")
    job = {"backend": "autoawq", "model": str(model), "output": str(output)}
    protocol.older_copy(job, str(folder))
    assert (folder / "model.safetensors").read_text() == "weights"
    older = json.loads((folder / "config.json").read_text())
    assert older["rope_theta"] == 500000.0
    assert older["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert older["torch_dtype"] == "bfloat16"
    assert json.loads((model / "config.json").read_text()) == config

    said = {"quantization_config": {"bits": 4, "is_marlin_format": False}, "rope_theta": 1.0}
    said["torch_dtype"] = "float16"
    (output / "config.json").write_text(json.dumps(said))
    protocol.keep_config(job, dropped=["is_marlin_format"])
    kept = json.loads((output / "config.json").read_text())
    assert kept == config | {"quantization_config": {"bits": 4}, "dtype": "float16"}


def test_transformers_4_has_one_rotary_embedding_for_all_layers(protocol, tmp_path):
    (tmp_path / "older").mkdir()
    rope = {kind: {"rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rope}))
    job = {"backend": "autoawq", "model": str(tmp_path)}
    with pytest.raises(protocol.BadJob, match="for full_attention, sliding_attention"):
        protocol.older_copy(job, str(tmp_path / "older"))
