"""Tasks of lm-evaluation-harness, run as the harness runs them.

The harness asks for one forward pass of the whole model after another. A model of up to
``HELD_BYTES`` in the type that it computes in is held so meanwhile; of a larger one each pass casts
block after block, which takes longer and holds one of them.
"""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from advisor.errors import InputError, did_you_mean
from advisor.models.casting import casting_of
from advisor.plan.hashing import sha256_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import nn

HELD_BYTES = 4 << 30
_SUFFIXES = (".yaml", ".yml")
_METRICS = ("acc", "exact_match", "acc_norm", "em", "f1")
"""Scores of a question, the first that a task has; all are in [0, 1] and more is better."""


class HarnessTask:
    """One task of the harness; every document's score is kept, so that models can be paired."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        """Find the task; its data set is loaded when a model is evaluated.

        Args:
            name: A task or group of the harness, or a YAML file that describes one.
            tokenizer: The model's.

        Raises:
            InputError: The harness is not installed, or does not know the task.
        """
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError(
                f"--task {name} needs lm-evaluation-harness, which cannot be imported ({error}): "
                "pip install lm-eval, or give a JSONL file of questions."
            ) from error
        path = Path(name).expanduser()
        content = ""
        if path.suffix in _SUFFIXES:
            content, task = _own_task(path)
            self._manager = TaskManager(include_path=str(path.parent.resolve()))
        else:
            task = name
            self._manager = TaskManager()
        known = self._manager.all_tasks
        if task not in known:
            raise InputError(
                f"--task {name} is neither a file nor a task of lm-evaluation-harness."
                f"{did_you_mean(name, known)}"
            )
        self.name = name
        self._task = task
        self._tokenizer = tokenizer
        version = importlib.metadata.version("lm-eval")
        self.identity = sha256_json({"harness": version, "task": task, "content": content})

    def evaluate(
        self, model: nn.Module, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float64]:
        """Return the score of every document, in the task's order.

        Raises:
            InputError: The task's data cannot be loaded, or none of its metrics is known here.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        if progress is not None:
            progress(0, 1)
        try:
            with casting_of(model).hold(*_held(model)):
                found = lm_eval.simple_evaluate(
                    model=HFLM(pretrained=model, tokenizer=self._tokenizer, batch_size=1),
                    tasks=[self._task],
                    task_manager=self._manager,
                    log_samples=True,
                    bootstrap_iters=0,
                    verbosity="ERROR",
                )
        except (OSError, ConnectionError, ValueError) as error:
            raise InputError(
                f"--task {self.name} could not be run by lm-evaluation-harness: "
                f"{str(error).splitlines()[0]}."
            ) from error
        samples = [row for rows in found["samples"].values() for row in rows]
        metric = next((name for name in _METRICS if samples and name in samples[0]), None)
        if metric is None:
            raise InputError(
                f"--task {self.name} has none of the scores {', '.join(_METRICS)} per question: "
                "choose a task of right and wrong answers."
            )
        ordered = sorted(samples, key=lambda row: (str(row.get("task", "")), row["doc_id"]))
        if progress is not None:
            progress(1, 1)
        return np.array([float(row[metric]) for row in ordered])


def _held(model: nn.Module) -> list[nn.Module]:
    """Return what is held ready to compute while the harness runs: the model, or nothing."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return [model] if size * casting_of(model).dtype.itemsize <= HELD_BYTES else []


def _own_task(path: Path) -> tuple[str, str]:
    """Return the content of a task's file and the task's name in it."""
    try:
        content = path.read_text(encoding="utf-8")
        # The harness has tags of its own (!function); only the name is wanted here.
        lines = [line for line in content.splitlines() if line.startswith("task:")]
        task = yaml.safe_load(lines[0])["task"] if lines else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--task {path} cannot be read: {error}.") from error
    if not isinstance(task, str):
        raise InputError(f"--task {path} needs a line task: NAME, as lm-evaluation-harness reads.")
    return content, task
