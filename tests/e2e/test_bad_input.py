"""Bad input: one clear message, exit code 2, nothing written, in words and as JSON.

Each case prepares a fault and returns the command's arguments; the message must match in full
knowledge of the rule, the value and the next step.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

CHECKOUT = Path(__file__).parents[2]
CATALOGUE = "llama-3.1-8b"


def recommend(*arguments, model=CATALOGUE, gpu="rtx-4090"):
    return ["recommend", model, "--gpu", gpu, *arguments]


def tune(workplace, *arguments):
    return [
        "tune", workplace.model, "--gpu", "cpu", "--engine", "transformers",
        "--samples", "2", "--sequence-length", "16", "--evaluation-sequences", "4",
        "--trials", "2", "-o", "out.yaml", *arguments,
    ]  # fmt: skip


def apply(plan, *arguments, output="quantized"):
    return ["apply", plan, "-o", output, *arguments]


CASES = {}


def case(message):
    """Register a function ``(workplace) -> arguments`` under its name."""

    def register(function):
        CASES[function.__name__.strip("_")] = (function, message)
        return function

    return register


# Devices


@case(r"--device must be auto, cpu, or an accelerator .* but got 'cuda:99': (torch sees no|here)")
def search_on_a_device_that_is_not_there(work):
    return tune(work, "--device", "cuda:99")


@case(r"2 problems:\s+- no checkpoint at nowhere.*\n.*--device must be auto, cpu.* got 'gpu'")
def verify_on_an_unknown_device(work):
    return ["verify", work.plan(), "nowhere", "--device", "gpu"]


@case(r"--device mps computes nothing in float64.*Use --device cpu")
def apply_where_there_is_no_float64(work):
    return apply(work.plan(), "--device", "mps")


# Embedding and head


@case(r"model\.embed_tokens is embedding and head in one.*Drop --quantize-head and")
def quantized_head_of_a_tied_model(work):
    return tune(work, "--quantize-head")


@case(r"vLLM is not known to read a quantized embedding.*Drop --quantize-embedding")
def quantized_embedding_for_vllm(work):
    return recommend("--engine", "vllm", "--quantize-embedding")


@case(r"lm_head \(128256x4096\) takes no rtn-int8-gch-sym-aint8.*name a weight-only scheme")
def quantized_head_with_rounded_inputs(work):
    return [
        "predict", CATALOGUE, "--gpu", "rtx-4090", "--engine", "vllm", "--quantize-head",
        "--scheme", "rtn-int8-gch-sym-aint8",
    ]  # fmt: skip


@case(
    r"(?s)8 problems:.*damping must be a number, but the plan says 'lots'.*descent must be a whole"
    r".*clip must be one of none, gptq, mse.*smoothing must be in \[0, 1\].*sequential must be"
    r".*unknown setting 'dampin'.*Did you mean 'damping'.*names module 'model\.layers\.9\.x'"
    r".*unknown method 'gptk' in scheme 'gptk-int4'"
)
def plan_of_wrong_settings_and_schemes(work):
    settings = {
        "damping": "lots", "descent": True, "clip": "mze", "smoothing": 3, "sequential": "yes",
        "dampin": 1, "clip_steps": 20, "scale_dtype": "float16",
    }  # fmt: skip
    modules = {"model.layers.9.x": "rtn-int8-gch-sym"}
    return apply(work.plan(settings=settings, scheme__default="gptk-int4", scheme__modules=modules))


@case(r"model\.embed_tokens is embedding and head in one.*reads from a compressed-tensors")
def plan_with_a_quantized_tied_embedding(work):
    return apply(work.plan(scheme__outer={"model.embed_tokens": "gptq-int4-g32-sym"}))


# The model


@case(r"no such model folder: \./nowhere\. Check the path")
def missing_folder(work):
    return recommend(model="./nowhere")


@case(r"no model folder at \./nowhere\. Give a folder with config\.json")
def missing_folder_for_tune(work):
    return ["tune", "./nowhere", "--gpu", "cpu"]


@case(r"unknown model 'llama-3\.1-8bb'.*Did you mean.*[Ll]lama-3\.1-8B")
def unknown_model_name(work):
    return recommend(model="llama-3.1-8bb")


@case(r"model has no config\.json: it is no Hugging Face model folder")
def no_config(work):
    (work.model / "config.json").unlink()
    return tune(work)


@case(r"config\.json.*not valid JSON")
def broken_config(work):
    (work.model / "config.json").write_text('{"architectures": [')
    return tune(work)


@case(r"LlamaForCasualLM.*Did you mean.*LlamaForCausalLM")
def unknown_architecture(work):
    work.edit_config(architectures=["LlamaForCasualLM"])
    return tune(work)


@case(r"only pickle weights.*safe_serialization")
def pickle_only(work):
    weights = work.model / "model.safetensors"
    torch.save(load_file(weights), work.model / "pytorch_model.bin")
    weights.unlink()
    return tune(work)


@case(r"model\.safetensors.* is truncated: .*expected")
def truncated_weights(work):
    weights = work.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return tune(work)


@case(r"not finite.*1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight")
def weights_not_a_number(work):
    tensors = load_file(work.model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, work.model / "model.safetensors", metadata={"format": "pt"})
    return tune(work)


@case(r"(?s)has no known name for this tokenizer's way.*GGUF files are written with default")
def model_that_is_never_written_as_gguf(work):
    path = work.model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps(tokenizer | {"pre_tokenizer": {"type": "Whitespace"}}))
    work.edit_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    return tune(work, "--engine", "llama.cpp")


@case(r"holds a GGUF file \(m\.gguf\), which is quantized already\. Give the 16-bit model")
def gguf_folder(work):
    (work.model / "model.safetensors").rename(work.model / "m.gguf")
    return tune(work)


@case(r"no tokenizer\.json and no tokenizer\.model\. Copy the tokenizer's files of the original")
def no_tokenizer(work):
    (work.model / "tokenizer.json").unlink()
    return tune(work)


@case(r"already quantized \(gptq\)")
def already_quantized(work):
    work.edit_config(quantization_config={"quant_method": "gptq", "bits": 4})
    return tune(work)


@case(r"model/config\.json holds no config\.json|holds no config\.json|is a file")
def compare_with_a_file(work):
    return ["compare", work.model, work.model / "config.json"]


@case(r"other is no version of .*model: hidden_size 64 and 32, num_hidden_layers 2 and 1\. Give")
def compare_of_different_architectures(work):
    other = work.folder / "other"
    other.mkdir()
    config = json.loads((work.model / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"num_hidden_layers": 1, "hidden_size": 32})
    )
    save_file({"transformer.wte.weight": torch.ones(4, 32)}, other / "model.safetensors")
    return ["compare", work.model, other, "--evaluation-sequences", "4"]


@case(r"no checkpoint folder at nowhere")
def inspect_of_nothing(work):
    return ["inspect", "nowhere"]


# The device and the engine


@case(r"'rtx-4900'.*rtx-?4090")
def unknown_gpu(work):
    return recommend(gpu="rtx-4900")


@case(r"must be one card, but 'a100' may be any of: a100-pcie-40.*--gpu a100-pcie-40")
def ambiguous_gpu(work):
    return recommend(gpu="a100")


@case(r"--measure times the device at hand, but 'l4' was named")
def measuring_an_absent_gpu(work):
    return ["profile", "--gpu", "l4", "--measure"]


@case(r"unknown engine 'vlllm': use one of .*Did you mean 'vllm'\?")
def unknown_engine(work):
    return recommend("--engine", "vlllm")


@case(r"there is no folder 'my-profiles'\. Create it or correct the path")
def missing_profiles_folder(work):
    return ["profile", "--gpu", "l4", "--profiles", "my-profiles"]


@case(r"no folder at my-profiles\. Give one with hardware/")
def missing_profiles_folder_to_check(work):
    return ["profiles", "check", "my-profiles"]


@case(r"kinds hardware, models, engines, but got 'modles'.*Did you mean 'models'")
def unknown_kind_of_profile(work):
    return ["profiles", "list", "modles"]


@case(r"'rtx-49000'.*rtx-?4090")
def unknown_profile(work):
    return ["profiles", "show", "rtx-49000"]


@case(r"gptqmodl.*gptqmodel")
def unknown_backend(work):
    return ["backends", "check", "gptqmodl"]


# Schemes


@case(r"unknown method 'gtpq' in scheme 'gtpq-int4-g128'\. Did you mean 'gptq'")
def unknown_method(work):
    return ["predict", CATALOGUE, "--gpu", "l4", "--scheme", "gtpq-int4-g128"]


@case(r"'gptq' has no weight type 'int9'.*use one of int2")
def unknown_weight_type(work):
    return ["predict", CATALOGUE, "--gpu", "l4", "--scheme", "gptq-int9-g128"]


@case(r"'gptq-int4' needs a group size, for example gptq-int4-g128-sym")
def missing_group_size(work):
    return ["predict", CATALOGUE, "--gpu", "l4", "--scheme", "gptq-int4"]


@case(r"group_size must divide in_features, but .*100.*")
def group_size_that_does_not_divide(work):
    return ["predict", CATALOGUE, "--gpu", "l4", "--scheme", "gptq-int4-g100-sym"]


@case(r"group_size must divide in_features, but .*48.*")
def group_size_that_does_not_divide_in_a_plan(work):
    return apply(work.plan(scheme__default="rtn-int4-g48-sym"))


# Budgets


@case(r"--max-loss must be below 1 or carry a %: '3' - did you mean 3%\?")
def loss_without_percent(work):
    return recommend("--max-loss", "3")


@case(r"--max-size must be a size such as 6GB .* but got '6 gigs'")
def unparsable_size(work):
    return recommend("--max-size", "6 gigs")


@case(r"--max-size must be positive, but got '0GB'")
def zero_size(work):
    return recommend("--max-size", "0GB")


@case(r"--max-loss must be a fraction such as 3% or 0\.03, but got '-3%'")
def negative_loss(work):
    return recommend("--max-loss=-3%")


@case(r"(?s)3 problems:.*--max-size.*'much'.*--max-loss.*'-1'.*--min-speed.*'fast'")
def several_bad_budgets(work):
    return recommend("--max-size", "much", "--max-loss=-1", "--min-speed", "fast")


@case(r"--task mmlu needs --max-accuracy-drop, for example 1pp")
def task_without_drop(work):
    return recommend("--task", "mmlu")


@case(r"--max-accuracy-drop needs --task NAME")
def drop_without_task(work):
    return recommend("--max-accuracy-drop", "1pp")


@case(r"--prefer must be one of .* but got 'acuracy'\. Did you mean 'accuracy'")
def misspelt_preference(work):
    return recommend("--prefer", "acuracy")


@case(r"--time-budget must be a duration such as 90s, 10m or 2h, but got 'soon'")
def unparsable_time_budget(work):
    return tune(work, "--time-budget", "soon")


# The command line itself


@case(r"No such option: --max-sise.*--max-size.*See: advisor recommend --help")
def unknown_option(work):
    return recommend("--max-sise", "6GB")


@case(r"'--context': .*greater than or equal to 1|'--context': 0 is not in the range")
def context_of_zero(work):
    return recommend("--context", "0")


@case(r"Missing argument 'MODEL'\. See: advisor tune --help")
def missing_argument(work):
    return ["tune"]


@case(r"No such command 'recomend'.*recommend|No such command 'recomend'")
def unknown_command(work):
    return ["recomend", CATALOGUE]


# Texts


@case(r"empty\.txt.* has no text: it is empty or blank")
def empty_calibration(work):
    return tune(work, "--calibration", work.text("empty.txt", " \n"))


@case(r"calibration text .*tiny\.txt.* has \d+ tokens: enough for \d sequences of 16 tokens, but 2")
def tiny_calibration(work):
    return tune(work, "--calibration", work.text("tiny.txt", "Too short."))


@case(r"there is no text at 'nothere\.txt'\. Give a file, a folder, .*one of builtin:calibration")
def missing_calibration(work):
    return tune(work, "--calibration", "nothere.txt")


@case(r"text must be UTF-8, but byte 3 of '.*latin\.txt' \(0xe9\) is not\. Convert the file")
def text_in_another_encoding(work):
    return tune(work, "--calibration", work.text("latin.txt", b"Caf\xe9 au lait"))


@case(r"evaluation text .* overlaps calibration text .*both.*share nothing")
def calibration_overlaps_evaluation(work):
    words = " ".join(f"word number {number} of {number * 7919 % 1000}," for number in range(400))
    text = work.text("same.txt", words)
    return tune(work, "--calibration", text, "--evaluation", text, "--samples", "60")


# Outputs


@case(r"--output out/plan\.yaml lies under .*out, which is a file\. Name another")
def plan_under_a_file(work):
    work.text("out", "a file")
    return ["tune", work.model, "--gpu", "cpu", "-o", "out/plan.yaml"]


@case(r"--output must be a file, but \. is a folder")
def plan_is_a_folder(work):
    return ["tune", work.model, "--gpu", "cpu", "-o", "."]


@case(r"output folder must not exist or be empty, but .*quantized is not")
def output_that_exists(work):
    (work.folder / "quantized").mkdir()
    (work.folder / "quantized" / "precious.txt").write_text("do not touch")
    return apply(work.plan())


@case(r"output must be a folder, but .*quantized is a file")
def output_is_a_file(work):
    work.text("quantized", "")
    return apply(work.plan())


@case(r"cannot write .*thing/quantized: .*thing is not a folder that you may write to")
def output_under_a_file(work):
    work.text("thing", "")
    return apply(work.plan(), output="thing/quantized")


@case(r"--output must be a file, but model is a folder")
def report_is_a_folder(work):
    return ["report", work.plan(), "-o", "model"]


# Plans


@case(r"no plan at nothere\.yaml\. Make one with: advisor tune MODEL -o nothere\.yaml")
def missing_plan(work):
    return apply("nothere.yaml")


@case(r"plan\.yaml is not valid YAML at line 3, column 7")
def broken_yaml(work):
    return apply(work.text("plan.yaml", "plan_version: 1\nmodel: [unclosed\nscheme: {\n"))


@case(r"plan\.yaml must be a YAML mapping, but it is empty")
def empty_plan(work):
    return apply(work.text("plan.yaml", ""))


@case(r"plan .*model cannot be read: .*directory")
def plan_that_is_a_folder(work):
    return apply(work.model)


@case(r"unknown key 'scheme\.defualt'\. Did you mean 'default'")
def misspelt_key_in_a_plan(work):
    return apply(work.plan(scheme__defualt="rtn-int8-gch-sym"))


@case(r"the key 'scheme\.format' is missing")
def missing_key_in_a_plan(work):
    return apply(work.plan(scheme__format="drop"))


@case(r"plan_version 99, but this Advisor reads up to 1\. Upgrade")
def plan_of_a_newer_version(work):
    return apply(work.plan(plan_version=99))


@case(r"must be the one that the plan was made for: give it with --model.* the weights of .*says")
def plan_of_other_weights(work):
    plan = work.plan()
    tensors = load_file(work.model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, work.model / "model.safetensors", metadata={"format": "pt"})
    return apply(plan)


@case(r"unknown method 'rtm' in scheme 'rtm-int8-gch-sym'\. Did you mean 'rtn'")
def unknown_scheme_in_a_plan(work):
    return apply(work.plan(scheme__default="rtm-int8-gch-sym"))


@case(r"layers\.9\.mlp\.up_proj.* which the model does not have\. Did you mean")
def unknown_module_in_a_plan(work):
    module = "model.layers.9.mlp.up_proj"
    return apply(work.plan(scheme__modules={module: "rtn-int4-gch-sym"}))


@case(r"no checkpoint at nowhere\. Make it: advisor apply .*plan\.yaml -o nowhere")
def verify_without_a_checkpoint(work):
    return ["verify", work.plan(), "nowhere"]


@case(r"my model\.gguf is a file\. Give the folder .*: advisor verify \S*plan\.yaml \S*work$")
def verify_of_a_file(work):
    return ["verify", work.plan(), work.text("my model.gguf", "GGUF")]


@case(r"no checkpoint at no where\. Make it: advisor apply \S*plan\.yaml -o 'no where'")
def verify_without_a_checkpoint_of_two_words(work):
    return ["verify", work.plan(), "no where"]


@case(r"model\.gguf is a file\. Give the folder of the 16-bit model.* quantized already")
def search_of_a_gguf_file(work):
    return ["tune", work.text("model.gguf", "GGUF"), *tune(work)[2:]]


@case(r"model\.gguf is a file\. Give the model's folder.*`advisor inspect` says what a GGUF")
def advice_on_a_gguf_file(work):
    return recommend(model=work.text("model.gguf", "GGUF"))


def check(outcome, message):
    """One message on stderr and nothing else anywhere."""
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: "), outcome.err
    text = outcome.err.removeprefix("error: ").rstrip("\n")
    assert re.search(message, text), text
    assert "Traceback" not in text
    assert "--debug" not in text
    lines = text.splitlines()
    assert len(lines) == 1 or "problems:" in text
    return text


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, workplace, advisor):
    prepare, message = CASES[name]
    arguments = prepare(workplace)
    before = workplace.contents()
    outcome = advisor(*arguments)
    text = check(outcome, message)
    assert outcome.out == ""
    assert workplace.contents() == before

    outcome = advisor(*arguments, "--json")
    assert outcome.document == {
        "schema_version": 1,
        "error": outcome.document["error"] | {"message": text, "exit_code": 2},
    }
    assert workplace.contents() == before


def test_the_table_is_long_enough():
    assert len(CASES) >= 35


@pytest.fixture
def full_disk(monkeypatch):
    """Every wait for the disk says that it is full."""

    def fail(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "fsync", fail)


def test_full_disk_leaves_no_checkpoint(workplace, advisor, full_disk):
    plan = workplace.plan()
    before = workplace.contents()
    full_disk()
    outcome = advisor(*apply(plan), "--json")
    assert outcome.code == 2
    assert "disk" in outcome.document["error"]["message"]
    assert "full" in outcome.document["error"]["message"]
    assert workplace.contents() == before


def test_full_disk_leaves_the_old_report(workplace, advisor, full_disk):
    plan = workplace.plan()
    workplace.text("report.html", "the old one")
    before = workplace.contents()
    full_disk()
    outcome = advisor("report", plan, "-o", "report.html")
    check(outcome, r"report\.html could not be written: No space left on device\. Nothing was")
    assert workplace.contents() == before


def test_unwritable_folder(workplace, advisor, monkeypatch):
    plan = workplace.plan()
    usual = Path.open

    def refuse(path, mode="r", *arguments, **named):
        if "x" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return usual(path, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    check(
        advisor("report", plan, "-o", "locked/report.html"),
        r"must be writable, but Permission denied: locked\. Name another",
    )


PROCESSES = {
    "unknown gpu": (["recommend", CATALOGUE, "--gpu", "rtx-4900"], "rtx-?4090"),
    "usage": (["recommend", CATALOGUE, "--context", "many"], "See: advisor recommend --help"),
    "missing plan": (["apply", "nothere.yaml", "-o", "out"], "advisor tune MODEL"),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_in_a_process_of_its_own(name, tmp_path):
    arguments, message = PROCESSES[name]
    done = subprocess.run(
        [sys.executable, "-c", "from advisor.cli.main import main; main()", *arguments],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr)
    # pytest's own cache folder of the test is made by a fixture, not by the command.
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []
