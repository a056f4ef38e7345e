"""Disk use: predicted before a search starts, and held to a limit."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from advisor.budgets import Budgets
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.engines.options import MixtureOptions
from advisor.errors import InputError
from advisor.hardware.catalogue import find_profile
from advisor.predict.models import load_modelspec
from advisor.schemes import parse_scheme
from advisor.search.disk import DiskUse
from advisor.search.tune import tune

OPTIONS = MixtureOptions(
    "compressed-tensors", tuple(map(parse_scheme, ("gptq-int4-g32-sym", "bf16")))
)
HEADERS = 40_000
"""Headers, manifests and facts beside the tensors."""


def sequences(seed, count):
    tokens = torch.randint(2, 300, (count, 32), generator=torch.Generator().manual_seed(seed))
    return TokenSequences(tokens, f"random:{seed}", str(seed) * 8, seed, hash_tokens(tokens))


@pytest.fixture
def run(random_llama, random_llama_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "cache"))

    def call(**changes):
        arguments = {
            "calibration": sequences(1, 16), "evaluation": sequences(2, 8),
            "workdir": tmp_path / "work", "trials": 4, "context": 64, "options": OPTIONS,
            "sequential": False,
        } | changes  # fmt: skip
        spec = load_modelspec(str(random_llama_folder))
        budgets = arguments.pop("budgets", Budgets())
        return tune(random_llama, spec, find_profile("rtx-4090"), "vllm", budgets, **arguments)

    return call


def used(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_is_predicted_is_what_is_used(run, tmp_path, monkeypatch):
    from advisor.search import run as search_run

    predicted: list[DiskUse] = []
    real = search_run.check_disk
    monkeypatch.setattr(search_run, "check_disk", lambda use: (predicted.append(use), real(use)))
    most = {}

    def watch(event):
        most[event.stage] = max(most.get(event.stage, 0), used(tmp_path / "cache"))

    run(progress=watch)
    (use,) = predicted
    # The last block's states are dropped a moment before its step is told.
    assert use.collecting * 0.75 < most["Statistics"] <= use.collecting + HEADERS
    assert used(tmp_path / "cache" / "statistics") <= use.statistics + HEADERS
    references = used(tmp_path / "cache" / "references")
    assert use.references <= references <= use.references + HEADERS
    run(progress=watch)
    assert predicted[1].collecting == predicted[1].references == 0


def test_a_limit_is_said_before_anything_is_written(run, tmp_path):
    with pytest.raises(InputError, match=r"needs at most .* --max-disk allows 100 kB"):
        run(max_disk_bytes=100_000)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "work").exists()


def test_statistics_are_compact_where_the_room_is_short(run, tmp_path):
    from advisor.search import disk

    first = run(workdir=tmp_path / "first")
    assert first.plan.calibration.compact is None
    statistics = used(tmp_path / "cache" / "statistics")
    shutil.rmtree(tmp_path / "cache")
    calls = []
    real = disk.predict_disk

    def watch(task, store, *others):
        calls.append(real(task, store, *others))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "predict_disk", watch)
        with pytest.raises(InputError, match=r"of statistics \(in 16 bits, for lack of room\)"):
            run(max_disk_bytes=100_000)
        usual, compact = calls
        assert compact.peak < usual.peak
        found = run(max_disk_bytes=usual.peak - 1)
    assert found.plan.calibration.compact is True
    assert used(tmp_path / "cache" / "statistics") < 0.75 * statistics  # gradients are as they were
    assert found.answer.measurement.kl.value == pytest.approx(
        first.answer.measurement.kl.value, rel=0.1
    )
    # Whoever has room later goes on with what is there.
    assert run(workdir=tmp_path / "again").plan.calibration.compact is None


def test_too_little_memory_is_said_before_anything_is_written(run, tmp_path, monkeypatch):
    from advisor.search import memory

    facts = replace(memory.detect_cpu(), memory_bytes=2 * 10**8)
    monkeypatch.setattr(memory, "detect_cpu", lambda: facts)
    with pytest.raises(InputError, match=r"needs about 0\.\d+ GB of memory .* has 0\.20 GB"):
        run()
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "work").exists()


def test_room_for_references_is_what_the_rest_leaves():
    use = DiskUse(collecting=0, statistics=10, references=20, candidate=30, limit=100)
    assert use.peak == 60
    assert use.left_for_references == 60
    assert DiskUse(90, 10, 20, 30).peak == 90
    assert DiskUse(90, 10, 20, 30).left_for_references is None
    kept = DiskUse(0, 10, 20, 30, kept=25, limit=100)
    assert kept.peak == 85
    assert kept.left_for_references == 35


def test_what_other_libraries_make_counts(run):
    use = DiskUse(0, 10, 20, 30, outside=25, limit=100)
    assert (use.peak, use.left_for_references) == (85, 35)
    assert "55 B for candidates, 25 B of them other libraries'" in use.describe()

    class Makers:
        def predicted_bytes(self, max_bytes):
            assert max_bytes == 100_000
            return 10**7

    with pytest.raises(InputError, match=r"10 MB of them .* --max-disk .* or fewer --backends\."):
        run(
            outsiders=Makers(), budgets=Budgets(max_size_bytes=100_000), max_disk_bytes=9 * 10**6,
        )  # fmt: skip


def test_codes_are_kept_only_where_there_is_plenty_of_room(run, monkeypatch):
    from advisor.search import run as search_run

    predicted: list[DiskUse] = []
    real = search_run.check_disk
    monkeypatch.setattr(search_run, "check_disk", lambda use: (predicted.append(use), real(use)))
    run()
    run()  # statistics and references are there now
    peak = predicted[1].peak
    assert predicted[1].kept > 0
    run(max_disk_bytes=2 * peak)
    run(max_disk_bytes=2 * peak - 1)
    assert [use.kept for use in predicted[2:]] == [predicted[1].kept, 0]
    assert predicted[3].peak == peak - predicted[1].kept
