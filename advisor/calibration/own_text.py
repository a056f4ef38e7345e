"""Text that a model writes itself, to calibrate on: self-calibration.

Sequences are sampled from the model, so that what codes are fitted to is what the model expects of
text, whatever it was trained on, and no text need be at hand.

Every token goes through all blocks before the next one is known, with the keys and values of those
before it kept. Weights stay where they lie, in 16 bits, and are computed with in 16 bits where the
device is good at that: which token is drawn needs no more. An accelerator with room for them all
gets them once, the host and others block by block for every token, as in every other pass.

Which tokens are drawn depends on the last bits of logits, and so on the machine, its number of
threads and versions. So they are kept: in the cache, and beside the plan that was made with them;
and what a stopped run wrote is kept with all that it takes to go on as if it had not been stopped
(:mod:`advisor.calibration.drafts`).

Reference: Williams, Chrysostomou and Aletras, "Self-calibration for Language Model Quantization and
Pruning", arXiv:2410.17170. Differs from the paper: the temperature is 1 throughout (their schedule
was not tried), and special tokens are not written. Also Liu et al., "LLM-QAT", arXiv:2305.17888
(sampled, rather than likeliest, tokens).
"""

from __future__ import annotations

import hashlib
import math
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from advisor.calibration.corpora import OWN_TEXT
from advisor.calibration.decoding import pieced_cache, room_for
from advisor.calibration.tokens import TokenSequences, hash_tokens, leading_tokens
from advisor.models.blocks import BlockRunner, rows_at_once
from advisor.models.casting import casting_of
from advisor.models.device import device_memory, device_name
from advisor.models.inspect import find_blocks
from advisor.plan.hashing import sha256_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from advisor.calibration.drafts import Draft
    from advisor.models.load import LoadedModel

VERSION = 2
"""Of everything here that decides which tokens are drawn."""
_MOST_ROWS = 64
"""Sequences that are written at once: more of them make a token little cheaper."""
_LEAST_CACHE_BYTES = 1 << 26
_CACHE_SHARE = 0.75
"""Keys and values may take this share of the weights' bytes, or of what an accelerator has left."""
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class Writing:
    """How a model is made to write.

    Attributes:
        prompt: Tokens that every sequence follows upon.
        kept: How many of them belong to the sequence: all, where the tokenizer puts them in front
            of every text, else none.
        banned: Tokens that are never written.
    """

    prompt: tuple[int, ...]
    kept: int
    banned: tuple[int, ...]


def writing_of(loaded: LoadedModel) -> Writing:
    """Return how a model is made to write.

    It starts from what begins a text: the tokenizer's token for that, or else the one that ends
    the text before. Special tokens, and those that the tokenizer does not know, are not written:
    other text to calibrate on has none of them, and the model goes on instead of ending.
    """
    tokenizer, config = loaded.tokenizer, loaded.model.config
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {int(token) for token in tokenizer.all_special_ids}
    special |= {int(token) for token, entry in added.items() if entry.special}
    known, vocabulary = len(tokenizer), int(getattr(config, "vocab_size", len(tokenizer)))
    banned = {token for token in special if token < vocabulary} | set(range(known, vocabulary))
    leading = tuple(leading_tokens(tokenizer))
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = next((int(token) for token in starts if token is not None), 0)
    return Writing(leading or (start,), len(leading), tuple(sorted(banned)))


def own_text_key(loaded: LoadedModel, sequences: int, sequence_length: int, seed: int) -> str:
    """Return the name under which a model's own text is kept."""
    how = asdict(writing_of(loaded))
    return sha256_json([VERSION, loaded.fingerprint, how, sequences, sequence_length, seed])[:32]


def as_sequences(tokens: Tensor, seed: int) -> TokenSequences:
    """Return written tokens as calibration sequences; their hash is the hash of the text."""
    digest = hash_tokens(tokens)
    return TokenSequences(
        tokens, OWN_TEXT, digest, seed, digest, sources=(OWN_TEXT,) * tokens.shape[0]
    )


