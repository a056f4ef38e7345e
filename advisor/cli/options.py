"""Options that several commands share, declared once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import typer


@dataclass
class State:
    """Flags that every command takes."""

    json: bool = False
    verbose: bool = False
    debug: bool = False


state = State()


def _remember(name: str) -> object:
    def callback(value: bool) -> bool:
        setattr(state, name, value)
        return value

    return callback


def _extra_profiles(folders: Any) -> Any:
    # Not list[Path]: on Python 3.10 that is an instance of type, which Typer trips over.
    if folders:
        from advisor.plan.data import set_extra_folders

        set_extra_folders(folders)
    return folders


_COMMON = "Output"
_COMPUTE = "Computing"
_BUDGETS = "Budgets"
_TARGET = "Target"

Json = Annotated[
    bool,
    typer.Option("--json", callback=_remember("json"), is_eager=True, rich_help_panel=_COMMON,
                 help="Print one JSON document on stdout and nothing else."),
]  # fmt: skip
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", callback=_remember("verbose"), is_eager=True,
                 rich_help_panel=_COMMON, help="Show the log on stderr."),
]  # fmt: skip
Debug = Annotated[
    bool,
    typer.Option("--debug", callback=_remember("debug"), is_eager=True, rich_help_panel=_COMMON,
                 help="Show the traceback of an error."),
]  # fmt: skip
Profiles = Annotated[
    list[Path],
    typer.Option("--profiles", callback=_extra_profiles, is_eager=True, rich_help_panel=_TARGET,
                 metavar="DIR", help="A folder with profiles of your own."),
]  # fmt: skip

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A local folder, a Hugging Face id, or a catalogue id."),
]
Gpu = Annotated[
    str,
    typer.Option("--gpu", rich_help_panel=_TARGET, metavar="NAME",
                 help="A GPU as people name it (rtx-4090, 'A100 80GB PCIe', '2x L4'), cpu, or "
                 "auto: what is in this machine."),
]  # fmt: skip
Engine = Annotated[
    str,
    typer.Option("--engine", rich_help_panel=_TARGET, metavar="NAME",
                 help="vllm, sglang, transformers, llama.cpp, tensorrt-llm or auto; vllm==0.27 for "
                 "an older release than the newest known."),
]  # fmt: skip
Context = Annotated[
    int,
    typer.Option(
        "--context", min=1, rich_help_panel=_TARGET, help="Tokens of context when serving."
    ),
]
Batch = Annotated[
    int,
    typer.Option("--batch", min=1, rich_help_panel=_TARGET, help="Sequences served at once."),
]
Prefer = Annotated[
    str,
    typer.Option("--prefer", rich_help_panel=_BUDGETS, metavar="WHAT",
                 help="Breaks ties among what fits: accuracy, size, speed or balanced."),
]  # fmt: skip
MaxSize = Annotated[
    Optional[str],  # noqa: UP045 - the annotation is read at run time on Python 3.10
    typer.Option("--max-size", rich_help_panel=_BUDGETS, metavar="SIZE",
                 help="Bytes of the weight files: 6GB (10^9) or 6GiB (2^30)."),
]  # fmt: skip
MaxMemory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--max-memory", rich_help_panel=_BUDGETS, metavar="SIZE",
                 help="Peak device memory at --context and --batch. "
                 "Default: what the GPU has, less 8%."),
]  # fmt: skip
MaxLoss = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--max-loss", rich_help_panel=_BUDGETS, metavar="FRACTION",
                 help="Relative increase of perplexity over the 16-bit model, for example 3%."),
]  # fmt: skip
MaxKl = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--max-kl", rich_help_panel=_BUDGETS, metavar="NATS",
                 help="Mean KL divergence from the 16-bit model per token."),
]  # fmt: skip
MaxAccuracyDrop = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--max-accuracy-drop", rich_help_panel=_BUDGETS, metavar="POINTS",
                 help="Drop of accuracy on --task, for example 1pp."),
]  # fmt: skip
Task = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--task", rich_help_panel=_BUDGETS, metavar="NAME",
                 help="An lm-evaluation-harness task, or a local multiple-choice JSONL."),
]  # fmt: skip
MinSpeed = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--min-speed", rich_help_panel=_BUDGETS, metavar="TOKENS/S",
                 help="Decode tokens per second at --batch and --context."),
]  # fmt: skip

_TEXTS = "Texts"
_SEARCH = "Search"

CalibrationText = Annotated[
    list[str],
    typer.Option("--calibration", rich_help_panel=_TEXTS, metavar="PATH",
                 help="Text to calibrate on: files, folders, JSONL (text or chat messages), "
                 "hf:NAME[:CONFIG[:SPLIT]], self (text that the model writes itself); PATH@2 "
                 "weighs one against others. Default: builtin:general, half technical English, "
                 "half facts and fiction. Give text like your users'."),
]  # fmt: skip
EvaluationText = Annotated[
    list[str],
    typer.Option("--evaluation", rich_help_panel=_TEXTS, metavar="PATH",
                 help="Text to judge on, disjoint from calibration. Default: builtin:evaluation."),
]  # fmt: skip
Slices = Annotated[
    list[str],
    typer.Option("--slice", rich_help_panel=_TEXTS, metavar="NAME=PATH",
                 help="A further text that must meet the budgets on its own: code=src/. "
                 "Repeatable."),
]  # fmt: skip
Samples = Annotated[
    int,
    typer.Option("--samples", min=1, rich_help_panel=_TEXTS, help="Calibration sequences."),
]
TuneSamples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        min=1,
        rich_help_panel=_TEXTS,
        help="Calibration sequences.",
        show_default="32, on an accelerator up to 128",
    ),
]
SequenceLength = Annotated[
    int,
    typer.Option("--sequence-length", min=16, rich_help_panel=_TEXTS, help="Tokens a sequence."),
]
TuneEvaluationSequences = Annotated[
    int | None,
    typer.Option("--evaluation-sequences", min=4, rich_help_panel=_TEXTS,
                 help="Held-out sequences to measure on; up to eight times as many where these "
                 "leave a budget undecided.", show_default="32, of a quick search 16"),
]  # fmt: skip
EvaluationSequences = Annotated[
    int,
    typer.Option("--evaluation-sequences", min=4, rich_help_panel=_TEXTS,
                 help="Held-out sequences to measure on; up to eight times as many where these "
                 "leave a budget undecided."),
]  # fmt: skip
Trials = Annotated[
    int,
    typer.Option("--trials", min=1, rich_help_panel=_SEARCH, help="Candidates to score."),
]
TimeBudget = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--time-budget", rich_help_panel=_SEARCH, metavar="TIME",
                 help="Stop proposing after this long (90s, 10m, 2h) and answer with the best."),
]  # fmt: skip
Seed = Annotated[
    int, typer.Option("--seed", min=0, rich_help_panel=_SEARCH, help="Seed of every choice.")
]
Storage = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--storage", rich_help_panel=_SEARCH, metavar="URL",
                 help="Where the study lives: an RDB URL; several processes may share it. Default: "
                 "SQLite beside the plan."),
]  # fmt: skip
MaxDisk = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--max-disk", rich_help_panel=_SEARCH, metavar="SIZE",
                 help="The most that statistics and predictions may add to the disk (20GB), and "
                 "the model's own text while it is written. Statistics take 16 bits where only "
                 "that fits; more is refused before anything starts."),
]  # fmt: skip
QuantizeHead = Annotated[
    bool,
    typer.Option("--quantize-head", rich_help_panel=_TARGET,
                 help="Let the head (lm_head; GGUF's output) take fewer bits too, where the "
                 "engine reads that. Default: 16 bits; in GGUF llama.cpp's choice."),
]  # fmt: skip
QuantizeEmbedding = Annotated[
    bool,
    typer.Option("--quantize-embedding", rich_help_panel=_TARGET,
                 help="Let the embedding (GGUF's token_embd) take fewer bits too, where the "
                 "engine reads that; of a tied model it is the head as well."),
]  # fmt: skip
Device = Annotated[
    str,
    typer.Option("--device", rich_help_panel=_COMPUTE, metavar="NAME",
                 help="Where this command computes: auto (an accelerator of this machine with "
                 "room for a block, else the CPU), cpu, cuda or cuda:1."),
]  # fmt: skip
Effort = Annotated[
    str,
    typer.Option("--effort", rich_help_panel=_SEARCH, metavar="NAME",
                 help="What the search spends: full, or quick (0.4 of the time on one model: "
                 "GPTQ's codes alone and without descent, one mixture and one uniform candidate "
                 "measured, on 16 sequences)."),
]  # fmt: skip
Sequential = Annotated[
    bool,
    typer.Option("--sequential/--no-sequential", rich_help_panel=_SEARCH,
                 help="Also measure the answer with each block fitted to what the quantized "
                 "blocks before it give, and keep the better."),
]  # fmt: skip
Sampler = Annotated[
    str,
    typer.Option("--sampler", rich_help_panel=_SEARCH, metavar="NAME",
                 help="Who proposes: tpe, nsga2 (over the whole frontier of size and KL) or "
                 "random."),
]  # fmt: skip
Backends = Annotated[
    list[str],
    typer.Option("--backends", rich_help_panel=_SEARCH, metavar="NAME,...",
                 help="Other libraries (advisor backends list) whose best uniform candidates and "
                 "own mixtures are measured too, and chosen only if they win."),
]  # fmt: skip
