"""What is understood otherwise than asked: a longer context than the model has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advisor.modelspec import ModelSpec


def served_context(spec: ModelSpec, context: int) -> int:
    """Return the tokens of a sequence that an engine serves of those asked for."""
    return min(context, spec.longest_context or context)


def context_notes(spec: ModelSpec, context: int) -> tuple[str, ...]:
    """Say where a context is cut; nothing where it is not.

    Reference: vLLM ``config/model.py`` (``_get_and_verify_max_len`` refuses a ``--max-model-len``
    above what the config derives).
    """
    served = served_context(spec, context)
    if served == context:
        return ()
    return (
        f"The model was made for {served} positions, and engines refuse more: everything here is "
        f"for a context of {served}, not {context}.",
    )