def write(
    loaded: LoadedModel,
    *,
    sequences: int,
    sequence_length: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    draft: Draft | None = None,
) -> Tensor:
    """Let a model write sequences, at temperature 1.

    Memory holds one block, embedding and head; and the keys and values of some sequences, at most
    three quarters as large as the weights, unless a draft keeps them in files.

    Args:
        loaded: The unquantized model.
        sequences: How many.
        sequence_length: Tokens of each, a leading special token included.
        seed: Of what is drawn. A sequence's share of chance depends on its number alone.
        progress: Called with (tokens written, tokens in all) of all sequences.
        draft: Keeps what is written, and has what a stopped run wrote of the same text: writing
            goes on from there, and comes out as if it had not been stopped.

    Returns:
        int64 [sequences, sequence_length], the same on each run of one machine.

    Raises:
        InputError: The draft's folder cannot be written, or has too little room.
    """
    writing = writing_of(loaded)
    steps = sequence_length - writing.kept
    chance = uniforms(sequences, steps, seed)
    parts = [] if draft is None else draft.finished()
    with _ready(loaded), torch.no_grad():
        rows = None if draft is None else draft.rows
        if rows is None:
            most = _rows_at_once(loaded, writing, sequence_length, draft)
            rows = math.ceil(sequences / math.ceil(sequences / most))  # as many each time
        for first in range(sum(map(len, parts)), sequences, rows):
            part = chance[first : first + rows]

            def report(step: int, first: int = first, count: int = len(part)) -> None:
                if progress is not None:
                    progress(first * steps + step * count, sequences * steps)

            parts.append(_continue(loaded, writing, part, report, draft))
            if draft is not None:
                draft.finish(parts[-1], rows)
    return torch.cat(parts)


def written_by(loaded: LoadedModel) -> dict[str, Any]:
    """Return what decides the last bits of logits, and so how a text that was begun goes on."""
    return {
        "torch": torch.__version__, "device": device_name(loaded.device),
        "threads": torch.get_num_threads(), "kernels": torch.backends.cpu.get_cpu_capability(),
        "dtype": str(writing_dtype(loaded)),
    }  # fmt: skip


