"""How checkpoints of some architectures differ from a plain decoder's: names, shapes, experts.

The names are those on disk, which engines read too: one matrix per expert
(``model.layers.0.mlp.experts.7.gate_proj``, Mixtral's ``block_sparse_moe.experts.7.w1``), although
transformers 5 holds all experts of a layer in one parameter. Older files leave out the first part
of each name (``h.0.attn.c_attn`` for ``transformer.h.0.attn.c_attn``).

Reference: transformers ``conversion_mapping.py`` and ``integrations/compressed_tensors.py``
(5.17); vLLM ``compressed_tensors_moe.py`` (``get_moe_method`` looks the experts of a layer up as
``<path>.0.gate_proj``, also where they are called w1), ``gptq_utils.py`` (``get_dynamic_override``
asks for ``<path>``), ``models/gpt2.py`` (every ``c_*.weight`` is transposed on loading).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from advisor.engines.releases import engine_name
from advisor.formats.gguf_names import ARCHITECTURES as GGUF_ARCHITECTURES
from advisor.models.architectures import ARCHITECTURES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from advisor.schemes import Scheme

HEADS = ("lm_head", "embed_out")
_SIDE = re.compile(r"(^|\.)(lm_head|embed_out|gate|shared_expert_gate|project_in|project_out)$")
_EXPERT = re.compile(r"(?P<path>.+\.experts)\.\d+\.[^.]+$")
_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


def is_side_linear(name: str) -> bool:
    """Whether a matrix is a head, a router or a projection of the embedding: never quantized."""
    return _SIDE.search(name) is not None


def expert_paths(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the modules that are no experts, and the paths of the layers' experts, both sorted."""
    others, paths = [], set()
    for name in names:
        found = _EXPERT.match(name)
        if found:
            paths.add(found["path"])
        else:
            others.append(name)
    return sorted(others), sorted(paths)


def architecture_name(config: Mapping[str, Any]) -> str:
    """Return ``architectures[0]`` of config.json; empty where there is none."""
    names = config.get("architectures") or [""]
    return str(names[0])


def is_transposed(config: Mapping[str, Any], tensor: str) -> bool:
    """Whether a tensor of the 16-bit checkpoint is a matrix stored as [in, out]."""
    known = ARCHITECTURES.get(architecture_name(config))
    return known is not None and known.transposed and _TRANSPOSED.search(tensor) is not None


def full_names(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return stored name -> name with the first part that older files leave out.

    Args:
        config: config.json.
        names: Every tensor's name.
    """
    stored = list(names)
    known = ARCHITECTURES.get(architecture_name(config))
    if known is None:
        return {name: name for name in stored}
    first, _, rest = known.blocks.partition(".")
    if not any(name.startswith(f"{rest}.") for name in stored):
        return {name: name for name in stored}
    return {
        name: name if name.partition(".")[0] in (first, *HEADS) else f"{first}.{name}"
        for name in stored
    }


_UNREAD: Mapping[tuple[str, str, str], str] = {
    ("transformers", "compressed-tensors", "GPT2LMHeadModel"): (
        "it takes GPT-2's matrices for [out, in] and computes something else, without a word"
    ),
    ("transformers", "compressed-tensors", "FalconForCausalLM"): (
        "its Falcon fills weights with random numbers first, which packed linears do not have"
    ),
}
"""(engine, format, architecture) -> what goes wrong; seen with transformers 5.17."""


def experts_as_one(engine: str, format: str) -> bool:
    """Whether an engine unpacks the experts of all layers by one and the same scheme.

    transformers holds the experts of a layer in one parameter and unpacks them while it loads, all
    by the first config group that speaks of experts: other schemes in other layers, and experts in
    16 bits beside quantized linears, come out as noise without a word, and zero points or int8
    inputs are an error (seen with transformers 5.17; integrations/compressed_tensors.py,
    get_experts_scheme and DecompressExperts).
    """
    return engine_name(engine) == "transformers" and format == "compressed-tensors"


def expert_scheme_fits(scheme: Scheme) -> bool:
    """Whether such an engine can unpack experts of a scheme."""
    if not scheme.is_quantized or scheme.activation is not None:
        return False
    return scheme.symmetric is not False and (scheme.is_integer or scheme.weight == "fp8")


def engine_problems(architecture: str, format: str, engine: str) -> list[str]:
    """Return why an engine cannot load an architecture in a format; empty where it can."""
    why = _UNREAD.get((engine_name(engine), format, architecture))
    advice = "Choose another --engine, such as vllm."
    if why is None:
        return []
    return [f"{engine} loads no {format} checkpoint of {architecture}: {why}. {advice}"]


def is_written(architecture: str, format: str) -> bool:
    """Whether Advisor writes an architecture in a format; of GGUF it writes a few."""
    return format != "gguf" or architecture in GGUF_ARCHITECTURES


def layout_problems(
    config: Mapping[str, Any], format: str, schemes: Mapping[str, Scheme]
) -> list[str]:
    """Return why no loader would read such a checkpoint of this architecture.

    Args:
        config: config.json.
        format: Name of the format.
        schemes: Scheme of each quantized module.
    """
    problems = []
    experts = sorted(name for name in schemes if _EXPERT.match(name))
    if format == "bitsandbytes" and experts:
        problems.append(
            "format 'bitsandbytes' holds linears, but transformers keeps the experts of a layer in "
            f"one parameter that it does not quantize ({len(experts)} modules, first: "
            f"{experts[0]}). Use compressed-tensors or gptq."
        )
    whole = sorted(
        name
        for name, scheme in schemes.items()
        if format == "compressed-tensors"
        and is_transposed(config, f"{name}.weight")
        and not (scheme.is_integer and scheme.activation is None)
    )
    if whole:
        problems.append(
            f"{architecture_name(config)} stores matrices as [in, out], and loaders transpose "
            f"whatever is called .weight, as in {format} with {schemes[whole[0]]} ({len(whole)} "
            f"modules, first: {whole[0]}). Use weight-only integers."
        )
    return problems
