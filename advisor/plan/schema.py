"""The plan: one versioned YAML that says what was chosen, why, and how to do it again."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from advisor.plan.hashing import is_hub_id

PLAN_VERSION = 1


class Strict(BaseModel):
    """Base of every file schema: frozen, and an unknown key is an error."""

    # Built on first use: commands that read no plan need not pay for the plan's schema.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class ModelIdentity(Strict):
    """Which model, by content."""

    id: str
    revision: str | None = None
    architecture: str
    parameters: int = Field(ge=0)
    quantizable_parameters: int = Field(ge=0)
    config_sha256: str
    tokenizer_sha256: str
    weights_sha256: str

    @property
    def title(self) -> str:
        """Its Hugging Face id, or a folder's last part: where that lies is nobody's business."""
        return self.id if is_hub_id(self.id) else PurePath(self.id).name


class Hardware(Strict):
    """The profile that the kernels were chosen for."""

    id: str
    name: str
    vendor: str
    compute_capability: str | None = None
    memory_bytes: int | None = Field(default=None, ge=1)
    count: int = Field(default=1, ge=1)
    instruction_sets: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name, with the number where there are several: ``2x L4``."""
        return self.name if self.count == 1 else f"{self.count}x {self.name}"


class Kernel(Strict):
    """How the engine runs the chosen scheme on the hardware."""

    support: Literal["native", "weight-only", "emulated", "none"]
    name: str | None = None
    reason: str
    source: str | None = None
    dtype: str | None = None
    """16-bit data type to serve with, where the kernel allows one only."""


class Engine(Strict):
    """What serves the checkpoint."""

    name: str
    kernel: Kernel


class Serving(Strict):
    """The workload that memory and speed are predicted for."""

    context: int = Field(ge=1)
    batch: int = Field(ge=1)


class BudgetLimits(Strict):
    """The budgets, by the names of :class:`advisor.budgets.Budgets`."""

    max_size_bytes: int | None = None
    max_memory_bytes: int | None = None
    max_loss: float | None = None
    max_kl: float | None = None
    max_accuracy_drop: float | None = None
    task: str | None = None
    min_tokens_per_s: float | None = None


class SchemeChoice(Strict):
    """The scheme, and the modules that differ from it."""

    name: str
    """Name of the answer: the scheme itself, or mixed-<bits>bpw."""
    default: str
    """Scheme of every quantized module that ``modules`` does not name."""
    format: str
    modules: dict[str, str] = Field(default_factory=dict)
    """Module path to scheme name; ``bf16`` keeps the module as it is."""
    outer: dict[str, str] = Field(default_factory=dict)
    """Embedding and head, by module path, where they were to be quantized too. Without an entry
    they stay in 16 bits, and in a GGUF file take what llama.cpp gives them."""


