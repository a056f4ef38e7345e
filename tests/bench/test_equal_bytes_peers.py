"""Which checkpoints of other libraries the grid at equal bytes asks for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from advisor.modelspec.types import LinearSpec

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def peers():
    """The script of this folder."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import equal_bytes_peers
    finally:
        sys.path.pop(0)
    return equal_bytes_peers


def linears(*widths):
    return [LinearSpec(str(width), width, 8, 0, str(width), str(width)) for width in widths]


def test_groups_of_128_are_asked_for_where_they_divide_all_inputs(peers):
    assert peers.peers_for(linears(256, 1536)) == peers.PEERS


def test_where_they_do_not_smaller_groups_take_their_place_once(peers):
    asked = [peers.Peer("a", "gptq-int4-g128-sym", 4), peers.Peer("a", "gptq-int4-g64-sym", 4.5),
             peers.Peer("b", "gptq-int4-g128-sym", 4), peers.Peer("b", "bnb-nf4", 4.5)]  # fmt: skip
    found = peers.peers_for(linears(576, 1536), asked)
    assert [(peer.library, peer.scheme, peer.level) for peer in found] == [
        ("a", "gptq-int4-g64-sym", 4), ("b", "gptq-int4-g64-sym", 4), ("b", "bnb-nf4", 4.5),
    ]  # fmt: skip
    thirty_two = peers.peers_for(linears(576, 96), asked)
    assert [peer.scheme for peer in thirty_two][:2] == ["gptq-int4-g32-sym", "gptq-int4-g64-sym"]


def test_answers_are_for_the_engines_that_are_wanted(peers):
    gptq, gguf = peers.Peer("gptqmodel", "a", 4), peers.Peer("llama.cpp", "q4_0", 4.5)
    assert peers.engines_for(gptq) == ("vllm", "transformers")
    assert peers.engines_for(gptq, ["transformers", "llama.cpp"]) == ("transformers",)
    assert peers.engines_for(gguf, ["transformers", "llama.cpp"]) == ("llama.cpp",)
    assert peers.engines_for(gguf, ["vllm"]) == ()
