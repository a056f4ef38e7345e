"""The journey on the small trained model: tune, apply, verify, and what verify must refuse."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from typing import TYPE_CHECKING

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from advisor import workflows
from advisor.budgets import Budgets
from advisor.errors import InputError
from advisor.plan.files import load_plan, save_plan
from advisor.plan.hashing import sha256_file
from advisor.workflows import applying
from advisor.workflows.demonstration import example_model

if TYPE_CHECKING:
    from pathlib import Path

    from advisor.workflows.tuning import Tuning

SIZE_LIMIT = 3_100_000
SETTINGS = {
    "gpu": "cpu", "engine": "transformers", "context": 256, "samples": 8,
    "sequence_length": 64, "evaluation_sequences": 8, "trials": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVISOR_CACHE", str(cache))


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, Tuning]:
    """Folder with plan.yaml and the checkpoint made from it."""
    folder = tmp_path_factory.mktemp("journey")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADVISOR_CACHE", str(cache))
        tuning = workflows.tune(
            example_model(), budgets=Budgets(max_size_bytes=SIZE_LIMIT),
            output=folder / "plan.yaml", **SETTINGS,
        )  # fmt: skip
        workflows.apply(folder / "plan.yaml", folder / "quantized")
    return folder, tuning


def copy(journey: tuple[Path, Tuning], tmp_path: Path) -> tuple[Path, Path]:
    """A plan and a checkpoint of one's own to damage."""
    shutil.copytree(journey[0] / "quantized", tmp_path / "quantized")
    shutil.copy(journey[0] / "plan.yaml", tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml", tmp_path / "quantized"


def rewrite(path: Path, change: dict[str, object], drop: str | None = None) -> None:
    """Write a tensor file again with some tensors changed."""
    with safe_open(path, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        metadata = handle.metadata()
    for name, source in change.items():
        tensors[name] = tensors[source].clone() if isinstance(source, str) else source
    if drop is not None:
        del tensors[drop]
    save_file(tensors, str(path), metadata)


def forget_hashes(plan: Path) -> None:
    """Leave only the checks that read the content."""
    text = plan.read_text().split("\noutputs:")[0] + "\n"
    plan.write_text(text)


def failed(plan: Path, folder: Path) -> dict[str, str]:
    report = workflows.verify(plan, folder)
    return {check.name: check.detail for check in report.checks if not check.passed}


def test_answer_meets_the_budget_and_beats_every_uniform_candidate(
    journey: tuple[Path, Tuning],
) -> None:
    folder, tuning = journey
    plan = load_plan(folder / "plan.yaml")
    assert tuning.feasible
    written = sum(file.stat().st_size for file in (folder / "quantized").glob("*.safetensors"))
    assert written <= SIZE_LIMIT
    assert abs(written - plan.expected.size_bytes) / written < 0.005
    uniform = [row for row in tuning.result.finalists if row.mixture.is_uniform]
    assert uniform
    assert plan.expected.kl is not None
    within = [row for row in uniform if row.mixture.size_bytes <= SIZE_LIMIT]
    assert all(plan.expected.kl.value <= row.measured_kl for row in within)


def test_verify_accepts_what_apply_wrote(journey: tuple[Path, Tuning]) -> None:
    folder, _ = journey
    report = workflows.verify(folder / "plan.yaml", folder / "quantized")
    assert report.passed, report.to_dict()["checks"]
    plan = load_plan(folder / "plan.yaml")
    assert plan.expected.kl is not None
    assert report.measured is not None
    assert report.measured["kl"]["value"] == pytest.approx(plan.expected.kl.value, rel=0.02)


def test_apply_twice_gives_identical_files(journey: tuple[Path, Tuning], tmp_path: Path) -> None:
    plan, _ = copy(journey, tmp_path)
    again = workflows.apply(plan, tmp_path / "again")
    assert again.files
    for name, digest in again.files.items():
        assert sha256_file(journey[0] / "quantized" / name) == digest


def test_apply_without_the_cache_gives_identical_files(
    journey: tuple[Path, Tuning], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "empty"))
    plan, _ = copy(journey, tmp_path)
    again = workflows.apply(plan, tmp_path / "again")
    for name, digest in again.files.items():
        assert sha256_file(journey[0] / "quantized" / name) == digest


def test_a_plan_that_cannot_be_written_costs_no_finished_work(
    journey: tuple[Path, Tuning], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copy in the checkpoint has the hashes, and verify finds them there."""
    plan = tmp_path / "plan.yaml"
    shutil.copy(journey[0] / "plan.yaml", plan)
    forget_hashes(plan)

    def save(content: object, path: Path) -> None:
        if path == plan:
            raise InputError(f"the folder of {path} must be writable.")
        save_plan(content, path)

    monkeypatch.setattr(applying, "save_plan", save)
    applied = workflows.apply(plan, tmp_path / "out")
    assert any("The hashes are in" in warning for warning in applied.warnings)
    report = workflows.verify(plan, tmp_path / "out")
    assert report.passed
    assert any("hashes are those of" in warning for warning in report.warnings)


@pytest.mark.parametrize("step", ["save_plan", "sha256_file"])
def test_apply_that_is_stopped_after_the_weights_leaves_nothing(
    journey: tuple[Path, Tuning], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Not a checkpoint without its plan and card, which the same command then refuses to touch."""
    plan, _ = copy(journey, tmp_path)
    before = plan.read_bytes()
    with monkeypatch.context() as patched:

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(applying, step, stop)
        with pytest.raises(KeyboardInterrupt):
            workflows.apply(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    assert plan.read_bytes() == before
    assert workflows.apply(plan, tmp_path / "out").files


def test_apply_refuses_an_existing_output(journey: tuple[Path, Tuning], tmp_path: Path) -> None:
    plan, folder = copy(journey, tmp_path)
    with pytest.raises(InputError, match="quantized"):
        workflows.apply(plan, folder)


def test_shards_are_hashed_verified_and_inspected(
    journey: tuple[Path, Tuning], tmp_path: Path
) -> None:
    plan, _ = copy(journey, tmp_path)
    folder = tmp_path / "shards"
    result = workflows.apply(plan, folder, max_shard_bytes=1_000_000)
    assert len(result.files) >= 3
    assert all((folder / name).stat().st_size < 1_050_000 for name in result.files)
    outputs = load_plan(plan).outputs
    assert {*result.files, "config.json", "model.safetensors.index.json"} == outputs.keys()
    assert workflows.verify(plan, folder).passed
    found = workflows.inspect(folder, gpu="cpu", engine="transformers")
    assert found.faults == ()
    assert found.size_bytes == result.size_bytes
    last = folder / sorted(result.files)[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(bytes(content))
    assert failed(plan, folder)["files"] == f"{last.name} has changed since it was written"
    last.unlink()
    assert f"{last.name} is missing" in failed(plan, folder)["files"]


def test_the_model_card_is_the_plans(journey: tuple[Path, Tuning], tmp_path: Path) -> None:
    plan, folder = copy(journey, tmp_path)
    card = (folder / "README.md").read_text()
    expected = load_plan(plan).expected
    assert expected.kl is not None
    assert f"{expected.kl.value:.3g} [{expected.kl.low:.3g}, {expected.kl.high:.3g}]" in card
    assert "base_model: tiny-llama" in card
    workflows.apply(plan, tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card


def test_apply_refuses_what_the_engine_cannot_load_before_any_work(
    journey: tuple[Path, Tuning], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = copy(journey, tmp_path)
    document = yaml.safe_load(plan.read_text())
    document["engine"]["name"] = "vllm"
    document["hardware"]["count"] = 16
    document["settings"]["static_groups"] = False
    document["scheme"]["default"] = "gptq-int5-g32-sym-actorder"
    document["scheme"]["modules"] = {"model.layers.0.self_attn.v_proj": "bf16"}
    plan.write_text(yaml.safe_dump(document, sort_keys=False))
    monkeypatch.setattr("advisor.models.load.load_model", lambda _: pytest.fail("work was done"))
    with pytest.raises(InputError) as caught:
        workflows.apply(plan, tmp_path / "again")
    text = str(caught.value)
    for part in ("act-order", "one product", "attention heads", "whole groups"):
        assert part in text
    assert not (tmp_path / "again").exists()


def test_flipped_byte(journey: tuple[Path, Tuning], tmp_path: Path) -> None:
    plan, folder = copy(journey, tmp_path)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert "changed" in failed(plan, folder)["files"]


def scale_of(folder: Path) -> str:
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        return next(n for n in sorted(handle.keys()) if n.endswith(("scales", "weight_scale")))


def test_files_above_the_budget_that_the_plan_promised(
    journey: tuple[Path, Tuning], tmp_path: Path
) -> None:
    plan, folder = copy(journey, tmp_path)
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    document = yaml.safe_load(plan.read_text())
    document["budgets"]["max_size_bytes"] = written - 1
    document["expected"]["size_bytes"] = written - 2
    plan.write_text(yaml.safe_dump(document))
    assert failed(plan, folder) == {
        "files": f"the weight files hold {written} bytes, and the budget is {written - 1}"
    }


def test_missing_scale(journey: tuple[Path, Tuning], tmp_path: Path) -> None:
    plan, folder = copy(journey, tmp_path)
    forget_hashes(plan)
    (folder / "advisor-plan.yaml").unlink()
    name = scale_of(folder)
    rewrite(folder / "model.safetensors", {}, drop=name)
    assert name.rsplit(".", 1)[0] in failed(plan, folder)["structure"]


def twins(folder: Path) -> tuple[str, str, list[str]]:
    """Two modules stored alike, and the names of their tensors' last parts."""
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        names = list(handle.keys())
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        module, _, last = name.rpartition(".")
        parts.setdefault(module, {})[last] = shape
    quantized = [module for module, found in parts.items() if len(found) > 1]
    return next(
        (first, second, list(parts[first]))
        for first, second in itertools.combinations(quantized, 2)
        if parts[first] == parts[second] and first.split(".")[-1] == second.split(".")[-1]
    )


def test_swapped_module(journey: tuple[Path, Tuning], tmp_path: Path) -> None:
    plan, folder = copy(journey, tmp_path)
    forget_hashes(plan)
    (folder / "advisor-plan.yaml").unlink()
    first, second, parts = twins(folder)
    rewrite(folder / "model.safetensors", {f"{first}.{p}": f"{second}.{p}" for p in parts})
    assert f"{first} " in failed(plan, folder)["weights"]


def test_edited_config(journey: tuple[Path, Tuning], tmp_path: Path) -> None:
    plan, folder = copy(journey, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json" in failed(plan, folder)["files"]


def test_wrong_group_size(journey: tuple[Path, Tuning], tmp_path: Path) -> None:
    plan, folder = copy(journey, tmp_path)
    forget_hashes(plan)
    (folder / "advisor-plan.yaml").unlink()
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    groups = config["quantization_config"]["config_groups"].values()
    settings = next(g["weights"] for g in groups if g["weights"]["strategy"] == "group")
    settings["group_size"] = {32: 64, 64: 128, 128: 64}[settings["group_size"]]
    (folder / "config.json").write_text(json.dumps(config))
    assert failed(plan, folder).keys() & {"structure", "schemes"}


def test_report_of_the_plan(journey: tuple[Path, Tuning], tmp_path: Path) -> None:
    page = workflows.report(journey[0] / "plan.yaml", tmp_path / "report.html").output.read_text()
    assert "<svg" in page
    assert load_plan(journey[0] / "plan.yaml").model.weights_sha256 in page


def test_compare_and_inspect(journey: tuple[Path, Tuning]) -> None:
    folder, _ = journey
    plan = load_plan(folder / "plan.yaml")
    found = workflows.inspect(folder / "quantized", gpu="cpu", engine="transformers")
    assert found.faults == ()
    assert found.bits_per_weight == pytest.approx(plan.expected.bits_per_weight, rel=0.005)
    compared = workflows.compare(
        example_model(), folder / "quantized", evaluation_sequences=8, sequence_length=64
    )
    assert plan.expected.kl is not None
    assert compared.kl.value == pytest.approx(plan.expected.kl.value, rel=0.02)


def test_impossible_budgets_name_what_would_do(tmp_path: Path) -> None:
    budgets = Budgets(max_size_bytes=2_350_000, max_kl=0.00005)
    result = workflows.tune(
        example_model(), budgets=budgets, output=tmp_path / "plan.yaml", **SETTINGS
    )
    assert not result.feasible
    document = result.to_dict()
    changed = {row["budget"]: row for row in document["relaxation"]}
    assert changed["max_size"]["to"] > budgets.max_size_bytes
    assert changed["max_kl"]["to"] > 0.00005


def test_slices_and_a_benchmark_are_judged_apart_and_verified(tmp_path, cli_text):
    """A second text and a task: both in the plan, both measured again by verify."""
    code = tmp_path / "code.txt"
    code.write_text(cli_text, encoding="utf-8")
    task = tmp_path / "task.jsonl"
    rows = [
        {"question": f"The {noun} statement is used", "choices": ["to", "zzzz"], "answer": 0}
        for noun in ("if", "for", "while", "return", "import", "pass", "with", "try", "del")
    ]
    task.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    budgets = Budgets(max_size_bytes=SIZE_LIMIT, max_accuracy_drop=0.9, task=str(task))
    tuning = workflows.tune(
        example_model(), budgets=budgets, slices=[f"code={code}"],
        output=tmp_path / "plan.yaml", **SETTINGS,
    )  # fmt: skip
    plan = load_plan(tmp_path / "plan.yaml")
    assert tuning.feasible
    assert plan.expected.slices.keys() == {"code"}
    assert plan.slices["code"].corpus == str(code)
    assert plan.expected.accuracy is not None
    assert plan.expected.accuracy.questions == len(rows)
    assert plan.expected.accuracy.reference > 0.5, "the model knows the text it was trained on"
    row = tuning.to_dict()["finalists"][0]
    assert row["slices"]["code"]["kl"]["value"] == plan.expected.slices["code"].kl.value
    workflows.apply(tmp_path / "plan.yaml", tmp_path / "quantized")
    report = workflows.verify(tmp_path / "plan.yaml", tmp_path / "quantized")
    assert report.passed, report.checks
    names = {check.name for check in report.checks}
    assert {"quality", "quality on code", f"accuracy on {task}"} <= names
    assert report.measured is not None
    assert report.measured["accuracy"] == plan.expected.accuracy.value
    workflows.report(tmp_path / "plan.yaml", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Judged apart" in page
    assert "questions right" in page


@pytest.fixture
def cli_text() -> str:
    """Source text of a few modules: not what the model was trained or calibrated on."""
    from pathlib import Path as Folder

    import advisor

    folder = Folder(advisor.__file__).parent / "cli"
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py")))


def test_bad_judges_are_named_all_at_once(tmp_path):
    (tmp_path / "bad.jsonl").write_text("[]\n[]\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        workflows.tune(
            example_model(), slices=["nonsense", f"x={tmp_path / 'none.txt'}"],
            budgets=Budgets(max_accuracy_drop=0.1, task=str(tmp_path / "bad.jsonl")),
            evaluation=[str(tmp_path / "gone.txt")], output=tmp_path / "plan.yaml", **SETTINGS,
        )  # fmt: skip
    text = str(caught.value)
    assert all(part in text for part in ("gone.txt", "'nonsense'", "line 1 of", "NAME=PATH"))
    assert not (tmp_path / "plan.yaml").exists()


def test_a_plan_from_compact_statistics_is_applied_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "cache"))
    asked = SETTINGS | {"samples": 16, "trials": 4, "sequential": False}
    limits = Budgets(max_size_bytes=SIZE_LIMIT)

    def tune(max_disk: int) -> Tuning:
        return workflows.tune(
            example_model(), budgets=limits, output=tmp_path / "plan.yaml",
            max_disk=max_disk, **asked,
        )  # fmt: skip

    with pytest.raises(InputError, match="in 16 bits, for lack of room") as refused:
        tune(1000)
    (needed,) = re.findall(r"needs at most ([\d.]+) MB", str(refused.value))
    tune(int(float(needed) * 1.02e6))
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.calibration is not None
    assert plan.calibration.compact
    stores = sorted((tmp_path / "cache" / "statistics").iterdir())
    workflows.apply(tmp_path / "plan.yaml", tmp_path / "once")
    assert sorted((tmp_path / "cache" / "statistics").iterdir()) == stores
    shutil.rmtree(tmp_path / "cache")
    workflows.apply(tmp_path / "plan.yaml", tmp_path / "anew")  # where there is room for more
    files = [sha256_file(tmp_path / name / "model.safetensors") for name in ("once", "anew")]
    assert files[0] == files[1]
    assert workflows.verify(tmp_path / "plan.yaml", tmp_path / "anew").passed
