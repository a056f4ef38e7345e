"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

_TEXT = (
    "The quick brown fox jumps over the lazy dog. A function returns the value of its last "
    "expression. Every module has a name and a table of symbols. Numbers are compared by value, "
    "sequences element by element; mappings have no order that one should rely upon. "
)


def _tokenizer():
    """Return a byte-level BPE tokenizer with a small vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def build_llama(folder: Path, **overrides) -> Path:
    """Save a tiny random Llama with its tokenizer and return its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    values = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 1,
    } | overrides  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**values))
    with torch.no_grad():
        # Sharper than the default initialisation, so that the outputs depend on every linear.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            else:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_llama_folder(tmp_path_factory) -> Path:
    """A tiny random Llama (2 blocks, hidden 64, grouped queries, tied head) with a tokenizer."""
    return build_llama(tmp_path_factory.mktemp("models") / "random-llama")


@pytest.fixture(scope="session")
def random_llama(random_llama_folder):
    """The tiny random Llama, loaded in float32. Do not change its weights."""
    from advisor.models.load import load_model

    return load_model(random_llama_folder)


@pytest.fixture
def llama_builder(tmp_path):
    """Build a tiny random Llama with other settings: ``llama_builder(num_hidden_layers=3)``."""

    def build(name: str = "llama", **overrides) -> Path:
        return build_llama(tmp_path / name, **overrides)

    return build


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    """Keep every test out of the user's cache."""
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "cache"))
