"""A tokenizer as GGUF metadata, from tokenizer.json and its companions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_DIGITS_OF_THREE = r"\p{N}{1,3}"
_DIGIT_ALONE = r"|\p{N}|"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def add_tokenizer(writer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Write tokens, merges, types, special ids and chat template.

    Args:
        writer: A ``gguf.GGUFWriter``.
        folder: The model's folder.
        config: Its config.json.

    Raises:
        InputError: The tokenizer is of a kind that GGUF files are not written for.
    """
    document = read_tokenizer(folder)
    model = document["model"]
    merges = [_merge(pair) for pair in model["merges"]]
    size = int(config.get("vocab_size") or len(model["vocab"]))
    byte_fallback = bool(model.get("byte_fallback"))
    tokens, types = _tokens(document, size, byte_fallback)
    writer.add_tokenizer_model("llama" if byte_fallback else "gpt2")
    if not byte_fallback:
        writer.add_tokenizer_pre(pre_tokenizer(document))
    writer.add_token_list(tokens)
    if byte_fallback:
        writer.add_token_scores(_scores(tokens, merges))
    writer.add_token_types(types)
    if not byte_fallback:
        writer.add_token_merges(merges)
    _add_special(writer, folder, config, document)


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """Return tokenizer.json of a folder.

    Raises:
        InputError: There is none, or it is of a kind that GGUF files are not written for.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json: save the tokenizer as a fast one first.")
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model = document["model"]
    if model.get("type") != "BPE":
        raise InputError(
            f"GGUF files are written for BPE tokenizers, but {path} is {model.get('type')!r}. "
            "Use llama.cpp's convert_hf_to_gguf.py for this model."
        )
    if not model.get("byte_fallback"):
        pre_tokenizer(document)
    return document


def pre_tokenizer(document: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the way a byte-level tokenizer splits text.

    Args:
        document: tokenizer.json.

    Raises:
        InputError: It splits in a way that has no name here.
    """
    found = document.get("pre_tokenizer") or {}
    steps: list[Any] = [found]
    if found.get("type") == "Sequence":
        steps = list(found.get("pretokenizers") or ())
    kinds = [step.get("type") for step in steps]
    pattern = "".join(str((step.get("pattern") or {}).get("Regex", "")) for step in steps)
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if _CONTRACTIONS in pattern and _DIGITS_OF_THREE in pattern:
        return "llama-bpe"
    if _CONTRACTIONS in pattern and _DIGIT_ALONE in pattern:
        return "qwen2"
    raise InputError(
        f"llama.cpp has no known name for this tokenizer's way to split text ({kinds}). "
        "Use llama.cpp's convert_hf_to_gguf.py for this model."
    )


def _merge(pair: Any) -> str:
    """Return a merge as GGUF holds it; tokenizer.json has pairs, or text in older files."""
    return pair if isinstance(pair, str) else " ".join(pair)


def _tokens(
    document: Mapping[str, Any], size: int, byte_fallback: bool
) -> tuple[list[str], list[int]]:
    """Return every token by id and its type; ids that no token has are padding."""
    added = {entry["id"]: entry for entry in document.get("added_tokens") or ()}
    by_id = {index: token for token, index in document["model"]["vocab"].items()}
    by_id |= {index: entry["content"] for index, entry in added.items()}
    unknown = document["model"].get("unk_token")
    tokens, types = [], []
    for index in range(max(size, 1 + max(by_id))):
        token = by_id.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(_UNUSED)
            continue
        kind = _NORMAL
        if index in added:
            kind = _CONTROL if added[index].get("special") else _USER_DEFINED
        if byte_fallback and token == unknown:
            kind = _UNKNOWN
        elif byte_fallback and len(token) == 6 and token.startswith("<0x"):
            kind = _BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return SentencePiece scores that merge in the order of the merges."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), number)
    last = float(len(merges))
    return [-float(rank.get(token, last)) for token in tokens]


def _add_special(
    writer: Any, folder: Path, config: Mapping[str, Any], document: Mapping[str, Any]
) -> None:
    settings: dict[str, Any] = {}
    path = folder / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
    ids = dict(document["model"]["vocab"])
    ids |= {entry["content"]: entry["id"] for entry in document.get("added_tokens") or ()}

    def special(name: str) -> int | None:
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            return int(ids[token])
        given = config.get(f"{name}_token_id")
        given = given[0] if isinstance(given, list) and given else given
        return int(given) if isinstance(given, int) else None

    if (beginning := special("bos")) is not None:
        writer.add_bos_token_id(beginning)
    if (end := special("eos")) is not None:
        writer.add_eos_token_id(end)
    if (unknown := special("unk")) is not None:
        writer.add_unk_token_id(unknown)
    if (padding := special("pad")) is not None:
        writer.add_pad_token_id(padding)
    writer.add_add_bos_token(_begins(document, settings))
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
    elif isinstance(settings.get("chat_template"), str):
        writer.add_chat_template(settings["chat_template"])


def _begins(document: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return whether encoding puts the beginning token first."""
    if isinstance(settings.get("add_bos_token"), bool):
        return bool(settings["add_bos_token"])
    processor = document.get("post_processor") or {}
    parts = processor.get("processors") or [processor]
    single = [step for part in parts for step in part.get("single") or ()]
    return bool(single) and "SpecialToken" in single[0]
