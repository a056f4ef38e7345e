"""Where caches and environments lie, and what is said where nothing tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from advisor.errors import InputError
from advisor.plan.folders import cache_root, environments_root

VARIABLES = ("ADVISOR_CACHE", "ADVISOR_BACKENDS", "XDG_CACHE_HOME", "XDG_DATA_HOME")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


def test_usual_folders(home):
    assert cache_root() == home / ".cache" / "advisor"
    assert environments_root() == home / ".local" / "share" / "advisor" / "backends"


def test_the_users_own_bases(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scratch"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert cache_root() == tmp_path / "scratch" / "advisor"
    assert environments_root() == tmp_path / "data" / "advisor" / "backends"


def test_relative_bases_are_ignored(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "scratch")
    assert cache_root() == home / ".cache" / "advisor"


def test_own_variables_come_first(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scratch"))
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("ADVISOR_BACKENDS", str(tmp_path / "environments"))
    assert cache_root() == tmp_path / "own"
    assert environments_root() == tmp_path / "environments"


@pytest.mark.parametrize(
    ("folder", "variable"), [(cache_root, "ADVISOR_CACHE"), (environments_root, "ADVISOR_BACKENDS")]
)
def test_a_user_without_a_home_is_told_which_variable_helps(folder, variable, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(InputError, match=f"export {variable}="):
        folder()
