"""Codes of 2 to 8 bits in int32 words, in the orders that checkpoints use.

All orders but AWQ's are one dense stream of bits: element i occupies the bits ``i * bits`` to
``(i + 1) * bits - 1``, bit 0 of the first word being the lowest. For 2, 4 and 8 bits no element
crosses a word. The last word is padded with zero bits. Words are little-endian in memory, as on
every machine that PyTorch supports.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advisor.errors import InputError

AWQ_ORDER: tuple[int, ...] = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output held by each 4-bit field of an AWQ gemm word, lowest field first."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack the last dimension of codes into a dense stream of bits.

    Args:
        codes: Integers 0..2^bits - 1 of any integer type, shape [rows, count].
        bits: Width of a code, 2 to 8.

    Returns:
        int32, shape [rows, ceil(count * bits / 32)].

    Raises:
        InputError: bits is out of range, or a code does not fit.
    """
    _check_bits(bits)
    rows, count = codes.shape
    if codes.numel() and (int(codes.max()) >= 2**bits or int(codes.min()) < 0):
        raise InputError(
            f"codes of {bits} bits lie in 0..{2**bits - 1}, but got "
            f"{int(codes.min())}..{int(codes.max())}."
        )
    codes = codes.to(torch.uint8)
    padding = -count % 32
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    if bits == 8:
        return _dense(codes).view(torch.int32)[:, : _word_count(count, bits)].contiguous()
    if bits == 4:
        packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
        return _dense(packed).view(torch.int32)[:, : _word_count(count, bits)].contiguous()
    # Eight codes fill exactly `bits` bytes: gather them in an int64 and keep its low bytes.
    eights = codes.reshape(rows, -1, 8)
    gathered = eights[:, :, 0].to(torch.int64)
    for position in range(1, 8):
        gathered |= eights[:, :, position].to(torch.int64) << (position * bits)
    stream = _dense(gathered).view(torch.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    return _dense(stream).view(torch.int32)[:, : _word_count(count, bits)].contiguous()


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes of a dense stream of bits, the inverse of :func:`pack_bits`.

    Args:
        words: int32, shape [rows, ceil(count * bits / 32)].
        bits: Width of a code, 2 to 8.
        count: Codes per row.

    Returns:
        uint8, shape [rows, count].

    Raises:
        InputError: bits is out of range, or the number of words does not belong to ``count``.
    """
    _check_bits(bits)
    rows, width = words.shape
    if width != _word_count(count, bits):
        raise InputError(
            f"{count} codes of {bits} bits fill {_word_count(count, bits)} words a row, "
            f"but got {width}."
        )
    stream = _dense(words).view(torch.uint8)
    if bits == 8:
        return stream[:, :count].contiguous()
    if bits == 4:
        codes = torch.stack((stream & 0xF, stream >> 4), dim=-1).reshape(rows, -1)
        return codes[:, :count].contiguous()
    padding = -stream.shape[1] % bits
    if padding:
        stream = torch.nn.functional.pad(stream, (0, padding))
    eights = torch.nn.functional.pad(stream.reshape(rows, -1, bits), (0, 8 - bits))
    gathered = _dense(eights).view(torch.int64).reshape(rows, -1)
    codes = torch.empty(rows, gathered.shape[1], 8, dtype=torch.uint8, device=words.device)
    for position in range(8):
        codes[:, :, position] = ((gathered >> (position * bits)) & (2**bits - 1)).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :count].contiguous()


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """Pack a weight as GPTQ checkpoints hold ``qweight``: along its inputs.

    Args:
        codes: Integers 0..2^bits - 1, shape [out, in].
        bits: Width of a code, 2 to 8.

    Returns:
        int32, shape [ceil(in * bits / 32), out].
    """
    return pack_bits(codes, bits).t().contiguous()


def unpack_gptq(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Return uint8 codes [out, in] of a GPTQ ``qweight``, the inverse of :func:`pack_gptq`."""
    return unpack_bits(words.t(), bits, in_features)


def pack_gptq_zeros(zero_points: Tensor, bits: int) -> Tensor:
    """Pack zero points as GPTQ checkpoints hold ``qzeros``: along the outputs.

    The older format of GPTQ checkpoints stores the zero point minus one; subtract it before.

    Args:
        zero_points: Integers 0..2^bits - 1, shape [out, groups].
        bits: Width of a zero point, 2 to 8.

    Returns:
        int32, shape [groups, ceil(out * bits / 32)].
    """
    return pack_bits(zero_points.t(), bits)


def unpack_gptq_zeros(words: Tensor, bits: int, out_features: int) -> Tensor:
    """Return uint8 zero points [out, groups], the inverse of :func:`pack_gptq_zeros`."""
    return unpack_bits(words, bits, out_features).t().contiguous()


def pack_awq(codes: Tensor, bits: int = 4) -> Tensor:
    """Pack codes as AWQ's gemm kernels read them: along the outputs, eight interleaved to a word.

    It serves both ``qweight`` (codes [out, in]) and ``qzeros`` (zero points [out, groups]).

    Args:
        codes: Integers 0..15, shape [out, n]; out must be a multiple of 8.
        bits: Width of a code; AWQ's gemm layout exists for 4 only.

    Returns:
        int32, shape [n, out / 8].

    Raises:
        InputError: bits is not 4, or out is not a multiple of 8.
    """
    _check_awq(bits, codes.shape[0])
    order = torch.tensor(AWQ_ORDER, device=codes.device)
    interleaved = codes.t().reshape(codes.shape[1], -1, 8)[:, :, order]
    return pack_bits(interleaved.reshape(codes.shape[1], -1), bits)


def unpack_awq(words: Tensor, bits: int = 4) -> Tensor:
    """Return uint8 codes [out, n] of AWQ words [n, out / 8], the inverse of :func:`pack_awq`."""
    out_features = words.shape[1] * 8
    _check_awq(bits, out_features)
    interleaved = unpack_bits(words, bits, out_features).reshape(words.shape[0], -1, 8)
    order = torch.argsort(torch.tensor(AWQ_ORDER, device=words.device))
    return interleaved[:, :, order].reshape(words.shape[0], -1).t().contiguous()


def pack_compressed_tensors(codes: Tensor, bits: int) -> Tensor:
    """Pack a weight as compressed-tensors' ``pack-quantized`` format does: along its inputs.

    That format stores signed values with an offset of 2^(bits - 1), which are our codes as they
    are.

    Args:
        codes: Integers 0..2^bits - 1, shape [out, in].
        bits: Width of a code, 2 to 8.

    Returns:
        int32, shape [out, ceil(in * bits / 32)].
    """
    return pack_bits(codes, bits)


def unpack_compressed_tensors(words: Tensor, bits: int, in_features: int) -> Tensor:
    """Return uint8 codes [out, in], the inverse of :func:`pack_compressed_tensors`."""
    return unpack_bits(words, bits, in_features)


def pack_compressed_tensors_zeros(zero_points: Tensor, bits: int) -> Tensor:
    """Pack zero points [out, groups] along the outputs: int32 [ceil(out * bits / 32), groups]."""
    return pack_bits(zero_points.t(), bits).t().contiguous()


def unpack_compressed_tensors_zeros(words: Tensor, bits: int, out_features: int) -> Tensor:
    """Return uint8 [out, groups], the inverse of :func:`pack_compressed_tensors_zeros`."""
    return unpack_bits(words.t(), bits, out_features).t().contiguous()


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack 4-bit codes as bitsandbytes does: flattened, two to a byte, the first one high.

    Args:
        codes: Integers 0..15 of any shape; an odd number of them is padded with code 0.

    Returns:
        uint8, shape [ceil(count / 2), 1].
    """
    flat = codes.reshape(-1).to(torch.uint8)
    if flat.numel() % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    return ((flat[0::2] << 4) | flat[1::2]).unsqueeze(1)


def unpack_nibbles(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return uint8 codes of the shape given, the inverse of :func:`pack_nibbles`."""
    flat = packed.reshape(-1).view(torch.uint8)
    codes = torch.stack((flat >> 4, flat & 0xF), dim=-1).reshape(-1)
    return codes[: shape[0] * shape[1]].reshape(shape)


def pack_hqq(codes: Tensor, bits: int) -> Tensor:
    """Pack rows of codes as HQQ does: the first part of the rows in the highest bits.

    Rows are cut in as many equal parts as codes go into a word; row i of each part shares row i of
    the words. 5- to 8-bit codes take a byte each.

    Args:
        codes: uint8 [rows, count]; rows a multiple of 2 for 4 bits and of 4 for 2 bits.
        bits: Width of a code, 2 to 8.

    Returns:
        uint8 [rows / parts, count], or int32 for 3 bits, ten of which go into a word.
    """
    _check_bits(bits)
    parts, kind = _hqq_parts(bits)
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % parts))
    words = torch.zeros(padded.shape[0] // parts, codes.shape[1], dtype=kind, device=codes.device)
    for number, part in enumerate(padded.chunk(parts)):
        words |= part.to(kind) << (bits * (parts - 1 - number) if parts > 1 else 0)
    return words


def unpack_hqq(words: Tensor, bits: int, rows: int) -> Tensor:
    """Return uint8 codes [rows, count], the inverse of :func:`pack_hqq`."""
    parts, _ = _hqq_parts(bits)
    shifts = [bits * (parts - 1 - number) if parts > 1 else 0 for number in range(parts)]
    mask = 2**bits - 1
    return torch.cat([((words >> shift) & mask).to(torch.uint8) for shift in shifts])[:rows]


def _hqq_parts(bits: int) -> tuple[int, torch.dtype]:
    """Return how many codes share a word, and the word's type."""
    parts = {2: 4, 3: 10, 4: 2}.get(bits, 1)
    return parts, torch.int32 if bits == 3 else torch.uint8


def _dense(tensor: Tensor) -> Tensor:
    """Copy to a layout that may be viewed as another type.

    ``contiguous()`` is not enough: it leaves any stride to a dimension of size 1.
    """
    return tensor.clone(memory_format=torch.contiguous_format)


def _word_count(count: int, bits: int) -> int:
    """Number of int32 words that hold ``count`` codes."""
    return -(-count * bits // 32)


def _check_bits(bits: int) -> None:
    """Reject widths that no format has."""
    if not 2 <= bits <= 8:
        raise InputError(f"codes are packed at 2 to 8 bits, but got {bits}.")


def _check_awq(bits: int, out_features: int) -> None:
    """Reject what AWQ's gemm layout cannot hold."""
    if bits != 4:
        raise InputError(f"AWQ's gemm layout holds 4-bit codes, but got {bits} bits. Use gptq's.")
    if out_features % 8:
        raise InputError(
            f"AWQ's gemm layout needs out_features to be a multiple of 8, but got {out_features}."
        )
