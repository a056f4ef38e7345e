"""Code tables, LLM.int8() and int8 inputs against textbook twins, and against the libraries."""

from __future__ import annotations

import numpy as np
import pytest
import reference_arithmetic as oracle
import torch

from advisor.evaluation.runtime import quantized_model, simulate_llm_int8
from advisor.methods import registry
from advisor.methods.settings import QuantizationSettings
from advisor.numerics.codebooks import codebook
from advisor.schemes import parse_scheme

ROWS, COLUMNS, TOKENS = 40, 192, 12
TIE = 1e-4
SETTINGS = QuantizationSettings()


@pytest.fixture(scope="module")
def weight():
    """Three blocks of 64 to a row, 120 in all; outliers, a block of zeros, half precision."""
    generator = np.random.default_rng(0)
    values = 0.05 * generator.standard_t(4, size=(ROWS, COLUMNS))
    values[1, 5], values[4, 140] = 1.7, -2.3
    values[3, 64:128] = 0.0
    return torch.tensor(values, dtype=torch.float16).float()


@pytest.fixture(scope="module")
def inputs():
    """Inputs with two outlier columns, one of them an outlier in a single token only."""
    generator = np.random.default_rng(1)
    values = generator.normal(size=(TOKENS, COLUMNS))
    values[:, 7] *= 30
    values[5, 100] = -6.0
    values[2] *= 0.01
    return torch.tensor(values, dtype=torch.float16).float()


def _double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def _linear(weight: torch.Tensor) -> torch.nn.Module:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    return torch.nn.Sequential(linear)


def test_tables():
    np.testing.assert_allclose(_double(codebook("nf4")), oracle.nf4_table(), atol=2e-7)
    np.testing.assert_allclose(_double(codebook("fp4")), oracle.fp4_table(), atol=2e-7)
    functional = pytest.importorskip("bitsandbytes.functional")
    table = oracle.dynamic_table()
    assert len(table) == 256
    np.testing.assert_allclose(_double(functional.create_dynamic_map()), table, atol=2e-7)


