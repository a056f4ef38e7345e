"""The kernels of a real GPU beside our simulation of them: ``pytest -m gpu tests/device``."""

from __future__ import annotations

import pytest
import torch

from advisor.evaluation.runtime import activation_simulation
from advisor.hardware.detect import detect
from advisor.hardware.measure import measure
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
OUT, IN, TOKENS = 384, 1024, 64


@pytest.fixture
def layer():
    """A weight and inputs with outliers, on the CPU in float32."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=draws) * 0.02
    inputs = torch.randn(TOKENS, IN, generator=draws)
    inputs[:, 7] *= 20.0
    return weight, inputs.to(torch.bfloat16).float()


def ours(weight, inputs, name):
    """Return the scheme's codes, and the outputs of our simulation in float64."""
    made = quantize(weight, None, parse_scheme(name), QuantizationSettings())
    simulate = activation_simulation(made.scheme, made.extras)
    return made, simulate(inputs).double() @ made.dequantize().double().T


def relative(found, expected):
    return float((found.double().cpu() - expected).norm() / expected.norm())


def test_nvml_names_the_card_of_the_catalogue():
    found = detect()
    assert found.problems == ()
    card = found.gpus[0]
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    assert card.compute_capability == capability
    assert card.memory_bytes == pytest.approx(torch.cuda.mem_get_info(0)[1], rel=0.03)
    assert card.bandwidth_gb_s is not None  # one of profiles/hardware, not a bare name


def test_tensor_cores_are_near_the_table():
    found = measure("cuda:0", detect().gpus[0])
    for item in found.measured:
        if item.table is not None:
            assert item.reason is None
            assert 0.3 < item.share_of_table < 1.1, item


def on_grid(values, limit, kind):
    """Return codes of inputs on the GPU, and their scales, one per token."""
    scale = values.cuda().abs().amax(-1, keepdim=True) / limit
    codes = values.cuda() / scale
    codes = torch.round(codes) if kind is torch.int8 else codes
    return codes.clamp(-limit, limit).to(kind), scale


def test_int8_tensor_cores_give_what_is_simulated(layer):
    weight, inputs = layer
    made, expected = ours(weight, inputs, "rtn-int8-gch-sym-aint8")
    codes, scale = on_grid(inputs, 127.0, torch.int8)
    row = made.scales.cuda().float().reshape(1, -1)
    weights = torch.round(made.dequantize().cuda() / row.T).to(torch.int8)
    found = torch._int_mm(codes, weights.T).float() * scale * row
    assert relative(found, expected) < 1e-3  # a scale's last bit turns a few codes at ties


@pytest.mark.parametrize("granularity", ["gch", "gtensor"])
def test_fp8_tensor_cores_give_what_is_simulated(layer, granularity):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs sm_89")
    weight, inputs = layer
    made, expected = ours(weight, inputs, f"rtn-fp8-{granularity}-afp8")
    codes, scale = on_grid(inputs, 448.0, torch.float8_e4m3fn)
    row = made.scales.cuda().float().reshape(1, -1).expand(1, OUT).contiguous()
    weights = (made.dequantize().cuda() / row.T).to(torch.float8_e4m3fn)
    found = torch._scaled_mm(
        codes, weights.T, scale_a=scale, scale_b=row, out_dtype=torch.bfloat16, use_fast_accum=False
    )
    assert relative(found, expected) < 3e-3  # half a rounding of the outputs, bfloat16
