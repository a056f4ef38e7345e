"""What loaders make of a checkpoint's tensors before the Marlin kernel multiplies them.

Tensors come from the file as they are, not through our readers: order of bits, of scales and of
zero points are changed as vLLM and gptqmodel change them, and nothing else is known of the weight.

Reference: vLLM, ``MarlinLinearKernel``, ``prepare_fp8_layer_for_marlin``,
``prepare_fp4_layer_for_marlin`` and ``AWQMarlinLinearMethod``; gptqmodel, ``MarlinLinear``. Scales
of FP4 are in pairs of groups, as the kernel that gptqmodel 7.6 ships reads them; newer kernels
of vLLM have them one after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from advisor.numerics.packing import pack_bits, unpack_bits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from advisor.schemes import Scheme

TYPES = {
    "uint4": 0x4000000000400, "uint4b8": 0x4000000100400, "uint8": 0x4000000000800,
    "uint8b128": 0x4000001000800, "fp8": 0xA000000010304, "fp4": 0x2000000010102,
}  # fmt: skip
"""vLLM's numbers of the weight types that the kernel multiplies."""
_GROUPED = [column + 8 * block for column in range(8) for block in range(8)]
_SINGLE = [2 * lane + column for lane in range(4) for column in (0, 1, 8, 9, 16, 17, 24, 25)]
_INTERLEAVED = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A weight as the kernel reads it.

    Attributes:
        kind: One of :data:`TYPES`.
        shape: (out_features, in_features).
        weight: int32, tiles of 16 inputs and 64 outputs.
        scales: In the data type of the activations, or FP8; shape [groups, out].
        zeros: int32, packed, shape [groups, out / codes per word], or None.
        global_scale: float32, one value, or None.
        order: int32, shape [in]: inputs sorted by their group, or None without act-order.
        index: int32, shape [in]: the group of each input in that order, or None.
    """

    kind: str
    shape: tuple[int, int]
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    global_scale: Tensor | None = None
    order: Tensor | None = None
    index: Tensor | None = None

    def multiply(self, inputs: Tensor, operations: Any, workspace: Tensor | None = None) -> Tensor:
        """Return inputs [m, in] times the weight's transpose, as the kernel computes it.

        Args:
            inputs: float16 or bfloat16, contiguous.
            operations: ``gemm`` of the kernel or of its twin.
            workspace: int32 zeros, at least one per multiprocessor; the kernel leaves zeros.
        """
        if workspace is None:
            workspace = torch.zeros(512, dtype=torch.int32, device=inputs.device)
        out_features, in_features = self.shape
        output: Tensor = operations.gemm(
            inputs, self.weight, self.scales, self.global_scale, self.zeros, self.index,
            self.order, workspace, TYPES[self.kind], inputs.shape[0], out_features, in_features,
        )  # fmt: skip
        return output


def prepare(
    tensors: Mapping[str, Tensor],
    name: str,
    scheme: Scheme,
    dtype: torch.dtype,
    operations: Any,
) -> Prepared:
    """Return a module's weight as loaders hand it to the kernel.

    Args:
        tensors: Those of the file, by name, on the device.
        name: Of the module.
        scheme: As its configuration says it.
        dtype: Of the activations.
        operations: ``gemm``, ``gptq_repack`` and ``awq_repack``: the kernel's, or its twin's.
    """
    own = {
        key.removeprefix(f"{name}."): value
        for key, value in tensors.items()
        if key.startswith(f"{name}.")
    }
    if "qweight" in own:
        return (_awq if "g_idx" not in own else _gptq)(own, scheme, dtype, operations)
    if scheme.weight in ("nvfp4", "mxfp4"):
        return _fp4(own, scheme, dtype, operations)
    if scheme.weight == "fp8":
        return _fp8(own, dtype, operations)
    return _packed(own, scheme, dtype, operations)


def _packed(own: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype, ops: Any) -> Prepared:
    """``pack-quantized``: words along the inputs, zero points along the outputs."""
    bits = int(scheme.bits)
    shape = _pair(own["weight_shape"])
    weight = _repack(own["weight_packed"].t().contiguous(), shape, bits, ops)
    scales = _permute_scales(own["weight_scale"].t().to(dtype))
    if scheme.symmetric:
        return Prepared(f"uint{bits}b{2 ** (bits - 1)}", shape, weight, scales)
    words = own["weight_zero_point"].t().contiguous()
    zeros = _pack_zeros(unpack_bits(words, bits, shape[0]), bits)
    return Prepared(f"uint{bits}", shape, weight, scales, zeros)


def _gptq(own: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype, ops: Any) -> Prepared:
    """GPTQ's layout, symmetric; inputs are sorted by group where there is act-order."""
    bits = int(scheme.bits)
    shape = (own["qweight"].shape[1], own["g_idx"].numel())
    order = index = None
    if scheme.activation_order:
        order = torch.argsort(own["g_idx"], stable=True).to(torch.int32)
        index = own["g_idx"][order.long()].contiguous()
    weight = _repack(own["qweight"], shape, bits, ops, order)
    scales = _permute_scales(own["scales"].to(dtype))
    kind = f"uint{bits}b{2 ** (bits - 1)}"
    return Prepared(kind, shape, weight, scales, order=order, index=index)


