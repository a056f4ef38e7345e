"""Mixtures of floating point types: options, scores with rounded inputs, search and checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advisor.budgets import Budgets
from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.engines.options import MixtureOptions, mixture_options
from advisor.engines.verdict import verdict
from advisor.evaluation.measure import measure
from advisor.evaluation.reference import Reference
from advisor.evaluation.runtime import activation_simulation
from advisor.formats.export import write_checkpoint
from advisor.formats.loaders import loading_problems
from advisor.formats.read import read_checkpoint
from advisor.hardware.catalogue import find_profile
from advisor.methods import microscaled
from advisor.methods.settings import QuantizationSettings
from advisor.models.load import load_model
from advisor.predict.models import load_modelspec
from advisor.predict.speed import predict_speed
from advisor.schemes import BF16, parse_scheme
from advisor.search.allocation import allocate
from advisor.search.assignment import assignment_of, samples_of, settings_of
from advisor.search.compose import Composer
from advisor.search.families import Family, bare, is_measured_alone
from advisor.search.input_noise import InputNoise
from advisor.search.realise import realise
from advisor.search.scores import ScoreBook
from advisor.search.tune import tune
from advisor.workflows.texts import draw

TINY = Path(__file__).parents[3] / "examples" / "tiny-llama"
W4A4 = ("nvfp4-anvfp4", "mxfp4-amxfp4", "rtn-fp8-gch-afp8", "rtn-int8-gch-sym-aint8", "bf16")
W4A16 = ("gptq-int4-g32-sym", "gptq-int8-gch-sym", "nvfp4", "mxfp4", "bf16")
GPTQ = Family("gptq", None, static_groups=True)


def sequences(seed, count, length=32):
    tokens = torch.randint(2, 300, (count, length), generator=torch.Generator().manual_seed(seed))
    return TokenSequences(tokens, f"random:{seed}", str(seed) * 8, seed, hash_tokens(tokens))


def offered(names):
    return MixtureOptions("compressed-tensors", tuple(map(parse_scheme, names)))


@pytest.fixture
def composer(random_llama, random_llama_folder, tmp_path):
    tokens = sequences(0, 8)
    store = open_store(random_llama, tokens, root=tmp_path)
    collect_statistics(random_llama, tokens, store)
    noise = InputNoise(random_llama, store, tokens, tmp_path / "noise")
    book = ScoreBook(random_llama, store, tmp_path / "scores", noise)
    spec = load_modelspec(str(random_llama_folder))
    return Composer(
        spec, random_llama.linears, offered(dict.fromkeys((*W4A4, *W4A16))), book,
        QuantizationSettings(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "gpu", "has", "lacks"),
    [
        ("vllm", "rtx-4090", {"nvfp4", "mxfp4", "rtn-fp8-gch-afp8", "rtn-int8-gch-sym-aint8"},
         {"nvfp4-anvfp4", "mxfp4-amxfp4"}),
        ("vllm", "h100-sxm", {"nvfp4", "mxfp4", "rtn-fp8-gch-afp8"}, {"nvfp4-anvfp4"}),
        ("vllm", "b200", {"nvfp4", "nvfp4-anvfp4", "mxfp4-amxfp4", "rtn-fp8-gch-afp8"},
         {"mxfp4", "rtn-int8-gch-sym-aint8"}),
        # Ampere multiplies no FP8: what says so keeps its inputs, and is no option.
        ("vllm", "a100-80gb-sxm", {"nvfp4", "mxfp4", "rtn-int8-gch-sym-aint8"},
         {"rtn-fp8-gch-afp8", "nvfp4-anvfp4"}),
        ("sglang", "b200", {"nvfp4", "nvfp4-anvfp4", "rtn-fp8-gch-afp8"}, {"mxfp4"}),
    ],
)  # fmt: skip
def test_options_are_what_the_kernels_of_a_gpu_do(engine, gpu, has, lacks):
    spec = load_modelspec("meta-llama/Llama-3.1-8B")
    names = {str(s) for s in mixture_options(engine, find_profile(gpu), spec.linears).schemes}
    assert has <= names
    assert not lacks & names


def test_inputs_that_stay_in_16_bits_are_ruled_out_with_the_kernel():
    spec = load_modelspec("meta-llama/Llama-3.1-8B")
    options = mixture_options("vllm", find_profile("rtx-4090"), spec.linears)
    whys = {str(scheme): why for scheme, why in options.ruled_out}
    assert "marlin-nvfp4 leaves its inputs in 16 bits" in whys["nvfp4-anvfp4"]


def test_rounded_inputs_add_the_same_to_every_storage(composer, monkeypatch):
    quantized = []
    real = microscaled.quantize_many

    def count(weight, statistics, schemes, settings):
        quantized.extend(map(str, schemes))
        return real(weight, statistics, schemes, settings)

    monkeypatch.setattr(microscaled, "quantize_many", count)
    groups = composer.groups(GPTQ)
    assert set(quantized) == {"nvfp4", "mxfp4"}, "inputs make no new codes"
    by_name = {key: {o.name: o for o in options} for key, options in groups.items()}
    for options in by_name.values():
        for kind in ("nvfp4", "mxfp4"):
            assert options[f"{kind}-a{kind}"].score > options[kind].score > 0
        assert options["gptq-int8-gch-sym-aint8"].score > options["gptq-int8-gch-sym"].score
        extra = options["gptq-int8-gch-sym-aint8"].score - options["gptq-int8-gch-sym"].score
        # int8 has 255 steps where E2M1 has 15: rounding inputs costs less by orders of magnitude.
        assert 30 * extra < options["nvfp4-anvfp4"].score - options["nvfp4"].score


def test_families_share_the_scores_of_what_is_not_theirs(composer):
    composer.groups(GPTQ)
    for family in (
        replace(GPTQ, damping=0.4), replace(GPTQ, clip="mse"), replace(GPTQ, static_groups=False)
    ):  # fmt: skip
        missing = composer.book.missing(
            composer.schemes(family), family.settings(composer.settings), family.samples
        )
        assert missing, "its integers are its own"
        assert not [s for s in missing if is_measured_alone(s)]


def test_uniform_candidates_of_families_are_integers(composer):
    names = [candidate.name for candidate in composer.uniforms(GPTQ)]
    assert names == ["gptq-int4-g32-sym", "gptq-int8-gch-sym"]


def test_the_least_score_within_a_size_is_found_among_all_types(composer):
    groups = composer.groups(GPTQ)
    smallest, largest = composer.smallest_and_largest()
    middle = (smallest.total_bytes + largest.total_bytes) // 2
    mixture = composer.mixture(GPTQ, middle)
    assert mixture.size_bytes <= middle
    limit = sum(
        next(o for o in options if o.name == str(mixture.assignment[_member(composer, key)])).cost
        for key, options in groups.items()
    )
    assert mixture.predicted_kl <= allocate(groups, limit).score * (1 + 1e-9)
    used = {str(bare(scheme)) for scheme in mixture.assignment.values()}
    assert len(used) > 1


def _member(composer, key):
    return next(m.name for m in composer.linears if m.fused_group == key)


@pytest.mark.parametrize("names", [W4A4, W4A16], ids=["W4A4", "W4A16"])
def test_a_search_and_its_checkpoint(
    names, random_llama, random_llama_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "cache"))
    spec, calibration = load_modelspec(str(random_llama_folder)), sequences(1, 8)
    sizes = {
        name: Composer(
            spec, random_llama.linears, offered((name, "bf16")), None, QuantizationSettings()
        ).smallest_and_largest()[0].total_bytes
        for name in names[:-1]
    }  # fmt: skip
    budget = (min(sizes.values()) + max(sizes.values())) // 2
    gpu = "b200" if names is W4A4 else "rtx-4090"
    result = tune(
        random_llama, spec, find_profile(gpu), "vllm", Budgets(max_size_bytes=budget),
        calibration=calibration, evaluation=sequences(2, 8), workdir=tmp_path / "work",
        trials=8, context=64, options=offered(names),
    )  # fmt: skip
    mixed = next(f for f in result.finalists if not f.mixture.is_uniform)
    used = set(mixed.mixture.assignment.values())
    assert {s.weight for s in used} & {"nvfp4", "mxfp4", "fp8"}
    assert any(s.activation for s in used) == (names is W4A4)
    assert any(f.mixture.family.sequential for f in result.finalists)
    assert result.feasible
    assert result.answer.mixture.size_bytes <= budget

    plan = result.plan
    assignment = assignment_of(plan, random_llama.linears)
    store = open_store(random_llama, calibration)
    made = realise(
        random_llama, assignment, settings_of(plan), store, samples=samples_of(plan),
        calibration=calibration,
    )  # fmt: skip
    out = tmp_path / "out"
    write_checkpoint(random_llama_folder, out, format="compressed-tensors", weights=made.weights)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    formats = {group["format"] for group in config["config_groups"].values()}
    assert config["format"] == ("mixed-precision" if len(formats) > 1 else formats.pop())
    read = read_checkpoint(out)
    assert read.modules.keys() == made.weights.keys()
    for name, weight in made.weights.items():
        found = read.weight(name)
        assert torch.equal(found.dequantize(), weight.dequantize()), name
        assert found.scheme.activation == weight.scheme.activation
        if weight.scheme.activation:
            rows = torch.randn(4, weight.shape[1])
            ours, theirs = (
                activation_simulation(each.scheme, each.extras)(rows) for each in (weight, found)
            )
            assert torch.equal(ours, theirs)


def test_what_rounded_inputs_cost_is_foreseen(tmp_path):
    """On the trained model: predicted beside measured KL, all linears' inputs rounded alone."""
    loaded = load_model(TINY)
    calibration, evaluation = (
        draw((), loaded.tokenizer, role=role, sequences=16, sequence_length=64, seed=0)
        for role in ("calibration", "evaluation")
    )
    store = open_store(loaded, calibration, root=tmp_path)
    collect_statistics(loaded, calibration, store)
    noise = InputNoise(loaded, store, calibration, tmp_path / "noise")
    reference = Reference.compute(loaded, evaluation, tmp_path)
    for name in ("rtn-fp8-gch-afp8", "rtn-int8-gch-sym-aint8", "nvfp4-anvfp4"):
        scheme = parse_scheme(name)
        book = ScoreBook(loaded, store, tmp_path / "scores", noise)
        found = book.scores([scheme, bare(scheme)], QuantizationSettings(), None)
        predicted = sum(
            found[scheme][linear.name].kl - found[bare(scheme)][linear.name].kl
            for linear in loaded.linears
        )
        handles = []
        for linear in loaded.linears:
            extras = {}
            if scheme.activation == "nvfp4":
                known = store.layer(linear)
                extras["input_global_scale"] = 448 * 6 / known.absolute_maximum.amax().reshape(1)
            simulate = activation_simulation(scheme, extras)
            hook = loaded.model.get_submodule(linear.name).register_forward_pre_hook(
                lambda _, given, simulate=simulate: (simulate(given[0]), *given[1:])
            )
            handles.append(hook)
        measured = measure(loaded.model, reference).kl.value
        for handle in handles:
            handle.remove()
        assert predicted == pytest.approx(measured, rel=0.2), name


