"""Where data files are found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import advisor
from advisor.errors import InputError
from advisor.plan import data
from advisor.plan.data import data_files, data_folders, profiles_folder, set_extra_folders

CARD = "kind: gpu\nid: mine\n"


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv("ADVISOR_PROFILES", raising=False)
    yield
    set_extra_folders(())


def folder(path: Path, **files: str) -> Path:
    for name, text in files.items():
        target = path / name.replace("__", "/")
        target = target.with_name(target.name + ".yaml")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return path


def test_checkout_or_wheel_has_hardware():
    assert (profiles_folder() / "hardware").is_dir()


def test_installed_package_finds_its_profiles_from_anywhere(tmp_path):
    """As in a wheel: profiles inside the package, no checkout beside it."""
    package = Path(advisor.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__", "_profiles")
    shutil.copytree(package, tmp_path / "site" / "advisor", ignore=ignore)
    shutil.copytree(profiles_folder(), tmp_path / "site" / "advisor" / "_profiles")
    code = (
        "from advisor.hardware.catalogue import find_profile\n"
        "from advisor.plan.data import profiles_folder\n"
        "print(profiles_folder().name, find_profile('l4').bandwidth_gb_s)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert answer.stdout.split() == ["_profiles", "300.0"]


def test_incomplete_installation_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "__file__", str(tmp_path / "advisor" / "plan" / "data.py"))
    with pytest.raises(data.AdvisorError, match="Install quantization-advisor again"):
        profiles_folder()


def test_own_folders_come_last_and_the_option_after_the_environment(monkeypatch, tmp_path):
    first = folder(tmp_path / "first", hardware__a=CARD)
    second = folder(tmp_path / "second", hardware__b=CARD)
    option = folder(tmp_path / "option", hardware__c=CARD)
    monkeypatch.setenv("ADVISOR_PROFILES", f"{first}{os.pathsep}{second}")
    set_extra_folders([option])
    files = data_files("hardware")
    assert [path.name for path in files[-3:]] == ["a.yaml", "b.yaml", "c.yaml"]
    assert data_folders("hardware")[-1] == option / "hardware"
    set_extra_folders(())
    assert data_files("hardware")[-1].name == "b.yaml"


def test_hardware_may_lie_directly_in_the_folder_but_models_do_not_count_as_it(tmp_path):
    own = folder(tmp_path, card=CARD, model="architecture: Llama\n", hardware__other=CARD)
    set_extra_folders([own])
    found = [path.name for path in data_files("hardware") if tmp_path in path.parents]
    assert found == ["other.yaml", "card.yaml"]
    assert all(tmp_path not in path.parents for path in data_files("engines"))
    assert [path.name for path in data.unplaced_files(own)] == ["model.yaml"]


def test_hidden_and_other_files_are_left_alone(tmp_path):
    own = folder(tmp_path, hardware__a=CARD)
    (own / "hardware" / ".swap.yaml").write_text(CARD)
    (own / "hardware" / "README.md").write_text("text")
    (own / "hardware" / "b.yml").write_text(CARD)
    assert [path.name for path in data.folder_files(own, "hardware")] == ["a.yaml", "b.yml"]


def test_missing_folders_are_all_named_and_nothing_is_set(tmp_path, monkeypatch):
    with pytest.raises(InputError) as caught:
        set_extra_folders([tmp_path, tmp_path / "no", tmp_path / "neither"])
    assert "no'" in str(caught.value)
    assert "neither'" in str(caught.value)
    assert data.extra_folders() == ()
    monkeypatch.setenv("ADVISOR_PROFILES", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"\$ADVISOR_PROFILES"):
        data_files("hardware")
