"""Checkpoints that others made: what they are, what is wrong with them, how far two differ."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from advisor import workflows
from advisor.errors import InputError, VerificationError

FORMATS = ("gptq", "awq", "compressed-tensors", "bitsandbytes", "gguf")
UP = "model.layers.1.mlp.up_proj"
BITS = {
    # Codes, then scales, zero points, group index or quantized scales over the weights of a group.
    "gptq": 4 + (16 + 4) / 32, "awq": 4 + (16 + 4) / 32, "compressed-tensors": 4 + (16 + 4) / 32,
    "bitsandbytes": 4 + 8 / 64, "gguf": 4.5,
}  # fmt: skip


@pytest.fixture
def damaged(checkpoints, tmp_path):
    """Copy a checkpoint to damage it: ``damaged("gptq", tensors=..., config=...)``."""

    def build(name, scheme=None, *, tensors=None, config=None):
        folder = tmp_path / "damaged"
        shutil.copytree(checkpoints(name, scheme), folder)
        if tensors is not None:
            found = load_file(folder / "model.safetensors")
            tensors(found)
            save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            document = json.loads((folder / "config.json").read_text())
            config(document)
            (folder / "config.json").write_text(json.dumps(document))
        return folder

    return build


def faults(folder, **options):
    return workflows.inspect(folder, gpu="cpu", engine="transformers", **options).faults


@pytest.mark.parametrize("name", FORMATS)
def test_inspect_says_what_each_format_holds(checkpoints, name):
    folder = checkpoints(name)
    found = workflows.inspect(folder, gpu="l4", engine="vllm")
    assert found.format == name
    assert found.faults == ()
    assert len(found.modules) == 14
    assert sum(row.modules for row in found.schemes) == 14
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    assert found.size_bytes == sum(file.stat().st_size for file in files)
    # The fixed tensors (g_idx, quant_map, weight_shape) weigh much in so small a model.
    assert BITS[name] <= found.bits_per_weight < BITS[name] + 2.8
    document = found.to_dict()
    assert document["schemes"][0]["kernel"].startswith(("native", "weight-only", "none"))
    if name in ("gptq", "bitsandbytes", "gguf"):
        assert document["refusals"][0].startswith("vLLM 0.32 could not load it")
    else:
        assert document["refusals"] == []
    older = workflows.inspect(folder, gpu="l4", engine="vllm==0.23")
    assert older.refusals == () or name == "gptq"  # asymmetric codes


def test_a_gguf_file_alone_is_examined(checkpoints, tmp_path):
    file = tmp_path / "some-Q4_0.gguf"
    shutil.copy(checkpoints("gguf") / "model.gguf", file)
    found = workflows.inspect(file, gpu="cpu", engine="llama.cpp")
    assert found.faults == ()
    assert set(found.modules.values()) == {"gguf-q4_0"}
    assert found.architecture == "LlamaForCausalLM"
    assert workflows.inspect(tmp_path, gpu="cpu", engine="llama.cpp").modules == found.modules
    shutil.copy(file, tmp_path / "other.gguf")
    with pytest.raises(InputError, match="holds 2 GGUF files"):
        workflows.inspect(tmp_path, gpu="cpu", engine="llama.cpp")


def test_what_auto_gptq_and_autoawq_wrote_is_read(checkpoints, tmp_path):
    """Their configuration lay in files of its own, v1 without a checkpoint_format, other names."""
    for name, beside in (("gptq", "quantize_config.json"), ("awq", "quant_config.json")):
        folder = tmp_path / name
        shutil.copytree(checkpoints(name), folder)
        config = json.loads((folder / "config.json").read_text())
        quantization = config.pop("quantization_config")
        (folder / "config.json").write_text(json.dumps(config))
        if name == "gptq":
            kept = ("bits", "group_size", "damp_percent", "desc_act", "static_groups", "sym",
                    "true_sequential")  # fmt: skip
            old = {key: quantization[key] for key in kept}
            old |= {"model_name_or_path": None, "is_marlin_format": False}
            (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
        else:
            old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
        (folder / beside).write_text(json.dumps(old))
        found = workflows.inspect(folder, gpu="cpu", engine="transformers")
        assert found.faults == ()
        assert found.modules == workflows.inspect(checkpoints(name), gpu="cpu").modules


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "suffix"),
    [("gptq", "scales"), ("awq", "scales"), ("compressed-tensors", "weight_scale")],
)
def test_scales_that_are_not_finite(damaged, name, suffix, value):
    folder = damaged(name, tensors=lambda found: found[f"{UP}.{suffix}"].view(-1)[3:5].fill_(value))
    assert faults(folder) == (f"{UP}: 2 of 256 scales are not finite.",)


def test_values_of_bitsandbytes_and_norms_that_are_not_finite(damaged):
    def change(found):
        found[f"{UP}.weight.nested_absmax"][0] = float("nan")
        found["model.norm.weight"][0] = float("inf")

    found = faults(damaged("bitsandbytes", tensors=change))
    assert found[0].startswith(f"{UP}: 128 of 128 scales are not finite")
    assert found[1] == "model.norm.weight holds values that are not finite (NaN or infinity)."


def test_every_fault_is_listed_and_the_rest_is_still_described(damaged):
    def change(found):
        del found[f"{UP}.scales"]
        del found["model.layers.0.self_attn.q_proj.qweight"]
        found["model.layers.0.mlp.down_proj.qzeros"] = torch.zeros(3, 8, dtype=torch.int32)
        del found["model.layers.0.input_layernorm.weight"]

    found = workflows.inspect(damaged("gptq", tensors=change), gpu="cpu", engine="transformers")
    text = "\n".join(found.faults)
    for part in (
        f"{UP} has no scales", "model.layers.0.self_attn.q_proj has no qweight",
        "model.layers.0.mlp.down_proj: qzeros has shape [3, 8], expected [4, 8]",
        "1 tensors of the model are missing (first: model.layers.0.input_layernorm.weight)",
    ):  # fmt: skip
        assert part in text
    assert found.modules[UP] == "faulty"
    assert sorted(row.modules for row in found.schemes) == [3, 11]


def add_to_zero_points(step):
    """Return a change of all 4-bit zero points of a checkpoint at once."""

    def change(found):
        for name in found:
            if name.endswith("qzeros"):
                moved = found[name].to(torch.int64) + step * 0x11111111
                found[name] = ((moved + 2**31) % 2**32 - 2**31).to(torch.int32)

    return change


def other_version(document):
    """Say that a gptq checkpoint is of the version that it is not."""
    settings = document["quantization_config"]
    versions = {"gptq": "gptq_v2", "gptq_v2": "gptq"}
    settings["checkpoint_format"] = versions[settings["checkpoint_format"]]


@pytest.mark.parametrize(
    ("scheme", "change", "words"),
    [
        ("rtn-int4-g32-sym", {"config": other_version}, "too low. They are stored as in gptq (v1"),
        ("rtn-int4-g32-sym", {"tensors": add_to_zero_points(1)},
         "too high. They are stored as in gptq_v2"),
        ("rtn-int4-g32-asym", {"config": other_version}, "look one too low (in gptq, v1 read"),
        ("rtn-int3-g32-asym", {"config": other_version}, "look one too low (in gptq, v1 read"),
        ("rtn-int4-g32-sym", {"tensors": add_to_zero_points(-1)}, "too low. They are stored as in"),
    ],
)  # fmt: skip
def test_zero_points_of_the_other_version(damaged, scheme, change, words):
    """A file of one version whose config.json says the other: every zero point is off by one."""
    found = faults(damaged("gptq", scheme, **change))
    assert len(found) == 14
    assert all(words in fault for fault in found)


@pytest.mark.parametrize(("step", "words"), [(-1, "one too low"), (1, "one too high")])
def test_awq_zero_points_off_by_one(damaged, step, words):
    found = faults(damaged("awq", "awq-int4-g32-sym", tensors=add_to_zero_points(step)))
    assert len(found) == 14
    assert all(f"zero points look {words}" in fault for fault in found)


def test_configurations_that_disagree_with_tensors(damaged, checkpoints):
    def group_size(document):
        document["quantization_config"]["group_size"] = 16

    assert all("config.json says" in fault for fault in faults(damaged("gptq", config=group_size)))
    assert faults(checkpoints("gptq")) == ()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gptq", lambda quantization: quantization.update(dynamic={"+:[": {"bits": 8}})),
        ("compressed-tensors", lambda quantization: quantization.update(ignore=5)),
        ("compressed-tensors", lambda quantization: quantization.update(config_groups={"g": None})),
        (
            "compressed-tensors",
            lambda quantization: quantization["config_groups"]["group_0"].update(targets=["re:["]),
        ),
    ],
)
def test_configurations_of_another_kind_are_one_fault(damaged, original, name, change):
    folder = damaged(name, config=lambda document: change(document["quantization_config"]))
    (fault,) = faults(folder)
    assert f"quantization_config is not as {name} writes it: " in fault
    with pytest.raises(VerificationError, match="is not as"):
        workflows.compare(original, folder, **OPTIONS)


def test_a_weight_that_config_says_is_quantized_but_is_not(damaged, original):
    from advisor.models.checkpoint import read_tensor

    def change(found):
        for name in [name for name in found if name.startswith(f"{UP}.")]:
            del found[name]
        found[f"{UP}.weight"] = read_tensor(original, f"{UP}.weight")

    for name in ("gptq", "awq", "compressed-tensors"):
        folder = damaged(name, tensors=change)
        assert faults(folder) == (
            f"config.json says that 1 module (first: {UP}) is quantized, but the weight is 16-bit.",
        )
        shutil.rmtree(folder)


def test_group_indices_out_of_range_and_truncated_files(damaged):
    folder = damaged("gptq", tensors=lambda found: found[f"{UP}.g_idx"].fill_(7))
    assert faults(folder) == (f"{UP}: its g_idx names group 7, but there are scales of 2 groups.",)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    assert "truncated" in faults(folder)[0]


def test_a_damaged_gguf_is_a_fault(damaged):
    folder = damaged("gguf")
    content = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(content[: len(content) // 2])
    assert "no whole GGUF file" in faults(folder)[0]


OPTIONS = {"evaluation_sequences": 4, "sequence_length": 32}


def _drop(found):
    del found[f"{UP}.weight"]


def _cut(found):
    found[f"{UP}.weight"] = found[f"{UP}.weight"][:-1].clone()


def _integers(found):
    found[f"{UP}.weight"] = (100 * found[f"{UP}.weight"]).to(torch.int8)


def _without_norm(found):
    del found["model.norm.weight"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop, f"1 module (first: {UP}) has no weight here."),
        (_cut, f"{UP}: its weight is [127, 64], config.json says [128, 64]."),
        (_integers, f"{UP}: its weight is stored as I8, but config.json speaks of no quantization"),
        (_without_norm, "1 tensors of the model are missing (first: model.norm.weight)."),
    ],
)
def test_a_16_bit_model_with_gaps_is_faulty_and_not_compared(original, tmp_path, change, words):
    """What is missing must not be taken from the reference: that would be called equal."""
    folder = tmp_path / "damaged"
    shutil.copytree(original, folder)
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    assert [fault for fault in faults(folder) if fault.startswith(words)] == list(faults(folder))
    with pytest.raises(VerificationError, match=re.escape(words)):
        workflows.compare(original, folder, **OPTIONS)


def test_a_missing_bias_is_a_gap(llama_builder):
    folder = llama_builder(attention_bias=True)
    assert faults(folder) == ()
    found = load_file(folder / "model.safetensors")
    del found["model.layers.1.self_attn.q_proj.bias"]
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    assert faults(folder) == (
        "1 tensors of the model are missing (first: model.layers.1.self_attn.q_proj.bias).",
    )


def test_codes_without_a_quantization_in_config_are_faulty(damaged, original):
    """LLM.int8() keeps its codes under the weight's own name."""
    folder = damaged(
        "bitsandbytes", "llm.int8", config=lambda document: document.pop("quantization_config")
    )
    assert len(faults(folder)) == 14
    assert all("is stored as I8" in fault for fault in faults(folder))
    with pytest.raises(VerificationError, match="14 problems"):
        workflows.compare(original, folder, **OPTIONS)


