"""A text whose writing is stopped anywhere goes on, and comes out as if it had not been."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import threading

import pytest
import torch
from filelock import FileLock

from advisor.calibration import drafts, own_text
from advisor.calibration.drafts import Draft
from advisor.calibration.own_text import write, written_by
from advisor.errors import InputError
from advisor.workflows.own_text import OwnText, save_tokens

SHAPE = {"sequences": 5, "sequence_length": 90, "seed": 4}


class Stopped(Exception):
    """What ends a run."""


@pytest.fixture
def always(monkeypatch):
    """Save after every token."""
    monkeypatch.setattr(drafts, "SAVE_SECONDS", 0.0)


@pytest.fixture
def whole(random_llama, monkeypatch):
    """What is written in one go, three and then two sequences at once."""
    monkeypatch.setattr(own_text, "_MOST_ROWS", 3)
    return write(random_llama, **SHAPE)


def begin(loaded, folder, stop=None):
    """Write until so many tokens are there; return the text, if it is whole, and where it began."""
    seen = []

    def progress(done, total):
        seen.append(done)
        assert total == 450
        if stop is not None and done >= stop:
            raise Stopped

    draft = Draft(folder, written_by(loaded))
    try:
        return write(loaded, **SHAPE, draft=draft, progress=progress), seen
    except Stopped:
        return None, seen


@pytest.mark.parametrize("stops", [(3,), (63 * 3, 64 * 3, 65 * 3), (268, 270), (274, 449), (450,)])
def test_a_stopped_text_goes_on(stops, random_llama, whole, tmp_path, always):
    last = 0
    for stop in stops:
        text, seen = begin(random_llama, tmp_path / "draft", stop)
        assert text is None
        assert 0 < seen[0] - last <= 3, "it goes on where it was"
        last = seen[-1]
    text, seen = begin(random_llama, tmp_path / "draft")
    assert torch.equal(text, whole)
    assert seen[:1] != [3], "nor is anything written twice"
    assert seen[-1:] in ([450], [])


def test_what_was_not_saved_is_written_again(random_llama, whole, tmp_path, always, monkeypatch):
    begin(random_llama, tmp_path / "draft", 60)
    monkeypatch.setattr(drafts, "SAVE_SECONDS", 1000.0)
    begin(random_llama, tmp_path / "draft", 150)  # leaves keys and values of tokens that are lost
    text, seen = begin(random_llama, tmp_path / "draft")
    assert seen[0] == 63
    assert torch.equal(text, whole)


def test_a_process_that_is_killed(random_llama, random_llama_folder, whole, tmp_path):
    code = f"""
import os, signal, torch
from pathlib import Path
from advisor.calibration import drafts, own_text
from advisor.models.load import load_model
torch.set_num_threads({torch.get_num_threads()})
drafts.SAVE_SECONDS, own_text._MOST_ROWS = 0.0, 3
loaded = load_model(Path({str(random_llama_folder)!r}))
draft = drafts.Draft(Path({str(tmp_path / "draft")!r}), own_text.written_by(loaded))
def progress(done, total):
    if done == 240:
        os.kill(os.getpid(), signal.SIGKILL)
