"""Mapped 16-bit weights that compute in float32: the same numbers as a plain float32 model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.errors import AdvisorError
from advisor.evaluation.measure import measure
from advisor.evaluation.reference import Reference
from advisor.evaluation.runtime import quantized_model
from advisor.models import load as load_module
from advisor.models.casting import casting_of
from advisor.models.inspect import find_blocks
from advisor.models.load import load_model
from advisor.models.mapped import MappedWeights

FIELDS = ("second_moment", "absolute_maximum", "absolute_sum", "gradient_moment")


@pytest.fixture(scope="module")
def folder(random_llama_folder, tmp_path_factory):
    """The tiny Llama with its weights in bfloat16."""
    target = tmp_path_factory.mktemp("bf16") / "llama"
    shutil.copytree(random_llama_folder, target)
    to_bf16(target)
    return target


def to_bf16(target: Path) -> None:
    path = target / "model.safetensors"
    tensors = {name: value.bfloat16() for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


@pytest.fixture
def loaded(folder):
    return load_model(folder)


@pytest.fixture
def plain(folder):
    """The same weights as transformers loads them, float32 throughout."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def whole(folder, monkeypatch):
    """Loaded as where mapping is not possible."""
    monkeypatch.setattr(load_module, "map_model", lambda *_: "a test")
    return load_model(folder)


def sequences_of(count=6, length=24):
    tokens = torch.randint(0, 300, (count, length), generator=torch.Generator().manual_seed(3))
    return TokenSequences(tokens, "test", "0" * 64, 0, hash_tokens(tokens))


def test_weights_stay_in_16_bits_and_logits_are_float32s(loaded, plain):
    assert loaded.not_mapped == ""
    assert loaded.dtype == torch.float32
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight  # tied
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        ours, theirs = loaded.model(tokens).logits, plain(tokens).logits
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    buffers = dict(plain.named_buffers())
    assert buffers
    for name, buffer in loaded.model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert loaded.model.generation_config.to_dict() == plain.generation_config.to_dict()


def test_only_one_block_computes_at_a_time(loaded):
    """While a block runs it is in float32, and all others are as they are stored."""
    blocks = find_blocks(loaded.model)
    seen = []

    def look(module, arguments):
        seen.append([next(block.parameters()).dtype for block in blocks])

    handles = [block.mlp.register_forward_pre_hook(look) for block in blocks]
    with torch.no_grad():
        loaded.model(torch.arange(12)[None])
    for handle in handles:
        handle.remove()
    assert seen == [[torch.float32, torch.bfloat16], [torch.bfloat16, torch.float32]]


def test_statistics_have_the_bits_of_a_float32_model(loaded, whole, tmp_path):
    sequences = sequences_of()
    assert {parameter.dtype for parameter in whole.model.parameters()} == {torch.float32}
    assert whole.not_mapped == "a test"
    stores = []
    for name, model in (("mapped", loaded), ("whole", whole)):
        store = open_store(model, sequences, root=tmp_path / name, prefixes=[2])
        collect_statistics(model, sequences, store, prefixes=[2])
        stores.append(store)
    assert stores[0].key == stores[1].key
    for linear in loaded.linears:
        ours, theirs = (store.layer(linear) for store in stores)
        assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in FIELDS)


def test_measurements_are_those_of_a_whole_forward(loaded, plain, tmp_path):
    """Block by block over all sequences, and each sequence through all of a float32 model."""
    sequences = sequences_of()
    reference = Reference.compute(loaded, sequences, tmp_path)
    name = loaded.linears[5].name
    noise = torch.randn(
        loaded.model.get_submodule(name).weight.shape, generator=torch.Generator().manual_seed(2)
    )
    changed = loaded.tensor(f"{name}.weight") + 0.05 * noise

    def chances():
        with torch.no_grad():
            rows = [plain(row[None]).logits[0, :-1] for row in sequences.tokens]
        return torch.log_softmax(torch.stack(rows), -1)

    before = chances()
    labels = sequences.tokens[:, 1:, None]
    nll = -before.gather(2, labels)[..., 0].double().mean(1)
    assert torch.equal(torch.tensor(reference.nll), nll)
    stored = torch.stack([reference.log_probabilities(index) for index in range(6)])
    assert torch.equal(stored, before.to(torch.float16))
    with quantized_model(loaded.model, {name: changed}) as model:
        found = measure(model, reference)
    plain.get_submodule(name).weight.data = changed
    after = chances()
    nll = -after.gather(2, labels)[..., 0].double().mean(1)
    assert torch.equal(torch.tensor(found.sequence_nll), nll)
    assert found.kl.value > 1e-4


