from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import yaml

from advisor.errors import InputError
from advisor.plan.files import dump_plan, load_plan, save_plan, write_atomically

GOLDEN = Path(__file__).parents[2] / "golden" / "plan.yaml"


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "plan.yaml"
    path.write_text("old")
    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(InputError, match=r"No space left on device\. Nothing was changed"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "cache"] == ["plan.yaml"]


def test_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "plan.yaml"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_is_as_readable_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "plan.yaml", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "plan.yaml").stat().st_mode & 0o777 == mode


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"must be writable.*Name another output"):
        write_atomically(tmp_path / "file" / "plan.yaml", "text")


def edited(tmp_path, change):
    document = yaml.safe_load(GOLDEN.read_text(encoding="utf-8"))
    change(document)
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.update(modle={}), "unknown key 'modle'. Did you mean 'model'"),
        (
            lambda plan: plan["runners_up"][1].update(reasn="x"),
            r"unknown key 'runners_up.1.reasn'. Did you mean 'reason'",
        ),
        (
            lambda plan: plan["expected"]["loss"].update(hihg=1),
            "unknown key 'expected.loss.hihg'. Did you mean 'high'",
        ),
        (lambda plan: plan.pop("model"), "the key 'model' is missing"),
        (lambda plan: plan["serving"].update(batch=0), "serving.batch: .* but got 0"),
        (lambda plan: plan["expected"].update(size_bytes="big"), "expected.size_bytes: .*'big'"),
        (lambda plan: plan.update(plan_version=-7), "plan_version: .* but got -7"),
        (lambda plan: plan["hardware"].update(count=0), "hardware.count: .* but got 0"),
        (lambda plan: plan.update(plan_version=2), "plan_version 2, but .* up to 1. Upgrade"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load_plan(edited(tmp_path, change))


def test_all_faults_of_a_plan_at_once(tmp_path):
    def change(plan):
        plan["extra"] = 1
        del plan["versions"]

    with pytest.raises(InputError, match=r"(?s)2 problems:.*'versions'.*'extra'"):
        load_plan(edited(tmp_path, change))


def test_yaml_never_makes_objects(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(InputError, match="not valid YAML"):
        load_plan(path)


def test_order_is_the_schemas_and_unknowns_are_left_out(tmp_path):
    plan = load_plan(GOLDEN)
    lines = dump_plan(plan).splitlines()
    keys = [line.split(":")[0] for line in lines if line and line[0].isalpha()]
    assert keys[:4] == ["plan_version", "advisor_version", "model", "hardware"]
    assert not any("revision" in line for line in lines)
    save_plan(plan, tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml") == plan