def test_a_tokenizer_of_another_model_is_named(llama_builder):
    """Its tokens have no embedding: an index out of range says nothing to a user."""
    folder = llama_builder(vocab_size=64)
    with pytest.raises(InputError, match="embeds 64 tokens only: tokenizer and model do not"):
        workflows.compare(folder, folder, **OPTIONS)


def test_compare_names_files_that_are_no_checkpoints(original, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match=r"index\.json is no index of a safetensors checkpoint"):
        workflows.compare(original, folder, **OPTIONS)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").rename(folder / "kept")
    (folder / "model.safetensors").mkdir()
    with pytest.raises(InputError, match="has no weights"):
        workflows.compare(original, folder, **OPTIONS)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must hold a JSON object, but holds list"):
        workflows.compare(original, folder, **OPTIONS)


@pytest.mark.parametrize("name", FORMATS)
def test_compare_takes_each_format_on_either_side(original, checkpoints, name):
    folder = checkpoints(name)
    there = workflows.compare(original, folder, **OPTIONS)
    assert there.kl.low <= there.kl.value <= there.kl.high
    assert there.kl.value > 1e-4
    assert there.perplexity[0].low < there.perplexity[0].value < there.perplexity[0].high
    assert len(there.modules) == 14
    assert 0.03 < there.modules[-1]["relative_error"] < 0.3
    back = workflows.compare(folder, original, **OPTIONS)
    assert back.perplexity[0].value == pytest.approx(there.perplexity[1].value, rel=1e-5)
    assert back.perplexity[1].value == pytest.approx(there.perplexity[0].value, rel=1e-5)
    assert {row["scheme"] for row in back.modules} == {"bf16"}
    same = workflows.compare(folder, folder, **OPTIONS)
    # The reference is kept in float16: KL of equal models is rounding noise, and near ties differ.
    assert abs(same.kl.value) < 1e-5
    assert same.top1.value > 0.95
    assert max(row["relative_error"] for row in same.modules) < 1e-6


