"""Benchmarks: questions with an answer, scored one by one so that two models can be paired."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from advisor.errors import InputError, join_errors
from advisor.evaluation.intervals import CONFIDENCE, mean_interval, t_quantile
from advisor.evaluation.logits import iterate_log_probabilities
from advisor.plan.schema import Interval

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import nn

_FORM = '{"question": "...", "choices": ["...", "..."], "answer": 0}'
_FEWEST = 2
_MOST_QUESTIONS = 1_000_000
_MANY = 100_000


class Benchmark(Protocol):
    """Anything that scores a model question by question.

    Attributes:
        name: What the user called it.
        identity: Hash of everything that decides the scores, the model aside.
    """

    name: str
    identity: str

    def evaluate(
        self, model: nn.Module, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float64]:
        """Return the score of every question, in a fixed order, float64 [questions] in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class TaskMeasurement:
    """Scores of a quantized model on a benchmark, paired with the unquantized one.

    Attributes:
        name: The benchmark.
        scores: float64 [questions], 1 for a right answer.
        reference: The same of the unquantized model.
    """

    name: str
    scores: NDArray[np.float64]
    reference: NDArray[np.float64]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.scores.mean())

    @property
    def reference_accuracy(self) -> float:
        """Share of right answers of the unquantized model."""
        return float(self.reference.mean())

    @property
    def drops(self) -> NDArray[np.float64]:
        """What each question lost: 1, 0 or -1 where answers are right or wrong."""
        return self.reference - self.scores

    @property
    def drop(self) -> Interval:
        """Drop of accuracy (0.01 = one point) and its paired 95% interval."""
        return self.drop_interval()

    def drop_interval(self, confidence: float = CONFIDENCE) -> Interval:
        """Return the drop of accuracy with a paired interval of that confidence.

        A t interval, widened to that of Agresti and Min, which adds half an answer of every kind:
        where few answers changed, or none, the spread that was seen is too small.

        Reference: Agresti and Min, Simple improved confidence intervals for comparing matched
        proportions (2005), section 2.
        """
        return self._interval_at(len(self.scores), confidence)

    def more_questions(self, limit: float, confidence: float = CONFIDENCE) -> int | None:
        """Return about how many more questions would decide a budget, answered as these were.

        None where even a million would not.

        Args:
            limit: The budget on the drop.
            confidence: Of the interval that decides.
        """

        def decides(count: int) -> bool:
            interval = self._interval_at(count, confidence)
            return interval.high <= limit or interval.low > limit

        known = len(self.scores)
        if not decides(_MOST_QUESTIONS):
            return None
        low, high = known, _MOST_QUESTIONS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if decides(middle) else (middle, high)
        return max(high - known, 1)

    def _interval_at(self, questions: int, confidence: float) -> Interval:
        """Return the drop's interval, were there so many questions that are answered alike."""
        known = len(self.scores)
        plain, share = mean_interval(self.drops, confidence), known / questions
        half = (plain.high - plain.value) * math.sqrt(share)
        count = questions + 2
        lost = float((self.drops > 0).sum()) / share + 0.5
        won = float((self.drops < 0).sum()) / share + 0.5
        middle = (lost - won) / count
        variance = ((lost + won) / count - middle**2) / count
        wider = t_quantile(0.5 + confidence / 2, _MANY) * math.sqrt(variance)
        return Interval(
            value=plain.value,
            low=min(plain.value - half, middle - wider),
            high=max(plain.value + half, middle + wider),
        )


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question."""

    text: str
    choices: tuple[str, ...]
    answer: int


class MultipleChoice:
    """Multiple-choice questions; a model answers with the choice that it finds likeliest.

    The log-probability of a choice is the sum over its tokens behind the question, not divided by
    its length: what lm-evaluation-harness calls ``acc``.
    """

    def __init__(self, name: str, questions: tuple[Question, ...], tokenizer: Any) -> None:
        """Tokenize.

        Args:
            name: What errors and reports call it.
            questions: At least two.
            tokenizer: The model's.
        """
        self.name = name
        self._questions = questions
        self._choices = [
            [_tokens(tokenizer, question.text, choice) for choice in question.choices]
            for question in questions
        ]
        content = [[q.text, q.choices, q.answer] for q in questions]
        tokens = [[ids for ids, _ in row] for row in self._choices]
        self.identity = hashlib.sha256(json.dumps([content, tokens]).encode()).hexdigest()

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self._questions)

    def evaluate(
        self, model: nn.Module, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float64]:
        """Return 1 for every question that the model answers as the file does, else 0."""
        per_question = [len(choices) for choices in self._choices]
        rows = [(ids, start) for choices in self._choices for ids, start in choices]

        def step(done: int, total: int) -> None:
            if progress is not None:
                progress(done * len(self._questions) // total, len(self._questions))

        scores = _log_likelihoods(model, rows, step)
        ends = np.cumsum([0, *per_question])
        found = np.zeros(len(self._questions))
        for index, question in enumerate(self._questions):
            best = int(np.argmax(scores[ends[index] : ends[index + 1]]))
            found[index] = float(best == question.answer)
        return found


def _tokens(tokenizer: Any, text: str, choice: str) -> tuple[list[int], int]:
    """Return the tokens of question and choice, and where the choice begins."""
    separator = "" if choice[:1].isspace() or text[-1:].isspace() else " "
    whole = tokenizer(text + separator + choice, verbose=False)["input_ids"]
    start = len(tokenizer(text.rstrip(), verbose=False)["input_ids"])
    return whole, min(max(start, 1), len(whole) - 1)


def _log_likelihoods(
    model: nn.Module, rows: list[tuple[list[int], int]], step: Callable[[int, int], None]
) -> NDArray[np.float64]:
    """Return the log-probability of each row's tokens from its place on, given those before."""
    texts = [torch.tensor(ids, dtype=torch.int64) for ids, _ in rows]
    totals = np.zeros(len(rows))
    for index, row, values in iterate_log_probabilities(model, texts, step):
        labels = texts[index][row + 1 : row + 1 + len(values)].to(values.device)
        likelihood = values.gather(1, labels[:, None])[:, 0]
        counted = likelihood[max(0, rows[index][1] - 1 - row) :]
        totals[index] += float(counted.sum(dtype=torch.float64))
    return totals


