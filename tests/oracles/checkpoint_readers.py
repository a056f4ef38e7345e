"""Independent readers of quantized checkpoints: numpy and the formats' descriptions, nothing else.

They share no code with what they check: the container is parsed here, and every code is taken out
of its word bit by bit. Slow on purpose.
"""

import json
import re
import struct

import numpy as np

AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which field of an AWQ word holds output 0, 1, 2, ... of its eight."""

_PLAIN = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}


def read_tensors(path):
    """Return every tensor of a safetensors file; bf16 and fp8 as float32."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        raw = data[8 + length + start : 8 + length + end]
        if entry["dtype"] == "BF16":
            wide = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
            values = wide.view(np.float32)
        elif entry["dtype"] == "F8_E4M3":
            values = np.array([e4m3(byte) for byte in range(256)], np.float32)[
                np.frombuffer(raw, "u1")
            ]
        else:
            values = np.frombuffer(raw, _PLAIN[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def e4m3(byte):
    """Return the value of an OCP E4M3 bit pattern: bias 7, no infinities, S.1111.111 is NaN."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 0xF, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def bits_of(words, bits, count):
    """Return ``count`` codes of a row of int32 words read as one stream, lowest bit first."""
    stream = 0
    for position, word in enumerate(words):
        stream |= (int(word) & 0xFFFFFFFF) << (32 * position)
    mask = (1 << bits) - 1
    return [(stream >> (bits * number)) & mask for number in range(count)]


def affine(codes, zeros, scales, groups):
    """Return scale * (code - zero) with one group per input, float32."""
    return (codes - zeros[:, groups]).astype(np.float32) * scales[:, groups]


def read_gptq(tensors, name, config):
    """Dequantize a GPTQ module: [out, in]."""
    rule = {"bits": config["bits"], "group_size": config["group_size"]}
    for pattern, override in (config.get("dynamic") or {}).items():
        if pattern.startswith("+:") and re.match(pattern[2:], name):
            rule.update(override)
            break
    bits = rule["bits"]
    qweight, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"]
    groups = tensors[f"{name}.g_idx"]
    codes = np.array([bits_of(column, bits, len(groups)) for column in qweight.T], np.int64)
    zeros = np.array(
        [bits_of(row, bits, codes.shape[0]) for row in tensors[f"{name}.qzeros"]], np.int64
    ).T
    if config["checkpoint_format"] == "gptq":
        zeros = zeros + 1
    return affine(codes, zeros, scales.T.astype(np.float32), groups)


def read_awq(tensors, name, config):
    """Dequantize an AWQ gemm module: [out, in]."""
    qweight, qzeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    group = config["group_size"] if config["group_size"] > 0 else qweight.shape[0]

    def outputs(words):
        """Return codes [n, out] of words [n, out / 8]."""
        table = []
        for row in words:
            codes = []
            for word in row:
                codes += [(int(word) >> (4 * field)) & 0xF for field in AWQ_NIBBLES]
            table.append(codes)
        return np.array(table, np.int64)

    groups = np.arange(qweight.shape[0]) // group
    scales = tensors[f"{name}.scales"].astype(np.float32)
    return affine(outputs(qweight).T, outputs(qzeros).T, scales.T, groups)


def read_compressed_tensors(tensors, name, config):
    """Dequantize a compressed-tensors module: [out, in]."""
    group = next(
        entry
        for entry in config["config_groups"].values()
        if name in entry["targets"] or entry["targets"] == ["Linear"]
    )
    weights = group["weights"]
    scales = tensors[f"{name}.weight_scale"].astype(np.float32)
    if weights["type"] == "float" and weights["group_size"] in (16, 32):
        return read_microscaled(tensors, name, weights)
    if group["format"] != "pack-quantized":
        values = tensors[f"{name}.weight"].astype(np.float32)
        if weights["strategy"] == "block":
            rows, columns = weights["block_structure"]
            scales = scales.repeat(rows, 0)[: values.shape[0]]
            scales = scales.repeat(columns, 1)[:, : values.shape[1]]
        return values * scales
    bits = weights["num_bits"]
    out_features, in_features = tensors[f"{name}.weight_shape"]
    packed = tensors[f"{name}.weight_packed"]
    codes = np.array([bits_of(row, bits, in_features) for row in packed], np.int64)
    half = 2 ** (bits - 1)
    zeros = np.full(scales.shape, half, np.int64)
    if not weights["symmetric"]:
        packed_zeros = tensors[f"{name}.weight_zero_point"]
        zeros = np.array(
            [bits_of(column, bits, out_features) for column in packed_zeros.T], np.int64
        ).T
    groups = np.arange(in_features) // (in_features // scales.shape[1])
    inputs = group["input_activations"]
    if inputs and inputs["type"] == "float":
        return fp8_products(codes - half, scales, groups)
    return affine(codes - half, zeros - half, scales, groups)


def fp8_products(steps, scales, groups):
    """Return int4 weights as a kernel of FP8 products has them: [out, in]."""
    table = np.array(sorted({e4m3(byte) for byte in range(127)}), np.float32)

    def rounded(values):
        # To nearest, ties to the even pattern, which is the index: patterns rise with values.
        distance = np.abs(np.abs(values)[..., None] - table)
        least = distance.min(-1, keepdims=True)
        even = np.where(distance == least, np.arange(len(table)) % 2, 2).argmin(-1)
        return np.copysign(table[even], values).astype(np.float32)

    channel = (scales.max(1, keepdims=True) / np.float32(448)).astype(np.float32)
    small = rounded(rounded(scales / channel) / np.float32(8))
    weights = rounded(steps.astype(np.float32) * small[:, groups])
    return weights * (channel * np.float32(8))


def e2m1(code):
    """Return the value of an OCP E2M1 bit pattern: bias 1, one mantissa bit."""
    exponent, mantissa = (code >> 1) & 3, code & 1
    value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -value if code & 8 else value


def read_microscaled(tensors, name, weights):
    """Dequantize an NVFP4, MXFP4 or MXFP8 module: [out, in]."""
    scales = tensors[f"{name}.weight_scale"]
    if weights["scale_dtype"] == "torch.uint8":
        scales = 2.0 ** (scales.astype(np.float64) - 127)
    else:
        scales = scales.astype(np.float32) / tensors[f"{name}.weight_global_scale"]
    if weights["num_bits"] == 8:
        values = tensors[f"{name}.weight"]
    else:
        packed = tensors[f"{name}.weight_packed"]
        values = np.array([[e2m1((int(b) >> s) & 15) for b in row for s in (0, 4)]
                           for row in packed])  # fmt: skip
    return (values * scales.astype(np.float64).repeat(weights["group_size"], 1)).astype(np.float32)


def read_bitsandbytes(tensors, name, config):
    """Dequantize a bitsandbytes module: [out, in]."""
    if config["load_in_8bit"]:
        row_scale = (tensors[f"{name}.SCB"] / np.float32(127)).astype(np.float32)
        return tensors[f"{name}.weight"].astype(np.float32) * row_scale[:, None]
    kind = config["bnb_4bit_quant_type"]
    state = json.loads(bytes(tensors[f"{name}.weight.quant_state.bitsandbytes__{kind}"]))
    packed = tensors[f"{name}.weight"].reshape(-1)
    codes = np.stack((packed >> 4, packed & 15), axis=1).reshape(-1)
    absmax = tensors[f"{name}.weight.absmax"]
    if config["bnb_4bit_use_double_quant"]:
        outer = tensors[f"{name}.weight.nested_absmax"].repeat(state["nested_blocksize"])
        absmax = tensors[f"{name}.weight.nested_quant_map"][absmax] * outer[: len(absmax)]
        absmax = absmax + np.float32(state["nested_offset"])
    count = state["shape"][0] * state["shape"][1]
    scales = absmax.repeat(state["blocksize"])[:count]
    values = tensors[f"{name}.weight.quant_map"][codes[:count]] * scales
    return values.astype(np.float32).reshape(state["shape"])


def read_hqq(tensors, name, config):
    """Dequantize an HQQ module: [out, in]."""
    parameters = config["quant_config"]["weight_quant_params"]
    bits, group = int(tensors[f"{name}.nbits"]), int(tensors[f"{name}.group_size"])
    assert (bits, group) == (parameters["nbits"], parameters["group_size"])
    shape = [int(size) for size in tensors[f"{name}.shape"]]
    packed, count = tensors[f"{name}.W_q"], shape[0] * shape[1] // group
    text = "".join(chr(character) for character in tensors[f"{name}.packing"])
    fields = {"3bit_32": 10, "2bit_u8": 4, "4bit_u8": 2, "8bit_u8": 1}[text]
    width = 3 if text == "3bit_32" else 8 // fields
    rows = []
    for number in range(count):
        # Row r of the words holds the groups r, r + n, r + 2n, ..., the first in its top bits.
        part, row = divmod(number, len(packed))
        shift = width * (fields - 1 - part)
        rows.append([(int(word) >> shift) & (2**width - 1) for word in packed[row]])
    codes = np.array(rows, np.float32)
    values = (codes - tensors[f"{name}.zero"]) * tensors[f"{name}.scale"]
    return values.astype(np.float32).reshape(shape)


READERS = {
    "hqq": read_hqq,
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "bitsandbytes": read_bitsandbytes,
}
