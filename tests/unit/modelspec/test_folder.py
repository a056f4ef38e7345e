"""Model folders: headers win over config.json, and broken files are named."""

from __future__ import annotations

import json

import pytest

from advisor.errors import InputError
from advisor.modelspec import read_model_folder

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "intermediate_size": 96,
    "tie_word_embeddings": True,
}


def write_safetensors(path, shapes, dtype="F16"):
    """Write zeros by hand, so that the reader is not judged by its own library."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(offset))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def _shapes(folder):
    return {tensor.name: list(tensor.shape) for tensor in read_model_folder(folder).tensors}


def test_without_weights_the_config_decides(folder):
    spec = read_model_folder(folder)
    assert (spec.source, spec.dtype, len(spec.linears)) == ("config", "bfloat16", 7)


def test_headers_tell_data_type_untied_head_and_unknown_tensors(folder):
    shapes = _shapes(folder) | {"lm_head.weight": [100, 64], "vision.patch.weight": [8, 3]}
    write_safetensors(folder / "model.safetensors", shapes)
    spec = read_model_folder(folder)
    assert (spec.source, spec.dtype, spec.stored_untied) == ("safetensors", "float16", True)
    assert [tensor.name for tensor in spec.tensors if tensor.role == "other"] == [
        "vision.patch.weight"
    ]
    assert "lm_head.weight" not in {tensor.name for tensor in spec.tensors}  # ours stays tied


def test_shards_are_joined_and_a_missing_one_is_named(folder):
    shapes = _shapes(folder)
    names = list(shapes)
    write_safetensors(folder / "a.safetensors", {name: shapes[name] for name in names[:5]})
    write_safetensors(folder / "b.safetensors", {name: shapes[name] for name in names[5:]})
    files = {name: "a.safetensors" if index < 5 else "b.safetensors"
             for index, name in enumerate(names)}  # fmt: skip
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert read_model_folder(folder).source == "safetensors"
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"not there: b\.safetensors"):
        read_model_folder(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(InputError, match="outside its folder"):
        read_model_folder(folder)


def test_a_shape_that_contradicts_the_config_is_an_error(folder):
    shapes = _shapes(folder) | {"model.layers.0.mlp.up_proj.weight": [97, 64]}
    write_safetensors(folder / "model.safetensors", shapes)
    with pytest.raises(InputError, match=r"up_proj\.weight is \[97, 64\].*\[96, 64\]"):
        read_model_folder(folder)


def test_missing_weights_are_an_error(folder):
    shapes = _shapes(folder)
    del shapes["model.layers.0.mlp.up_proj.weight"]
    write_safetensors(folder / "model.safetensors", shapes)
    with pytest.raises(InputError, match=r"lacks 1 of the weights.*up_proj"):
        read_model_folder(folder)


def test_weights_stored_as_integers_are_no_16_bit_model(folder):
    write_safetensors(folder / "model.safetensors", _shapes(folder), dtype="I16")
    with pytest.raises(InputError, match=r"weights are stored as integers \(first: .* as I16\)"):
        read_model_folder(folder)


def test_files_beside_the_model_are_not_read(folder):
    write_safetensors(folder / "model.safetensors", _shapes(folder))
    alone = read_model_folder(folder)
    write_safetensors(folder / "adapter.safetensors", {"lora.a.weight": [8, 64]})
    assert read_model_folder(folder).tensors == alone.tensors


@pytest.mark.parametrize("keep", [4, 40, -10])
def test_truncated_safetensors(folder, keep):
    write_safetensors(folder / "model.safetensors", _shapes(folder))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(InputError, match="truncated"):
        read_model_folder(folder)


def test_bad_config_files(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        read_model_folder(tmp_path / "none")
    with pytest.raises(InputError, match=r"no config\.json"):
        read_model_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        read_model_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must hold a JSON object"):
        read_model_folder(tmp_path)