def test_an_exception_leaves_no_block_in_float32(loaded):
    def explode(module, arguments):
        raise KeyError

    handle = find_blocks(loaded.model)[1].mlp.register_forward_pre_hook(explode)
    with pytest.raises(KeyError), torch.no_grad():
        loaded.model(torch.arange(12)[None])
    handle.remove()
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_what_is_held_stays_until_the_last_holder_lets_go(loaded):
    casting, block = casting_of(loaded.model), find_blocks(loaded.model)[0]
    parameter = block.mlp.up_proj.weight
    with casting.hold(block):
        inside = parameter.data_ptr()
        with casting.hold(block.mlp):
            assert parameter.data_ptr() == inside
        assert parameter.dtype == torch.float32
        with pytest.raises(RuntimeError, match="cannot be replaced"):
            casting.replace({parameter: lambda: parameter}).__enter__()
    assert parameter.dtype == torch.bfloat16


def test_released_pages_come_back_and_changes_are_kept(loaded):
    parameter = loaded.model.model.layers[0].mlp.up_proj.weight
    before = parameter.detach().clone()
    casting_of(loaded.model).release(parameter)
    assert torch.equal(parameter, before)
    parameter.zero_()
    casting_of(loaded.model).release(parameter)
    assert not parameter.any()  # was written to: its pages are no longer the file's


def pages(path: Path) -> int:
    """Return the bytes of a file that are resident in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_pages_of_a_file_do_not_stay_in_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1 << 20), "b": torch.ones(1 << 20)}, path)
    weights = MappedWeights(tmp_path)
    assert float(weights.tensors["a"].sum() + weights.tensors["b"].sum()) == 2 << 20
    full = pages(path)
    assert full > 8e6
    weights.release(weights.tensors["a"])
    assert pages(path) < full - 4e6
    weights.release(weights.tensors["b"])
    assert pages(path) < 1e5
    assert float(weights.tensors["a"].sum()) == 1 << 20


def rename(tensors):
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def store_head_too(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def integers(tensors):
    return tensors | {"model.norm.weight": torch.ones(64, dtype=torch.int32)}


def one_more(tensors):
    return tensors | {"extra": torch.ones(2)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rename, "have other names in the model"),
        (store_head_too, "are stored 2 times"),
        (integers, r"model.norm.weight is stored as torch.int32"),
        (one_more, "extra have other names in the model, or none"),
    ],
)
def test_what_cannot_be_mapped_is_loaded_whole_and_says_so(folder, tmp_path, change, reason):
    target = shutil.copytree(folder, tmp_path / "model")
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    expected = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    try:
        found = load_model(target)
    except AdvisorError:
        pytest.fail("what transformers loads must load")
    assert re.search(reason, found.not_mapped)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(found.model(tokens).logits, expected.eval()(tokens).logits)


def test_a_float32_checkpoint_in_bfloat16_is_converted_whole(random_llama_folder):
    found = load_model(random_llama_folder, torch.bfloat16)
    assert "is stored as torch.float32" in found.not_mapped
    assert found.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.bfloat16}


def test_a_float32_checkpoint_is_mapped_as_it_is(random_llama):
    assert random_llama.not_mapped == ""
    parameter = random_llama.model.model.layers[0].mlp.up_proj.weight
    assert random_llama.tensor("model.layers.0.mlp.up_proj.weight").data_ptr() == (
        parameter.data_ptr()
    )


def test_sharded_files_are_mapped(loaded, tmp_path):
    loaded.model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.not_mapped == ""
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again.model(tokens).logits, loaded.model(tokens).logits)
