"""examples/build_corpus.py drops topics that repeat others."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("corpus", EXAMPLES / "build_corpus.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_topic_inside_a_longer_one_is_dropped(script: ModuleType) -> None:
    words = [f"w{number}" for number in range(100)]
    texts = {
        "inside": " ".join(words[10:50]),
        "whole": " ".join(words),
        "short": "a few words",
        "other": " ".join(words[80:] + [f"v{number}" for number in range(60)]),
    }
    assert list(script.without_repeats(texts)) == ["other", "short", "whole"]


def test_shingles_are_every_run_of_words(script: ModuleType) -> None:
    assert script.shingles("a b\nc  d", 3) == {("a", "b", "c"), ("b", "c", "d")}
    assert script.shingles("a b", 3) == set()
