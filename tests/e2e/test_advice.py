"""Advice as a person gets it: without torch, on stdout alone, with the documented exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "optuna", "safetensors", "accelerate", "bitsandbytes")
PROBE = (
    "import sys\n"
    "from advisor.cli.main import main\n"
    "try:\n    main()\n"
    "finally:\n"
    "    heavy = [name for name in {names} if name in sys.modules]\n"
    "    sys.stderr.write('imported: ' + ','.join(heavy) + '\\n')\n"
)


@pytest.mark.parametrize(
    ("arguments", "is_json"),
    [
        (["--help"], False),
        (["recommend", "--help"], False),
        (["profile", "--gpu", "l4", "--json"], True),
        (["recommend", "llama-3.1-8b", "--gpu", "l4", "--max-size", "6GB", "--json"], True),
        (["predict", "llama-3.1-8b", "--gpu", "l4", "--scheme", "awq-int4-g128", "--json"], True),
        (["profiles", "list", "engines", "--json"], True),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_advice_never_imports_what_touches_weights(arguments, is_json, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(names=HEAVY), *arguments],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "imported: \n"
    if is_json:
        assert json.loads(done.stdout)["schema_version"] == 1


def recommend(advisor, *arguments):
    return advisor("recommend", "llama-3.1-8b", "--gpu", "rtx-4090", "--engine", "vllm", *arguments)


@pytest.mark.parametrize("columns", [80, 110])
@pytest.mark.parametrize(
    "arguments",
    [(), ("--max-size", "6GB", "--max-loss", "3%"), ("--max-size", "1GB"), ("--min-speed", "60")],
    ids=lambda value: " ".join(value) or "no budgets",
)
def test_the_answer_fits_the_terminal(advisor, monkeypatch, columns, arguments):
    monkeypatch.setenv("COLUMNS", str(columns))
    outcome = recommend(advisor, *arguments)
    lines = outcome.out.splitlines()
    assert outcome.err == ""
    # Commands are left whole for copying, sources too; the terminal itself wraps them.
    whole = ("Tune ", "Serve ", "    source: ")
    assert max(len(line) for line in lines if not line.startswith(whole)) <= columns
    assert len(lines) < 75  # a screen or two


def test_every_scheme_of_the_table_is_on_one_line(advisor, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    outcome = recommend(advisor, "--all")
    document = recommend(advisor, "--json").document
    for row in document["candidates"]:
        assert any(row["name"] in line.split() for line in outcome.out.splitlines()), row["name"]


def test_words_and_document_say_the_same(advisor):
    arguments = ("--max-size", "6GB", "--max-loss", "10%")
    outcome, document = recommend(advisor, *arguments), None
    document = recommend(advisor, *arguments, "--json").document
    assert outcome.code == 0
    assert f">  {document['recommended']}" in outcome.out
    assert f"Why {document['recommended']}." in outcome.out
    assert document["serve"] in outcome.out
    assert document["tune"] in outcome.out
    assert "nothing here was measured" in " ".join(outcome.out.split())


def test_a_quantized_head_is_counted_where_the_engine_reads_it(advisor):
    plain = recommend(advisor, "--json").document["candidates"]
    found = recommend(advisor, "--quantize-head", "--json").document
    sizes = {row["name"]: row["size_bytes"] for row in plain}
    taking = {row["name"]: row for row in found["candidates"] if row["outer"]}
    assert "gptq-int4-g128-sym" in taking
    assert "rtn-fp8-gch-afp8" not in taking  # inputs are rounded there
    assert "awq-int4-g128-asym" not in taking  # its format keeps the head
    # 128256 x 4096 weights at 4 bits and a scale, zero point and index instead of 16.
    saved = sizes["gptq-int4-g128-sym"] - taking["gptq-int4-g128-sym"]["size_bytes"]
    assert saved == pytest.approx(128256 * 4096 * (16 - 4.16) / 8, rel=0.005)
    assert "--quantize-head" in found["tune"]
    faster = {row["name"]: row["decode_tokens_per_s"]["expected"] for row in plain
              if row["decode_tokens_per_s"]}  # fmt: skip
    row = taking["gptq-int4-g128-sym"]
    assert row["decode_tokens_per_s"]["expected"] > 1.05 * faster["gptq-int4-g128-sym"]


def test_nothing_fits_is_three_with_the_smallest_changes(advisor):
    outcome = recommend(advisor, "--max-size", "1GB", "--max-loss", "0.1%")
    assert outcome.code == 3
    assert "Nothing fits these budgets" in outcome.out
    assert "  - " in outcome.out
    document = recommend(advisor, "--max-size", "1GB", "--max-loss", "0.1%", "--json")
    assert document.code == 3
    assert document.document["relaxation"]


def test_markdown_is_one_table_with_every_scheme(advisor):
    outcome = recommend(advisor, "--max-size", "6GB", "--markdown")
    document = recommend(advisor, "--max-size", "6GB", "--json").document
    header, rule, *rows = outcome.out.splitlines()
    assert set(rule) == {"|", " ", "-"}
    assert {line.count("|") for line in (header, rule, *rows)} == {header.count("|")}
    assert len(rows) == len(document["candidates"])
    assert rows[0].startswith(f"| **{document['recommended']}** |")


def test_what_advisor_does_not_write_is_not_offered_for_tuning(advisor):
    arguments = ("--gpu", "a100-sxm-80", "--engine", "llama.cpp")
    mixtral = advisor("recommend", "mixtral-8x7b-v0.1", *arguments, "--json").document
    assert mixtral["recommended"].startswith("gguf-")
    assert mixtral["tune"] is None
    assert {row["tunable"] for row in mixtral["candidates"] if row["bits"] < 16} == {False}
    outcome = advisor("recommend", "mixtral-8x7b-v0.1", *arguments)
    assert "advisor tune" not in outcome.out
    assert "llama.cpp's llama-quantize does" in " ".join(outcome.out.split())
    llama = advisor("recommend", "llama-3.1-8b", *arguments, "--json").document
    assert llama["tune"].startswith("advisor tune meta-llama/Llama-3.1-8B")


def test_an_architecture_that_tune_does_not_take_is_not_offered_to_it(advisor):
    arguments = ("recommend", "google/gemma-3-27b-it", "--gpu", "l40s")
    found = advisor(*arguments, "--json").document
    assert found["recommended"] is not None
    assert found["tune"] is None
    assert "Advisor does not write it: " in " ".join(advisor(*arguments).out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "l4", "--json", "--markdown"), "--json and --markdown both say"),
        (
            ("--compare", "l4,a10", "--gpu", "t4"),
            "--compare l4,a10 names the GPUs: leave out --gpu t4",
        ),
        (("--compare", "l4,a10", "--markdown"), "--markdown is for one GPU"),
        (("--compare", "l4,a10", "--all"), "--all is for one GPU"),
    ],
)
def test_options_that_contradict_each_other_are_refused(advisor, arguments, words):
    outcome = advisor("recommend", "llama-3.1-8b", *arguments)
    assert (outcome.code, words in outcome.err) == (2, True), outcome
    if "--json" in arguments:
        assert outcome.document["error"]["exit_code"] == 2


def test_what_others_make_is_marked(advisor):
    out = advisor("recommend", "llama-3.1-8b", "--gpu", "l4", "--max-size", "6GB").out
    assert "made with other software, so after the rest: autoround-int4-g128-sym" in out


def test_several_cards_stay_several(advisor):
    outcome = advisor("recommend", "llama-3.1-8b", "--gpu", "2x L4")
    assert " on 2x L4," in outcome.out
    assert "advisor tune meta-llama/Llama-3.1-8B --gpu 2xl4 " in outcome.out
    assert "--tensor-parallel-size 2" in outcome.out
    assert "memory: of each of 2 devices, which share the weights" in outcome.out
    assert " of memory of each device" in outcome.out
    assert "each" not in advisor("recommend", "llama-3.1-8b", "--gpu", "L4").out


def test_on_cpus_the_usual_server_is_named(advisor):
    question = ("recommend", "llama-3.1-8b", "--gpu", "cpu-spr-8ch", "--json")
    (note,) = advisor(*question).document["notes"]
    assert "ask with --engine llama.cpp" in note
    assert advisor(*question, "--engine", "transformers").document["notes"] == []
    speeds = [
        next(row for row in advisor(*question, "--engine", engine).document["candidates"])
        ["decode_tokens_per_s"]["expected"] for engine in ("transformers", "llama.cpp")
    ]  # fmt: skip
    assert speeds[0] < speeds[1]


def test_several_gpus_side_by_side(advisor):
    outcome = advisor("recommend", "llama-3.1-8b", "--compare", "l4,a10,t4", "--max-size", "6GB")
    assert outcome.code == 0
    assert [name for name in ("L4", "A10", "Tesla T4") if name not in outcome.out] == []
    outcome = advisor("recommend", "llama-3.1-8b", "--compare", "l4,nope", "--json")
    assert outcome.code == 2
    assert "nope" in outcome.document["error"]["message"]


def test_a_local_folder_needs_no_weights(advisor, workplace):
    (workplace.model / "model.safetensors").unlink()
    outcome = advisor("recommend", workplace.model, "--gpu", "l4", "--engine", "vllm", "--json")
    assert outcome.code == 0
    assert outcome.document["model"]["quantizable_parameters"] == 2 * (
        64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    )


@pytest.mark.parametrize(
    "arguments",
    [("profile",), ("profile", "--gpu", "cpu"), ("profiles", "list"), ("profiles", "show", "l4"),
     ("profiles", "show", "vllm"), ("backends", "list"), ("doctor",)],
    ids=" ".join,
)  # fmt: skip
def test_what_only_reads_ends_well_in_words_and_json(advisor, arguments):
    outcome = advisor(*arguments)
    assert outcome.code == 0
    assert outcome.out.strip()
    assert "None" not in outcome.out
    assert advisor(*arguments, "--json").document["schema_version"] == 1


def test_a_scheme_without_a_kernel_does_not_run_and_one_too_large_does_not_fit(advisor):
    scheme = ("--scheme", "gguf-q4_k_m", "--engine", "vllm", "--gpu", "l4")
    assert "Does not run. vLLM" in advisor("predict", "llama-3.1-8b", *scheme).out
    large = ("--scheme", "bf16", "--engine", "vllm", "--gpu", "l4")
    assert "Does not fit. memory" in advisor("predict", "llama-3.1-70b", *large).out


def test_help_of_compare_speaks_of_no_budget(advisor):
    outcome = advisor("compare", "--help")
    assert "budget" not in outcome.out
    assert "calibration" not in outcome.out


@pytest.mark.parametrize("group", [(), ("profiles",), ("backends",)])
def test_a_group_alone_shows_its_help_and_no_error(advisor, group):
    outcome = advisor(*group)
    assert (outcome.code, outcome.err) == (2, "")
    assert "Usage: advisor" in outcome.out


def test_profiles_of_one_s_own_travel_with_the_command_that_follows(advisor, tmp_path):
    folder = tmp_path / "my profiles"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "id: mine\nname: Mine\nvendor: NVIDIA\nkind: gpu\ncompute_capability: '8.9'\n"
        "figures:\n  memory_gib: {value: 24, grade: datasheet, source: me}\n"
    )
    outcome = advisor("recommend", "llama-3.1-8b", "--gpu", "mine", "--profiles", folder, "--json")
    assert f"--profiles '{folder}' -o plan.yaml" in outcome.document["tune"]


def test_what_follows_the_advice_is_served_from_where_it_is_written(advisor):
    question = ("recommend", "llama-3.1-8b", "--gpu", "l4", "--engine", "llama.cpp")
    assert "llama-server -m quantized/model.gguf " in advisor(*question).out
    # Gemma's files are llama.cpp's own tools' to make, and 16 bits are nobody's to quantize.
    others = advisor("recommend", "gemma-3-4b-it", "--gpu", "l4", "--engine", "llama.cpp").out
    assert "llama-server -m gemma-3-4b-it-q" in others
    whole = advisor(*question, "--max-loss", "0").out
    assert "llama-server -m Llama-3.1-8B-bf16.gguf " in whole


def test_a_quantized_folder_is_not_offered_to_tune_which_refuses_it(advisor, workplace):
    assert "\nTune " in advisor("recommend", workplace.model, "--gpu", "l4").out
    workplace.edit_config(quantization_config={"quant_method": "gptq"})
    out = advisor("recommend", workplace.model, "--gpu", "l4").out
    assert "quantized already (gptq)" in out
    assert "\nTune " not in out