def uniforms(sequences: int, steps: int, seed: int) -> Tensor:
    """Return the numbers in [0, 1) that choose tokens, float64 [sequences, steps]."""
    rows = []
    for row in range(sequences):
        digest = hashlib.sha256(f"1:{seed}:{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def pick(logits: Tensor, chance: Tensor, banned: Sequence[int]) -> Tensor:
    """Return the tokens that numbers in [0, 1) fall upon, by the inverse of the distribution.

    Args:
        logits: [rows, vocabulary].
        chance: float64 [rows].
        banned: Tokens with no probability.

    Returns:
        int64 [rows].
    """
    rows = rows_at_once(logits.shape[1], logits.device)
    parts = zip(torch.split(logits, rows), torch.split(chance, rows), strict=True)
    return torch.cat([_pick_few(few, some, banned) for few, some in parts])


def _pick_few(logits: Tensor, chance: Tensor, banned: Sequence[int]) -> Tensor:
    logits = logits.to(torch.float32, copy=True)
    logits[:, list(banned)] = -torch.inf
    reached = torch.cumsum(torch.softmax(logits, dim=-1), dim=-1, dtype=torch.float64)
    wanted = chance.to(reached.device) * reached[:, -1]
    # Strictly above: a token without probability adds nothing, and is passed over.
    return torch.searchsorted(reached, wanted[:, None], right=True)[:, 0].clamp_max(
        logits.shape[1] - 1
    )


def _continue(
    loaded: LoadedModel,
    writing: Writing,
    chance: Tensor,
    report: Callable[[int], None],
    draft: Draft | None,
) -> Tensor:
    """Write some sequences at once, or on, int64 [rows, length]."""
    model, prompt = loaded.model, torch.tensor(writing.prompt, device=loaded.device)
    kept, steps = writing.kept, chance.shape[1]
    # One tensor for all tokens: each one's own would lie between large ones and part the heap.
    written = prompt.new_empty(len(chance), kept + steps)
    written[:, :kept] = prompt[:kept]
    given, done, filled = prompt.expand(len(chance), -1), 0, 0
    if draft is not None and draft.begun is not None:
        done, filled = draft.begun.shape[1] - kept, draft.filled
        written[:, : kept + done] = draft.begun.to(loaded.device)
        given = written[:, kept + done - 1 : kept + done]
    cache = pieced_cache(
        len(find_blocks(model)), len(prompt) + steps, filled=filled,
        room_of=None if draft is None else draft.room,
    )  # fmt: skip
    for place in range(kept + done, kept + steps):
        output = model(input_ids=given, past_key_values=cache, use_cache=True)
        written[:, place] = pick(output.logits[:, -1], chance[:, place - kept], writing.banned)
        given = written[:, place : place + 1]
        if draft is not None and draft.due:
            draft.save(written[:, : place + 1].cpu(), len(prompt) + place - kept, len(chance))
        report(place - kept + 1)
    return written.cpu()


@contextmanager
def _ready(loaded: LoadedModel) -> Iterator[None]:
    """Hold what is used for every token: embedding and head, and all blocks where there is room."""
    casting = casting_of(loaded.model)
    with ExitStack() as stack:
        stack.enter_context(casting.computing_in(writing_dtype(loaded)))
        runner = BlockRunner(loaded.model)
        stack.enter_context(runner.at_embedding())
        stack.enter_context(runner.at_head())
        if _has_room(loaded):
            for block in range(len(runner.blocks)):
                stack.enter_context(runner.at_block(block))
        yield


def writing_dtype(loaded: LoadedModel) -> torch.dtype:
    """Return the type to write in: bfloat16 where all weights are stored so and it is fast.

    One core with AVX-512 writes SmolLM2-135M's tokens, 32 at once, in 0.5 of the time so.
    """
    casting = casting_of(loaded.model)
    kinds = {
        casting.stored(parameter).dtype
        for parameter in loaded.model.parameters()
        if parameter.is_floating_point()
    }
    fast = loaded.device.type != "cpu" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.bfloat16 if kinds == {torch.bfloat16} and fast else loaded.dtype


def _stored_bytes(loaded: LoadedModel) -> int:
    casting = casting_of(loaded.model)
    return sum(casting.stored(parameter).nbytes for parameter in loaded.model.parameters())


def _has_room(loaded: LoadedModel) -> bool:
    """Whether an accelerator could hold all weights, and half as much again."""
    if loaded.device.type == "cpu":
        return False
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    needed = parameters * writing_dtype(loaded).itemsize
    return device_memory(loaded.device)[0] > 1.5 * needed


def _rows_at_once(loaded: LoadedModel, writing: Writing, length: int, draft: Draft | None) -> int:
    """Return how many sequences are written at once, after a look at what one token keeps."""
    cache = pieced_cache(len(find_blocks(loaded.model)), len(writing.prompt))
    prompt = torch.tensor([writing.prompt], device=loaded.device)
    output = loaded.model(input_ids=prompt, past_key_values=cache, use_cache=True)
    kept: int = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    per_token = max(1, kept // prompt.shape[1])
    free = _stored_bytes(loaded)
    if loaded.device.type != "cpu":
        free = device_memory(loaded.device)[0]
    room = max(_LEAST_CACHE_BYTES, int(_CACHE_SHARE * free))
    most = min(_MOST_ROWS, _LOGITS_AT_ONCE // int(output.logits.shape[-1]))
    if draft is not None:
        tokens = room_for(len(writing.prompt) + length - writing.kept)
        most = min(most, draft.most_rows(per_token * tokens))
    return max(1, min(most, room // (per_token * length)))
