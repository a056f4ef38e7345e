"""Environments, made offline from a folder of wheels that the test writes itself."""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
from pathlib import Path

import pytest

from advisor.backends import registry
from advisor.backends.environments import (
    check,
    environment_of,
    install,
    install_steps,
    installed_version,
    read_lock,
)
from advisor.backends.registry import BACKENDS, Backend, Makes
from advisor.errors import BackendError, InputError

HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def write_wheel(folder: Path, name: str, version: str, module: str = "value = 1\n") -> str:
    """Write a pure wheel and return its sha256."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": module,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Tiny(Backend):
    """A backend whose lock file is the test's."""

    __slots__ = ()

    @property
    def requirements(self) -> Path:
        return Path(self.remark)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVISOR_BACKENDS", str(tmp_path / "environments"))

    def make(lock: str, **options) -> Backend:
        path = tmp_path / f"tiny-{hashlib.sha256(lock.encode()).hexdigest()[:8]}.txt"
        path.write_text(lock)
        values = {"pythons": ((3, 10), (3, 13))} | options
        backend = Tiny("tinylib", "tinylib", (Makes("gptq", "gptq", ("int4",)),), "", **values,
                       remark=str(path))  # fmt: skip
        monkeypatch.setitem(registry.BACKENDS, "tinylib", backend)
        return backend

    return make


def test_it_installs_offline_and_checks_hashes(tiny, tmp_path, monkeypatch):
    # Neither the current folder nor PYTHONPATH has a say in another interpreter's imports.
    for place in ("here", "path"):
        (tmp_path / place / "pip").mkdir(parents=True)
        for name in ("pip/__init__.py", "venv.py", "torch.py", "tinylib.py"):
            (tmp_path / place / name).write_text("raise ImportError('shadowed')\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    digest = write_wheel(tmp_path / "wheels", "tinylib", "1.5")
    write_wheel(tmp_path / "wheels", "torch", "0.1", "class cuda:\n    is_available = bool\n")
    lock = f"# a comment\n#: torch==0.1\ntinylib==1.5 \\\n    --hash=sha256:{digest}\n"
    backend = tiny(lock)
    steps = []
    status = install(
        backend, lambda done, total: steps.append((done, total)), wheels=tmp_path / "wheels"
    )
    assert status.works, status.problem
    assert (status.version, installed_version(backend)) == ("1.5", "1.5")
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert check(backend).requirements_sha256 == hashlib.sha256(lock.encode()).hexdigest()

    tampered = tiny(lock.replace(digest, "0" * 64))
    assert environment_of(tampered) != environment_of(backend)
    with pytest.raises(BackendError, match="installing tinylib failed") as error:
        install(tampered, wheels=tmp_path / "wheels")
    assert "install.log" in str(error.value)
    assert "\n" not in str(error.value)
    assert installed_version(tampered) is None


def test_an_interpreter_that_the_lock_is_not_for_is_refused(tiny, tmp_path):
    backend = tiny("#: torch==0.1\n", pythons=((2, 7), (2, 7)))
    with pytest.raises(InputError, match=r"lock file is for Python 2\.7 to 2\.7, but"):
        install(backend)
    with pytest.raises(InputError, match="there is no 'python9'"):
        install(backend, python="python9")
    with pytest.raises(InputError, match="--wheels must be a folder"):
        install(tiny("#: torch==0.1\n"), wheels=tmp_path / "none")
    assert not environment_of(backend).exists()


def test_a_library_that_builds_against_torch_comes_after_it(tiny, tmp_path):
    backend = tiny(
        "#: torch==2.13.0\ntinylib==1 \\\n    --hash=sha256:aa\nOther==2 \\\n"
        "    --hash=sha256:bb \\\n    --hash=sha256:cc\n",
        no_isolation=True,
    )
    folder = tmp_path / "environment"
    folder.mkdir()
    steps = install_steps(backend, folder, sys.executable, tmp_path)
    assert [step[-1] for step in steps] == [
        str(folder), str(folder / "locked.txt"), "torch==2.13.0", str(folder / "locked-last.txt"),
    ]  # fmt: skip
    assert all("--no-index" in step for step in steps[1:])
    assert "--no-build-isolation" in steps[-1]
    assert "--require-hashes" not in steps[2]
    assert (folder / "locked.txt").read_text().count("--hash") == 2
    assert (folder / "locked-last.txt").read_text().startswith("tinylib==1 ")


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_every_lock_pins_and_hashes_all_but_torch(name):
    torch, locked = read_lock(BACKENDS[name].requirements)
    assert torch is not None
    assert re.fullmatch(r"torch==[\d.]+", torch)
    assert name in locked
    assert "torch" not in locked
    for text in locked.values():
        assert re.match(r"[\w.-]+==[\w.]+", text), text
        assert HASH.search(text), text
    assert len(locked) > 20
