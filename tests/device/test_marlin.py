"""Our checkpoints in vLLM's Marlin kernel: what it multiplies is what our reader says.

On a CUDA device the kernel itself, from the library that ``$ADVISOR_MARLIN`` names (the sources
that gptqmodel ships, compiled with ``gemm``, ``gptq_repack`` and ``awq_repack`` as
``torch.ops.advisor_marlin``): ``pytest -s -m 'gpu and slow' tests/device/test_marlin.py``.
Everywhere a float64 twin of the kernel that reads the same memory.
"""

from __future__ import annotations

import os
from dataclasses import replace

import marlin_twin
import pytest
import torch
from marlin_loader import Prepared, prepare
from safetensors.torch import load_file

from advisor.formats.export import write_checkpoint
from advisor.formats.read import read_checkpoint
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.models.checkpoint import read_tensor
from advisor.schemes import parse_scheme

LIBRARY = os.environ.get("ADVISOR_MARLIN")
on_device = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(LIBRARY is None, reason="ADVISOR_MARLIN names no library of the kernel"),
]
CASES = [
    *(("compressed-tensors", f"rtn-int4-{g}-sym") for g in ("g32", "g64", "g128", "gch")),
    *(("compressed-tensors", f"rtn-int4-{g}-asym") for g in ("g32", "g64", "g128", "gch")),
    *(("compressed-tensors", f"rtn-int8-{g}-sym") for g in ("gch", "g64", "g128")),
    *(("compressed-tensors", f"rtn-int8-{g}-asym") for g in ("gch", "g64")),
    *(("compressed-tensors", name) for name in ("rtn-fp8-gch", "nvfp4", "mxfp4")),
    *(("gptq", f"rtn-int4-{g}-sym") for g in ("g32", "g128", "gch")),
    ("gptq", "gptq-int4-g64-sym-actorder"), ("gptq", "rtn-int8-gch-sym"),
    ("gptq", "rtn-int8-g64-sym"), ("awq", "rtn-int4-g64-asym"), ("awq", "rtn-int4-g128-asym"),
]  # fmt: skip
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LIMITS = {"float16": 2e-3, "bfloat16": 1e-2}
"""Of the relative error: a weight, a product's sum and an output are rounded to 2^-12 or 2^-9."""
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
MODULES = [f"model.layers.0.{part}" for part in PARTS]
SIZES = {
    "hidden_size": 384, "intermediate_size": 512, "num_attention_heads": 6,
    "num_key_value_heads": 1, "num_hidden_layers": 1,
}  # fmt: skip
"""Inputs of 384 and 512, outputs of 384, 64, 512 and 384: each of the kernel's widths of a tile."""
ROWS = (1, 16, 64)
TIMED = [(4096, 4096), (14336, 4096)]
"""Outputs and inputs of the linears that are timed."""


@pytest.fixture
def folder_of(llama_builder, tmp_path):
    """Save the random Llama in 16 bits: ``folder_of("float16")``."""

    def save(dtype: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = llama_builder(**SIZES)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype])
        model.save_pretrained(tmp_path / dtype)
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / dtype)
        return tmp_path / dtype

    return save


def write(folder, output, form: str, name: str, dtype: str):
    """Quantize block 0 and write a checkpoint; act-order groups are drawn, not sought."""
    scheme = parse_scheme(name)
    plain = parse_scheme("rtn-int4-g64-sym") if scheme.activation_order else scheme
    settings = QuantizationSettings(scale_dtype=dtype)
    weights = {}
    for module in MODULES:
        weight = read_tensor(folder, f"{module}.weight").to(torch.float32)
        found = quantize(weight, None, plain, settings)
        if scheme.activation_order:
            groups = torch.arange(weight.shape[1]) // 64
            drawn = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3))
            index = groups[drawn].to(torch.int32)
            found = replace(found, scheme=scheme, group_index=index)
        weights[module] = found
    write_checkpoint(folder, output, format=form, weights=weights)


def products(output, dtype, operations, device="cpu"):
    """Yield each module's shape and rows, what the kernel computes, and what our reader says."""
    checkpoint = read_checkpoint(output)
    assert sorted(checkpoint.modules) == sorted(MODULES)
    tensors = load_file(output / "model.safetensors")
    tensors = {name: value.to(device) for name, value in tensors.items()}
    for module in MODULES:
        prepared = prepare(tensors, module, checkpoint.modules[module], dtype, operations)
        weight = checkpoint.weight(module).dequantize().to(device, torch.float64)
        assert prepared.shape == weight.shape
        for rows in ROWS:
            inputs = torch.randn(
                rows, weight.shape[1], generator=torch.Generator().manual_seed(rows)
            )
            inputs = inputs.to(device, dtype)
            found = prepared.multiply(inputs, operations).to(torch.float64)
            yield (*prepared.shape, rows), found, inputs.to(torch.float64) @ weight.t()


def relative(found, expected) -> float:
    """Return the norm of the difference over that of the expected values."""
    return float((found - expected).norm() / expected.norm())


