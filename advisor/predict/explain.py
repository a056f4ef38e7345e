"""Words: why the first is first, why the others are not, and the commands that follow."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from advisor.budgets import as_option
from advisor.engines import engine_name, load_engine
from advisor.predict.loss import rounded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.budgets import Budgets
    from advisor.predict.candidate import Candidate, Violation

_BUDGETS = {
    "max_size": "size", "max_memory": "memory", "max_loss": "expected loss",
    "max_kl": "expected KL", "max_accuracy_drop": "expected accuracy drop", "min_speed": "speed",
}  # fmt: skip

_OTHERS = "other software"
_MAKERS = {
    "gguf": "llama.cpp's llama-quantize",
    "autoround": "auto-round",
    "hqq": "hqq while loading",
    "gptq": "gptqmodel or llm-compressor",
    "bnb": "transformers with bitsandbytes, while loading,",
    "llm.int8": "transformers with bitsandbytes, while loading,",
    **dict.fromkeys(("awq", "rtn", "smoothquant", "mxfp4", "mxfp8", "nvfp4"), "llm-compressor"),
}
_FIRST_BY = {
    "accuracy": "loses least", "size": "is the smallest (within 1%)",
    "speed": "decodes fastest (within 5%)", "balanced": "balances size, speed and loss best",
}  # fmt: skip


def why(ranked: Sequence[Candidate], tied: Sequence[Candidate], prefer: str) -> str | None:
    """Say in two sentences why the first candidate is first."""
    feasible = [candidate for candidate in ranked if candidate.feasible]
    if not feasible:
        return None
    best = feasible[0]
    loss = best.loss
    what = "loses nothing" if not best.scheme.is_quantized else (
        f"costs {percent(loss.expected)} of perplexity (90% range {percent(loss.low)} to "
        f"{percent(loss.high)}, published evidence)"
    )  # fmt: skip
    gain = ""
    if best.speedup is not None and best.scheme.is_quantized:
        times = "" if 0.95 <= best.speedup < 1.05 else f"{best.speedup:.2g}x "
        gain = f", decodes {times}as fast as 16 bits"
    count = (
        f"Of {len(feasible)} schemes that fit" if len(feasible) > 1 else "The only one that fits"
    )
    place = f", {best.name} {_FIRST_BY[prefer]}" if len(feasible) > 1 else f" is {best.name}"
    first = f"{count}{place}: {size(best.size_bytes)}{gain} and {what}."
    if tied:
        names = ", ".join(candidate.name for candidate in tied[:3])
        more = f" and {len(tied) - 3} more" if len(tied) > 3 else ""
        how = (
            "only `advisor tune` can tell them apart"
            if best.tunable
            else f"measure before you choose. {_made_by(best)}"
        )
        second = f"As far as is known it ties with {names}{more}: {how.rstrip('.')}."
    elif not best.tunable:
        second = _made_by(best)
    elif best.speed.words:
        second = f"On this workload {best.speed.words} ({best.kernel.name})."
    else:
        second = f"{best.kernel.reason}."
    return f"{first} {second}"


def _made_by(candidate: Candidate) -> str:
    maker = _MAKERS.get(candidate.scheme.method, _OTHERS)
    return f"Advisor does not write it: {maker} does."


def why_not(candidate: Candidate) -> str | None:
    """Say why a candidate is ruled out: rule, number, source; None if it is not."""
    if candidate.kernel.support == "none":
        source = f" [{candidate.kernel.source}]" if candidate.kernel.source else ""
        return f"{candidate.kernel.reason}{source}"
    if candidate.problem is not None:
        return candidate.problem
    if not candidate.violations:
        return None
    return "; ".join(_violation(entry) for entry in candidate.violations)


def _violation(entry: Violation) -> str:
    name = _BUDGETS[entry.budget]
    if entry.budget == "min_speed":
        value = "is not known" if entry.value is None else f"{entry.value:.3g} tokens/s"
        return f"{name} {value}, the budget asks {entry.limit:.3g}"
    value, limit = amount(entry.budget, entry.value), amount(entry.budget, entry.limit)
    return f"{name} {value}, the limit is {limit}"


def amount(budget: str, value: float | None) -> str:
    """Print a budget's value in its own unit."""
    if value is None:
        return "unknown"
    if budget in ("max_size", "max_memory"):
        return size(value)
    if budget == "max_loss":
        return percent(value)
    if budget == "max_accuracy_drop":
        return f"{_two_digits(100 * value)} points"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def relaxed_in_words(budget: str, limit: float, needed: float, *, assumed: bool = False) -> str:
    """Say what a budget would have to be: ``--max-size 6GB instead of 5.73 GB``.

    Args:
        budget: As :meth:`advisor.budgets.Budgets.limits` names it.
        limit: The budget now.
        needed: What it would have to be.
        assumed: Whether the limit is the memory that the device leaves, which no option raises.
    """
    now = amount(budget, limit)
    if assumed:
        return f"{amount(budget, needed)} of memory where the device leaves {now}"
    return f"{as_option(budget, needed)} instead of {now}"


def size(value: float | None) -> str:
    """Print bytes in decimal units."""
    if value is None:
        return "unknown size"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def percent(value: float) -> str:
    """Print a fraction as a percentage of two digits, rounded as tables round what JSON holds."""
    return f"{_two_digits(100 * rounded(value))}%"


def serve_command(
    engine: str,
    path: str,
    context: int,
    batch: int = 1,
    *,
    devices: int = 1,
    dtype: str | None = None,
) -> str:
    """Return the command that serves a checkpoint.

    Args:
        engine: Name of the engine.
        path: Folder of the checkpoint (for llama.cpp, the GGUF file).
        context: Tokens of each sequence.
        batch: Sequences at once.
        devices: Devices in tensor parallel.
        dtype: 16-bit data type where the kernel allows one only.

    Raises:
        InputError: Unknown engine.
    """
    profile = load_engine(engine)
    parallel = ""
    if devices > 1:
        name = engine_name(engine)
        option = {"vllm": "--tensor-parallel-size", "sglang": "--tp", "tensorrt-llm": "--tp_size"}
        parallel = f" {option[name]} {devices}" if name in option else ""
    short = {"float16": "half"}.get(dtype or "", dtype)
    return profile.serve.format(
        path=shlex.quote(path),
        context=context,
        context_total=context * batch,
        batch=batch,
        tensor_parallel=parallel,
        dtype=f" --dtype {short}" if dtype == "float16" else "",
    )


def tune_command(
    model: str,
    hardware: str,
    engine: str,
    budgets: Budgets,
    context: int,
    batch: int,
    prefer: str,
    options: Sequence[str] = (),
) -> str:
    """Return the command that measures and refines the answer."""
    parts = ["advisor", "tune", model, "--gpu", hardware, "--engine", engine]
    for budget, limit in budgets.limits().items():
        parts += as_option(budget, limit).split()
    if budgets.task is not None:
        parts += ["--task", budgets.task]
    if context != 4096:
        parts += ["--context", str(context)]
    if batch != 1:
        parts += ["--batch", str(batch)]
    if prefer != "balanced":
        parts += ["--prefer", prefer]
    return shlex.join([*parts, *options, "-o", "plan.yaml"])


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):.6g}"
