"""Embedding and head in the search: rows that stand for all, codes by parts, plans, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import advisor
from advisor.budgets import Budgets
from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.engines import load_engine, mixture_options
from advisor.engines.outer import outer_problems, with_ends
from advisor.errors import InputError
from advisor.formats.read import read_checkpoint
from advisor.hardware.catalogue import find_profile
from advisor.methods.errors import layer_error
from advisor.methods.settings import QuantizationSettings
from advisor.models.inspect import find_outer
from advisor.models.load import load_model
from advisor.modelspec.outer import outer_modules
from advisor.plan.files import load_plan
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.schemes import parse_scheme
from advisor.search import outer, outer_codes
from advisor.search.realise import realise


def _in_bf16(source, folder):
    """Save a copy of a model in bf16, as published ones are: sizes are predicted for these."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied_folder(random_llama_folder, tmp_path_factory):
    return _in_bf16(random_llama_folder, tmp_path_factory.mktemp("tied") / "bf16")


def test_rows_of_most_weight_and_a_sample_of_the_others_stand_for_all():
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(0)).pow(8)
    rows, factors = outer.rows_to_score(weights, 100)
    assert len(rows) == len(set(rows.tolist())) == 100
    assert set(torch.topk(weights, 50).indices.tolist()) == set(rows[:50].tolist())
    assert float((weights[rows] * factors).sum()) == pytest.approx(float(weights.sum()), rel=1e-5)
    errors = 1 + 0.5 * torch.rand(1000, generator=torch.Generator().manual_seed(1))
    whole = float((weights * errors).sum())
    assert float((weights[rows] * factors * errors[rows]).sum()) == pytest.approx(whole, rel=0.05)


def test_few_rows_are_all_scored():
    rows, factors = outer.rows_to_score(torch.tensor([1.0, 3.0, 2.0]), 3)
    assert rows.tolist() == [1, 2, 0]
    assert factors.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "scheme", ["gguf-q5_0", "gguf-q4_1", "rtn-int4-g32-asym", "rtn-int8-gch-sym"]
)
def test_codes_by_parts_are_those_of_the_whole(random_llama, monkeypatch, scheme):
    (module,) = find_outer(random_llama.model)
    settings = QuantizationSettings()

    def quantized():
        return outer_codes.quantize_outer(
            random_llama, module, parse_scheme(scheme), settings, None, None
        )

    whole = quantized()
    monkeypatch.setattr(outer_codes, "_WEIGHTS_AT_ONCE", 64 * 100)  # 100 rows of 64
    parts = quantized()
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scales, whole.scales)
    assert torch.equal(parts.dequantize(), whole.dequantize())
    assert parts.extras.keys() == whole.extras.keys()


def test_a_gguf_file_holds_the_types_asked_for(random_llama, random_llama_folder, tmp_path):
    from advisor.formats.export import write_checkpoint

    chosen = {linear.name: parse_scheme("gguf-q8_0") for linear in random_llama.linears}
    spec = load_modelspec(random_llama_folder)
    sizes = {}
    for kind in (None, "iq4_nl", "q5_0"):
        ends = {} if kind is None else {"model.embed_tokens": parse_scheme(f"gguf-{kind}")}
        made = realise(random_llama, chosen | ends, QuantizationSettings(), None)
        folder = tmp_path / str(kind)
        write_checkpoint(
            random_llama_folder, folder, format="gguf", weights=made.weights,
            replaced=made.replaced,
        )  # fmt: skip
        header = read_checkpoint(folder).stored.headers["model.embed_tokens.weight"]
        assert header.dtype.lower() == (kind or "q8_0")
        sizes[kind] = (folder / "model.gguf").stat().st_size
        predicted = checkpoint_size(spec, chosen | ends, "gguf")
        assert predicted.total_bytes == pytest.approx(sizes[kind], rel=0.005)
    rows = spec.vocabulary_size * 64 // 32
    assert sizes[None] - sizes["iq4_nl"] == rows * (34 - 18)
    assert sizes[None] - sizes["q5_0"] == rows * (34 - 22)


