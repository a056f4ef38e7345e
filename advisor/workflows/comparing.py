"""``compare``: how far two checkpoints of one architecture differ, measured on one text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError, VerificationError, join_errors
from advisor.workflows.checking import Checks
from advisor.workflows.computing import check_device_name, describe_device, device_for
from advisor.workflows.progress import ProgressCallback, ignore_progress, stage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from advisor.formats.read import Checkpoint
    from advisor.models.load import LoadedModel
    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.plan.schema import Interval


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints beside each other.

    Attributes:
        reference: Folder of A.
        other: Folder of B.
        size_bytes: Bytes of the weight files of A and B.
        perplexity: Of A and B, each with the spread over sequences; what tells them apart is
            ``loss``, which is paired.
        kl: KL(A ‖ B) per token, nats.
        loss: Relative perplexity increase from A to B.
        top1: Share of tokens whose likeliest next token is the same.
        sequences: Number of sequences measured.
        sequence_length: Tokens of each.
        modules: Weight error by module, largest first.
        computed_on: Where it was computed.
    """

    reference: Path
    other: Path
    size_bytes: tuple[int, int]
    perplexity: tuple[Interval, Interval]
    kl: Interval
    loss: Interval
    top1: Interval
    sequences: int
    sequence_length: int
    modules: tuple[dict[str, Any], ...]
    computed_on: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor compare --json``."""
        return {
            "schema_version": 1,
            "reference": str(self.reference),
            "other": str(self.other),
            "size_bytes": list(self.size_bytes),
            "perplexity": [interval.value for interval in self.perplexity],
            "perplexity_intervals": [interval.model_dump() for interval in self.perplexity],
            "kl": self.kl.model_dump(),
            "loss": self.loss.model_dump(),
            "top1_agreement": self.top1.model_dump(),
            "sequences": self.sequences,
            "sequence_length": self.sequence_length,
            "modules": list(self.modules),
            "computed_on": self.computed_on,
        }


_SAME = (
    "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
"""Keys of config.json that decide tensors and tokens."""


def _check_places(first: Path, second: Path) -> None:
    """Refuse what is no checkpoint, both at once.

    Raises:
        InputError: The first is no folder with config.json, or the second none and no GGUF file.
    """
    from advisor.formats.gguf_read import find_gguf

    problems = []
    if first.is_file() or not (first / "config.json").is_file():
        problems.append(
            f"{first} holds no config.json: it is not a checkpoint's folder. A needs its tokenizer."
        )
    if not (second / "config.json").is_file() and find_gguf(second) is None:
        problems.append(f"{second} holds no config.json: it is not a checkpoint's folder.")
    if problems:
        raise InputError(join_errors(problems))


def _check_same_model(first: Path, second: Path) -> None:
    """Refuse two checkpoints that are not of one model.

    Raises:
        InputError: A config.json cannot be read, or keys differ; all are listed.
    """
    from advisor.formats.gguf_read import find_gguf
    from advisor.models.config_file import read_config

    configs = []
    for folder in (first, second):
        if not (folder / "config.json").is_file() and find_gguf(folder) is not None:
            return  # a GGUF file alone: its tensors' shapes are compared instead
        configs.append(read_config(folder))
    differing = [
        f"{key} {configs[0].get(key)} and {configs[1].get(key)}"
        for key in _SAME
        if configs[0].get(key) != configs[1].get(key)
    ]
    if differing:
        raise InputError(
            f"{second} is no version of {first}: {', '.join(differing)}. "
            "Give checkpoints of one architecture and size."
        )


def compare(
    reference: str | Path,
    other: str | Path,
    *,
    evaluation: Sequence[str] = (),
    evaluation_sequences: int = 16,
    sequence_length: int = 256,
    seed: int = 0,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> Comparison:
    """Measure KL(A ‖ B), perplexity and agreement of two checkpoints with one tokenizer.

    Args:
        reference: A: a folder with a tokenizer, 16-bit or quantized in any format.
        other: B: any checkpoint of the same architecture, quantized or not, or a GGUF file.
        evaluation: Text to measure on; the built-in evaluation text by default.
        evaluation_sequences: Number of sequences, at least 2.
        sequence_length: Tokens of each.
        seed: Seed of the draw.
        device: Where it is measured, as for ``tune``.
        progress: Called with events.

    Raises:
        InputError: A folder is missing, or the two do not fit together.
        VerificationError: One of them has faults.
    """
    from advisor.evaluation.measure import measure
    from advisor.evaluation.reference import Reference
    from advisor.evaluation.runtime import quantized_model
    from advisor.formats.read import read_checkpoint
    from advisor.models.device import computing
    from advisor.plan.folders import cache_root
    from advisor.workflows.checkpoints import contents, opened
    from advisor.workflows.inspection import modelspec_of
    from advisor.workflows.texts import draw

    report = progress or ignore_progress
    first, second = Path(reference), Path(other)
    places = Checks()
    places.run(lambda: _check_places(first, second))
    places.run(lambda: check_device_name(device))
    places.settle()
    _check_same_model(first, second)
    checkpoint = read_checkpoint(second)
    _check_whole(checkpoint)
    schemes = {name: str(scheme) for name, scheme in checkpoint.modules.items()}
    choice = device_for(
        device, modelspec_of(first), length=sequence_length, sequences=evaluation_sequences,
        quantizing=False,
    )  # fmt: skip
    with computing(choice.device), opened(first, choice.device) as loaded:
        _check_modules(first, second, checkpoint, dict(loaded.model.named_parameters()))
        sequences = draw(
            evaluation, loaded.tokenizer, role="evaluation", sequences=evaluation_sequences,
            sequence_length=sequence_length, seed=seed,
        )  # fmt: skip
        base = Reference.compute(
            loaded, sequences, cache_root(), progress=stage(report, "Reference")
        )
    # Outside: A's activations are its own, B's are B's.
    weights, replaced = contents(checkpoint, loaded)
    with computing(choice.device), quantized_model(loaded.model, weights, replaced):
        rows = _module_errors(loaded, weights, replaced, schemes)
        result = measure(loaded.model, base, progress=stage(report, "Measuring"))
    return Comparison(
        reference=first,
        other=second,
        size_bytes=(read_checkpoint(first).size_bytes, checkpoint.size_bytes),
        perplexity=(_perplexity(result.sequence_reference_nll), _perplexity(result.sequence_nll)),
        kl=result.kl,
        loss=result.loss,
        top1=result.top1,
        sequences=evaluation_sequences,
        sequence_length=sequence_length,
        modules=tuple(rows),
        computed_on=describe_device(choice),
    )


def _check_whole(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with gaps: the reference's weights would stand in for what it lacks.

    Raises:
        VerificationError: Tensors of the model are missing, or of another shape or kind.
    """
    from advisor.formats.health import gaps
    from advisor.workflows.inspection import modelspec_of

    spec = modelspec_of(checkpoint.folder)
    if faults := gaps(checkpoint, spec.linears, spec.tensors):
        raise VerificationError(f"{checkpoint.folder} is faulty. {join_errors(faults)}")