def _awq(own: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype, ops: Any) -> Prepared:
    """AWQ's layout: words along the outputs, eight interleaved, and zero points alike."""
    del scheme
    in_features, out_features = own["qweight"].shape[0], own["scales"].shape[1]
    weight = ops.awq_repack(own["qweight"], in_features, out_features, 4)
    fields = unpack_bits(own["qzeros"], 4, out_features).reshape(-1, 8)
    zeros = torch.empty_like(fields)
    zeros[:, _INTERLEAVED[4]] = fields
    scales = _permute_scales(own["scales"].to(dtype))
    packed = _pack_zeros(zeros.reshape(-1, out_features), 4)
    return Prepared("uint4", (out_features, in_features), weight, scales, packed)


def _fp8(own: Mapping[str, Tensor], dtype: torch.dtype, ops: Any) -> Prepared:
    """E4M3 per channel: the kernel leaves out the exponents' difference, which scales take up."""
    shape = _pair(own["weight"].shape)
    weight = _repack(own["weight"].view(torch.int32).t().contiguous(), shape, 8, ops)
    scales = _permute_scales(own["weight_scale"].reshape(1, -1).to(dtype))
    return Prepared("fp8", shape, weight, scales * 2.0 ** (8 if dtype == torch.float16 else 120))


def _fp4(own: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype, ops: Any) -> Prepared:
    """NVFP4 and MXFP4: two codes a byte, an FP8 scale per 16 or 32 inputs."""
    shape = (own["weight_packed"].shape[0], own["weight_packed"].shape[1] * 2)
    weight = _repack(own["weight_packed"].view(torch.int32).t().contiguous(), shape, 4, ops)
    local = own["weight_scale"].t().contiguous()
    if scheme.weight == "mxfp4":
        local = local.view(torch.float8_e8m0fnu)
    scales = _permute_scales(local.to(dtype))
    pairs = scales.view(scales.shape[0] // 2, 2, -1, 8).permute(0, 2, 1, 3)
    scales = pairs.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(scales.shape)
    if scheme.weight == "mxfp4":
        return Prepared("fp4", shape, weight, scales.to(torch.float8_e8m0fnu))
    # Five bits of exponent and no sign; the kernel's bf16 needs the top bit set: nothing is small.
    wide = scales.to(torch.float16) * 2**7
    wide[wide < 2] = 0
    eight = (wide.view(torch.int16) << 1).view(torch.uint8)[:, 1::2].contiguous()
    exponent = (14 if dtype == torch.float16 else 126) - 7
    global_ = (2.0**exponent / own["weight_global_scale"].float()).reshape(1)
    return Prepared("fp4", shape, weight, eight.view(torch.float8_e4m3fn), global_scale=global_)


def _pair(values: Any) -> tuple[int, int]:
    """Return two integers."""
    return (int(values[0]), int(values[1]))


def _repack(
    words: Tensor, shape: tuple[int, int], bits: int, ops: Any, order: Tensor | None = None
) -> Tensor:
    """Return tiles of words [in / codes per word, out]."""
    none = torch.empty(0, dtype=torch.int32, device=words.device)
    tiles: Tensor = ops.gptq_repack(
        words, none if order is None else order, shape[1], shape[0], bits
    )
    return tiles


def _permute_scales(scales: Tensor) -> Tensor:
    """Return scales [groups, out] as lanes of a warp read them: 64, or 32 per channel, at once."""
    order = _GROUPED if scales.shape[0] > 1 else _SINGLE
    return scales.reshape(-1, len(order))[:, order].reshape(scales.shape).contiguous()


def _pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Return zero points [groups, out] in the order of scales, interleaved and packed."""
    interleaved = _INTERLEAVED[bits]
    lanes = zeros.reshape(-1, 64)[:, _GROUPED].reshape(-1, len(interleaved))[:, interleaved]
    return pack_bits(lanes.reshape(zeros.shape), bits)
