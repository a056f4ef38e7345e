"""The answer: its JSON, its order, its reasons, and what it says when nothing fits."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from advisor.budgets import Budgets
from advisor.engines import verdict
from advisor.errors import InputError
from advisor.hardware.catalogue import find_profile
from advisor.predict.advise import predict, recommend
from advisor.predict.candidate import SCHEME_NAMES
from advisor.predict.cost import quantization_cost
from advisor.predict.explain import serve_command, tune_command
from advisor.predict.models import load_modelspec
from advisor.predict.published import published_size
from advisor.predict.ranking import is_makeshift
from advisor.schemes import parse_scheme

GB = 10**9


@pytest.fixture(scope="module")
def llama():
    return load_modelspec("meta-llama/Llama-3.1-8B")


@pytest.fixture(scope="module")
def rtx4090():
    return find_profile("rtx4090")


def test_the_document_has_the_keys_of_the_contract(llama, rtx4090):
    document = recommend(llama, rtx4090, "vllm", Budgets(max_size_bytes=10 * GB)).to_dict()
    json.dumps(document)
    assert document["schema_version"] == 1
    assert set(document) >= {
        "model", "hardware", "engine", "budgets", "recommended", "candidates", "relaxation",
        "serve", "tune", "why",
    }  # fmt: skip
    row = document["candidates"][0]
    assert set(row) >= {
        "name", "method", "bits", "group_size", "symmetric", "format", "kernel", "size_bytes",
        "bits_per_weight", "memory_bytes", "loss", "decode_tokens_per_s", "prefill_tokens_per_s",
        "speedup_over_16bit", "quantization_cost", "feasible", "violations",
    }  # fmt: skip
    assert set(row["kernel"]) >= {"support", "name", "reason", "source"}
    assert set(row["memory_bytes"]) == {
        "weights", "kv_cache", "activations", "overhead", "total",
    }  # fmt: skip
    assert set(row["loss"]) >= {"low", "expected", "high", "basis", "sources", "collapse_risk"}
    assert document["relaxation"] is None
    assert document["recommended"] == row["name"]


def test_every_scheme_is_in_the_list_and_the_ruled_out_ones_say_why(llama, rtx4090):
    document = recommend(llama, rtx4090, "vllm", Budgets(max_size_bytes=6 * GB)).to_dict()
    rows = {row["name"]: row for row in document["candidates"]}
    assert set(rows) == set(SCHEME_NAMES)
    assert all(row["feasible"] or row["why_not"] for row in rows.values())
    assert rows["bf16"]["violations"][0]["budget"] == "max_size"
    assert rows["bf16"]["violations"][0]["limit"] == 6 * GB
    feasible = [row["feasible"] for row in document["candidates"]]
    assert feasible == sorted(feasible, reverse=True)


@pytest.mark.parametrize("prefer", ["accuracy", "size", "speed", "balanced"])
def test_preferences_break_ties_inside_the_feasible_set(llama, rtx4090, prefer):
    result = recommend(llama, rtx4090, "vllm", Budgets(), prefer=prefer)
    best = result.recommended
    others = [
        c for c in result.candidates if c.feasible and c.loss.expected < 0.2 and not is_makeshift(c)
    ]
    if prefer == "size":
        assert best.size_bytes <= min(c.size_bytes for c in others) * 1.02
    if prefer == "accuracy":
        assert best.loss.expected <= min(c.loss.expected for c in others) + 0.005
    if prefer == "speed":
        fastest = max(c.speed.decode.expected for c in others)
        assert best.speed.decode.expected >= 0.9 * fastest
    assert best.loss.collapse_risk < 0.5
    assert result.why.count(best.name) == 1


def test_a_larger_budget_never_rules_out_more(llama, rtx4090):
    def names(size):
        result = recommend(llama, rtx4090, "vllm", Budgets(max_size_bytes=size, max_loss=0.1))
        return {c.name for c in result.candidates if c.feasible}

    sets = [names(size * GB) for size in (5, 6, 7, 9, 17)]
    assert all(a <= b for a, b in itertools.pairwise(sets))


def test_ties_are_called_ties(llama, rtx4090):
    result = recommend(llama, rtx4090, "vllm", Budgets(), prefer="accuracy")
    assert result.tied
    assert "tie" in result.why


def test_nothing_fits_names_the_smallest_relaxations(llama, rtx4090):
    budgets = Budgets(max_size_bytes=4 * GB, max_loss=0.005)
    document = recommend(llama, rtx4090, "vllm", budgets).to_dict()
    assert document["recommended"] is None
    assert document["serve"] is None
    found = document["relaxation"]
    assert {"budget", "from", "to", "candidate", "text"} <= set(found[0])
    sizes = [entry["to"] for entry in found if entry["budget"] == "max_size"]
    assert sizes
    assert sizes[0] > 4 * GB


@pytest.mark.parametrize(
    ("gpu", "given"),
    [
        ("rtx4090", {"max_size": "9.08GB", "max_loss": "1%"}),
        ("rtx4090", {"max_size": "3GB", "max_kl": "0.2"}),
        ("2xl4", {"max_memory": "12GiB", "min_speed": "300"}),
        ("l4", {"max_size": "1GB", "min_speed": "500"}),
    ],
)
def test_a_relaxation_does_as_it_is_written(llama, gpu, given):
    found = recommend(llama, find_profile(gpu), "vllm", Budgets.from_text(**given)).relaxation
    tried = 0
    for entry in found:
        options = re.findall(r"--((?:max|min)-[a-z]+) (\S+)", entry.text)
        typed = given | {name.replace("-", "_"): value for name, value in options}
        again = recommend(llama, find_profile(gpu), "vllm", Budgets.from_text(**typed))
        assert not options or again.recommended is not None, entry.text
        tried += bool(options)
    assert tried


@pytest.mark.parametrize("given", [{"max_loss": "2%"}, {"max_loss": "2%", "max_kl": "0.01"}])
def test_less_context_and_more_loss_together_where_neither_is_enough(given):
    """32B on a 24 GB card: what an expert would say first, and it does as it is written."""
    spec, gpu = load_modelspec("Qwen/Qwen3-32B"), find_profile("rtx4090")

    def ask(context, **typed):
        return recommend(spec, gpu, "vllm", Budgets.from_text(**typed), context=context)

    found = ask(32768, **given).relaxation
    entry = next(entry for entry in found if entry.budget == "context")
    options = dict(re.findall(r"--([a-z-]+) (\S+)", entry.text))
    assert {"context", *(name.replace("_", "-") for name in given)} == set(options)
    context = int(options.pop("context"))
    assert 8192 <= context < 32768
    typed = {name.replace("-", "_"): value for name, value in options.items()}
    assert ask(context, **typed).recommended.name == entry.candidate
    assert ask(context, **given).recommended is None
    assert ask(32768, **typed).recommended is None


def test_more_cards_of_the_same_are_a_way_out_where_the_engine_shares_a_model():
    spec = load_modelspec("meta-llama/Llama-3.1-70B")

    def asked(gpu, engine):
        found = recommend(spec, find_profile(gpu), engine, Budgets(max_loss=0.01)).relaxation
        return [entry.after for entry in found if entry.budget == "gpu"]

    assert "4xrtx4090" in asked("rtx4090", "vllm")
    assert "4xl4" in asked("2xl4", "vllm")
    assert not any(name.endswith("xrtx4090") for name in asked("rtx4090", "transformers"))


def test_a_device_s_memory_is_no_budget_to_be_raised():
    spec = load_modelspec("meta-llama/Llama-3.1-70B")
    found = recommend(spec, find_profile("rtx4090"), "vllm", Budgets()).relaxation
    memory = next(entry for entry in found if entry.budget == "max_memory")
    assert "where the device leaves 23.7 GB" in memory.text
    assert "--max-memory" not in memory.text


def test_a_budget_beyond_the_device_asks_for_what_it_has_and_says_so():
    spec, l4 = load_modelspec("meta-llama/Llama-3.1-70B"), find_profile("l4")
    result = recommend(spec, l4, "vllm", Budgets(max_memory_bytes=200 * GB))
    assert result.recommended is None
    assert "L4 has 24.2 GB of memory, and --max-memory asks for 200 GB" in result.notes[0]
    assert any(entry.budget == "gpu" for entry in result.relaxation)
    assert not any("--max-memory" in entry.text for entry in result.relaxation)


def test_no_option_raises_a_budget_beyond_the_device(llama):
    """All the KV cache of a context and a little more: 24.3 GB, of which an L4 has 24.15."""
    l4, budgets = find_profile("l4"), Budgets(max_memory_bytes=24 * GB)
    result = recommend(llama, l4, "vllm", budgets, context=131072)
    memory = next(entry for entry in result.relaxation if entry.budget == "max_memory")
    assert memory.after > l4.memory_bytes
    assert memory.text.startswith("24.3 GB of memory where the device leaves 24.2 GB, with ")
    assert not result.notes


def test_too_long_a_context_is_relaxed_by_less_context_or_a_larger_gpu():
    spec = load_modelspec("meta-llama/Llama-3.1-70B")
    hardware = find_profile("a100-sxm-80")
    result = recommend(spec, hardware, "vllm", Budgets(max_loss=0.01), context=131072)
    kinds = {entry.budget for entry in result.relaxation}
    assert "gpu" in kinds
    assert "context" in kinds
    asks = [entry.ask for entry in result.relaxation]
    assert asks == sorted(asks)


def test_the_default_memory_limit_leaves_eight_percent(llama):
    hardware = find_profile("t4")
    row = predict(llama, parse_scheme("bf16"), hardware, "vllm").to_dict()["candidate"]
    violation = next(v for v in row["violations"] if v["budget"] == "max_memory")
    assert violation["limit"] == int(hardware.memory_bytes * 0.92)


def test_fp8_on_ampere_says_what_it_does_not_give(llama):
    reason = predict(
        llama, parse_scheme("rtn-fp8-gch-afp8"), find_profile("a100-sxm-80"), "vllm"
    ).candidate.kernel.reason
    assert "no FP8 compute" in reason


def test_modules_that_stay_in_16_bits_are_paid_for(llama, rtx4090):
    spec = load_modelspec("HuggingFaceTB/SmolLM2-135M-Instruct")
    scheme = parse_scheme("gptq-int4-g64-sym")
    assert verdict("vllm", scheme, rtx4090, spec.linears).support == "weight-only"
    candidate = predict(spec, scheme, rtx4090, "vllm").candidate
    assert 4.2 < candidate.size.bits_per_weight < 16


@pytest.mark.parametrize(("context", "batch"), [(0, 1), (1, 0)])
def test_a_workload_below_one_is_refused(llama, rtx4090, context, batch):
    with pytest.raises(InputError, match="at least 1"):
        recommend(llama, rtx4090, "vllm", Budgets(), context=context, batch=batch)


def test_commands():
    assert serve_command("vllm", "out dir", 8192, 4, devices=2, dtype="float16") == (
        "vllm serve 'out dir' --max-model-len 8192 --max-num-seqs 4 "
        "--tensor-parallel-size 2 --dtype half"
    )
    budgets = Budgets(max_size_bytes=6 * GB, max_loss=0.03)
    assert tune_command("m", "l4", "vllm", budgets, 8192, 1, "balanced") == (
        "advisor tune m --gpu l4 --engine vllm --max-size 6GB --max-loss 3% --context 8192 "
        "-o plan.yaml"
    )


def test_cost_follows_published_times():
    spec, a100 = load_modelspec("meta-llama/Llama-2-7b-hf"), find_profile("a100-sxm-80")
    scheme = parse_scheme("gptq-int4-g128-sym")
    assert 5 < quantization_cost(spec, scheme, a100).minutes < 20
    assert quantization_cost(spec, parse_scheme("rtn-int4-g128-sym"), a100).minutes < 2
    large = load_modelspec("meta-llama/Llama-3.1-70B")
    cost = quantization_cost(large, scheme, find_profile("rtx4090"))
    assert cost.possible
    assert cost.peak_memory_bytes < 24 * GB
    assert cost.host_memory_bytes > 130 * GB
    assert "block by block" in cost.words


def test_advice_imports_no_torch_and_no_numpy():
    code = (
        "import sys\n"
        "from advisor.budgets import Budgets\n"
        "from advisor.hardware.catalogue import find_profile\n"
        "from advisor.predict.advise import recommend\n"
        "from advisor.predict.models import load_modelspec\n"
        "spec = load_modelspec('meta-llama/Llama-3.1-8B')\n"
        "recommend(spec, find_profile('l4'), 'vllm', Budgets()).to_dict()\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'optuna') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_experimental_and_emulated_kernels_come_last(llama, rtx4090):
    ranked = recommend(llama, rtx4090, "vllm==0.23", Budgets()).candidates
    feasible = [c for c in ranked if c.feasible and c.loss.expected < 0.2]
    makeshift = [is_makeshift(candidate) for candidate in feasible]
    assert any(makeshift)
    assert makeshift == sorted(makeshift)


def test_what_advisor_cannot_make_is_not_put_first(llama, rtx4090):
    names = ["rtn-fp8-gch-afp8", "rtn-int4-g32-sym", "gptq-int4-g128-sym", "bf16"]
    schemes = [parse_scheme(name) for name in names]
    usual = recommend(llama, rtx4090, "vllm", Budgets(), schemes=schemes)
    assert usual.candidates[0].name == "rtn-fp8-gch-afp8"
    rounding = recommend(
        llama, rtx4090, "vllm", Budgets(max_size_bytes=10 * GB), schemes=schemes,
        makes=lambda scheme, _: scheme.weight == "int4",
    )  # fmt: skip
    assert rounding.candidates[0].name == "gptq-int4-g128-sym"
    assert not rounding.tied or rounding.tied[0].tunable


def test_where_advisor_makes_nothing_the_maker_is_named(llama, rtx4090):
    answer = recommend(
        llama, rtx4090, "llama.cpp", Budgets(), makes=lambda scheme, _: scheme.method != "gguf"
    )
    assert answer.recommended.scheme.method == "gguf"
    assert answer.to_dict()["candidates"][0]["tunable"] is False
    assert answer.tied or "llama-quantize" in answer.why


def test_native_fp8_beats_weight_only_int8_where_arithmetic_is_the_limit(llama):
    found = recommend(llama, find_profile("h100-sxm"), "vllm", Budgets(), batch=64)
    assert found.candidates[0].name == "rtn-fp8-gch-afp8"
    assert found.candidates[0].speedup > 1
    tied = {candidate.name for candidate in found.tied}
    assert "smoothquant-int8-gch-sym-aint8" not in tied  # four times the loss is no tie


def test_the_ladder_is_the_largest_that_fits(llama, rtx4090):
    answer = recommend(llama, rtx4090, "vllm", Budgets(max_size_bytes=10 * GB), context=2048)
    rung = answer.ladder[0]
    assert rung.candidate == answer.candidates[0].name

    def total(context, batch):
        scheme = answer.candidates[0].scheme
        found = predict(llama, scheme, rtx4090, "vllm", context=context, batch=batch)
        return found.candidate.memory.total

    assert total(rung.largest_context, 1) <= rung.limit_bytes < total(rung.largest_context + 16, 1)
    assert total(2048, rung.largest_batch) <= rung.limit_bytes < total(2048, rung.largest_batch + 1)
    assert answer.to_dict()["ladder"][0]["largest_batch_at_context"] == rung.largest_batch


def test_no_more_context_is_served_than_the_model_was_made_for():
    spec, gpu = load_modelspec("facebook/opt-1.3b"), find_profile("l4")
    found = recommend(spec, gpu, "vllm", Budgets(), context=8192).to_dict()
    assert found["context"] == 2048
    assert "--max-model-len 2048 " in found["serve"]
    assert "--context 2048" in found["tune"]
    assert "context of 2048, not 8192" in found["notes"][0]
    fits = recommend(spec, gpu, "vllm", Budgets(), context=2048).to_dict()
    assert fits["notes"] == []
    assert fits["candidates"][0]["memory_bytes"] == found["candidates"][0]["memory_bytes"]
    one = predict(spec, parse_scheme("gptq-int4-g128-sym"), gpu, "vllm", context=8192).to_dict()
    assert one["candidate"]["notes"] == found["notes"]


def test_devices_that_cannot_share_the_heads_equally_are_refused(llama):
    """vLLM refuses --tensor-parallel-size 3 of 32 heads, in 16 bits as well."""
    three = find_profile("3xl4")
    with pytest.raises(InputError, match=r"has 32 and 3xl4 are 3\. Use --gpu 2xl4 or 4xl4\."):
        recommend(llama, three, "vllm", Budgets())
    with pytest.raises(InputError, match="equally among devices"):
        predict(llama, parse_scheme("bf16"), three, "sglang")
    assert recommend(llama, three, "llama.cpp", Budgets()).candidates  # shares whole blocks
    assert recommend(llama, find_profile("2xl4"), "vllm", Budgets()).candidates


def test_a_checkpoint_that_is_quantized_already_is_noticed(llama, rtx4090):
    assert recommend(llama, rtx4090, "vllm", Budgets()).notes == ()
    config = {**llama.config, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}
    quantized = replace(llama, config=config)
    (note,) = recommend(quantized, rtx4090, "vllm", Budgets()).to_dict()["notes"]
    assert note.startswith("This checkpoint is quantized already (fp8)")
    scheme = parse_scheme("gptq-int4-g64-sym")
    assert predict(quantized, scheme, rtx4090, "vllm").notes == (note,)
    assert len(predict(quantized, scheme, rtx4090, "vllm", context=10**6).notes) == 2
    for name, method in (("deepseek-ai/DeepSeek-R1", "fp8"), ("openai/gpt-oss-20b", "mxfp4")):
        (note,) = recommend(load_modelspec(name), rtx4090, "vllm", Budgets()).notes
        assert f"quantized already ({method})" in note


def test_what_is_published_quantized_has_its_own_size(llama, rtx4090):
    gpt_oss = load_modelspec("openai/gpt-oss-20b")
    experts = 24 * 32 * 3 * 2880 * 2880  # blocks of 32 codes of 4 bits and a scale of 8
    whole = experts * 17 / 32 + 2 * (gpt_oss.parameters - experts)
    assert published_size(gpt_oss).total_bytes == pytest.approx(whole, rel=1e-4)
    (note,) = recommend(gpt_oss, rtx4090, "vllm", Budgets()).notes
    assert "It is about 13.8 GB and takes 15.3 GB of memory, which is there." in note
    (note,) = recommend(gpt_oss, find_profile("rtx-3060-12"), "vllm", Budgets()).notes
    assert "takes 15.3 GB of memory, more than is there." in note
    deepseek, several = load_modelspec("deepseek-v3"), find_profile("8xh200")
    (note,) = recommend(deepseek, several, "vllm", Budgets()).notes
    assert "about 673 GB and takes 86.2 GB of memory of each device, which is there." in note
    for odd in ({"quant_method": "gptq"}, {"quant_method": "fp8", "weight_block_size": None}):
        spec = replace(llama, config={**llama.config, "quantization_config": odd})
        assert published_size(spec) is None
        assert "It is about" not in recommend(spec, rtx4090, "vllm", Budgets()).notes[0]


def test_a_group_size_that_is_advised_has_a_kernel(llama):
    row = predict(llama, parse_scheme("gptq-int4-g100-sym"), find_profile("l4"), "vllm").candidate
    assert row.problem.endswith("Use group size 128 or 64.")


def test_the_reason_says_no_1x_and_contradicts_no_speedup(llama):
    """At a large batch fewer bits make 16 bits faster once, and not the answer once more."""
    deepseek, h200 = load_modelspec("deepseek-ai/DeepSeek-V3"), find_profile("8xh200-sxm")
    why = recommend(deepseek, h200, "sglang", Budgets()).why
    assert "decodes as fast as 16 bits" in why
    mixtral = load_modelspec("Mixtral-8x7B-v0.1")
    result = recommend(mixtral, find_profile("a100-sxm-80"), "vllm", Budgets(), batch=256,
                       context=1024)  # fmt: skip
    assert result.recommended.speedup > 1.3
    assert result.recommended.scheme.activation is None
    assert result.recommended.speed.words.endswith("still fewer bits per weight do not")
