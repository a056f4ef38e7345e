from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from advisor.plan.hashing import (
    hash_model,
    model_name,
    sha256_file,
    sha256_files,
    sha256_json,
)


def test_file_hash_is_the_one_that_everybody_computes(tmp_path):
    path = tmp_path / "data.bin"
    content = bytes(range(256)) * 20_000  # more than one chunk
    path.write_bytes(content)
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()


def test_json_hash_ignores_the_order_of_keys_only():
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json({"a": [1, 2]}) != sha256_json({"a": [2, 1]})


def test_files_hash_names_and_contents(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("x")
    two.write_text("y")
    first = sha256_files([one, two])
    assert sha256_files([two, one]) == first
    one.write_text("y")
    two.write_text("x")
    assert sha256_files([one, two]) != first


def test_each_part_of_a_model_has_its_own_hash(random_llama_folder, tmp_path):
    folder = shutil.copytree(random_llama_folder, tmp_path / "model")
    before = hash_model(folder)
    assert hash_model(random_llama_folder) == before  # where it lies does not matter

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "0.0"}))
    assert hash_model(folder) == before  # nor who wrote it

    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    changed = hash_model(folder)
    assert changed.config != before.config
    assert (changed.tokenizer, changed.weights) == (before.tokenizer, before.weights)

    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert hash_model(folder).weights != before.weights


@pytest.mark.parametrize(
    ("folder", "name", "revision"),
    [
        (f"/c/hub/models--org--Model-1.5B/snapshots/{'ab' * 20}", "org/Model-1.5B", "ab" * 20),
        (f"models--org--a--b/snapshots/{'0' * 40}", "org/a--b", "0" * 40),
        ("/data/models--org--m/snapshots/main", "/data/models--org--m/snapshots/main", None),
        ("tiny", "tiny", None),
        ("models/tiny", "./models/tiny", None),
        ("../models/tiny", "../models/tiny", None),
    ],
)
def test_a_download_is_called_by_its_id_and_a_folder_never_reads_as_one(folder, name, revision):
    assert model_name(Path(folder)) == (name, revision)