def test_loaders_take_what_mixtures_hold(random_llama):
    ties = list(dict.fromkeys(linear.fused_group for linear in random_llama.linears))
    for engine, names in (("vllm", (*W4A4[:-1], *W4A16[:-1])), ("sglang", W4A4[:1])):
        chosen = {tie: parse_scheme(names[i % len(names)]) for i, tie in enumerate(ties)}
        assignment = {m.name: chosen[m.fused_group] for m in random_llama.linears}
        found = loading_problems(engine, "compressed-tensors", assignment, random_llama.linears)
        assert found == ([], [])


@pytest.fixture
def slow_blackwell():
    """A Blackwell GPU whose arithmetic is so slow that a tiny model waits for it."""
    found = find_profile("b200")
    names = ("fp16_tflops", "bf16_tflops", "fp8_tflops", "fp4_tflops", "int8_tops")
    slower = {}
    for name in names:
        figure = getattr(found.figures, name)
        slower[name] = figure.model_copy(update={"value": figure.value * 1e-8})
    return found.model_copy(update={"figures": found.figures.model_copy(update=slower)})


@pytest.mark.parametrize("wish", ["prefer speed", "min speed"])
def test_a_search_for_speed_rounds_inputs(
    wish, slow_blackwell, random_llama, random_llama_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "cache"))
    spec = load_modelspec(str(random_llama_folder))
    speeds = {
        name: predict_speed(
            spec, parse_scheme(name),
            verdict("vllm", parse_scheme(name), slow_blackwell, spec.linears),
            slow_blackwell, "vllm", linear_bytes=1, context=64, batch=64,
        ).decode.expected
        for name in ("nvfp4", "rtn-fp8-gch-afp8", "nvfp4-anvfp4")
    }  # fmt: skip
    assert speeds["nvfp4"] < speeds["rtn-fp8-gch-afp8"] < speeds["nvfp4-anvfp4"]
    middle = (speeds["rtn-fp8-gch-afp8"] + speeds["nvfp4-anvfp4"]) / 2
    budgets = Budgets(max_size_bytes=10**6)
    if wish == "min speed":
        budgets = Budgets(max_size_bytes=10**6, min_tokens_per_s=middle)
    result = tune(
        random_llama, spec, slow_blackwell, "vllm", budgets, calibration=sequences(1, 8),
        evaluation=sequences(2, 8), workdir=tmp_path / "work", trials=6, context=64, batch=64,
        prefer="speed" if wish == "prefer speed" else "balanced",
    )  # fmt: skip
    assert result.feasible
    used = {s for f in result.finalists for s in f.mixture.assignment.values()}
    if wish == "prefer speed":
        # Nothing else is asked of the size: 16 bits are best, and no slower than weight-only.
        assert all(s.activation or s == BF16 for s in used)
        return
    pace = result.goal.pace
    assert pace is not None
    assert all(pace.keeps(f.mixture.assignment) for f in result.finalists)
    answer = result.answer.mixture
    assert {s.activation for s in answer.assignment.values()} & {"nvfp4", "mxfp4"}
    assert not answer.is_uniform, "what time is left is spent on bits"
