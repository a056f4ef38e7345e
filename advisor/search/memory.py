"""Memory of a search, predicted before it starts.

With mapped weights at most one of these is there at a time, in host memory beside what torch,
transformers and the tokenizer take (``_PROCESS_BYTES``), or on the accelerator that computes; h is
the hidden size, V the vocabulary, P the weights of the largest block, T the tokens that run
together:

    head        4·V·(h + head_tokens(V)) + 4·h·T     the head in float32, logits, hidden states of
                                                     8192 tokens, or of 32 sequences
    collecting  4·P + 12·T·(a + L·heads)             a block and its gradients' intermediate values
                + 4·(prefixes + 1)·Σ in² + 8·Σ out²  for 1024 tokens (a: all inputs and outputs of a
                                                     token; an expert's share), sums of inputs and
                                                     output gradients
    scoring     4·n·in·O·(1 + max(¼, 128/in))    linears that share an input, with O outputs, as n
                + 16·in·O + 16·in² + 4·S         types at once (4·n·in·O: at most 1 GiB); S: Σ out²
                                                 of those that keep a whole G
    quantizing  8·P + the larger of              a block's weights, and those fitted to what the
                  12·Σ in² + 24·max in²          quantized blocks pass on: its sums, factors in
                  4·Σ in² + 20·in²               float64; or linears that share an input, with
                  + 24·in·O + 12·S               feedback among their outputs

Nothing grows with the number of blocks, nor V with the tokens. Where the weights cannot be mapped,
all of them are there too, in the type that is computed in. Where an accelerator computes, the host
has beside these only the sums of the block that is collected, on their way to the disk.

``tests/bench/test_memory.py`` holds a whole search to it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from advisor.calibration.passes import BATCH_TOKENS
from advisor.calibration.settings import default_prefixes, keeps_full_gradient
from advisor.errors import InputError
from advisor.evaluation.logits import GROUP_TOKENS
from advisor.hardware.cpu import detect_cpu
from advisor.models.blocks import head_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.modelspec import LinearSpec, ModelSpec
    from advisor.search.planning import Task

_PROCESS_BYTES = 550 * 10**6
"""Resident beside tensors: 350 MB of torch and transformers, then the search's libraries, a
tokenizer and what MKL keeps."""
_DEVICE_BYTES = 1_300 * 10**6
"""Assumed, not measured: logits of many tokens at once with their copies, workspaces of an
accelerator's libraries, and gaps between tensors."""
_COMPARED_SEQUENCES = 32
_TYPES = 10
"""Integer types of GPTQ that vLLM's kernels leave to choose from."""
_MOST_SCORED_BYTES = 1 << 30
_ERROR_COLUMNS = 128
"""Columns whose errors are kept while they are scored."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of memory that a search takes, by what may be there at the same time.

    Attributes:
        process: Libraries and what else does not depend on the model.
        weights: All weights, where they cannot be mapped.
        head: While the head, or the embedding, computes.
        collecting: While a block's statistics are collected.
        scoring: While linears that share an input are scored.
        quantizing: While a block is quantized.
        sums: Of ``collecting``, what goes to the disk.
        device: The accelerator that computes; empty where the CPU does.
    """

    process: int
    weights: int
    head: int
    collecting: int
    scoring: int
    quantizing: int
    sums: int = 0
    device: str = ""

    @property
    def stages(self) -> int:
        """The most that is there at once where it is computed."""
        return max(self.head, self.collecting, self.scoring, self.quantizing)

    @property
    def peak(self) -> int:
        """The most that is in host memory at once."""
        return self.process + self.weights + (self.sums if self.device else self.stages)

    def describe(self) -> str:
        """Say it in a line."""
        if self.device:
            return (
                f"about {self.peak / 1e9:.2f} GB of host memory, and {self.stages / 1e9:.2f} GB on "
                f"{self.device} (at its most one of: {self._parts()})"
            )
        whole = f", weights that cannot be mapped {self.weights / 1e9:.2f}" if self.weights else ""
        return (
            f"about {self.peak / 1e9:.2f} GB of memory (libraries {self.process / 1e9:.2f}{whole}, "
            f"and at its most one of: {self._parts()})"
        )

    def _parts(self) -> str:
        return (
            f"head {self.head / 1e9:.2f}, statistics of a block {self.collecting / 1e9:.2f}, "
            f"scores {self.scoring / 1e9:.2f}, quantizing a block {self.quantizing / 1e9:.2f}"
        )


def predict_memory(task: Task) -> MemoryUse:
    """Return the memory that a search will take."""
    config: Any = task.loaded.model.config
    calibration, spec = task.calibration, task.spec
    lengths = [calibration.sequence_length]
    lengths += [text.sequence_length for text in task.judges.texts.values()]
    weights = 0
    if task.loaded.not_mapped:
        weights = spec.parameters * task.loaded.dtype.itemsize
    use = predicted_use(
        task.loaded.linears,
        hidden_size=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        heads=int(config.num_attention_heads),
        length=max(lengths),
        prefixes=len(default_prefixes(calibration.sequences)),
        routed=spec.experts_per_token / spec.experts if spec.experts else 1.0,
        weights=weights,
    )
    device = task.loaded.device
    return use if device.type == "cpu" else replace(use, device=str(device))


