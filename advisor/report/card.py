"""The model card of a checkpoint: README.md with the plan's figures, the same for the same plan."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import TYPE_CHECKING

import yaml

from advisor.plan.hashing import is_hub_id
from advisor.predict.explain import serve_command
from advisor.predict.explain import size as in_words
from advisor.schemes import parse_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.plan.schema import Interval, Plan, Text

_LIBRARIES = {"gguf": "gguf"}
"""``library_name`` of formats that transformers does not load as they are."""


def render_card(plan: Plan, modules: Mapping[str, str], files: Mapping[str, int]) -> str:
    """Return README.md of a checkpoint's folder.

    Args:
        plan: What was applied.
        modules: Scheme of every quantizable module; ``bf16`` where it was left as it is.
        files: Bytes of each tensor file, by name.

    Returns:
        Markdown with YAML front matter; a function of the arguments alone, without dates, paths
        of one machine or hashes of what lies elsewhere.
    """
    name, link = plan.model.title, _link(plan)
    sections = [
        _front_matter(plan, modules),
        f"# {name}, {plan.scheme.name}",
        f"{f'[{name}]({link})' if link else name} quantized by Quantization Advisor "
        f"{plan.advisor_version} for {plan.engine.name} on {plan.hardware.title}. "
        "`advisor-plan.yaml` beside this file is the whole recipe.",
        _unmet(plan),
        _figures(plan, files),
        _judged(plan),
        _serving(plan, files),
        _inside(modules, plan.scheme.outer),
        _again(plan),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _unmet(plan: Plan) -> str:
    if plan.unmet is None:
        return ""
    return f"**Not within the budgets it was searched for**, only nearest to them: {plan.unmet}."


def _link(plan: Plan) -> str:
    """Return the hub's address of the original; empty for a folder."""
    return f"https://huggingface.co/{plan.model.id}" if is_hub_id(plan.model.id) else ""


def _front_matter(plan: Plan, modules: Mapping[str, str]) -> str:
    """Return what the hub reads: where the model comes from and how it is stored."""
    bits = {f"{parse_scheme(name).bits:g}-bit" for name in modules.values() if name != "bf16"}
    tags = ["quantized", plan.scheme.format, *sorted(bits), plan.engine.name]
    document = {
        "base_model": plan.model.title,
        "base_model_relation": "quantized",
        "library_name": _LIBRARIES.get(plan.scheme.format, "transformers"),
        "pipeline_tag": "text-generation",
        "quantized_by": "quantization-advisor",
        "tags": list(dict.fromkeys(tags)),
    }
    return f"---\n{yaml.safe_dump(document, sort_keys=False, allow_unicode=True)}---"


def _figures(plan: Plan, files: Mapping[str, int]) -> str:
    expected = plan.expected
    rows = [
        ("weight files", in_words(sum(files.values()))),
        ("bits per weight, scales included", f"{expected.bits_per_weight:.3f}"),
    ]
    if expected.memory_bytes is not None:
        rows.append(
            (
                f"memory when serving {plan.serving.batch} × {plan.serving.context} tokens, "
                "predicted",
                in_words(expected.memory_bytes),
            )
        )
    if expected.kl is not None:
        rows.append(("KL from the 16-bit model, nats per token", _interval(expected.kl)))
    if expected.loss is not None:
        rows.append(("increase of perplexity", _interval(expected.loss, percent=True)))
    if expected.perplexity is not None and expected.reference_perplexity is not None:
        pair = f"{expected.perplexity:.2f} (16-bit: {expected.reference_perplexity:.2f})"
        rows.append(("perplexity", pair))
    if expected.top1_agreement is not None:
        rows.append(("same likeliest next token", _interval(expected.top1_agreement, percent=True)))
    for name, found in sorted(expected.slices.items()):
        rows.append((f"KL on {name}", _interval(found.kl)))
        rows.append((f"increase of perplexity on {name}", _interval(found.loss, percent=True)))
    if (accuracy := expected.accuracy) is not None:
        task = PurePath(accuracy.task).name
        value = f"{accuracy.value:.2%} (16-bit: {accuracy.reference:.2%})"
        rows.append((f"right answers on {task}, {accuracy.questions} questions", value))
        rows.append((f"drop on {task}", _interval(accuracy.drop, percent=True)))
    note = {
        "measured": "Measured on the weights as these files hold them; 95% confidence intervals.",
        "score": "Predicted from calibration statistics; not measured.",
        "evidence": "Expected from published evidence; not measured.",
    }[expected.basis]
    return f"## Figures\n\n{_table(('figure', 'value'), rows)}\n\n{note}"


