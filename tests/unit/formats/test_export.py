"""Writing: identical bytes, all or nothing, and errors before any work."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from advisor.errors import InputError
from advisor.formats import export, folder
from advisor.formats.export import write_checkpoint
from advisor.formats.folder import atomic_folder
from advisor.formats.read import read_checkpoint
from advisor.formats.registry import get_format, storage_scheme
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.models.checkpoint import read_tensor, tensor_names
from advisor.schemes import parse_scheme


def _files(path):
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("gptq", "rtn-int4-g32-sym"), ("awq", "rtn-int4-g32-asym"), ("bitsandbytes", "bnb-nf4-dq"),
     ("compressed-tensors", "rtn-int4-g32-asym")],
)  # fmt: skip
def test_the_same_weights_give_the_same_bytes(bf16_folder, quantized, tmp_path, name, scheme):
    weights = quantized(scheme)
    backwards = dict(reversed(weights.items()))
    first = write_checkpoint(bf16_folder, tmp_path / "a", format=name, weights=weights)
    second = write_checkpoint(bf16_folder, tmp_path / "b", format=name, weights=backwards)
    assert first == second
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_shards_hold_the_same_tensors_and_an_index(bf16_folder, quantized, tmp_path):
    weights = quantized("rtn-int4-g32-sym")
    digests = write_checkpoint(
        bf16_folder, tmp_path / "out", format="gptq", weights=weights, shard_bytes=40_000
    )
    assert len(digests) > 2
    assert all((tmp_path / "out" / name).stat().st_size < 50_000 for name in digests)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(digests)
    checkpoint = read_checkpoint(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * tensor.element_size()
        for tensor in map(checkpoint.stored.load, checkpoint.stored.headers)
    )
    for module, weight in weights.items():
        assert torch.equal(checkpoint.weight(module).dequantize(), weight.dequantize())


def test_tokenizer_travels_and_the_tied_head_is_not_stored_twice(bf16_folder, quantized, tmp_path):
    write_checkpoint(
        bf16_folder, tmp_path / "out", format="gptq", weights=quantized("rtn-int4-g32-sym")
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (bf16_folder / name).read_bytes()
    assert "lm_head.weight" not in tensor_names(tmp_path / "out")
    mode = (tmp_path / "out" / "model.safetensors").stat().st_mode
    assert mode == (tmp_path / "out" / "config.json").stat().st_mode


def test_templates_and_licences_travel(bf16_folder, quantized, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(bf16_folder, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (source / "LICENSE").write_text("as is")
    (source / "training_args.bin").write_bytes(b"no")
    write_checkpoint(source, tmp_path / "out", format="gptq", weights=quantized("rtn-int4-g32-sym"))
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "LICENSE"):
        assert (tmp_path / "out" / name).read_text() == (source / name).read_text()
    assert not (tmp_path / "out" / "training_args.bin").exists()


def test_auto_gptqs_file_is_written_where_auto_gptq_reads_the_checkpoint_right(
    bf16_folder, quantized, tmp_path
):
    schemes = {
        "plain": "rtn-int4-g32-sym",
        "mixed": lambda module: "rtn-int8-g32-sym" if "down" in module else "rtn-int4-g32-sym",
    }
    for name, scheme in schemes.items():
        write_checkpoint(bf16_folder, tmp_path / name, format="gptq", weights=quantized(scheme))
    found = json.loads((tmp_path / "plain" / "quantize_config.json").read_text())
    assert (found["bits"], found["group_size"], found["sym"]) == (4, 32, True)
    assert not (tmp_path / "mixed" / "quantize_config.json").exists()
    second = quantized("rtn-int4-g32-asym")
    name = next(iter(second))
    second[name].zero_points[0, 0] = 0  # a zero point that version 1 cannot hold
    write_checkpoint(bf16_folder, tmp_path / "v2", format="gptq", weights=second)
    assert read_checkpoint(tmp_path / "v2").config["checkpoint_format"] == "gptq_v2"
    assert not (tmp_path / "v2" / "quantize_config.json").exists()


def test_replaced_tensors_take_the_place_of_the_sources(bf16_folder, quantized, tmp_path):
    name = "model.layers.0.input_layernorm.weight"
    folded = read_tensor(bf16_folder, name).float() * 2
    write_checkpoint(
        bf16_folder,
        tmp_path / "out",
        format="awq",
        weights=quantized("rtn-int4-g32-asym"),
        replaced={name: folded},
    )
    stored = read_tensor(tmp_path / "out", name)
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored.float(), folded)


def test_a_model_without_quantized_weights_is_a_plain_copy(bf16_folder, tmp_path):
    write_checkpoint(bf16_folder, tmp_path / "out", format="safetensors", weights={})
    checkpoint = read_checkpoint(tmp_path / "out")
    assert (checkpoint.format, dict(checkpoint.modules)) == ("safetensors", {})
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    for name, tensor in checkpoint.other_tensors():
        assert torch.equal(tensor, read_tensor(bf16_folder, name))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk of .* is full; nothing was"),
        (OSError(errno.EACCES, "Permission denied"), "cannot write .*: Permission denied"),
        (RuntimeError("broken"), "broken"),
    ],
)
def test_a_failed_write_leaves_nothing(
    bf16_folder, quantized, tmp_path, monkeypatch, error, message
):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(export, "save_file", fail)
    expected = InputError if isinstance(error, OSError) else RuntimeError
    with pytest.raises(expected, match=message):
        write_checkpoint(
            bf16_folder,
            tmp_path / "place" / "out",
            format="gptq",
            weights=quantized("rtn-int4-g32-sym"),
        )
    assert list((tmp_path / "place").iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    bf16_folder, quantized, tmp_path, monkeypatch
):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: _Usage(1000))
    with pytest.raises(InputError, match=r"needs [\d.]+ kB, but the disk of .* has 1 kB left"):
        write_checkpoint(
            bf16_folder, tmp_path / "out", format="gptq", weights=quantized("rtn-int4-g32-sym")
        )
    assert list(tmp_path.glob("*out*")) == []


class _Usage:
    def __init__(self, free):
        self.free = free


def test_outputs_in_use_and_wrong_names_are_refused(bf16_folder, quantized, tmp_path):
    weights = quantized("rtn-int4-g32-sym")
    used = tmp_path / "used"
    used.mkdir()
    (used / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="must not exist or be empty"):
        write_checkpoint(bf16_folder, used, format="gptq", weights=weights)
    assert [entry.name for entry in used.iterdir()] == ["note.txt"]
    with pytest.raises(InputError, match="is a file"):
        write_checkpoint(bf16_folder, used / "note.txt", format="gptq", weights=weights)
    with pytest.raises(InputError, match="not a folder that you may write to"):
        write_checkpoint(bf16_folder, used / "note.txt" / "x", format="gptq", weights=weights)
    name = "model.layers.0.mlp.up_proj"
    wrong = {
        "model.layers.7.mlp.up_proj": weights[name],
        "model.layers.0.mlp.down_proj": weights[name],
    }
    with pytest.raises(InputError, match=r"(?s)2 problems.*layers\.7\.mlp.*down_proj has shape"):
        write_checkpoint(bf16_folder, tmp_path / "out", format="gptq", weights=wrong)
    write_checkpoint(bf16_folder, tmp_path / "out", format="gptq", weights=weights)
    with pytest.raises(InputError, match="is quantized already"):
        write_checkpoint(tmp_path / "out", tmp_path / "again", format="gptq", weights={})
    with pytest.raises(InputError, match="Did you mean 'gptq'"):
        write_checkpoint(bf16_folder, tmp_path / "x", format="gtpq", weights=weights)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A folder with one linear and a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    shapes = {"model.layers.0.mlp.down_proj": (64, 96), "lm_head": (160, 64)}
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    tensors["model.embed_tokens.weight"] = torch.ones(160, 64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16",
              "tie_word_embeddings": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _with_head(folder, linear, head):
    """Quantize the linear, and the head where a scheme is given for it."""
    found = {}
    for name, scheme in {"model.layers.0.mlp.down_proj": linear, "lm_head": head}.items():
        if scheme is not None:
            weight = read_tensor(folder, f"{name}.weight").float()
            found[name] = quantize(weight, None, parse_scheme(scheme), QuantizationSettings())
    return found


@pytest.mark.parametrize(
    ("name", "linear", "head"),
    [
        ("gptq", "rtn-int4-g32-sym", "rtn-int4-g32-sym"),
        ("gptq", "rtn-int4-g32-sym", "rtn-int8-gch-sym"),
        ("compressed-tensors", "rtn-int4-g32-asym", "rtn-int4-g32-asym"),
        ("compressed-tensors", "rtn-int4-g32-asym", "rtn-int8-gch-sym"),
        ("bitsandbytes", "bnb-nf4", "bnb-nf4"),
        ("bitsandbytes", "llm.int8", "llm.int8"),
    ],
)
def test_a_quantized_head_says_so_where_loaders_look(untied, tmp_path, name, linear, head):
    weights = _with_head(untied, linear, head)
    write_checkpoint(untied, tmp_path / "head", format=name, weights=weights)
    checkpoint = read_checkpoint(tmp_path / "head")
    assert checkpoint.modules["lm_head"] == storage_scheme(parse_scheme(head), name)
    assert torch.equal(checkpoint.weight("lm_head").dequantize(), weights["lm_head"].dequantize())
    assert get_format(name).expects("lm_head", checkpoint.config)
    plain = _with_head(untied, linear, None)
    write_checkpoint(untied, tmp_path / "plain", format=name, weights=plain)
    other = read_checkpoint(tmp_path / "plain")
    assert "lm_head" not in other.modules
    assert not get_format(name).expects("lm_head", other.config)
    keys = {
        "gptq": ("lm_head", True, False),
        "compressed-tensors": ("ignore", [], ["lm_head"]),
        "bitsandbytes": ("llm_int8_skip_modules", [], ["lm_head"]),
    }
    key, with_head, without = keys[name]
    assert (checkpoint.config[key], other.config[key]) == (with_head, without)
    if name == "compressed-tensors":
        # vLLM's head is of no class called Linear.
        targets = [t for g in checkpoint.config["config_groups"].values() for t in g["targets"]]
        assert "lm_head" in targets
    # auto-gptq passes over a head that is quantized.
    assert not (tmp_path / "head" / "quantize_config.json").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["all", "some"])
def test_the_predicted_size_is_that_of_the_file(
    random_llama_folder, quantized, tmp_path, dtype, which
):
    """What is not quantized stays in the data type that the model has it in."""
    from transformers import AutoModelForCausalLM

    from advisor.modelspec import read_model_folder
    from advisor.predict.size import checkpoint_size
    from advisor.search.prices import Prices

    source = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(random_llama_folder, dtype=dtype).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(random_llama_folder / name, source / name)
    weights = quantized(
        lambda module: "rtn-int4-g32-sym" if which == "all" or "mlp" in module else None
    )
    output = tmp_path / "out"
    write_checkpoint(source, output, format="compressed-tensors", weights=weights)
    found = (output / "model.safetensors").stat().st_size
    spec = read_model_folder(source)
    schemes = {name: weight.scheme for name, weight in weights.items()}
    size = checkpoint_size(spec, schemes, "compressed-tensors")
    assert size.total_bytes == pytest.approx(found, abs=200)
    prices = Prices(spec, "compressed-tensors", spec.linears)
    parts = sum(
        prices.module(linear, schemes.get(linear.name, parse_scheme("bf16")))
        for linear in spec.linears
    )
    assert prices.beside({}, ()) + parts == pytest.approx(found, abs=1500)  # headers' digits
    if which == "all":
        uniform = checkpoint_size(spec, parse_scheme("rtn-int4-g32-sym"), "compressed-tensors")
        assert uniform == size
    # Engines hold 16 bits of what is not quantized, whatever the file has.
    assert checkpoint_size(spec, parse_scheme("bf16"), "safetensors").weight_bytes == (
        2 * spec.parameters
    )


def test_what_is_written_into_a_folder_to_be_is_named_as_it_will_be(tmp_path):
    """Of two folders, one made in the other, nobody knows the temporary name."""

    def full(output, *, computes=False):
        with atomic_folder(output, computes=computes) as folder:
            if computes:
                full(folder)
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"nothing was written to \S*/out\. Free"):
        full(tmp_path / "out", computes=True)
    assert list(tmp_path.iterdir()) == []
    # What only computes beside it may have filled another disk.
    with (
        pytest.raises(OSError, match="No space left"),
        atomic_folder(tmp_path / "out", computes=True),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
