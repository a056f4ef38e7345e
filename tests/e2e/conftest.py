"""The command in this process, in a folder of its own, and what is needed to break its input."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from advisor.plan.hashing import hash_model

GOLDEN_PLAN = Path(__file__).parents[1] / "golden" / "plan.yaml"


@dataclass
class Outcome:
    """What a run of the command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self):
        return json.loads(self.out)


@dataclass
class Workplace:
    """A working folder with a model in it, and ways to damage what is there."""

    folder: Path
    model: Path

    def text(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def edit_config(self, **changes):
        path = self.model / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(config))

    def plan(self, name="plan.yaml", **changes):
        """Write a valid plan for the model, changed: ``scheme__default="x"`` sets scheme.default.

        The value ``"drop"`` removes the key.
        """
        document = yaml.safe_load(GOLDEN_PLAN.read_text())
        hashes = hash_model(self.model)
        document["model"] |= {
            "id": str(self.model),
            "config_sha256": hashes.config,
            "tokenizer_sha256": hashes.tokenizer,
            "weights_sha256": hashes.weights,
        }
        document["scheme"] |= {"default": "rtn-int8-gch-sym", "modules": {}}
        for part in ("calibration", "evaluation", "outputs"):
            del document[part]
        for path, value in changes.items():
            *parents, key = path.split("__")
            place = document
            for parent in parents:
                place = place[parent]
            if value == "drop":
                del place[key]
            else:
                place[key] = value
        path = self.folder / name
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return str(path)

    def contents(self):
        """Name and bytes of every file there is, and the folders."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(self.folder.rglob("*"))
        }


@pytest.fixture
def workplace(tmp_path, monkeypatch, random_llama_folder):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    # Wide enough that messages are not wrapped.
    monkeypatch.setenv("COLUMNS", "200")
    return Workplace(folder, shutil.copytree(random_llama_folder, folder / "model"))


@pytest.fixture
def advisor(capsys):
    """Run the command in this process: ``advisor("recommend", "model") -> Outcome``."""
    from advisor.cli.main import main
    from advisor.plan.data import set_extra_folders

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(stop.value.code or 0, captured.out, captured.err)

    yield run
    set_extra_folders(())
