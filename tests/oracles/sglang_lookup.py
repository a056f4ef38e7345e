"""What SGLang makes of a compressed-tensors configuration: a twin written from its rules.

Release 0.5.23, ``compressed_tensors/utils.py`` and ``get_scheme_dict``: a layer is left alone if
the ``ignore`` list names it (or its end, or an expression matches), all parts of a fused one alike.
Else its group is the first with a target that is its name (or an expression), then one whose target
lies within its class's name, then that of its first part if all parts have one. Which layers are
fused of what says the model's class in SGLang, not the checkpoint: many classes, Llama's among
them, say nothing.
"""

from __future__ import annotations

import re

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
CLASSES = {"qkv_proj": "QKVParallelLinear", "gate_up_proj": "MergedColumnParallelLinear"}


def _is(name, target):
    return re.match(target[3:], name) is not None if target.startswith("re:") else name == target


def ignored(name, config, fused):
    """Whether a layer stays in 16 bits."""

    def listed(part):
        return any(
            _is(part, entry) or (not entry.startswith("re:") and part.endswith(f".{entry}"))
            for entry in config["ignore"]
        )

    leaf = name.rpartition(".")[2]
    if leaf in fused and name not in config["ignore"]:
        found = {listed(name.replace(leaf, part)) for part in fused[leaf]}
        if len(found) > 1:
            raise ValueError(f"{name}: parts differ")
        return found.pop()
    return listed(name)


def group_of(name, config, fused):
    """The config group of a layer; None where it stays in 16 bits."""
    if ignored(name, config, fused):
        return None
    targets = {t: key for key, group in config["config_groups"].items() for t in group["targets"]}
    leaf = name.rpartition(".")[2]
    kind = CLASSES.get(leaf, "RowParallelLinear").lower()
    for target in targets:
        if _is(name, target):
            return targets[target]
    for target in targets:
        if not target.startswith("re:") and target.lower() in kind:
            return targets[target]
    parts = [name.replace(leaf, part) for part in fused.get(leaf, ())]
    found = [next((t for t in targets if _is(part, t)), None) for part in parts]
    if found and all(found):
        return targets[found[0]]
    raise ValueError(f"no target for {name}")


def group_of_experts(path, config, fused):
    """The config group of the experts of a layer, by the names of the first one."""
    found = {
        group_of(f"{path}.0.{leaf}", config, fused)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    if len(found) > 1:
        raise ValueError(f"{path}: projections differ")
    return found.pop()
