"""Multiple-choice questions: reading, scoring against one forward pass per choice, pairing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from advisor.budgets import Budgets
from advisor.errors import InputError
from advisor.evaluation.gate import decide
from advisor.evaluation.measure import Measurement
from advisor.evaluation.tasks import (
    MultipleChoice,
    Question,
    TaskMeasurement,
    load_benchmark,
    load_questions,
)

_MEASURED = Measurement(np.zeros(4), np.ones(4), np.ones(4), np.ones(4))
QUESTIONS = (
    Question("The quick brown fox jumps over the lazy", ("dog", "module of symbols"), 0),
    Question("A function returns the value of its last", ("fox", "expression", "a"), 1),
    Question("Every module has a name and a ", ("table", "dog", "sequence"), 2),
)


def _write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_answers_are_those_of_the_likeliest_continuation(random_llama):
    """The oracle runs the model once per choice and sums the log-softmax by hand."""
    task = MultipleChoice("ours", QUESTIONS, random_llama.tokenizer)
    found = task.evaluate(random_llama.model)
    for index, question in enumerate(QUESTIONS):
        scores = []
        for choice in question.choices:
            context = random_llama.tokenizer(question.text.rstrip())["input_ids"]
            ids = random_llama.tokenizer(f"{question.text.rstrip()} {choice}")["input_ids"]
            assert ids[: len(context)] == context
            with torch.no_grad():
                table = random_llama.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(table[i - 1, ids[i]]) for i in range(len(context), len(ids))))
        assert found[index] == float(int(np.argmax(scores)) == question.answer)
    assert task.identity != MultipleChoice("x", QUESTIONS[:2], random_llama.tokenizer).identity


@pytest.mark.parametrize("answer", [1, "B", "b", "blue"])
def test_answers_by_place_letter_or_text(tmp_path, answer):
    row = {"question": "The sky is", "choices": ["green", "blue"], "answer": answer, "id": 7}
    assert load_questions(_write(tmp_path / "t.jsonl", [row, row]))[0].answer == 1


def test_every_bad_line_is_named(tmp_path):
    rows = [
        {"question": "q", "choices": ["a", "b"], "answer": 2},
        {"question": "q", "choices": ["a"], "answer": 0},
        {"choices": ["a", "b"], "answer": 0},
        {"question": "q", "choices": ["a", " "], "answer": True},
    ]
    with pytest.raises(InputError, match=r"(?s)4 problems.*line 1 .*line 2 .*line 3 .*line 4 "):
        load_questions(_write(tmp_path / "t.jsonl", rows))
    with pytest.raises(InputError, match="no such file"):
        load_benchmark(str(tmp_path / "none.jsonl"), None)
    with pytest.raises(InputError, match="at least 2 questions"):
        load_questions(_write(tmp_path / "one.jsonl", [rows[0] | {"answer": 0}]))


@pytest.mark.parametrize(("changed", "limit"), [(0, 0.05), (1, 0.10), (0, 0.01), (4, 0.03)])
def test_so_many_more_questions_decide(changed, limit):
    """Also where no answer changed yet, and the spread that was seen says nothing."""

    def task(count):
        scores = np.ones(count)
        scores[: round(changed / 40 * count)] = 0
        return TaskMeasurement("t", scores, np.ones(count))

    few = task(40)
    more = few.more_questions(limit, 0.98)
    reason = decide(
        _MEASURED, Budgets(max_accuracy_drop=limit, task="t"), task=few, confidence=0.98
    )
    assert reason.verdict == "undecided"
    assert reason.more_sequences == more
    assert f"needs about {more} more question" in reason.reason

    def decided(count):
        interval = task(count).drop_interval(0.98)
        return interval.high <= limit or interval.low > limit

    assert decided(round(1.03 * (40 + more)))
    assert not decided(round(0.9 * (40 + more)))


def test_a_drop_at_its_budget_is_never_decided():
    half = TaskMeasurement("t", np.repeat([1.0, 0.0], 20), np.ones(40))
    assert half.more_questions(0.5) is None


def test_no_changed_answer_is_no_certainty():
    ones = np.ones(20)
    few = TaskMeasurement("t", ones, ones)
    assert few.drop.value == 0
    assert few.drop.high > 0.05, "twenty questions cannot exclude a drop of five points"
    many = TaskMeasurement("t", np.ones(5000), np.ones(5000))
    assert many.drop.high < 0.001


def test_false_accepts_of_accuracy_are_at_most_five_percent():
    """A true drop of exactly the budget: 4 points lost, 2 won, of 300 questions."""
    generator = np.random.default_rng(1)
    flat = np.full(16, 0.0)
    measured = Measurement(flat, flat, flat, flat)
    budgets = Budgets(max_accuracy_drop=0.02, task="t")
    accepted = 0
    for _ in range(1000):
        draw = generator.random(300)
        reference = np.where(draw < 0.02, 0.0, 1.0)
        scores = np.where((draw >= 0.02) & (draw < 0.06), 0.0, 1.0)
        task = TaskMeasurement("t", scores, reference)
        accepted += decide(measured, budgets, task=task).verdict == "pass"
    assert accepted / 1000 <= 0.05


def test_accuracy_decides():
    flat = np.full(16, 0.0)
    measured = Measurement(flat, flat, flat, flat)
    budgets = Budgets(max_accuracy_drop=0.01, task="t")
    bad = TaskMeasurement("t", np.r_[np.zeros(100), np.ones(300)], np.ones(400))
    found = decide(measured, budgets, task=bad)
    assert (found.verdict, "25.00pp" in found.reason) == ("fail", True)
    close = TaskMeasurement("t", np.r_[np.zeros(2), np.ones(398)], np.ones(400))
    found = decide(measured, budgets, task=close)
    assert found.verdict == "undecided"
    assert "more questions" in found.reason