def is_possible(name: str, dtype: str) -> bool:
    """Return whether the kernel has it: an E8M0 scale is beyond float16."""
    return name != "mxfp4" or dtype == "bfloat16"


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_twin_reads_what_our_reader_reads(folder_of, tmp_path, dtype):
    folder = folder_of(dtype)
    for number, (form, name) in enumerate(CASES):
        if not is_possible(name, dtype):
            continue
        output = tmp_path / f"{number}"
        write(folder, output, form, name, dtype)
        for shape, found, expected in products(output, DTYPES[dtype], marlin_twin):
            assert relative(found, expected) < 1e-6, (form, name, shape)


@pytest.mark.parametrize("lost", ["scales", "zeros", "weight"])
def test_another_order_shows(folder_of, tmp_path, lost):
    write(
        folder_of("float16"), tmp_path / "out", "compressed-tensors", "rtn-int4-g64-asym", "float16"
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scheme = parse_scheme("rtn-int4-g64-asym")
    right = prepare(tensors, MODULES[0], scheme, torch.float16, marlin_twin)
    wrong = replace(right, **{lost: getattr(right, lost).roll(1, 1)})
    inputs = torch.randn(4, 384, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    found, expected = (each.multiply(inputs, marlin_twin) for each in (wrong, right))
    assert relative(found, expected) > 0.05


@pytest.fixture(scope="session")
def kernel():
    """The library's operations."""
    torch.ops.load_library(LIBRARY)
    return _Kernel(torch.ops.advisor_marlin)


class _Kernel:
    """The operations, with what gptqmodel's copy of the kernel leaves out.

    That copy (7.6) multiplies its sums by NVFP4's global scale after it has rounded them to the
    outputs, so that the scale has no effect: seen on an H100, and in its ``marlin_template.h``.
    vLLM's own multiplies before.
    """

    def __init__(self, operations):
        self.gptq_repack, self.awq_repack = operations.gptq_repack, operations.awq_repack
        self._operations = operations

    def gemm(self, inputs, weight, scales, global_scale, *rest):
        found = self._operations.gemm(inputs, weight, scales, global_scale, *rest)
        return found if global_scale is None else found.float() * global_scale


class TestOnTheDevice:
    pytestmark = on_device

    @pytest.mark.parametrize("dtype", list(DTYPES))
    def test_the_kernel_multiplies_what_our_reader_reads(self, kernel, folder_of, tmp_path, dtype):
        folder = folder_of(dtype)
        print(f"\n{dtype}: largest |out - ref| / |ref| of {', '.join(PARTS)}, by rows {ROWS}")
        worse = []
        for number, (form, name) in enumerate(CASES):
            if not is_possible(name, dtype):
                continue
            output = tmp_path / f"{number}"
            write(folder, output, form, name, dtype)
            errors = dict.fromkeys(ROWS, 0.0)
            for shape, found, expected in products(output, DTYPES[dtype], kernel, "cuda"):
                error = relative(found, expected)
                errors[shape[2]] = max(errors[shape[2]], error)
                if not error < LIMITS[dtype]:
                    worse.append((form, name, shape, error))
            print(f"{form:20}{name:30}", *(f"{error:10.2e}" for error in errors.values()))
        assert worse == []

    @pytest.mark.parametrize("kind", ["uint4b8", "uint8b128"])
    def test_few_rows_take_less_time_than_in_sixteen_bits(self, kernel, kind, record_property):
        slower = []
        for out_features, in_features in TIMED:
            for rows in (1, 16):
                ours, theirs = timed(kernel, kind, out_features, in_features, rows)
                line = f"{kind} {out_features}x{in_features} m={rows}"
                print(
                    f"\n{line}: {ours:.1f} us, fp16 {theirs:.1f} us, {theirs / ours:.2f}x", end=""
                )
                record_property(line, theirs / ours)
                if ours >= theirs:
                    slower.append(line)
        assert slower == []


def timed(kernel, kind: str, out_features: int, in_features: int, rows: int):
    """Return microseconds of the kernel (int4 g128 or int8 per channel) and of torch's fp16.

    Each call has a weight of its own, 400 MB in all or more: none is in the cache any more.
    """
    bits = 4 if kind == "uint4b8" else 8
    copies = -(-400_000_000 // (2 * out_features * in_features)) * (16 // bits)
    groups = in_features // 128 if bits == 4 else 1
    inputs = torch.randn(rows, in_features, device="cuda", dtype=torch.float16)
    words = (in_features // 16, out_features * bits // 2)
    scales = torch.full((groups, out_features), 0.01, dtype=torch.float16, device="cuda")
    workspace = torch.zeros(512, dtype=torch.int32, device="cuda")
    high = 2**31 - 1
    ours = [
        Prepared(kind, (out_features, in_features),
                 torch.randint(-high, high, words, dtype=torch.int32, device="cuda"), scales)
        for _ in range(copies)
    ]  # fmt: skip
    plain = [
        torch.randn(out_features, in_features, device="cuda", dtype=torch.float16)
        for _ in range(copies * bits // 16)
    ]
    return (
        _microseconds([lambda w=w: w.multiply(inputs, kernel, workspace) for w in ours]),
        _microseconds([lambda w=w: inputs @ w.t() for w in plain]),
    )


def _microseconds(calls) -> float:
    """Return the median of ten replays of a graph of the calls, per call."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(12):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) * 1000 / len(calls))
    return float(torch.tensor(times[2:]).median())
