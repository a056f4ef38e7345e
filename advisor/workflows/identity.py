"""Is this the model, and are these the versions, that a plan speaks of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.errors import InputError, join_errors
from advisor.plan.hashing import hash_model

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from advisor.plan.schema import Plan


def device_warnings(plan: Plan, device: torch.device) -> tuple[str, ...]:
    """Return a sentence where the plan's codes were computed on another device than this one."""
    from advisor.search.planning import computed_on

    there, here = plan.computed_on, computed_on(device)
    if there is None or there.name == here.name:
        return ()
    return (
        f"this is computed on {here.name} ({here.device}), the plan was on {there.name} "
        f"({there.device}): they round differently, and a few codes may differ",
    )


def version_warnings(plan: Plan) -> tuple[str, ...]:
    """Return a sentence for each version that differs from the plan's."""
    from advisor.search.planning import versions

    here = versions()
    return tuple(
        f"{name} is {here.get(name, 'not installed')} here, the plan was made with {version}"
        for name, version in plan.versions.items()
        if here.get(name) != version
    )


def check_model(plan: Plan, folder: Path) -> None:
    """Refuse a model that is not the plan's.

    Raises:
        InputError: Configuration, tokenizer or weights have another hash; all are listed.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json: it is not a model folder.")
    found = hash_model(folder)
    pairs = {
        "config.json": (found.config, plan.model.config_sha256),
        "the tokenizer": (found.tokenizer, plan.model.tokenizer_sha256),
        "the weights": (found.weights, plan.model.weights_sha256),
    }
    problems = [
        f"{part} of {folder}: sha256 is {here[:16]}, the plan says {there[:16]}."
        for part, (here, there) in pairs.items()
        if here != there
    ]
    if problems:
        raise InputError(
            "the model must be the one that the plan was made for: give it with --model, or tune "
            f"this one. {join_errors(problems)}"
        )
