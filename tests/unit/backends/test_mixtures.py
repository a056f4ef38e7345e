from __future__ import annotations

import json

import pytest

from advisor.backends.mixtures import average_bits, further_schemes, together
from advisor.backends.registry import get_backend
from advisor.backends.requests import check_request
from advisor.budgets import Budgets
from advisor.errors import InputError, VerificationError
from advisor.plan.files import load_plan
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.schemes import BF16, parse_scheme
from advisor.workflows.applying import PLAN_NAME, apply
from advisor.workflows.backend_runs import run_backend
from advisor.workflows.tuning import tune
from advisor.workflows.verifying import verify

SHORT = {"samples": 4, "sequence_length": 32, "evaluation_sequences": 4}
TARGET = {"gpu": "rtx-4090", "engine": "vllm", "device": "cpu"}  # which reads mixtures
ROUND4 = parse_scheme("autoround-int4-g32-sym")


@pytest.fixture
def linears(random_llama_folder):
    return load_modelspec(random_llama_folder).linears


def test_options_are_schemes_of_the_same_method():
    options = "int8-g64-sym, int4-g32-sym,bf16,int8-g64-sym"
    found = further_schemes(ROUND4, {"target_bits": 5.0, "options": options})
    assert found == (parse_scheme("autoround-int8-g64-sym"), BF16)
    assert further_schemes(ROUND4, {}) == ()
    with pytest.raises(InputError, match="without their method, as int8-g64-sym, or bf16"):
        further_schemes(ROUND4, {"options": "gptq-int8-g64-sym"})


def test_what_engines_fuse_stays_together(linears):
    groups = [
        {name.removeprefix("model.layers.0.") for name in group}
        for group in together(linears)
        if group[0].startswith("model.layers.0.")
    ]
    attention = {f"self_attn.{part}_proj" for part in "qkv"}
    assert groups == [attention, {"mlp.gate_proj", "mlp.up_proj"}]


def test_bits_count_scales_and_zero_points(linears):
    assert average_bits(parse_scheme("autoround-int4-g64-sym"), linears) == 4 + (16 + 4) / 64
    assert average_bits(parse_scheme("autoround-int8-g32-asym"), linears) == 8 + (16 + 8) / 32
    assert average_bits(BF16, linears) == 16
    outputs = sum(linear.out_features for linear in linears)
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    channel = average_bits(parse_scheme("autoround-int8-gch-sym"), linears)
    assert channel == pytest.approx(8 + 24 * outputs / weights)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_bits": 5.0}, ["Add --setting options=int8-g64-sym"]),
        ({"options": "int8-g64-sym"}, ["Add --setting target_bits=4.6"]),
        ({"target_bits": 4.4, "options": "int8-g64-sym"}, ["own 4.625 and 8.375 bits", "4.4"]),
        (
            {"target_bits": 5.0, "options": "int5-g48-sym"},
            ["2 problems", "group_size=48", "int2 or int3 or int4 or int8, but int5"],
        ),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_before_any_work(linears, settings, said):
    with pytest.raises(InputError) as error:
        check_request(get_backend("auto-round"), ROUND4, linears, settings, "auto")
    assert all(part in str(error.value) for part in said), str(error.value)


def test_a_library_without_mixtures_has_no_such_setting(linears):
    with pytest.raises(InputError, match="gptqmodel has no setting 'target_bits'"):
        check_request(
            get_backend("gptqmodel"), parse_scheme("gptq-int4-g64-sym"), linears,
            {"target_bits": 5.0, "options": "int8-g64-sym"}, "auto",
        )  # fmt: skip


@pytest.fixture
def mixed(fake_backend, prepared, random_llama_folder, tmp_path):
    def go(other: str, options: str = "int4-g64-sym,bf16"):
        folder = prepared("rtn-int4-g32-sym", {"layers.0.mlp.down_proj": other})
        fake_backend(
            act="round", prepared=str(folder), target_bits=4.8, options="int4-g64-sym,bf16",
            keep=str(tmp_path / "job.json"),
        )  # fmt: skip
        return run_backend(
            "fake", random_llama_folder, "gptq-int4-g32-sym", tmp_path / "out", **SHORT, **TARGET,
            settings=["target_bits=4.8", f"options={options}"],
        )  # fmt: skip

    return go


