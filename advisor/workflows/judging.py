"""What candidates are judged on: evaluation text, slices and a benchmark, as a user names them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from advisor.errors import InputError, join_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from advisor.budgets import Budgets
    from advisor.calibration.tokens import TokenSequences
    from advisor.search.judges import Judges

_Made = TypeVar("_Made")
_MOST_TIMES = 8
"""How many times the sequences asked for may be measured where fewer leave a budget undecided."""
_FEWEST_OF_SLICE = 4


def draw_judges(
    evaluation: Sequence[str],
    slices: Sequence[str],
    budgets: Budgets | None,
    tokenizer: Any,
    *,
    sequences: int,
    sequence_length: int,
    seed: int,
) -> Judges:
    """Draw everything that candidates are judged on.

    Raises:
        InputError: A text or the benchmark is not what it should be; all are named.
    """
    from advisor.evaluation.tasks import load_benchmark
    from advisor.search.judges import Judges
    from advisor.workflows.texts import draw, parse_slices

    problems: list[str] = []

    def attempt(make: Callable[[], _Made]) -> _Made | None:
        try:
            return make()
        except InputError as error:
            problems.append(str(error))
            return None

    def text(sources: Sequence[str], role: str, fewest: int) -> TokenSequences:
        return draw(
            sources, tokenizer, role=role, sequences=fewest, sequence_length=sequence_length,
            seed=seed, most=_MOST_TIMES * sequences,
        )  # fmt: skip

    main = attempt(partial(text, evaluation, "evaluation", sequences))
    named = attempt(lambda: parse_slices(slices)) or {}
    drawn = {
        name: attempt(partial(text, sources, f"slice {name}", _FEWEST_OF_SLICE))
        for name, sources in named.items()
    }
    benchmark = None
    if budgets is not None and (task := budgets.task) is not None:
        benchmark = attempt(lambda: load_benchmark(task, tokenizer))
    if problems or main is None:
        raise InputError(join_errors(problems))
    further = {name: found for name, found in drawn.items() if found is not None}
    return Judges(main, sequences, further, benchmark)