def test_what_a_gguf_file_quantizes_in_any_case_is_fitted_to_its_statistics(
    random_llama, random_llama_folder, store, tmp_path
):
    from advisor.formats.export import write_checkpoint

    (module,) = find_outer(random_llama.model)
    name = "model.embed_tokens"
    blocks = {linear.name: parse_scheme("gguf-q4_0") for linear in random_llama.linears}
    settings = QuantizationSettings(damping=0.05, descent=1, output_feedback=0.7)
    rounded = realise(
        random_llama, blocks, settings, store_without_gradients(random_llama, tmp_path)
    )
    fitted = realise(random_llama, blocks, settings, store)
    assert name not in rounded.weights
    assert str(fitted.weights[name].scheme) == "gguf-q8_0"  # llama.cpp's choice, as of the other
    weight = random_llama.tensor(f"{name}.weight").float()
    statistics = outer_codes.fitting_statistics(
        outer_codes.role_statistics(random_llama, store, module)
    )
    errors = [
        layer_error(weight, found, statistics)
        for found in (fitted.weights[name], rounded.replaced[f"{name}.weight"])
    ]
    assert errors[0] < 0.9 * errors[1]
    sizes = []
    for number, made in enumerate((rounded, fitted)):
        write_checkpoint(
            random_llama_folder, tmp_path / str(number), format="gguf", weights=made.weights,
            replaced=made.replaced,
        )  # fmt: skip
        sizes.append((tmp_path / str(number) / "model.gguf").stat().st_size)
    assert sizes[0] == sizes[1]
    asked = realise(random_llama, blocks | {name: parse_scheme("gguf-q5_0")}, settings, store)
    assert str(asked.weights[name].scheme) == "gguf-q5_0"
    integers = {linear.name: parse_scheme("gptq-int4-g32-asym") for linear in random_llama.linears}
    assert name not in realise(random_llama, integers, settings, store).weights


