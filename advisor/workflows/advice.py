"""``recommend`` and ``predict``: advice before anything is measured, without torch."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError
from advisor.workflows.checking import BudgetsGiven, check_counts, check_lists, check_request
from advisor.workflows.resolve import resolve_hardware

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from advisor.modelspec import ModelSpec
    from advisor.predict.answers import Prediction, Recommendation
    from advisor.schemes import Scheme

_ON_CPUS = (
    "On CPUs this is for transformers, which runs every model that Advisor tunes. Of the engines, "
    "llama.cpp decodes fastest there: ask with --engine llama.cpp."
)


def recommend(
    model: str,
    *,
    gpu: str = "auto",
    engine: str = "auto",
    budgets: BudgetsGiven = None,
    context: int = 4096,
    batch: int = 1,
    prefer: str = "balanced",
    quantize_head: bool = False,
    quantize_embedding: bool = False,
) -> Recommendation:
    """Rank every scheme for a model on a device, from arithmetic and published evidence.

    Args:
        model: A local folder, a catalogue id or a Hugging Face id; weights are not read.
        gpu: A device as people name it, ``cpu``, or ``auto`` for this machine's.
        engine: What will serve it, or ``auto``.
        budgets: Limits, or their texts by name; none by default.
        context: Tokens of context when serving, at least 1.
        batch: Sequences served at once, at least 1.
        prefer: What breaks ties: accuracy, size, speed or balanced.
        quantize_head: The head takes each scheme too, where the engine reads that.
        quantize_embedding: The embedding takes each scheme too, where the engine reads that.

    Raises:
        InputError: A name is unknown or a value breaks its rule.
    """
    from advisor.predict.advise import recommend as rank
    from advisor.predict.models import load_modelspec, name_notes

    request = check_request(
        gpu=gpu, engine=engine, budgets=budgets, prefer=prefer,
        others=[lambda: check_counts(context=context, batch=batch)],
        late=[lambda: load_modelspec(model)],
    )  # fmt: skip
    spec = load_modelspec(model)
    answer = rank(
        spec,
        request.hardware,
        request.engine,
        request.budgets,
        context=context,
        batch=batch,
        prefer=prefer,
        makes=_maker(spec, request.engine),
        quantize_head=quantize_head,
        quantize_embedding=quantize_embedding,
    )
    notes = name_notes(model) + answer.notes
    if engine.strip().lower() == "auto" and request.hardware.kind == "cpu":
        notes += (_ON_CPUS,)
    return replace(answer, notes=notes)


def _maker(spec: ModelSpec, engine: str) -> Callable[[Scheme, str | None], bool]:
    """Return whether Advisor has the method and writes this model so that the engine reads it."""
    from advisor.formats.layouts import engine_problems, is_written
    from advisor.formats.registry import format_names
    from advisor.methods.registry import method_names
    from advisor.models.architectures import ARCHITECTURES

    def makes(scheme: Scheme, format: str | None) -> bool:
        if spec.architecture not in ARCHITECTURES:
            return False
        if scheme.method not in method_names() or format is None or format not in format_names():
            return False
        unread = engine_problems(spec.architecture, format, engine)
        return is_written(spec.architecture, format) and not unread

    return makes


def predict(
    model: str,
    scheme: str,
    *,
    gpu: str = "auto",
    engine: str = "auto",
    context: int = 4096,
    batch: int = 1,
    quantize_head: bool = False,
    quantize_embedding: bool = False,
) -> Prediction:
    """Predict size, memory, speed, loss and cost of one scheme, feasible or not.

    Raises:
        InputError: A name is unknown, a value breaks its rule, or the scheme does not fit the
            model's shapes.
    """
    from advisor.predict.advise import predict as predict_one
    from advisor.predict.models import load_modelspec, name_notes
    from advisor.schemes import parse_scheme

    request = check_request(
        gpu=gpu, engine=engine, late=[lambda: load_modelspec(model)],
        others=[
            lambda: parse_scheme(scheme),
            lambda: check_counts(context=context, batch=batch),
        ],
    )  # fmt: skip
    spec = load_modelspec(model)
    prediction = predict_one(
        spec,
        parse_scheme(scheme),
        request.hardware,
        request.engine,
        context=context,
        batch=batch,
        makes=_maker(spec, request.engine),
        quantize_head=quantize_head,
        quantize_embedding=quantize_embedding,
    )
    if prediction.candidate.problem is not None:  # asked for by name, and it cannot exist
        raise InputError(prediction.candidate.problem)
    return replace(prediction, notes=name_notes(model) + prediction.notes)


def compare_gpus(
    model: str,
    gpus: Sequence[str],
    *,
    engine: str = "auto",
    budgets: BudgetsGiven = None,
    context: int = 4096,
    batch: int = 1,
    prefer: str = "balanced",
    quantize_head: bool = False,
    quantize_embedding: bool = False,
) -> dict[str, Any]:
    """Recommend for several devices; each row holds the device and its best candidate.

    Raises:
        InputError: Lists every name that is unknown and every value that breaks its rule.
    """
    from advisor.predict.models import load_modelspec

    check_lists(gpus=gpus)
    first, *others = gpus or ("auto",)
    budgets = check_request(
        gpu=first, engine=engine, budgets=budgets, prefer=prefer,
        late=[lambda: load_modelspec(model)],
        others=[
            *(functools.partial(resolve_hardware, gpu) for gpu in others),
            lambda: check_counts(context=context, batch=batch),
        ],
    ).budgets  # fmt: skip
    rows, notes = [], dict[str, None]()
    for gpu in gpus:
        document = recommend(
            model, gpu=gpu, engine=engine, budgets=budgets,
            context=context, batch=batch, prefer=prefer, quantize_head=quantize_head,
            quantize_embedding=quantize_embedding,
        ).to_dict()  # fmt: skip
        name = document["recommended"]
        best = next((row for row in document["candidates"] if row["name"] == name), None)
        rows.append(
            {
                "hardware": document["hardware"],
                "engine": document["engine"],
                "recommended": name,
                "candidate": best,
                "relaxation": document["relaxation"],
            }
        )
        notes |= dict.fromkeys(document["notes"])
    return {"schema_version": 1, "model": model, "gpus": rows, "notes": list(notes)}
