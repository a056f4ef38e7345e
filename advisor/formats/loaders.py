"""What the loaders of the engines demand of a checkpoint, beyond what its format can hold.

Each rule is one that a loader checks while it loads, or silently assumes; it is applied to what is
about to be written, so that nobody quantizes for an hour what the server then refuses. Rules name
where they were read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.engines import engine_name, load_engine
from advisor.engines.outer import outer_problems
from advisor.engines.releases import holds
from advisor.formats import loader_checks as checks
from advisor.formats.base import Planned
from advisor.formats.registry import get_format, storage_scheme
from advisor.modelspec.outer import outer_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from advisor.modelspec import LinearSpec, ModelSpec
    from advisor.schemes import Scheme


@dataclass(frozen=True, slots=True)
class LoaderRule:
    """One thing that a loader demands.

    Attributes:
        engines: Engines whose loader demands it; empty = all.
        formats: Formats that it is about; empty = all.
        check: Returns a sentence per kind of offence.
        source: Where it was read.
        since: First release with the rule; None where every release has it.
        until: First release without it.
    """

    engines: tuple[str, ...]
    formats: tuple[str, ...]
    check: Callable[[checks.PlannedCheckpoint], Sequence[str]]
    source: str
    since: str | None = None
    until: str | None = None


_VLLM = "vllm-project/vllm vllm/model_executor"
_SGLANG = "sgl-project/sglang python/sglang/srt"
_TENSORRT = "NVIDIA/TensorRT-LLM tensorrt_llm"
RULES: tuple[LoaderRule, ...] = (
    LoaderRule((), (), checks.reads_format, "profiles/engines: formats"),
    LoaderRule(
        ("vllm", "sglang", "tensorrt-llm"),
        ("gptq", "awq", "compressed-tensors", "bitsandbytes", "fp8", "modelopt"),
        checks.fused_share,
        f"{_VLLM}/layers/quantization/compressed_tensors/utils.py (find_matched_target, "
        "should_ignore_layer), utils/quant_utils.py (is_layer_skipped)",
    ),
    LoaderRule(
        ("transformers",),
        ("gptq",),
        checks.one_setting,
        "huggingface/optimum optimum/gptq/quantizer.py (one bits and group_size; no dynamic)",
    ),
    LoaderRule(
        ("transformers",),
        ("compressed-tensors",),
        checks.one_scheme_of_experts,
        "huggingface/transformers src/transformers/integrations/compressed_tensors.py "
        "(get_experts_scheme, DecompressExperts)",
    ),
    LoaderRule(
        ("transformers",),
        ("compressed-tensors",),
        checks.no_zero_points,
        "huggingface/transformers src/transformers/quantizers/quantizer_compressed_tensors.py "
        "(5.23.0 and 5.24.0: size mismatch of weight_zero_point; 5.22.0 loads it)",
        since="5.23",
    ),
    LoaderRule(
        ("sglang",),
        ("compressed-tensors",),
        checks.packed_bits((4, 8)),
        f"{_SGLANG}/layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py "
        "(WNA16_SUPPORTED_BITS)",
    ),
    LoaderRule(
        ("sglang",),
        ("compressed-tensors",),
        checks.narrow_weights_under_8_bit_inputs,
        f"{_SGLANG}/layers/quantization/compressed_tensors/compressed_tensors.py "
        "(_get_scheme_from_parts)",
    ),
    LoaderRule(
        ("sglang",),
        ("compressed-tensors",),
        checks.blocks_of_all,
        f"{_SGLANG}/layers/quantization/compressed_tensors/compressed_tensors.py "
        "(weight_block_size: the target Linear), layers/linear.py (_load_qkv_block_scale)",
    ),
    LoaderRule(
        ("sglang",),
        ("gptq",),
        checks.gptq_types,
        f"{_SGLANG}/layers/quantization/gptq/gptq.py (GPTQMarlinConfig.TYPE_MAP); "
        "layers/quantization/__init__.py (BASE_QUANTIZATION_METHODS)",
        since="0.5.20",
    ),
    LoaderRule(
        ("tensorrt-llm",),
        ("compressed-tensors",),
        checks.scales_per_token,
        f"{_TENSORRT}/models/quant_config_utils.py (_quant_config_from_config_group)",
    ),
    LoaderRule(
        ("tensorrt-llm",),
        ("compressed-tensors",),
        checks.one_config_group,
        f"{_TENSORRT}/models/quant_config_utils.py (update_quant_config_from_compressed_tensors)",
    ),
    LoaderRule(
        ("vllm",),
        ("gptq",),
        checks.gptq_types,
        f"{_VLLM}/layers/quantization/auto_gptq.py (TYPE_MAP)",
    ),
    LoaderRule(
        ("vllm",),
        ("gptq",),
        checks.ordered_groups,
        f"{_VLLM}/layers/quantization/utils/gptq_utils.py (normalize_and_validate_gptq_desc_act)",
        since="0.30",
    ),
    LoaderRule(
        ("vllm", "sglang"),
        ("gptq", "awq", "compressed-tensors"),
        checks.whole_groups,
        f"{_VLLM}/layers/quantization/awq.py, gptq.py (create_weights: input size and output size "
        "per partition)",
    ),
    LoaderRule(
        ("vllm", "sglang"),
        (),
        checks.whole_heads,
        "vllm-project/vllm vllm/config/model.py (verify_with_parallel_config)",
    ),
    LoaderRule(
        ("vllm", "sglang"),
        ("bitsandbytes",),
        checks.one_device,
        f"{_VLLM}/model_loader/bitsandbytes_loader.py (prequantized with tensor parallelism)",
    ),
    LoaderRule(
        ("vllm", "sglang"),
        ("gptq",),
        checks.order_per_device,
        f"{_VLLM}/layers/quantization/gptq.py (exllama is off then), "
        "kernels/linear/mixed_precision/machete.py (has_g_idx with partitions)",
    ),
    LoaderRule(
        ("vllm", "sglang", "transformers"),
        ("awq",),
        checks.skipped_by_part,
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
) -> tuple[list[str], list[str]]:
    """Return why an engine could not load a checkpoint, and why its later releases could not.

    Args:
        engine: Name of the engine; ``vllm==0.27`` for a release that is not the newest.
        format: Name of the format.
        schemes: Scheme of each module; one that is absent or 16-bit stays as it is.
        linears: The model's quantizable linears.
        heads: Attention heads of the model.
        devices: Devices in tensor parallel.

    Returns:
        Sentences that refuse, and sentences that warn of releases after the one that was named.

    Raises:
        InputError: Unknown engine or format.
    """
    stored = {
        name: storage_scheme(scheme, format)
        for name, scheme in schemes.items()
        if scheme.is_quantized
    }
    checkpoint = checks.PlannedCheckpoint(engine, format, stored, linears, heads, devices)
    profile = load_engine(engine)
    refusals: list[str] = []
    warnings: list[str] = []
    for rule in RULES:
        if rule.engines and engine_name(engine) not in rule.engines:
            continue
        if rule.formats and format not in rule.formats:
            continue
        for problem in rule.check(checkpoint):
            if holds(rule, profile.release):
                refusals.append(f"{profile.label} could not load it: {problem} ({rule.source}).")
            elif rule.until is None:
                warnings.append(
                    f"{profile.title} {rule.since} and newer do not load it: {problem} "
                    f"({rule.source})"
                )
    return refusals, warnings


def ends_problems(
    engine: str, format: str, schemes: Mapping[str, Scheme], spec: ModelSpec
) -> list[str]:
    """Return why an engine could not read embedding or head as they are quantized.

    Args:
        engine: Name of the engine.
        format: Name of the format.
        schemes: Scheme of each module, embedding and head among them where they are quantized.
        spec: The model.
    """
    ends = [
        module
        for module in outer_modules(spec)
        if module.name in schemes and schemes[module.name].is_quantized
    ]
    return outer_problems(engine, format, ends)


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