def test_a_mixture_is_planned_module_by_module(mixed, tmp_path):
    document = mixed("rtn-int4-g64-sym").to_dict()
    assert document["scheme"] == "gptq-int4-g32-sym"
    assert document["name"] == f"mixed-{document['bits_per_weight']:.2f}bpw"
    plan = load_plan(tmp_path / "out" / PLAN_NAME)
    assert plan.scheme.modules == {"model.layers.0.mlp.down_proj": "gptq-int4-g64-sym"}
    apply(tmp_path / "out" / PLAN_NAME, tmp_path / "again")
    report = verify(tmp_path / "out" / PLAN_NAME, tmp_path / "again")
    assert report.passed, report.to_dict()
    job = json.loads((tmp_path / "job.json").read_text())
    assert [option["name"] for option in job["options"]] == ["gptq-int4-g64-sym", "bf16"]
    assert ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"] in job["together"]


def test_a_scheme_that_was_no_option_is_an_error(mixed):
    with pytest.raises(VerificationError, match=r"down_proj is .*int4-g64-sym"):
        mixed("rtn-int4-g64-sym", "bf16")


@pytest.fixture
def tuned(fake_backend, prepared, llama_builder, tmp_path):
    """Tune a model that Marlin runs, with a library that mixes int4 in groups of 128 and 32."""

    def go(uniform="rtn-int4-g64-sym", engine="vllm"):
        folder = llama_builder(hidden_size=256, intermediate_size=512)
        others = {"layers.1.mlp.down_proj": "rtn-int4-g32-sym"}
        fake_backend(
            act="round", prepared=str(prepared(uniform, None, folder)),
            prepared_mixture=str(prepared("rtn-int4-g128-sym", others, folder)),
            target_bits=0.0, options="", keep=str(tmp_path / "job.json"),
        )  # fmt: skip
        spec = load_modelspec(folder)
        sizes = [
            checkpoint_size(spec, parse_scheme(f"gptq-int4-g{size}-sym"), "gptq").total_bytes
            for size in (64, 32)
        ]
        return tune(
            folder, budgets=Budgets(max_size_bytes=sum(sizes) // 2), backends=["fake"],
            output=tmp_path / "plan.yaml", trials=2, sequential=False, context=64, gpu="rtx-4090",
            engine=engine, **SHORT,
        )  # fmt: skip

    return go


def test_a_search_has_a_library_mix_at_its_own_size(tuned, monkeypatch, tmp_path):
    def theirs(finalists, goal):
        made = [f for f in finalists if f.mixture.backend and not f.mixture.is_uniform]
        return made[0] if made else finalists[0]

    monkeypatch.setattr("advisor.search.run.choose", theirs)
    document = tuned().to_dict()
    assert document["backends_failed"] == []
    names = {row["name"] for row in document["finalists"] if row["backend"] == "fake"}
    assert names == {"gptq-int4-g64-sym", load_plan(tmp_path / "plan.yaml").scheme.name}
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan.backend is not None
    assert plan.backend.settings["options"] == "int4-g32-sym"
    # Half way between uniform groups of 64 and 32, scales and zero points counted.
    assert plan.backend.settings["target_bits"] == pytest.approx(4.469, abs=0.002)
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["settings"]["target_bits"] == plan.backend.settings["target_bits"]
    assert [option["name"] for option in job["options"]] == ["gptq-int4-g32-sym"]
    assert plan.scheme.modules == {"model.layers.1.mlp.down_proj": "gptq-int4-g32-sym"}
    assert apply(tmp_path / "plan.yaml", tmp_path / "out").size_bytes == plan.expected.size_bytes
    report = verify(tmp_path / "plan.yaml", tmp_path / "out")
    assert report.passed, report.to_dict()


def test_no_mixture_is_made_for_an_engine_that_reads_none_in_its_format(tuned):
    document = tuned("rtn-int4-g64-asym", "transformers").to_dict()
    assert document["backends_failed"] == []
    theirs = [row["name"] for row in document["finalists"] if row["backend"] == "fake"]
    assert theirs == ["gptq-int4-g64-asym"]
