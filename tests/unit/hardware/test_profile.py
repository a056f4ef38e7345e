"""The facts of the catalogue where common tables are wrong, and what follows from a generation."""

from __future__ import annotations

import json

import pytest

from advisor.hardware.capabilities import derive_capabilities
from advisor.hardware.catalogue import find_profile, list_profiles
from advisor.hardware.profile import FIGURE_NAMES

GATES = (
    "dp4a",
    "fp16_tensor_cores",
    "int8_tensor_cores",
    "int4_tensor_cores",
    "bf16",
    "fp8",
    "fp4",
)


@pytest.mark.parametrize(
    ("sm", "gates"),
    [
        (52, ""),
        (60, ""),
        (61, "dp4a"),
        (62, "dp4a"),
        (70, "dp4a fp16_tensor_cores"),
        (72, "dp4a fp16_tensor_cores int8_tensor_cores"),
        (75, "dp4a fp16_tensor_cores int8_tensor_cores int4_tensor_cores"),
        (80, "dp4a fp16_tensor_cores int8_tensor_cores int4_tensor_cores bf16"),
        (86, "dp4a fp16_tensor_cores int8_tensor_cores int4_tensor_cores bf16"),
        (87, "dp4a fp16_tensor_cores int8_tensor_cores int4_tensor_cores bf16"),
        (89, "dp4a fp16_tensor_cores int8_tensor_cores int4_tensor_cores bf16 fp8"),
        (90, "dp4a fp16_tensor_cores int8_tensor_cores bf16 fp8"),
        (100, "dp4a fp16_tensor_cores int8_tensor_cores bf16 fp8 fp4"),
        (103, "dp4a fp16_tensor_cores int8_tensor_cores bf16 fp8 fp4"),
        (110, "dp4a fp16_tensor_cores int8_tensor_cores bf16 fp8 fp4"),
        (120, "dp4a fp16_tensor_cores int8_tensor_cores bf16 fp8 fp4"),
        (121, "dp4a fp16_tensor_cores int8_tensor_cores bf16 fp8 fp4"),
    ],
)
def test_gates_of_nvidia_generations(sm, gates):
    able = derive_capabilities(vendor="NVIDIA", kind="gpu", sm=sm, isa=None, instruction_sets=())
    assert {gate for gate in GATES if getattr(able, gate)} == set(gates.split())


TRAPS = {
    # name: {attribute: true value, ...}; the wrong value that tables print is in the comment.
    "rtx5090": {"compute_capability": "12.0", "sm": 120, "bandwidth_gb_s": 1792},  # sm_100
    "rtx5080": {"compute_capability": "12.0"},
    "p100": {"compute_capability": "6.0", "sm": 60, "int8_tops": None},
    "h100-sxm": {"int8_tops": 1978, "fp8_tflops": 1978, "bf16_tflops": 989},  # 3958, 1979
    "l4": {"bandwidth_gb_s": 300, "int8_tops": 242, "fp16_tflops": 121},  # 3350, 485, 242
    "b200": {"memory_bytes": 180 * 2**30, "bandwidth_gb_s": 7700},  # one die
    "b300": {"int8_tops": 153.5},  # 4500
    "mi300x": {"bandwidth_gb_s": 5300},  # 10300
    "a10g": {"fp16_tflops": None, "int8_tops": None},  # the A10's 125
    "rtx3090": {"fp16_tflops": 71.2, "int8_tops": 284.7},  # 142 accumulates in FP16
    "h100-pcie": {"bandwidth_gb_s": 2000, "int4_tops": None},
    "thor-t5000": {"compute_capability": "11.0", "fp4_tflops": 1035},  # 2070 is sparse
    "arc-a770-16": {"bandwidth_gb_s": None},  # 512 or 560
    "h20": {"bandwidth_gb_s": None, "fp8_tflops": None},
    "gh200-141": {"memory_bytes": 141 * 2**30},
    "l40s": {"memory_bytes": 46068 * 2**20},  # what the driver leaves of 48
}