def store_without_gradients(loaded, folder):
    tokens = torch.randint(2, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    sequences = TokenSequences(tokens, "random", "0" * 8, 0, hash_tokens(tokens))
    found = open_store(loaded, sequences, root=folder / "plain", gradient="none")
    collect_statistics(loaded, sequences, found, gradients=False)
    return found


SETTINGS = {
    "gpu": "cpu", "context": 64, "samples": 8, "sequence_length": 32, "evaluation_sequences": 4,
    "trials": 2, "sequential": False,
}  # fmt: skip


def _journey(folder, tmp_path, engine, max_bytes, **options):
    tuning = advisor.tune(
        folder, engine=engine, budgets=Budgets(max_size_bytes=max_bytes),
        output=tmp_path / "plan.yaml", **SETTINGS, **options,
    )  # fmt: skip
    made = advisor.apply(tuning.plan_path, tmp_path / "out")
    report = advisor.verify(tuning.plan_path, tmp_path / "out")
    assert report.passed, [check for check in report.checks if not check.passed]
    plan = load_plan(tuning.plan_path)
    assert plan.expected.size_bytes == pytest.approx(made.size_bytes, rel=0.005, abs=600)
    return tuning, plan


def test_a_tied_embedding_in_a_gguf_file_from_tune_to_verify(tied_folder, tmp_path):
    spec = load_modelspec(tied_folder)
    small = checkpoint_size(spec, parse_scheme("gguf-iq4_nl"), "gguf").total_bytes
    # Less than llama.cpp's own choice for the embedding allows: only a smaller one fits.
    tuning, plan = _journey(
        tied_folder, tmp_path, "llama.cpp", small - 4000, quantize_embedding=True
    )
    assert tuning.feasible
    assert plan.scheme.outer.keys() == {"model.embed_tokens"}
    assert "model.embed_tokens" not in plan.scheme.modules
    found = tuning.to_dict()["finalists"][0]["outer"]
    assert found == plan.scheme.outer
    header = read_checkpoint(tmp_path / "out").stored.headers["model.embed_tokens.weight"]
    assert f"gguf-{header.dtype.lower()}" == plan.scheme.outer["model.embed_tokens"]


def test_verify_notices_an_embedding_of_another_type(tied_folder, tmp_path):
    _, plan = _journey(tied_folder, tmp_path, "llama.cpp", 10**6, quantize_embedding=True)
    ((name, scheme),) = plan.scheme.outer.items()
    other = "gguf-q5_0" if scheme != "gguf-q5_0" else "gguf-q8_0"
    changed = plan.model_copy(
        update={"scheme": plan.scheme.model_copy(update={"outer": {name: other}})}
    )
    from advisor.plan.files import save_plan

    save_plan(changed, tmp_path / "other.yaml")
    report = advisor.verify(tmp_path / "other.yaml", tmp_path / "out")
    failed = {check.name: check.detail for check in report.checks if not check.passed}
    assert f"{name} is {scheme}, the plan says {other}" in failed["schemes"]


def test_a_head_in_compressed_tensors_from_tune_to_verify(llama_builder, tmp_path):
    folder = _in_bf16(llama_builder(tie_word_embeddings=False), tmp_path / "bf16")
    spec = load_modelspec(folder)
    whole = checkpoint_size(spec, parse_scheme("gptq-int8-gch-sym"), "compressed-tensors")
    tuning, plan = _journey(
        folder, tmp_path, "transformers", whole.total_bytes - 20_000, quantize_head=True
    )
    assert plan.scheme.outer.keys() == {"lm_head"}
    checkpoint = read_checkpoint(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = parse_scheme(plan.scheme.outer["lm_head"])
    assert ("lm_head" in checkpoint.modules) == scheme.is_quantized
    assert ("lm_head" in config["ignore"]) != scheme.is_quantized
    assert tuning.result.finalists[0].measured_kl >= 0


def test_the_option_never_scores_worse_in_as_many_bytes(tied_folder, tmp_path):
    """llama.cpp's own choice is among the options, so the best of all is no worse."""
    spec = load_modelspec(tied_folder)
    limit = checkpoint_size(spec, parse_scheme("gguf-q5_0"), "gguf").total_bytes + 2000
    found = {}
    for wanted in (False, True):
        folder = tmp_path / str(wanted)
        folder.mkdir()
        tuning = advisor.tune(
            tied_folder, engine="llama.cpp", budgets=Budgets(max_size_bytes=limit),
            output=folder / "plan.yaml", quantize_embedding=wanted, **SETTINGS,
        )  # fmt: skip
        found[wanted] = tuning.result.plan.expected
    assert found[True].size_bytes <= limit
    assert found[True].kl.value <= 1.1 * found[False].kl.value


@pytest.mark.parametrize(
    ("engine", "format", "tied", "role", "expected"),
    [
        (
            "vllm",
            "compressed-tensors",
            True,
            "embedding",
            "embedding and head in one.*16 bits only",
        ),
        ("vllm", "compressed-tensors", False, "head", None),
        # 320 rows are five times 64; see the next test for others.
        ("vllm", "gptq", False, "head", None),
        ("vllm", "awq", False, "head", "not known to read a quantized head.*it does in"),
        ("vllm", "compressed-tensors", False, "embedding", "Drop --quantize-embedding"),
        ("transformers", "bitsandbytes", False, "head", None),
        ("sglang", "compressed-tensors", False, "head", "Drop --quantize-head"),
        ("llama.cpp", "gguf", True, "embedding", None),
        ("llama.cpp", "gguf", False, "embedding", None),
        ("llama.cpp", "gguf", False, "head", None),
    ],
)
def test_what_engines_read(random_llama_folder, engine, format, tied, role, expected):
    spec = load_modelspec(random_llama_folder)
    (module,) = outer_modules(spec)
    assert (module.role, module.tied, module.linear.in_features) == ("embedding", True, 64)
    module = replace(module, role=role, tied=tied)
    problems = outer_problems(engine, format, [module])
    assert len(problems) == (expected is not None)
    if expected is not None:
        with pytest.raises(InputError, match=expected):
            raise InputError(problems[0])


def test_vllm_pads_the_vocabulary_but_not_that_of_a_gptq_head(random_llama_folder):
    (module,) = outer_modules(load_modelspec(random_llama_folder))
    head = replace(module, role="head", tied=False)
    assert head.linear.out_features == 320
    odd = replace(head, linear=replace(head.linear, out_features=328))
    (problem,) = outer_problems("vllm", "gptq", [odd])
    assert "multiple of 64, but model.embed_tokens has 328 rows" in problem
    assert outer_problems("vllm", "compressed-tensors", [odd]) == []


def test_every_rule_of_outer_modules_has_a_source():
    for engine in ("vllm", "transformers", "llama.cpp"):
        profile = load_engine(engine)
        assert profile.outer
        assert all(profile.source(rule.source) for rule in profile.outer)


def test_tune_refuses_a_tied_head_before_any_work(random_llama_folder, tmp_path):
    with pytest.raises(InputError, match=r"on top of these 0\.0 MB and save nothing"):
        advisor.tune(
            random_llama_folder, engine="vllm", output=tmp_path / "plan.yaml",
            quantize_head=True, **SETTINGS,
        )  # fmt: skip
    assert not (tmp_path / "plan.yaml.search").exists()


def test_a_head_that_no_kernel_takes_is_refused(llama_builder):
    spec = load_modelspec(llama_builder(tie_word_embeddings=False))
    hardware = find_profile("rtx-4090")
    offered = mixture_options("vllm", hardware, spec.linears)
    head = next(m for m in outer_modules(spec) if m.role == "head")
    odd = replace(head, linear=replace(head.linear, in_features=90, out_features=321))
    with pytest.raises(InputError, match=r"lm_head \(321x90\) fits nothing.*Drop --quantize-head"):
        with_ends("vllm", hardware, offered, [odd])


def test_prediction_counts_a_quantized_head(llama_builder):
    folder = llama_builder(tie_word_embeddings=False)
    plain = advisor.workflows.predict(
        str(folder), "gptq-int4-g64-sym", gpu="rtx-4090", engine="vllm"
    ).to_dict()["candidate"]
    quantized = advisor.workflows.predict(
        str(folder), "gptq-int4-g64-sym", gpu="rtx-4090", engine="vllm", quantize_head=True
    ).to_dict()["candidate"]
    assert plain["outer"] == {}
    assert quantized["outer"] == {"lm_head": "gptq-int4-g64-sym"}
    rows, width = load_modelspec(folder).vocabulary_size, 64
    # Codes, one scale and one packed zero point a row, and an index for each input.
    expected = rows * width // 2 + rows * 2 + rows // 2 + 4 * width
    saved = 4 * rows * width - expected  # the head is float32 in this file
    assert plain["size_bytes"] - quantized["size_bytes"] == pytest.approx(saved, abs=300)


def test_an_untied_model_has_two_ends_and_their_shapes(llama_builder):
    spec = load_modelspec(llama_builder(tie_word_embeddings=False))
    loaded = load_model(spec.id)
    found = {m.role: (m.name, m.linear.out_features, m.tied) for m in find_outer(loaded.model)}
    rows = spec.vocabulary_size
    assert found == {
        "embedding": ("model.embed_tokens", rows, False), "head": ("lm_head", rows, False)
    }  # fmt: skip
    assert outer_modules(spec, head=False)[0].role == "embedding"
    assert outer_modules(spec, embedding=False)[0].role == "head"