def _check_modules(
    first: Path, second: Path, checkpoint: Checkpoint, parameters: Mapping[str, Tensor]
) -> None:
    """Refuse a checkpoint whose modules are not the reference's.

    Raises:
        InputError: Modules are unknown or of another shape.
    """
    unknown = [name for name in checkpoint.modules if f"{name}.weight" not in parameters]
    if unknown:
        raise InputError(
            f"{second} is no version of {first}: {len(unknown)} of its modules are not in it "
            f"(first: {unknown[0]}). Give checkpoints of one architecture."
        )
    for name in checkpoint.modules:
        expected, found = tuple(parameters[f"{name}.weight"].shape), checkpoint.weight(name).shape
        if expected != found:
            raise InputError(
                f"{second} is no version of {first}: {name} is {list(found)}, "
                f"but {list(expected)} in the reference."
            )


def _module_errors(
    loaded: LoadedModel,
    weights: Mapping[str, QuantizedWeight],
    replaced: Mapping[str, Tensor],
    schemes: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return the relative error of every linear that differs, largest first."""
    from advisor.workflows.resemblance import relative_error

    rows: list[dict[str, Any]] = []
    for linear in loaded.linears:
        name, tensor = linear.name, f"{linear.name}.weight"
        if name in weights:
            found = weights[name].to(loaded.device).dequantize()
        elif tensor in replaced:
            found = replaced[tensor]
        else:
            continue
        error = relative_error(loaded.tensor(tensor), found)
        rows.append({"name": name, "scheme": schemes.get(name, "bf16"), "relative_error": error})
    rows.sort(key=lambda row: -float(row["relative_error"]))
    return rows


def _perplexity(losses: NDArray[np.float64]) -> Interval:
    """Return the perplexity of sequences' mean losses and its 95% interval."""
    from advisor.evaluation.intervals import mean_interval
    from advisor.plan.schema import Interval

    mean = mean_interval(losses)
    value, low, high = (math.exp(part) for part in (mean.value, mean.low, mean.high))
    return Interval(value=value, low=low, high=high)
