"""Which family a model is of, for evidence: from its configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advisor.modelspec import ModelSpec

_BY_ARCHITECTURE: tuple[tuple[str, str], ...] = (
    ("qwen", "qwen"),
    ("mixtral", "mistral"),
    ("mistral", "mistral"),
    ("ministral", "mistral"),
    ("gemma", "gemma"),
    ("phi", "phi"),
    ("opt", "opt"),
    ("bloom", "bloom"),
    ("falcon", "falcon"),
    ("gpt2", "gpt2"),
    ("gptneox", "gptneox"),
    ("deepseek", "deepseek"),
)
_TRAINING_TOKENS = {
    "gpt2": 0.01, "opt": 0.18, "bloom": 0.366, "gptneox": 0.4, "llama1": 1.2, "falcon": 1.5,
    "llama2": 2.0, "gemma": 6.0, "phi": 6.0, "mistral": 8.0, "deepseek": 10.0, "llama3": 15.0,
    "qwen": 16.0, "smollm": 4.0,
}  # fmt: skip
"""10^12 tokens, as the families' model cards and papers say; Mistral's is a guess."""
_UNKNOWN_TOKENS = 4.0
_LLAMA3_VOCABULARY = 128_000
_LLAMA2_VOCABULARY = 32_000
_SMOLLM_VOCABULARY = 49_152


def family_of(spec: ModelSpec) -> str:
    """Return the family: ``llama2``, ``llama3``, ``qwen``, ... or ``other``.

    Many fine-tuned and unrelated models carry the Llama architecture, so the vocabulary and the
    context length tell the generations apart.
    """
    architecture = spec.architecture.lower()
    if "llama" in architecture:
        return _llama(spec)
    for part, family in _BY_ARCHITECTURE:
        if part in architecture:
            return family
    return "other"


def _llama(spec: ModelSpec) -> str:
    name = spec.id.lower()
    if spec.vocabulary_size == _SMOLLM_VOCABULARY:
        return "smollm"
    if any(part in name for part in ("tiny", "yi-")):
        return "other"
    if _LLAMA3_VOCABULARY <= spec.vocabulary_size <= _LLAMA3_VOCABULARY + 1000:
        return "llama3"
    if _LLAMA2_VOCABULARY <= spec.vocabulary_size <= _LLAMA2_VOCABULARY + 100:
        positions = spec.text_config.get("max_position_embeddings")
        return "llama1" if positions == 2048 and "llama-2" not in name else "llama2"
    return "other"


def training_tokens(family: str) -> float:
    """Return about how many tokens a family was trained on, in 10^12."""
    return _TRAINING_TOKENS.get(family, _UNKNOWN_TOKENS)