def _judged(plan: Plan) -> str:
    """Say which texts the figures and the codes come from."""
    rows = []
    if plan.evaluation is not None:
        rows.append(("measured on", _text(plan.evaluation)))
    rows += [(f"measured on, {name}", _text(text)) for name, text in sorted(plan.slices.items())]
    if plan.calibration is not None:
        rows.append(("calibrated on", _text(plan.calibration)))
    if not rows:
        return ""
    warnings = plan.calibration_fit.warnings if plan.calibration_fit else ()
    notes = "".join(f"\n- {warning}" for warning in warnings)
    text = f"## Texts\n\n{_table(('', 'text'), rows)}"
    return f"{text}\n{notes}" if notes else text


def _text(text: Text) -> str:
    corpora = ", ".join(
        part if part.startswith(("builtin:", "hf:")) else PurePath(part).name
        for part in text.corpus.split(",")
    )
    return (
        f"{corpora}: {text.sequences} sequences of {text.sequence_length} tokens, seed "
        f"{text.seed}, sha256 {text.tokens_sha256[:16]}"
    )


def serve_plan(plan: Plan, path: str) -> str:
    """Return the command that serves a plan's checkpoint as it was tuned for.

    Args:
        plan: The plan.
        path: Folder of the checkpoint (for llama.cpp, the GGUF file).
    """
    return serve_command(
        plan.engine.name, path, plan.serving.context, plan.serving.batch,
        devices=plan.hardware.count, dtype=plan.engine.kernel.dtype,
    )  # fmt: skip


def _serving(plan: Plan, files: Mapping[str, int]) -> str:
    gguf = [name for name in files if name.endswith(".gguf")]
    command = serve_plan(plan, gguf[0] if gguf else ".")
    kernel = plan.engine.kernel
    verdict = f"Kernel on {plan.hardware.title}: {kernel.support}, {kernel.reason}."
    return f"## Serving\n\n```sh\n{command}\n```\n\n{verdict}"


def _inside(modules: Mapping[str, str], outer: Mapping[str, str]) -> str:
    counted = Counter(scheme for name, scheme in modules.items() if name not in outer)
    rows = [
        (name, str(count)) for name, count in sorted(counted.items(), key=lambda x: (-x[1], x[0]))
    ]
    rows += [(scheme, name) for name, scheme in outer.items()]
    return f"## Inside\n\n{_table(('scheme', 'modules'), rows)}"


def _again(plan: Plan) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(plan.versions.items()))
    device = "" if plan.computed_on is None else f", on {plan.computed_on.name}"
    return (
        "## Reproduce and check\n\n```sh\nadvisor apply advisor-plan.yaml -o again --model "
        "ORIGINAL\nadvisor verify advisor-plan.yaml . --model ORIGINAL\n```\n\n"
        f"`ORIGINAL` is the 16-bit model (sha256 of its weights {plan.model.weights_sha256[:16]})."
        f"\nMade with {versions}{device}."
    )


def _interval(value: Interval, *, percent: bool = False) -> str:
    factor, unit = (100.0, "%") if percent else (1.0, "")
    form = ".2f" if percent else ".3g"
    numbers = (f"{factor * part:{form}}" for part in (value.value, value.low, value.high))
    middle, low, high = numbers
    return f"{middle}{unit} [{low}, {high}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