own_text.write(loaded, **{SHAPE!r}, draft=draft, progress=progress)
"""
    found = subprocess.run([sys.executable, "-c", code], timeout=240, check=False)
    assert found.returncode == -signal.SIGKILL
    text, seen = begin(random_llama, tmp_path / "draft")
    assert seen[0] == 243
    assert torch.equal(text, whole)


@pytest.mark.parametrize("name", ["00000-keys", "00001-values"])
def test_damaged_keys_and_values_are_not_gone_on_with(name, random_llama, whole, tmp_path, always):
    begin(random_llama, tmp_path / "draft", 240)
    path = tmp_path / "draft" / name
    content = bytearray(path.read_bytes())
    content[4 * 16 * 40] ^= 1  # of the 41st token of the first sequence's first head
    path.write_bytes(content)
    text, seen = begin(random_llama, tmp_path / "draft")
    assert seen[0] == 3, "begun anew"
    assert torch.equal(text, whole)


@pytest.mark.parametrize("loss", ["missing", "short", "no state", "half a state"])
def test_a_draft_that_is_not_whole_is_begun_anew(loss, random_llama, whole, tmp_path, always):
    folder = tmp_path / "draft"
    begin(random_llama, folder, 240)
    if loss == "missing":
        (folder / "00001-keys").unlink()
    elif loss == "short":
        with (folder / "00001-keys").open("r+b") as handle:
            handle.truncate(1000)
    elif loss == "no state":
        (folder / "draft.json").unlink()
    else:
        (folder / "draft.json").write_text((folder / "draft.json").read_text()[:99])
    text, seen = begin(random_llama, folder)
    assert seen[0] == 3
    assert torch.equal(text, whole)


def test_what_another_number_of_threads_wrote_is_not_gone_on_with(
    random_llama, whole, tmp_path, always, monkeypatch
):
    begin(random_llama, tmp_path / "draft", 240)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert Draft(tmp_path / "draft", written_by(random_llama)).rows is None
    assert list((tmp_path / "draft").iterdir()) == []


def test_files_of_whole_sequences_are_removed(random_llama, whole, tmp_path, always):
    begin(random_llama, tmp_path / "draft", 240)
    kept = sum(path.stat().st_size for path in (tmp_path / "draft").glob("0*"))
    # Two blocks' keys and values, 3 rows, 2 groups, 16 wide, room for 91 tokens in two pieces.
    assert kept == 2 * 2 * 3 * 2 * 16 * 128 * 4
    begin(random_llama, tmp_path / "draft", 450)
    kept = sum(path.stat().st_size for path in (tmp_path / "draft").glob("0*"))
    assert kept == 2 * 2 * 2 * 2 * 16 * 128 * 4, "of the last two"
    state = json.loads((tmp_path / "draft" / "draft.json").read_text())
    assert len(state["finished"]) == 3
    begin(random_llama, tmp_path / "draft")
    assert [path.name for path in (tmp_path / "draft").iterdir()] == ["draft.json"]


ROW_BYTES = 2 * 2 * 2 * 16 * 128 * 4
"""Keys and values of one sequence: two blocks, 2 groups, 16 wide, 91 tokens in two pieces."""


def test_as_many_sequences_are_written_at_once_as_the_disk_allows(random_llama, tmp_path, always):
    limit, most = 2 * ROW_BYTES + 100, 0

    def progress(done, total):
        nonlocal most
        used = [path.stat().st_size for path in (tmp_path / "draft").glob("0*")]
        most = max(most, sum(used))

    draft = Draft(tmp_path / "draft", written_by(random_llama), limit)
    text = write(random_llama, **SHAPE, draft=draft, progress=progress)
    assert most == 2 * ROW_BYTES
    assert text.shape == (5, 90)


def test_less_disk_than_a_sequence_needs_is_said(random_llama, tmp_path, monkeypatch):
    draft = Draft(tmp_path / "draft", written_by(random_llama), ROW_BYTES - 1)
    match = r"one sequence of text need 65\.5 kB .* --max-disk allows 65\.5 kB.*--sequence-length"
    with pytest.raises(InputError, match=match):
        write(random_llama, **SHAPE, draft=draft)
    assert list((tmp_path / "draft").iterdir()) == []
    monkeypatch.setattr(drafts, "free_bytes", lambda _: 1000)
    draft = Draft(tmp_path / "draft", written_by(random_llama))
    with pytest.raises(InputError, match=r"65\.5 kB .* 1 kB are free in .*ADVISOR_CACHE"):
        write(random_llama, **SHAPE, draft=draft)


def test_the_limit_of_a_command_counts_the_text_too(random_llama, monkeypatch):
    limit = ROW_BYTES // 2 + 16 * 2 * 20  # room for 21 tokens in one piece, and the text
    assert OwnText(random_llama, most_bytes=limit)(2, 20, 0).sequences == 2
    with pytest.raises(InputError, match=r"--max-disk allows 32\.8 kB"):
        OwnText(random_llama, most_bytes=limit - 10)(2, 20, 1)


def test_a_full_disk_is_said_before_anything_is_written(random_llama, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(drafts.os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"room on the disk, but No space left.*ADVISOR_CACHE"):
        begin(random_llama, tmp_path / "draft")


def test_a_folder_that_cannot_be_written_is_said(random_llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"cannot write text to .*ADVISOR_CACHE"):
        Draft(tmp_path / "file" / "draft", {})
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write text to .*ADVISOR_CACHE"):
        OwnText(random_llama)(2, 20, 0)


def test_the_command_goes_on_too_and_leaves_only_the_text(
    random_llama, tmp_path, always, monkeypatch
):
    events = []

    def stop(event):
        events.append(event.done)
        if event.done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        OwnText(random_llama, stop)(3, 20, 0)
    again = []
    found = OwnText(random_llama, lambda event: again.append(event.done))(3, 20, 0)
    assert (events[-1], again[0], again[-1]) == (30, 33, 60)
    assert torch.equal(found.tokens, write(random_llama, sequences=3, sequence_length=20, seed=0))
    folder = tmp_path / "cache" / "texts"
    assert {path.suffix for path in folder.iterdir()} <= {".npy", ".lock"}


def test_two_processes_write_one_text_once(random_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("advisor.workflows.own_text.write", None)
    key = own_text.own_text_key(random_llama, 2, 20, 0)
    kept = tmp_path / "cache" / "texts" / f"{key}.npy"
    kept.parent.mkdir(parents=True)
    found = []
    waiting = threading.Thread(target=lambda: found.append(OwnText(random_llama)(2, 20, 0)))
    with FileLock(kept.with_suffix(".lock")):  # the other process writes
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        save_tokens(kept, torch.arange(40).view(2, 20))
    waiting.join(20)
    assert torch.equal(found[0].tokens, torch.arange(40).view(2, 20))