class BackendChoice(Strict):
    """The library that makes the checkpoint, where it is not Advisor itself."""

    name: str
    version: str
    lock_sha256: str
    """Hash of the lock file that its environment is made of."""
    scheme: str
    """What is asked of it."""
    settings: dict[str, bool | int | float | str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    """Of what it ran on, in its own environment."""


class Text(Strict):
    """A text and how it was cut into sequences."""

    corpus: str
    """What was named, joined by " + ": built-in texts, files, folders, data sets, in a mix each
    with its weight. ``self`` is what the model wrote, kept in a file beside the plan."""
    sha256: str
    sequences: int = Field(ge=1)
    sequence_length: int = Field(ge=2)
    seed: int
    tokens_sha256: str
    share_of_calibration_tokens: float | None = None
    compact: bool | None = None
    """Of the calibration text: whether its statistics were kept in 16 bits, where the disk had no
    room for more."""


class CalibrationFit(Strict):
    """How well the calibration text stands for the evaluation text."""

    token_coverage: float
    """Share of the evaluation's tokens of a kind that the calibration has."""
    calibration_perplexity: float
    evaluation_perplexity: float
    """Both of the unquantized model."""
    moment_ratio: float
    """Distance of the layers' inputs between the texts, over that between calibration halves."""
    warnings: tuple[str, ...] = ()


class ExpertCoverage(Strict):
    """How many calibration tokens the experts of a mixture saw: each only those routed to it."""

    experts: int
    """Of all layers."""
    unseen: int
    """Experts without any token."""
    helped: int
    """Experts that saw too few, and were fitted with the help of their layer's average inputs."""
    fewest_tokens: int
    median_tokens: int
    layers: dict[str, str]
    """Path of a layer's experts to the tokens that each of them saw, in their order."""


class Fallback(Strict):
    """Modules that could not take what the others took."""

    modules: int
    first: str
    scheme: str
    """What they got instead; ``bf16`` is left as it was."""
    reason: str


class Interval(Strict):
    """A measured mean and its 95% confidence interval."""

    value: float
    low: float
    high: float


class SliceResult(Strict):
    """What was measured on one further text."""

    loss: Interval
    kl: Interval
    top1_agreement: Interval


class Accuracy(Strict):
    """What was measured on a benchmark."""

    task: str
    questions: int
    value: float
    reference: float
    """Of the unquantized model."""
    drop: Interval


class Expected(Strict):
    """What the search measured or computed of the answer."""

    size_bytes: int
    bits_per_weight: float
    basis: Literal["evidence", "score", "measured"]
    loss: Interval | None = None
    kl: Interval | None = None
    top1_agreement: Interval | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    slices: dict[str, SliceResult] = Field(default_factory=dict)
    accuracy: Accuracy | None = None
    predicted_kl: float | None = None
    """The score, before anything was measured; none for candidates that have no score."""
    memory_bytes: int | None = None


class Search(Strict):
    """Where the answer came from."""

    study: str
    trials: int
    sampler: str
    effort: Literal["quick", "full"] = "full"
    """What the search spent: ``quick`` measures fewer candidates, whose codes are made faster."""
    seed: int
    passed_over: tuple[str, ...] = ()
    """Methods that a look at a few blocks ruled out, with the reason in words."""
    stopped: Literal["completed", "interrupted", "time budget"] = "completed"
    best: tuple[tuple[int, float], ...] = ()
    """(trial, best objective from then on): size in bytes or predicted KL, within the budgets."""
    score_spearman: float | None = None
    """Rank correlation of predicted and measured KL over the finalists."""


class ComputedOn(Strict):
    """What the codes and figures were computed on: others add in another order."""

    device: str
    """As torch names it: ``cpu``, ``cuda:0``."""
    name: str
    """What it is called."""
    threads: int | None = None
    """Of the CPU."""


class RunnerUp(Strict):
    """A candidate that lost, and why."""

    name: str
    size_bytes: int
    basis: Literal["evidence", "score", "measured"]
    loss: Interval | None = None
    kl: Interval | None = None
    predicted_kl: float | None = None
    reason: str


class Plan(Strict):
    """The whole plan, readable top to bottom."""

    plan_version: int = Field(default=PLAN_VERSION, ge=1)
    advisor_version: str
    model: ModelIdentity
    hardware: Hardware
    engine: Engine
    serving: Serving
    budgets: BudgetLimits
    scheme: SchemeChoice
    backend: BackendChoice | None = None
    """Another library that makes it; its settings are here, and ``settings`` has none."""
    settings: dict[str, str | int | float | bool | None]
    calibration: Text | None = None
    calibration_fit: CalibrationFit | None = None
    expert_coverage: ExpertCoverage | None = None
    fallbacks: tuple[Fallback, ...] = ()
    expected: Expected
    unmet: str | None = None
    """Which budget it breaks, where nothing met them all and this came nearest."""
    evaluation: Text | None = None
    slices: dict[str, Text] = Field(default_factory=dict)
    """Further texts that had to meet the budgets on their own, by name."""
    search: Search | None = None
    runners_up: tuple[RunnerUp, ...] = ()
    computed_on: ComputedOn | None = None
    versions: dict[str, str]
    outputs: dict[str, str] = Field(default_factory=dict)
    """After apply: sha256 of every output tensor file."""
