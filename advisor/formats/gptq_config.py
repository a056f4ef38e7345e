"""``quantization_config`` of GPTQ checkpoints: the most common scheme, and the rest in ``dynamic``.

Modules that differ from the most common scheme are in ``dynamic``: regular expressions, tried in
order with ``re.match``; ``+:`` overrides, ``-:`` keeps 16 bits. vLLM looks fused modules up by
their fused name (``qkv_proj``), gptqmodel each one by its own, so the expressions match both.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from advisor.formats.base import FUSED_ALIASES, HEAD, group_size_of, is_consecutive
from advisor.formats.gptq_versions import version_for
from advisor.formats.layouts import HEADS, expert_paths
from advisor.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.numerics.quantized_weight import QuantizedWeight


def build_config(
    weights: Mapping[str, QuantizedWeight], unquantized: Sequence[str]
) -> dict[str, Any]:
    """Return ``quantization_config``, with the most common scheme as the default."""
    rules = {name: _rule(weight) for name, weight in weights.items()}
    keys = [tuple(sorted(rule.items())) for rule in rules.values()]
    ranked = sorted(Counter(keys).items(), key=lambda item: (-item[1], item[0]))
    default = dict(ranked[0][0])
    dynamic: dict[str, dict[str, Any]] = {}
    others: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for name, rule in rules.items():
        if rule != default:
            others.setdefault(tuple(sorted(rule.items())), []).append(name)
    for key in sorted(others):
        dynamic[f"+:{_pattern(others[key])}"] = dict(key)
    if kept := [name for name in unquantized if name.rpartition(".")[2] not in HEADS]:
        dynamic[f"-:{_pattern(kept)}"] = {}
    config: dict[str, Any] = {
        **default,
        "checkpoint_format": version_for(weights.values()),
        "damp_percent": 0.01,
        "lm_head": HEAD in weights,
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "static_groups": False,
        "true_sequential": True,
    }
    if dynamic:
        config["dynamic"] = dynamic
    return dict(sorted(config.items()))


def _rule(weight: QuantizedWeight) -> dict[str, Any]:
    """Return the fields of the configuration that one weight needs."""
    return {
        "bits": int(weight.scheme.bits),
        "desc_act": not is_consecutive(weight),
        "group_size": group_size_of(weight.scheme),
        "sym": weight.zero_points is None,
    }


def _pattern(names: Sequence[str]) -> str:
    """Return an expression that matches these modules, also under their fused names."""
    others, paths = expert_paths(names)
    matched = set(others)
    parents: dict[str, set[str]] = {}
    for name in others:
        parent, _, leaf = name.rpartition(".")
        parents.setdefault(parent, set()).add(leaf)
    for parent, leaves in parents.items():
        matched.update(f"{parent}.{alias}" for alias, parts in FUSED_ALIASES if parts <= leaves)
    patterns = [re.escape(name) for name in sorted(matched)]
    # vLLM asks for the experts of a layer by their common path, gptqmodel for each of them.
    patterns += [rf"{re.escape(path)}(?:\.\d+\.\w+)?" for path in paths]
    return f"(?:{'|'.join(patterns)})$"


def resolve_rule(name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the fields that loaders use for a module; None where it stays 16-bit."""
    rule = {key: config.get(key) for key in ("bits", "group_size", "desc_act", "sym")}
    for pattern, override in (config.get("dynamic") or {}).items():
        if pattern.startswith("-:"):
            if re.match(pattern[2:], name):
                return None
        elif re.match(pattern.removeprefix("+:"), name):
            return {**rule, **override}
    return rule


def scheme_of(rule: Mapping[str, Any]) -> Scheme:
    """Return the scheme that a configuration stands for."""
    grouped = rule["group_size"] > 0
    return Scheme(
        "gptq",
        f"int{rule['bits']}",
        granularity="group" if grouped else "channel",
        group_size=rule["group_size"] if grouped else -1,
        symmetric=bool(rule["sym"]),
        activation_order=bool(rule["desc_act"]) and grouped,
    )