@pytest.mark.parametrize("name", TRAPS)
def test_figures_that_common_tables_have_wrong(name):
    profile = find_profile(name)
    assert {key: getattr(profile, key) for key in TRAPS[name]} == pytest.approx(TRAPS[name])


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("rtx4090", True),
        ("a100-sxm-80", True),
        ("p40", True),  # FP16 at 1/64 rate, INT8 through DP4A
        ("v100-sxm2-32", False),  # FP16 tensor cores, INT8 through DP4A only
        ("p100", False),
        ("b300", False),
        ("mi210", False),
        ("mi250x", False),
        ("rx7900xtx", False),
        ("mi300x", True),
        ("h20", True),  # no figures: by generation
        ("max-1100", None),
    ],
)
def test_whether_int8_gains_anything_over_16_bit(name, gain):
    assert find_profile(name).capabilities.int8_faster_than_16bit is gain


def test_geforce_int8_is_four_times_bf16():
    for profile in list_profiles():
        if profile.name.startswith("GeForce RTX") and profile.sm and profile.sm >= 75:
            assert profile.int8_tops / profile.fp16_tflops == pytest.approx(4, rel=0.01)


def test_rates_are_dense_and_units_absent_from_a_generation_have_none():
    for profile in list_profiles():
        able = profile.capabilities
        for figure, gate in (("bf16_tflops", able.bf16), ("fp8_tflops", able.fp8),
                             ("fp4_tflops", able.fp4), ("int4_tops", able.int4_tensor_cores),
                             ("int8_tops", able.int8_any)):  # fmt: skip
            if gate is False:
                assert profile.figure(figure) is None, (profile.id, figure)
        if profile.fp8_tflops and profile.bf16_tflops:
            # Twice at full rate; four times where BF16 is halved, as no card of the catalogue.
            assert profile.fp8_tflops / profile.bf16_tflops == pytest.approx(2, rel=0.02)


def test_every_figure_has_a_source_and_a_grade():
    seen = 0
    for profile in list_profiles():
        for name in FIGURE_NAMES:
            figure = getattr(profile.figures, name)
            if figure is not None:
                assert figure.source
                assert figure.grade
                seen += 1
    assert seen > 400


def test_unknown_lists_what_the_device_has_but_nobody_says():
    assert {"fp16_tflops", "int8_tops", "bf16_tflops"} <= set(find_profile("a10g").unknown)
    assert find_profile("rtx4090").unknown == ()
    # An A100 has no FP8: that is not unknown.
    assert "fp8_tflops" not in find_profile("a100-sxm-80").unknown


@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("cpu-avx2-ddr5-2ch", {"avx2"}),
        ("cpu-icx-8ch", {"avx2", "avx512", "avx512_vnni"}),
        ("cpu-spr-8ch", {"avx2", "avx512", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8",
                         "amx_bf16"}),
        ("cpu-apple-m1", {"neon", "neon_dotprod"}),
    ],
)  # fmt: skip
def test_gates_of_cpus(name, gates):
    able = find_profile(name).capabilities.to_dict()
    cpu = ("avx2", "avx512", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
           "neon", "neon_dotprod", "neon_i8mm")  # fmt: skip
    assert {gate for gate in cpu if able[gate]} == gates


def test_amd_fp8_is_the_fnuz_variant_on_cdna3_and_absent_before():
    assert find_profile("mi300x").capabilities.fp8_variant == "fnuz"
    assert find_profile("mi210").capabilities.fp8 is False
    assert find_profile("mi300x").compute_capability is None
    assert find_profile("mi300x").isa == "gfx942"


def test_card_of_two_devices_says_so():
    assert find_profile("mi250x").devices_per_card == 2


def test_plan_and_json_agree_with_the_profile():
    profile = find_profile("2x A100 80GB PCIe")
    plan = profile.to_plan()
    assert (plan.id, plan.count, plan.memory_bytes) == ("a100-pcie-80", 2, 80 * 2**30)
    document = json.loads(json.dumps(profile.to_dict()))
    assert document["bandwidth_gb_s"] == 1935
    assert document["fp8_tflops"] is None
    assert document["capabilities"]["fp8"] is False
    assert document["sources"]["bf16_tflops"]["grade"] == "datasheet"
    assert document["unknown"] == []