def load_questions(path: Path) -> tuple[Question, ...]:
    """Read a JSONL file of questions.

    Raises:
        InputError: A line is not of the form; all offending lines are named.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--task {path} cannot be read as UTF-8 text: {error}.") from error
    questions, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        found = _question(line)
        if isinstance(found, Question):
            questions.append(found)
        else:
            problems.append(f"line {number} of {path}: {found}. A line reads {_FORM}.")
    if problems:
        raise InputError(join_errors(problems))
    if len(questions) < _FEWEST:
        raise InputError(f"--task {path} needs at least {_FEWEST} questions, has {len(questions)}.")
    return tuple(questions)


def _question(line: str) -> Question | str:
    """Return a line's question, or what is wrong with it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"no JSON ({error.msg})"
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        return 'no "question" string'
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or len(choices) < _FEWEST:
        return '"choices" is no list of two or more'
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return '"choices" holds something that is no text'
    if not row["question"].strip():
        return '"question" is blank'
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        return '"answer" is neither the place of a choice (from 0), its letter nor its text'
    return Question(row["question"], tuple(choices), answer)


def load_benchmark(name: str, tokenizer: Any) -> Benchmark:
    """Return a benchmark by its file (JSONL), or by its name in lm-evaluation-harness.

    Raises:
        InputError: The file is not what it should be, or the harness is not installed or does not
            know the name.
    """
    path = Path(name).expanduser()
    is_text = path.suffix.lower() in (".jsonl", ".yaml", ".yml")
    if is_text and not path.is_file():
        raise InputError(f"--task {name}: there is no such file.")
    if path.is_file() and path.suffix.lower() not in (".yaml", ".yml"):
        return MultipleChoice(name, load_questions(path), tokenizer)
    from advisor.evaluation.harness import HarnessTask

    return HarnessTask(name, tokenizer)
