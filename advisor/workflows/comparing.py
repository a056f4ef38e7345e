"""``compare``: how far two checkpoints of one architecture differ, measured on one text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError
from advisor.workflows.progress import ProgressCallback, ignore_progress, stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.plan.schema import Interval


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints beside each other.

    Attributes:
        reference: Folder of A.
        other: Folder of B.
        size_bytes: Bytes of the weight files of A and B.
        perplexity: Of A and B.
        kl: KL(A ‖ B) per token, nats.
        loss: Relative perplexity increase from A to B.
        top1: Share of tokens whose likeliest next token is the same.
        sequences: Number of sequences measured.
        sequence_length: Tokens of each.
        modules: Weight error by module, largest first.
    """

    reference: Path
    other: Path
    size_bytes: tuple[int, int]
    perplexity: tuple[float, float]
    kl: Interval
    loss: Interval
    top1: Interval
    sequences: int
    sequence_length: int
    modules: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor compare --json``."""
        return {
            "schema_version": 1,
            "reference": str(self.reference),
            "other": str(self.other),
            "size_bytes": list(self.size_bytes),
            "perplexity": list(self.perplexity),
            "kl": self.kl.model_dump(),
            "loss": self.loss.model_dump(),
            "top1_agreement": self.top1.model_dump(),
            "sequences": self.sequences,
            "sequence_length": self.sequence_length,
            "modules": list(self.modules),
        }


_SAME = (
    "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
"""Keys of config.json that decide tensors and tokens."""


def _check_same_model(first: Path, second: Path) -> None:
    """Refuse two checkpoints that are not of one model.

    Raises:
        InputError: A config.json cannot be read, or keys differ; all are listed.
    """
    configs = []
    for folder in (first, second):
        try:
            configs.append(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}/config.json is not valid JSON: {error}.") from error
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
    progress: ProgressCallback | None = None,
) -> Comparison:
    """Measure KL(A ‖ B), perplexity and agreement of two checkpoints with one tokenizer.

    Args:
        reference: A: a 16-bit model's folder.
        other: B: any checkpoint of the same architecture, quantized or not.
        evaluation: Text to measure on; the built-in evaluation text by default.
        evaluation_sequences: Number of sequences, at least 2.
        sequence_length: Tokens of each.
        seed: Seed of the draw.
        progress: Called with events.

    Raises:
        InputError: A folder is missing, A is quantized, or the two do not fit together.
    """
    from advisor.calibration.store import cache_root
    from advisor.evaluation.measure import measure
    from advisor.evaluation.reference import Reference
    from advisor.evaluation.runtime import quantized_model
    from advisor.formats.read import read_checkpoint
    from advisor.models.load import load_model
    from advisor.workflows.checkpoints import contents
    from advisor.workflows.texts import draw
    from advisor.workflows.verifying import relative_error

    report = progress or ignore_progress
    first, second = Path(reference), Path(other)
    for folder in (first, second):
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} holds no config.json: it is not a checkpoint's folder.")
    _check_same_model(first, second)
    loaded = load_model(first)
    checkpoint = read_checkpoint(second)
    parameters = dict(loaded.model.named_parameters())
    unknown = [name for name in checkpoint.modules if f"{name}.weight" not in parameters]
    if unknown:
        raise InputError(
            f"{second} is no version of {first}: {len(unknown)} of its modules are not in it "
            f"(first: {unknown[0]}). Give checkpoints of one architecture."
        )
    sequences = draw(
        evaluation, loaded.tokenizer, role="evaluation", sequences=evaluation_sequences,
        sequence_length=sequence_length, seed=seed,
    )  # fmt: skip
    base = Reference.compute(loaded, sequences, cache_root(), progress=stage(report, "Reference"))
    weights, replaced = contents(checkpoint, loaded)
    rows: list[dict[str, Any]] = []
    for name, weight in weights.items():
        source = loaded.tensor(f"{name}.weight")
        if tuple(source.shape) != weight.shape:
            raise InputError(
                f"{second} is no version of {first}: {name} is {list(weight.shape)}, "
                f"but {list(source.shape)} in the reference."
            )
        error = relative_error(source, weight.dequantize())
        rows.append(
            {"name": name, "scheme": str(checkpoint.modules[name]), "relative_error": error}
        )
    with quantized_model(loaded.model, weights, replaced):
        result = measure(loaded.model, base, progress=stage(report, "Measuring"))
    rows.sort(key=lambda row: -float(row["relative_error"]))
    sizes = tuple(
        sum(file.stat().st_size for file in f.glob("*.safetensors")) for f in (first, second)
    )
    return Comparison(
        reference=first,
        other=second,
        size_bytes=(sizes[0], sizes[1]),
        perplexity=(base.perplexity, result.perplexity),
        kl=result.kl,
        loss=result.loss,
        top1=result.top1,
        sequences=evaluation_sequences,
        sequence_length=sequence_length,
        modules=tuple(rows),
    )
