from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from advisor.errors import InputError
from advisor.plan.files import load_plan
from advisor.plan.hashing import hash_model
from advisor.workflows.identity import check_model, version_warnings

GOLDEN = Path(__file__).parents[2] / "golden" / "plan.yaml"


@pytest.fixture
def folder(random_llama_folder, tmp_path):
    return shutil.copytree(random_llama_folder, tmp_path / "model")


@pytest.fixture
def plan(folder):
    hashes = hash_model(folder)
    plan = load_plan(GOLDEN)
    identity = plan.model.model_copy(
        update={
            "config_sha256": hashes.config,
            "tokenizer_sha256": hashes.tokenizer,
            "weights_sha256": hashes.weights,
        }
    )
    return plan.model_copy(update={"model": identity})


def test_the_right_model_passes(plan, folder):
    check_model(plan, folder)


def test_every_part_that_differs_is_listed(plan, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError) as error:
        check_model(plan, folder)
    assert "2 problems" in str(error.value)
    assert "config.json" in str(error.value)
    assert "the tokenizer" in str(error.value)
    assert "the weights" not in str(error.value)


def test_another_version_is_a_warning_with_both(plan):
    from advisor.search.planning import versions

    here = versions()
    same = plan.model_copy(update={"versions": here})
    assert version_warnings(same) == ()
    other = plan.model_copy(update={"versions": here | {"torch": "1.0", "gone": "2.0"}})
    assert version_warnings(other) == (
        f"torch is {here['torch']} here, the plan was made with 1.0",
        "gone is not installed here, the plan was made with 2.0",
    )