@pytest.mark.parametrize("block", [64, 32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_tables(weight, kind, block):
    table = {"nf4": oracle.nf4_table, "fp4": oracle.fp4_table}[kind]()
    found = registry.quantize(weight, None, parse_scheme(f"bnb-{kind}-g{block}"), SETTINGS)
    codes, margins, maxima = oracle.blockwise(_double(weight).ravel(), table, block)
    spread = np.repeat(maxima, block).reshape(weight.shape)
    np.testing.assert_array_equal(
        _double(found.scales).repeat(COLUMNS // found.scales.shape[1], 1), spread
    )
    # FP4 has a zero of either sign: compare what the codes stand for there.
    assert kind == "nf4" or table[0] == table[8] == 0
    same = np.array([0 if kind == "fp4" and code == 8 else code for code in range(16)])
    differ = same[found.codes.numpy().ravel()] != same[codes]
    assert (margins[differ] < TIE).all()
    assert differ.sum() <= 3
    expected = np.array(table)[codes] * np.repeat(maxima, block)
    error = np.square(_double(found.dequantize() - weight)).sum()
    assert error == pytest.approx(np.square(expected - _double(weight).ravel()).sum(), rel=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization(weight, kind):
    found = registry.quantize(weight, None, parse_scheme(f"bnb-{kind}-dq"), SETTINGS)
    maxima = np.abs(_double(weight).reshape(-1, 64)).max(axis=1)
    offset = maxima.mean()
    table = oracle.dynamic_table()
    codes, margins, nested = oracle.blockwise(maxima - offset, table, 256)
    assert float(found.extras["offset"]) == pytest.approx(offset, rel=1e-6)
    np.testing.assert_allclose(_double(found.extras["nested_absmax"]).ravel(), nested, rtol=1e-6)
    differ = found.extras["absmax"].numpy().ravel() != codes
    assert (margins[differ] < 1e-5).all()
    assert differ.sum() <= 2
    scales = np.array(table)[codes] * np.repeat(nested, 256)[: len(codes)] + offset
    # Scales are what the nested codes stand for, not the maxima themselves.
    np.testing.assert_allclose(
        _double(found.scales).ravel()[~differ], scales[~differ], rtol=1e-6, atol=1e-6 * offset
    )
    assert np.abs(scales - maxima).max() > 1e-3 * offset
    # As in bitsandbytes, the 4-bit codes were chosen with the maxima as they were.
    plain = registry.quantize(weight, None, parse_scheme(f"bnb-{kind}"), SETTINGS)
    assert torch.equal(found.codes, plain.codes)


@pytest.mark.parametrize("block", [None, 32, 64, 128, 256])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_equals_bitsandbytes(weight, kind, double, block):
    functional = pytest.importorskip("bitsandbytes.functional")
    size = "" if block is None else f"-g{block}"
    weight = weight if block is None else weight.reshape(-1, 256)
    scheme = parse_scheme(f"bnb-{kind}{size}" + ("-dq" if double else ""))
    found = registry.quantize(weight, None, scheme, SETTINGS)
    packed, state = functional.quantize_4bit(
        weight.clone(), blocksize=block or 64, compress_statistics=double, quant_type=kind
    )
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(found.dequantize(), expected)
    high, low = packed.ravel() >> 4, packed.ravel() & 15
    assert torch.equal(found.codes.ravel(), torch.stack([high, low], dim=1).ravel())


def test_llm_int8_weight(weight):
    found = registry.quantize(weight, None, parse_scheme("llm.int8"), SETTINGS)
    codes, maxima = oracle.rowwise_int8(_double(weight))
    differ = found.codes.numpy().astype(int) - 128 != codes
    steps = np.abs(_double(weight) * 127 / maxima[:, None])
    assert (np.abs(steps % 1 - 0.5)[differ] < TIE).all()
    assert differ.sum() <= 2
    np.testing.assert_array_equal(_double(found.extras["SCB"]), maxima)
    np.testing.assert_allclose(_double(found.scales).ravel(), maxima / 127, rtol=2e-7)


def test_llm_int8_product(weight, inputs):
    """The decomposition at 6.0: the boundary itself is an outlier, and so is its whole column."""
    scheme = parse_scheme("llm.int8")
    quantized = registry.quantize(weight, None, scheme, SETTINGS)
    codes = quantized.codes.numpy().astype(int) - 128
    maxima = _double(quantized.extras["SCB"])
    expected = oracle.llm_int8_product(_double(inputs), codes, maxima, 6.0)
    product = simulate_llm_int8(inputs) @ quantized.dequantize().T
    np.testing.assert_allclose(_double(product), expected, rtol=1e-4, atol=1e-5)
    model = _linear(weight)
    with torch.no_grad(), quantized_model(model, {"0": quantized}):
        np.testing.assert_allclose(_double(model(inputs)), expected, rtol=1e-4, atol=1e-5)
        # An outlier column is one of the whole batch, whatever its shape.
        batch = _double(model(inputs.reshape(3, TOKENS // 3, COLUMNS)))
        np.testing.assert_allclose(batch.reshape(TOKENS, ROWS), expected, rtol=1e-4, atol=1e-5)
    # Without the decomposition, or with the outliers setting the scales, it is far from that.
    plain = oracle.int8_product(_double(inputs), codes, maxima / 127)
    assert np.abs(plain - expected).max() > 0.01


def test_llm_int8_product_equals_bitsandbytes(weight, inputs):
    modules = pytest.importorskip("bitsandbytes.nn")
    quantized = registry.quantize(weight, None, parse_scheme("llm.int8"), SETTINGS)
    layer = modules.Linear8bitLt(COLUMNS, ROWS, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = modules.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    # In training mode bitsandbytes skips int8 on the CPU and multiplies dequantized weights.
    layer = layer.to("cpu").eval()
    with torch.no_grad():
        expected = layer(inputs.half()).double()
    product = (simulate_llm_int8(inputs) @ quantized.dequantize().T).double()
    # Its output, and its outlier part, are float16.
    difference = (product - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(difference.max()) < 5e-4


@pytest.mark.parametrize("name", ["rtn-int8-gch-sym-aint8", "rtn-int4-g64-asym-aint8"])
def test_dynamic_int8_product(weight, inputs, name):
    scheme = parse_scheme(name)
    quantized = registry.quantize(weight, None, scheme, SETTINGS)
    model = _linear(weight)
    with torch.no_grad(), quantized_model(model, {"0": quantized}):
        found = _double(model(inputs))
    width = COLUMNS if scheme.granularity == "channel" else 64
    zeros = 128 if quantized.zero_points is None else _double(quantized.zero_points)
    expected = np.zeros((TOKENS, ROWS))
    # int32 sums within a group, whose scale they then take.
    for group in range(COLUMNS // width):
        members = slice(group * width, (group + 1) * width)
        zero = zeros if isinstance(zeros, int) else zeros[:, group : group + 1]
        steps = _double(quantized.codes)[:, members] - zero
        for token, values in enumerate(_double(inputs)):
            maximum = np.abs(values).max()
            codes = np.array([round(127 * value / maximum) for value in values])[members]
            sums = steps @ codes
            expected[token] += sums * _double(quantized.scales)[:, group] * maximum / 127
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    if width == COLUMNS:
        scales = _double(quantized.scales)[:, 0]
        steps = _double(quantized.codes) - 128
        np.testing.assert_allclose(
            oracle.int8_product(_double(inputs), steps, scales), expected, rtol=1e-9
        )


@pytest.mark.parametrize("form", ["gch-sym", "gch-asym", "g64-sym", "g64-asym"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_round_to_nearest_equals_compressed_tensors(weight, bits, form):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    scheme = parse_scheme(f"rtn-int{bits}-{form}")
    # A bfloat16 scale leaves the largest weight at no tie, and a weight in full float32 leaves no
    # other: compressed-tensors adds the zero point before it rounds ties to even, so it breaks
    # them another way (exact ties are frequent where both weights and scales are short floats).
    generator = torch.Generator().manual_seed(3)
    weight = weight * (1 + 1e-3 * torch.rand(weight.shape, generator=generator))
    found = registry.quantize(weight, None, scheme, SETTINGS)
    width = COLUMNS if scheme.granularity == "channel" else 64
    arguments = quantization.QuantizationArgs(
        num_bits=bits, symmetric=scheme.symmetric, strategy=scheme.granularity,
        group_size=width if scheme.granularity == "group" else None,
    )  # fmt: skip
    groups = weight.reshape(ROWS, -1, width)
    scales, zeros = helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    live = groups.abs().amax(-1) > 0
    rounded = scales.to(torch.bfloat16).float()
    assert torch.equal(found.scales[live], rounded[live])
    half = 2 ** (bits - 1)
    if not scheme.symmetric:
        moved = (found.zero_points.int() - half - zeros.int())[live]
        # There the zero point is chosen with the scale before it is rounded.
        assert moved.abs().max() <= 1
        zeros = found.zero_points.int() - half
    codes = forward.quantize(weight, found.scales, zeros, arguments)
    assert torch.equal(codes.int() + half, found.codes.int())
    values = forward.dequantize(codes, found.scales, zeros, arguments, dtype=torch.float32)
    assert torch.equal(values, found.dequantize())
