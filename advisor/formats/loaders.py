"""What the loaders of the engines demand of a checkpoint, beyond what its format can hold.

Each rule is one that a loader checks while it loads, or silently assumes; it is applied to what is
about to be written, so that nobody quantizes for an hour what the server then refuses. Rules name
where they were read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.engines import fused_conflicts, load_engine
from advisor.formats.base import Planned, list_some
from advisor.formats.registry import get_format, storage_scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from advisor.modelspec import LinearSpec
    from advisor.schemes import Scheme

_ROW_PARALLEL = (
    "o_proj", "down_proj", "out_proj", "fc2", "dense", "dense_4h_to_h", "c_proj", "w2",
)  # fmt: skip
"""Last parts of linears whose inputs, not outputs, tensor parallelism splits."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as it is planned, to be judged by the rules of one engine.

    Attributes:
        engine: Name of the engine.
        format: Name of the format.
        schemes: Scheme of each quantized module, as the format's readers find it.
        linears: Every quantizable linear of the model.
        heads: Attention heads; None where unknown.
        devices: Devices that share every layer (tensor parallelism).
    """

    engine: str
    format: str
    schemes: Mapping[str, Scheme]
    linears: Sequence[LinearSpec]
    heads: int | None = None
    devices: int = 1

    @property
    def quantized(self) -> list[LinearSpec]:
        """The linears that are stored in fewer than 16 bits."""
        return [linear for linear in self.linears if linear.name in self.schemes]


@dataclass(frozen=True, slots=True)
class LoaderRule:
    """One thing that a loader demands.

    Attributes:
        engines: Engines whose loader demands it; empty = all.
        formats: Formats that it is about; empty = all.
        check: Returns a sentence per kind of offence.
        source: Where it was read.
    """

    engines: tuple[str, ...]
    formats: tuple[str, ...]
    check: Callable[[Checkpoint], Sequence[str]]
    source: str


def _reads(checkpoint: Checkpoint) -> list[str]:
    profile = load_engine(checkpoint.engine)
    known = {rule.format for rule in profile.formats}
    if checkpoint.format in known:
        return []
    return [f"it reads {', '.join(sorted(known))}, not {checkpoint.format}"]


def _fused(checkpoint: Checkpoint) -> list[str]:
    return list(fused_conflicts(checkpoint.engine, checkpoint.schemes, checkpoint.linears))


def _one_setting(checkpoint: Checkpoint) -> list[str]:
    settings: dict[str, list[str]] = {}
    for linear in checkpoint.linears:
        scheme = checkpoint.schemes.get(linear.name)
        settings.setdefault("16-bit" if scheme is None else str(scheme), []).append(linear.name)
    if len(settings) < 2:
        return []
    seen = "; ".join(f"{key} for {list_some(names)}" for key, names in sorted(settings.items()))
    return [
        f"it reads one setting for every linear of a {checkpoint.format} checkpoint, but got "
        f"{seen}. Use format compressed-tensors"
    ]


def _symmetric(checkpoint: Checkpoint) -> list[str]:
    return _say(
        checkpoint,
        lambda scheme, _: scheme.is_integer and scheme.symmetric is False,
        "its compressed-tensors kernels take no zero points",
    )


def _packed_bits(bits: tuple[int, ...]) -> Callable[[Checkpoint], list[str]]:
    def check(checkpoint: Checkpoint) -> list[str]:
        return _say(
            checkpoint,
            lambda scheme, _: (
                scheme.is_integer and scheme.activation is None and int(scheme.bits) not in bits
            ),
            f"its packed integers have {' or '.join(map(str, bits))} bits",
        )

    return check


def _groups(checkpoint: Checkpoint) -> list[str]:
    """Groups and words may not be cut by the devices that share a layer."""

    def cut(scheme: Scheme, linear: LinearSpec) -> bool:
        size = scheme.group_size or -1
        rows = _is_row_parallel(linear)
        inputs, outputs = linear.in_features, linear.out_features
        if (inputs if rows else outputs) % checkpoint.devices:
            return True
        inputs = inputs // checkpoint.devices if rows else inputs
        outputs = outputs if rows else outputs // checkpoint.devices
        if scheme.granularity in ("group", "block") and size > 0 and inputs % size:
            return True
        if scheme.granularity == "block" and checkpoint.devices > 1 and outputs % size:
            return True
        words = 8 if scheme.is_integer and scheme.activation is None else 1
        packed = checkpoint.format in ("gptq", "awq")
        return packed and bool(outputs % words)

    rule = "groups must divide the inputs"
    if checkpoint.devices > 1:
        rule = (
            f"each of {checkpoint.devices} devices must get whole groups and words of every "
            "matrix; use a smaller group size, or fewer devices"
        )
    return _say(checkpoint, cut, rule)


def _heads(checkpoint: Checkpoint) -> list[str]:
    if not checkpoint.heads or checkpoint.heads % checkpoint.devices == 0:
        return []
    return [
        f"its {checkpoint.heads} attention heads cannot be shared by {checkpoint.devices} devices"
    ]


def _one_device(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.devices == 1 or not checkpoint.schemes:
        return []
    return [
        f"it splits no quantized {checkpoint.format} checkpoint over {checkpoint.devices} devices; "
        "use one device, or format compressed-tensors"
    ]


def _order_per_device(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.devices == 1:
        return []
    return _say(
        checkpoint,
        lambda scheme, linear: scheme.activation_order and _is_row_parallel(linear),
        f"act-order's groups are scattered over the inputs, which {checkpoint.devices} devices "
        "share: only slow kernels take that; use -gN without -actorder",
    )


def _skipped_by_part(checkpoint: Checkpoint) -> list[str]:
    """Excluded names are matched as parts of names: one must not be part of a quantized one."""
    kept = [linear.name for linear in checkpoint.linears if linear.name not in checkpoint.schemes]
    caught = [name for name in checkpoint.schemes if any(part in name for part in kept)]
    if not caught:
        return []
    return [
        f"its names of 16-bit modules also match {list_some(caught)}, which are quantized; "
        "use format compressed-tensors"
    ]


def _is_row_parallel(linear: LinearSpec) -> bool:
    return linear.name.rpartition(".")[2] in _ROW_PARALLEL


def _say(
    checkpoint: Checkpoint, offends: Callable[[Scheme, LinearSpec], bool], rule: str
) -> list[str]:
    """Return the rule with the number of modules that break it and the first of them."""
    names = [
        linear.name
        for linear in checkpoint.quantized
        if offends(checkpoint.schemes[linear.name], linear)
    ]
    if not names:
        return []
    scheme = checkpoint.schemes[names[0]]
    return [f"{rule}, but {list_some(names)} with {scheme} cannot"]


_VLLM = "vllm-project/vllm vllm/model_executor"
_SGLANG = "sgl-project/sglang python/sglang/srt"
RULES: tuple[LoaderRule, ...] = (
    LoaderRule((), (), _reads, "profiles/engines: formats"),
    LoaderRule(
        ("vllm", "sglang", "tensorrt-llm"),
        ("gptq", "awq", "compressed-tensors", "bitsandbytes"),
        _fused,
        f"{_VLLM}/layers/quantization/compressed_tensors/utils.py (find_matched_target, "
        "should_ignore_layer), utils/quant_utils.py (is_layer_skipped)",
    ),
    LoaderRule(
        ("transformers",),
        ("gptq",),
        _one_setting,
        "huggingface/optimum optimum/gptq/quantizer.py (one bits and group_size; no dynamic)",
    ),
    LoaderRule(
        ("sglang",),
        ("compressed-tensors",),
        _symmetric,
        f"{_SGLANG}/layers/quantization/compressed_tensors/compressed_tensors.py@b553569 "
        "(_is_wNa16_group_channel)",
    ),
    LoaderRule(
        ("vllm", "sglang"),
        ("compressed-tensors",),
        _packed_bits((4, 8)),
        f"{_VLLM}/layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py "
        "(WNA16_SUPPORTED_BITS)",
    ),
    LoaderRule(
        ("vllm", "sglang"),
        ("gptq", "awq", "compressed-tensors"),
        _groups,
        f"{_VLLM}/layers/quantization/awq.py, gptq.py (create_weights: input size and output size "
        "per partition)",
    ),
    LoaderRule(("vllm", "sglang"), (), _heads, "vllm-project/vllm vllm/config/model.py"),
    LoaderRule(
        ("vllm", "sglang"),
        ("bitsandbytes",),
        _one_device,
        f"{_VLLM}/model_loader/bitsandbytes_loader.py (prequantized with tensor parallelism)",
    ),
    LoaderRule(
        ("vllm", "sglang"),
        ("gptq",),
        _order_per_device,
        f"{_VLLM}/layers/quantization/gptq.py (exllama is off then), "
        "kernels/linear/mixed_precision/machete.py (has_g_idx with partitions)",
    ),
    LoaderRule(
        ("vllm", "sglang", "transformers"),
        ("awq",),
        _skipped_by_part,
        f"{_VLLM}/layers/quantization/awq.py (is_layer_skipped_awq)",
    ),
)


def loading_problems(
    engine: str,
    format: str,
    schemes: Mapping[str, Scheme],
    linears: Sequence[LinearSpec],
    *,
    heads: int | None = None,
    devices: int = 1,
) -> list[str]:
    """Return every reason why an engine could not load a checkpoint; empty where it can.

    Args:
        engine: Name of the engine.
        format: Name of the format.
        schemes: Scheme of each module; one that is absent or 16-bit stays as it is.
        linears: The model's quantizable linears.
        heads: Attention heads of the model.
        devices: Devices in tensor parallel.

    Raises:
        InputError: Unknown engine or format.
    """
    stored = {
        name: storage_scheme(scheme, format)
        for name, scheme in schemes.items()
        if scheme.is_quantized
    }
    checkpoint = Checkpoint(engine, format, stored, linears, heads, devices)
    title = load_engine(engine).title
    return [
        f"{title} could not load it: {problem} ({rule.source})."
        for rule in RULES
        if (not rule.engines or engine in rule.engines)
        and (not rule.formats or format in rule.formats)
        for problem in rule.check(checkpoint)
    ]


def storing_problems(
    format: str,
    schemes: Mapping[str, Scheme],
    linears: Sequence[LinearSpec],
    *,
    static_groups: bool = False,
) -> list[str]:
    """Return why a format could not hold these schemes, before any weight is made.

    Args:
        format: Name of the format.
        schemes: Scheme of each module; one that is absent or 16-bit stays as it is.
        linears: The model's quantizable linears.
        static_groups: Whether act-order keeps groups of neighbouring inputs.

    Raises:
        InputError: Unknown format.
    """
    planned = {
        linear.name: Planned(
            schemes[linear.name],
            (linear.out_features, linear.in_features),
            static_groups
            or not (
                schemes[linear.name].activation_order
                and schemes[linear.name].granularity == "group"
            ),
        )
        for linear in linears
        if linear.name in schemes and schemes[linear.name].is_quantized
    }
    return get_format(format).problems(planned) if planned else []
