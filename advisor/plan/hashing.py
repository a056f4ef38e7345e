"""Content hashes: a plan speaks of bytes, not of names."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_CHUNK_BYTES = 1 << 22
_DOWNLOADED = re.compile(
    r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$"
)
"""Where huggingface_hub keeps what it downloads."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files that decide how text becomes tokens."""


@dataclass(frozen=True, slots=True)
class ModelHashes:
    """sha256 of what decides a model's behaviour.

    Attributes:
        config: Of config.json, without keys that only say who wrote it.
        tokenizer: Of the tokenizer's files.
        weights: Of the safetensors files' content.
    """

    config: str
    tokenizer: str
    weights: str


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_files(paths: Iterable[Path]) -> str:
    """Return one sha256 over the names and contents of several files."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def sha256_json(document: Any) -> str:
    """Return the sha256 of a JSON document, however its keys are ordered."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_model(folder: Path) -> ModelHashes:
    """Hash a model's folder: config.json, tokenizer files and safetensors files.

    Args:
        folder: A Hugging Face model folder.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_version", None)
    config.pop("_name_or_path", None)
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return ModelHashes(
        config=sha256_json(config),
        tokenizer=sha256_files(tokenizer),
        weights=sha256_files(folder.glob("*.safetensors")),
    )


def model_name(folder: Path) -> tuple[str, str | None]:
    """Return the name by which a plan finds a model again, and the commit it was at.

    What was downloaded is called by its Hugging Face id, so that the plan means the same on another
    machine. A folder ``a/b`` is written ``./a/b``: else it would read as such an id.
    """
    found = _DOWNLOADED.search(folder.absolute().as_posix())
    if found is not None:
        return f"{found['owner']}/{found['name']}", found["commit"]
    return (f"./{folder}" if is_hub_id(str(folder)) else str(folder)), None


def is_hub_id(name: str) -> bool:
    """Whether a model's name reads as a Hugging Face id and not as a folder."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