def needed_on_device(
    spec: ModelSpec, *, length: int, sequences: int, quantizing: bool = True
) -> int:
    """Return the bytes that an accelerator must have free for a search of a model.

    Args:
        spec: Its tensors.
        length: Tokens of a sequence.
        sequences: Calibration sequences.
        quantizing: Whether weights are also quantized, not only measured.
    """
    config = spec.text_config
    use = predicted_use(
        spec.linears,
        hidden_size=spec.hidden_size,
        vocabulary=spec.vocabulary_size,
        heads=int(config.get("num_attention_heads") or config.get("n_head") or 1),
        length=length,
        prefixes=len(default_prefixes(sequences)),
        routed=spec.experts_per_token / spec.experts if spec.experts else 1.0,
    )
    if quantizing:
        return use.stages + _DEVICE_BYTES
    blocks: dict[int, int] = {}
    for linear in spec.linears:
        blocks[linear.block] = blocks.get(linear.block, 0) + 4 * linear.parameters
    return use.head + max(blocks.values(), default=0) + _DEVICE_BYTES


def predicted_use(
    linears: Sequence[LinearSpec],
    *,
    hidden_size: int,
    vocabulary: int,
    heads: int,
    length: int,
    prefixes: int,
    routed: float = 1.0,
    weights: int = 0,
) -> MemoryUse:
    """Return the memory of a search on a model of these shapes; see the module.

    Args:
        linears: All quantizable linears.
        hidden_size: Width of the hidden states.
        vocabulary: Rows of the embedding.
        heads: Attention heads.
        length: Tokens of the longest sequence.
        prefixes: Sample counts whose sums are kept.
        routed: Share of a mixture's experts that a token visits.
        weights: Bytes of weights that are held whole.
    """
    blocks: dict[int, list[LinearSpec]] = {}
    for linear in linears:
        blocks.setdefault(linear.block, []).append(linear)
    states = 4 * hidden_size * max(GROUP_TOKENS, _COMPARED_SEQUENCES * length)
    held = 0 if weights else 4 * vocabulary * hidden_size
    head = held + 4 * vocabulary * head_tokens(vocabulary) + states
    rows = max(BATCH_TOKENS, length)
    collecting = scoring = quantizing = most_sums = 0
    for members in blocks.values():
        size = sum(linear.in_features * linear.out_features for linear in members)
        groups: dict[str, list[LinearSpec]] = {}
        for linear in members:
            groups.setdefault(linear.input_group, []).append(linear)
        inputs = sum(own[0].in_features ** 2 for own in groups.values())
        seen = sum(
            (linear.in_features + linear.out_features) * (routed if linear.is_expert else 1.0)
            for linear in members
        )
        values = 12 * rows * (int(seen) + length * heads)
        sums = 4 * (prefixes + 1) * inputs + 8 * _gradients(members)
        most_sums = max(most_sums, sums)
        collecting = max(collecting, 4 * size + values + sums)
        scoring = max(scoring, *map(_scoring, groups.values()))
        dense = [own[0].in_features for own in groups.values() if not own[0].is_expert]
        behind = sum(width * width for width in dense)
        fitting = 12 * behind + 24 * max(dense, default=0) ** 2
        coding = 4 * behind + max(map(_coding, groups.values()))
        quantizing = max(quantizing, 8 * size + max(fitting, coding))
    return MemoryUse(_PROCESS_BYTES, weights, head, collecting, scoring, quantizing, most_sums)


def _gradients(members: Sequence[LinearSpec]) -> int:
    """Return Σ out² of the linears that keep a whole G."""
    return sum(linear.out_features**2 for linear in members if keeps_full_gradient(linear, "full"))


def _scoring(members: Sequence[LinearSpec]) -> int:
    """Return what scoring linears takes that share an input."""
    width = members[0].in_features
    size = width * sum(linear.out_features for linear in members)
    working = min(4 * _TYPES * size, max(4 * size, _MOST_SCORED_BYTES))
    beside = int(working * max(0.25, min(1.0, _ERROR_COLUMNS / width)))
    return working + beside + 16 * size + 16 * width * width + 4 * _gradients(members)


def _coding(members: Sequence[LinearSpec]) -> int:
    """Return what quantizing linears takes that share an input, with feedback among outputs."""
    width = members[0].in_features
    size = width * sum(linear.out_features for linear in members)
    return 20 * width * width + 24 * size + 12 * _gradients(members)


def check_memory(use: MemoryUse, limit: int | None = None) -> None:
    """Refuse, before any work, a search that the machine's memory has no room for.

    Args:
        use: What is predicted.
        limit: Bytes that there are; by default what this process may use at most. Nothing is
            refused where that is not known.

    Raises:
        InputError: It says what is needed, and for what.
    """
    has = detect_cpu().memory_bytes if limit is None else limit
    _logger.info("this search takes %s", use.describe())
    if has is not None and use.peak > has:
        saved = "Save the model as transformers saves it, so that it can be mapped, or use"
        advice = f"{saved if use.weights else 'Use shorter sequences, or'} a machine with more"
        raise InputError(
            f"this search needs {use.describe()}; this machine has {has / 1e9:.2f} GB. {advice} "
            "memory."
        )
