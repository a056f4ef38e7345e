"""Microbenchmarks, small."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from advisor.errors import InputError
from advisor.hardware.catalogue import find_profile
from advisor.hardware.kept import keep_measurements, with_kept
from advisor.hardware.measure import QUANTITIES, Measured, _Bench, measure


@pytest.fixture(scope="module")
def small():
    seen = []
    profile = find_profile("cpu-avx2-ddr5-2ch")
    return measure("cpu", profile, repeats=3, scale=0.03, progress=seen.append), seen


def test_each_quantity_has_a_value_or_a_reason(small):
    measurements, seen = small
    assert tuple(item.quantity for item in measurements.measured) == QUANTITIES
    assert tuple(seen) == QUANTITIES
    for item in measurements.measured:
        assert (item.value is None) == (item.reason is not None)
        if item.value is not None:
            assert 0 < item.low <= item.value <= item.high
    # Any machine copies more than 0.1 and less than 10000 GB/s.
    assert 0.1 < measurements.value("bandwidth_gb_s") < 10_000
    assert measurements.threads >= 1


def test_table_stands_beside_the_measurement(small):
    measurements, _ = small
    bandwidth = measurements.measured[0]
    assert bandwidth.table == 89.6
    assert bandwidth.share_of_table == pytest.approx(bandwidth.value / 89.6)
    assert measurements.measured[1].table is None
    assert measurements.measured[1].share_of_table is None
    document = json.loads(json.dumps(measurements.to_dict()))
    assert document["measured"][0]["share_of_table"] == bandwidth.share_of_table


def test_what_is_kept_fills_only_unknown_figures_of_that_device(small, tmp_path):
    measurements, _ = small
    profile = find_profile("cpu-avx2-ddr5-2ch")
    assert with_kept(profile, tmp_path) == profile
    keep_measurements(replace(measurements, name="another"), tmp_path)
    assert with_kept(profile, tmp_path) == profile
    keep_measurements(replace(measurements, name=profile.name), tmp_path)
    filled = with_kept(profile, tmp_path)
    assert filled.bandwidth_gb_s == 89.6
    assert filled.fp32_tflops == measurements.value("fp32_tflops")
    assert filled.figures.fp32_tflops.grade == "measured"
    assert profile.fp32_tflops is None


@pytest.mark.parametrize("text", ["{", "[]", '{"NAME": 3}', '{"NAME": {"figures": {"x": 1}}}'])
def test_a_damaged_file_of_measurements_is_named(tmp_path, text):
    profile = find_profile("cpu-avx2-ddr5-2ch")
    (tmp_path / "measured.json").write_text(text.replace("NAME", profile.name))
    with pytest.raises(InputError, match=r"measured\.json does not hold .* measure again"):
        with_kept(profile, tmp_path)


def test_advice_for_this_machine_uses_what_was_measured_of_it(monkeypatch, small):
    from advisor import workflows
    from advisor.hardware import measure as measuring

    before = workflows.profile("cpu").devices[0]
    found = replace(small[0], name=before.name)
    monkeypatch.setattr(measuring, "measure", lambda device, profile: found)
    after = workflows.profile("cpu", measure=True).devices[0]
    assert after.fp32_tflops == (before.fp32_tflops or found.value("fp32_tflops"))
    advice = workflows.recommend("llama-3.2-1b", gpu="cpu", engine="llama.cpp").to_dict()
    assert advice["candidates"][0]["decode_tokens_per_s"] is not None


def test_int8_that_torch_cannot_run_has_the_reason(monkeypatch):
    import torch

    def refuse(*_):
        raise RuntimeError("_int_mm: not implemented for this device\nstack")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    measured = _Bench(torch, torch.device("cpu"), 2, 0.02).run("int8_tops", 242.0)
    assert measured.value is None
    assert measured.reason == "torch cannot run it here: _int_mm: not implemented for this device"
    assert measured.table == 242.0


def test_int8_product_is_right_where_it_runs():
    import torch

    bench = _Bench(torch, torch.device("cpu"), 2, 0.02)
    try:
        product = bench._make_product("int8_tops", 64)()
    except RuntimeError:
        pytest.skip("torch has no INT8 product here")
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-127, 128, (64, 64), dtype=torch.int8, generator=generator) for _ in range(2)
    )
    assert torch.equal(product.long(), left.long() @ right.long().t())


def test_rates_are_medians_of_work_over_time(monkeypatch):
    import torch

    bench = _Bench(torch, torch.device("cpu"), 3, 0.02)
    monkeypatch.setattr(bench, "_product", lambda _: (2e12, [1.0, 4.0, 2.0], "a"))
    measured = bench.run("fp32_tflops", None)
    assert (measured.low, measured.value, measured.high) == (0.5, 1.0, 2.0)


def test_fp32_is_not_tf32_and_the_setting_is_restored(monkeypatch):
    import torch

    bench = _Bench(torch, torch.device("cpu"), 2, 0.02)
    matmul = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    during = []
    original = bench._once
    monkeypatch.setattr(
        bench, "_once", lambda run: (during.append(matmul.allow_tf32), original(run))[1]
    )
    bench.run("fp32_tflops", None)
    assert set(during) == {False}
    assert matmul.allow_tf32


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "mps", "no such thing"])
def test_device_that_is_not_there(device):
    with pytest.raises(InputError, match="device must be"):
        measure(device)


@pytest.mark.parametrize("arguments", [{"repeats": 0}, {"scale": 0.0}, {"scale": 2.0}])
def test_settings_out_of_range(arguments):
    with pytest.raises(InputError):
        measure("cpu", **arguments)


def test_share_of_an_unknown_figure_is_unknown():
    assert Measured("int8_tops", 1.0, 1.0, 1.0, None, "").share_of_table is None


@pytest.mark.gpu
def test_cuda_device_is_within_its_table():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from advisor.hardware.detect import detect

    measurements = measure("cuda:0", detect().gpus[0])
    for item in measurements.measured:
        if item.share_of_table is not None:
            assert 0.2 < item.share_of_table < 1.1