def test_compare_of_two_quantized_ones_and_of_a_gguf_file_alone(checkpoints, tmp_path):
    found = workflows.compare(checkpoints("bitsandbytes"), checkpoints("awq"), **OPTIONS)
    assert found.kl.value > 1e-4
    assert {row["scheme"] for row in found.modules} == {"awq-int4-g32-asym"}
    file = tmp_path / "alone.gguf"
    shutil.copy(checkpoints("gguf") / "model.gguf", file)
    alone = workflows.compare(checkpoints("gptq"), file, **OPTIONS)
    beside = workflows.compare(checkpoints("gptq"), checkpoints("gguf"), **OPTIONS)
    assert alone.kl == beside.kl
    assert alone.size_bytes[1] == file.stat().st_size
    with pytest.raises(InputError, match="A needs its tokenizer"):
        workflows.compare(file, checkpoints("gptq"), **OPTIONS)


def test_activations_are_simulated_on_both_sides(original, checkpoints):
    """W8A8 against itself is equal; against the same weights with 16-bit inputs it is not."""
    scheme = "rtn-int8-gch-sym-aint8"
    folder = checkpoints("compressed-tensors", scheme)
    same = workflows.compare(folder, folder, **OPTIONS)
    assert abs(same.kl.value) < 1e-5
    weights_only = checkpoints("compressed-tensors", "rtn-int8-gch-sym")
    assert workflows.compare(folder, weights_only, **OPTIONS).kl.value > 10 * abs(same.kl.value)
    assert workflows.compare(original, folder, **OPTIONS).kl.value > 0
