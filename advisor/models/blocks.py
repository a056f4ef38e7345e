"""Run a model block by block: what calibration and evaluation need to hold one at a time.

While a part runs its parameters are cast (:mod:`advisor.models.casting`). That happens by itself;
who runs a part many times in a row, or needs it for a backward pass, holds it with
:meth:`BlockRunner.at_embedding`, :meth:`BlockRunner.at_block` or :meth:`BlockRunner.at_head`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from advisor.errors import AdvisorError
from advisor.models.allocator import give_back
from advisor.models.casting import casting_of
from advisor.models.inspect import architecture_of, find_blocks, logits_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

_CHECK_TOKENS = 8
_CHECK_TOLERANCE = 0.02
_VALUES_AT_ONCE = 1 << 19
_LOGITS_AT_ONCE = 1 << 23
_FEWEST_TOKENS, _MOST_TOKENS = 32, 256
_ON_ACCELERATOR = 1 << 25
"""Values of logits at once there, where each call costs a launch and memory is larger: 128 MB in
float32, and four to five times that with all copies."""
_MOST_TOKENS_THERE = 1024


def head_tokens(vocabulary: int, device: torch.device | None = None) -> int:
    """Return how many tokens go through the head at once: a power of two, from 32 to 256.

    On an accelerator up to 1024.

    Their logits take at most 32 MB in float32 up to a vocabulary of 262144. Fewer tokens would
    read the head too often: beside 256 tokens, 64 take 1.1 to 1.2 times as long for each, 32 1.3
    times and 16 1.9 times (vocabulary 49152, hidden size 576, one AVX-512 core under load).
    """
    if device is None or device.type == "cpu":
        most = max(_FEWEST_TOKENS, min(_MOST_TOKENS, _LOGITS_AT_ONCE // vocabulary))
    else:
        most = max(_FEWEST_TOKENS, min(_MOST_TOKENS_THERE, _ON_ACCELERATOR // vocabulary))
    return 1 << (most.bit_length() - 1)


def rows_at_once(vocabulary: int, device: torch.device | None = None) -> int:
    """Return how many tokens' logits are worked on at once, so that copies of them stay small."""
    on_cpu = device is None or device.type == "cpu"
    return max(1, (_VALUES_AT_ONCE if on_cpu else _ON_ACCELERATOR) // vocabulary)


class BlockRunner:
    """The stages of a decoder model: embedding, each block, and the head.

    Blocks get exactly the arguments (masks, rotary positions) that the model itself would pass:
    they are recorded from the model with its blocks short-circuited. Sequences have no padding,
    so the arguments depend only on the shape of a batch.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the stages.

        Args:
            model: A loaded model of a known architecture.

        Raises:
            InputError: The architecture is unknown.
        """
        architecture = architecture_of(model)
        self.model = model
        self.blocks = find_blocks(model)
        self._casting = casting_of(model)
        self._embedding = model.get_submodule(architecture.embedding)
        self._base = model.get_submodule(architecture.blocks.split(".")[0])
        present = dict(model.named_modules())
        self._final = [present[name] for name in architecture.final if name in present]
        self._head = model.get_submodule(architecture.head)
        self._returns_tuple = architecture.returns_tuple
        self._arguments: dict[tuple[int, ...], list[tuple[tuple[Any, ...], Mapping[str, Any]]]] = {}

    @property
    def compute_dtype(self) -> torch.dtype:
        """Data type of hidden states."""
        return self._casting.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._casting.device

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the logits tell apart."""
        config: Any = self.model.config
        return int(config.vocab_size)

    @property
    def head_module(self) -> nn.Module:
        """The linear that gives the logits."""
        return self._head

    def at_embedding(self) -> AbstractContextManager[None]:
        """Hold the token embedding ready to compute."""
        return self._alone(self._embedding)

    def at_block(self, index: int) -> AbstractContextManager[None]:
        """Hold a block ready to compute, forward and backward."""
        return self._alone(self.blocks[index])

    def at_head(self) -> AbstractContextManager[None]:
        """Hold the final norm and the head ready to compute, forward and backward."""
        return self._alone(*self._final, self._head)

    @contextmanager
    def _alone(self, *modules: nn.Module) -> Iterator[None]:
        """Hold modules; what ran before them has left no memory behind, nor do they."""
        give_back()
        try:
            with self._casting.hold(*modules):
                yield
        finally:
            give_back()

    def forget(self) -> None:
        """Drop the arguments of the shapes that were embedded so far."""
        self._arguments.clear()

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the first block's input, shape [batch, length, hidden]."""
        recorded: list[tuple[Tensor, tuple[Any, ...], Mapping[str, Any]]] = []

        def record(hidden_states: Tensor, *positional: Any, **arguments: Any) -> Any:
            recorded.append((hidden_states, positional, arguments))
            return (hidden_states,) if self._returns_tuple else hidden_states

        with self._short_circuit(record), self._casting.idle(self.blocks), torch.no_grad():
            self._base(input_ids=tokens, use_cache=False)
        self._arguments[tuple(tokens.shape)] = [(rest, named) for _, rest, named in recorded]
        return recorded[0][0]

    @contextmanager
    def _short_circuit(self, forward: Any) -> Iterator[None]:
        """Replace every block's forward for a while."""
        try:
            for block in self.blocks:
                block.forward = forward
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Return a block's output for the input of a batch whose shape was embedded before."""
        positional, arguments = self._arguments[tuple(hidden.shape[:2])][index]
        output = self.blocks[index](hidden, *positional, **arguments)
        # Some releases of transformers return a tuple that begins with the hidden states.
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits of the last block's output."""
        for module in self._final:
            hidden = module(hidden)
        return logits_of(self.model, hidden)

    def check(self, tokens: Tensor) -> None:
        """Check that the stages together are the model, on the first few tokens of a batch.

        Raises:
            AdvisorError: They are not: this release of transformers runs the architecture in a
                way that this version does not know.
        """
        tokens = tokens[:1, :_CHECK_TOKENS]
        with torch.no_grad():
            hidden = self.embed(tokens)
            for index in range(len(self.blocks)):
                hidden = self.run(index, hidden)
            ours = self.head(hidden).float()
            theirs = self.model(input_ids=tokens, use_cache=False).logits.float()
        difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
        if not difference <= _CHECK_TOLERANCE:
            raise AdvisorError(
                f"running {type(self.model).__name__} block by block gives other logits than the "
                f"model (relative difference {difference:.2g}); this version of transformers runs "
                "it in a way that is not known here. Please report the two versions."
            )
