"""Everything that can be wrong with a model's folder is one clear error."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from advisor.errors import InputError
from advisor.models.load import check_model_folder, load_model

WEIGHTS = "model.safetensors"


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "drop"}))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def truncate(folder, size):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:size])


def to_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def to_index(folder, name):
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


CHEAP = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "no architecture": (lambda f: edit_config(f, architectures="drop"), "names no architecture"),
    "unknown architecture": (
        lambda f: edit_config(f, architectures=["LlamaForCasualLM"]),
        "not known. Did you mean 'LlamaForCausalLM'",
    ),
    "already quantized": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
        r"already quantized \(gptq\)",
    ),
    "quantized by nobody": (
        lambda f: edit_config(f, quantization_config=["gptq"]),
        "does not name",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no weights"),
    "pickle only": (to_pickle, "only pickle weights.*safe_serialization"),
    "truncated": (lambda f: truncate(f, -100), "is truncated: .* expected"),
    "truncated in the header": (lambda f: truncate(f, 300), "truncated inside its header"),
    "empty": (lambda f: truncate(f, 0), "is truncated: 0 bytes"),
    "not safetensors": (
        lambda f: (f / WEIGHTS).write_bytes((9).to_bytes(8, "little") + b"not json!" + b"0" * 50),
        "no safetensors file",
    ),
    "missing shard": (lambda f: to_index(f, "model-2.safetensors"), "not there: model-2"),
    "shard outside": (lambda f: to_index(f, "../other.safetensors"), "outside its folder"),
    "index is a list": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text("[]"),
        "no index of a safetensors",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json"),
}


@pytest.fixture
def folder(random_llama_folder, tmp_path):
    return shutil.copytree(random_llama_folder, tmp_path / "model")


@pytest.mark.parametrize("case", CHEAP)
def test_found_before_loading(folder, case):
    damage, message = CHEAP[case]
    damage(folder)
    with pytest.raises(InputError, match=message):
        check_model_folder(folder)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_a_sound_folder_passes(folder):
    check_model_folder(folder)
    edit_config(folder, quantization_config=None)  # as some publishers write it
    check_model_folder(folder)


def test_missing_folder_and_file_instead_of_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        load_model(tmp_path / "file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder, value):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors[name][3].fill_(value))
    with pytest.raises(InputError, match=f"not finite.*1 tensors.*{name}"):
        load_model(folder)


def test_missing_tensors_are_not_left_random(folder):
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=name):
        load_model(folder)


def test_another_shape_than_the_config_says(folder):
    edit_config(folder, intermediate_size=96)
    with pytest.raises(InputError):
        load_model(folder)
