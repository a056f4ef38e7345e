"""Trials: proposals of the study, composed and scored; nothing here quantizes a whole model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from advisor.search.families import BEST, Family, clip_under
from advisor.search.outcomes import Outcome, TrialRecord
from advisor.search.sifting import is_promising, share_of_a_look
from advisor.search.space import Proposal, Space, Suggester, storage_name, suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from advisor.search.compose import Composer
    from advisor.search.goal import Goal
    from advisor.search.mixture import Mixture

_UNITS_PER_PARAMETER = 0.8e9
_FEWEST_UNITS, _MOST_UNITS = 9, 24
_UNITS = {"rtn": 1, "gptq": 2, "awq": 2, "gguf": 2}
_CLIP_UNITS = {"rtn": 1, "gptq": 0, "awq": 4, "gguf": 0}
"""Cost of scoring all options of a method, and what a clip search adds (measured on SmolLM2)."""


def scoring_allowance(parameters: int, further: int = 0, saved: Sequence[str] = ()) -> int:
    """Return what may be spent on scoring; two units are about one GPTQ of the model.

    A function of the model's size, not of the time that passed, so that a study can be repeated.
    The experts' families take seven units, and two for each further mix of calibration sources
    or rotation.

    Args:
        parameters: Quantizable ones.
        further: Mixes and rotations beside the usual.
        saved: Methods that are not scored: what they would have cost is not spent on others.
    """
    units = max(_FEWEST_UNITS, min(_MOST_UNITS, round(_UNITS_PER_PARAMETER / parameters)))
    return units + further * _UNITS["gptq"] - sum(_UNITS.get(method, 0) for method in saved)


def scoring_cost(family: Family, known: Sequence[Family]) -> int:
    """Return the units of scoring a family, less what it shares with known ones."""
    paid = {part for other in known for part in _parts(other)}
    return sum(
        _UNITS[method] + (_CLIP_UNITS[method] if clip_under(method, family.clip) == "mse" else 0)
        for method, choices in _parts(family)
        if (method, choices) not in paid
    )


def _parts(family: Family) -> list[tuple[str, tuple[object, ...]]]:
    """Return what of a family is scored by itself: methods, and the choices their scores heed."""
    found = []
    for method in family.methods:
        grids: tuple[bool | None, ...] = (family.symmetric,)
        if family.symmetric is None:
            grids = (True, False) if method == "gptq" else (True,)
        clip = clip_under(method, family.clip)
        for symmetric in grids:
            own: tuple[object, ...] = (symmetric, clip, family.rotation)
            if method == "gptq":
                own += (family.damping, family.activation_order, family.static_groups)
            if method != "rtn" or clip == "mse":
                own += (family.samples, family.mix)
            found.append((method, own))
    return found


@dataclass(slots=True)
class Scorer:
    """Turns a trial's proposal into an outcome.

    Attributes:
        composer: Makes and prices candidates.
        space: The search space.
        goal: What is wanted.
        allowance: Units that may be spent on scoring families.
        progress: Told of the scoring of a new family: (family, groups done, in all).
        scored: Families known so far, in order of first use.
        expected: Families that trials are sure to ask for: the first of them that comes up has all
            scored with it, in one walk over the model.
        usual: Families that are scored whatever that costs, and without a look.
        passed: Families that a look at a few blocks passed over, in order.
    """

    composer: Composer
    space: Space
    goal: Goal
    allowance: int
    progress: Callable[[Family, int, int], None]
    scored: list[Family] = field(default_factory=list)
    best: Mixture | None = None
    expected: Sequence[Family] = ()
    usual: Sequence[Family] = ()
    passed: dict[Family, None] = field(default_factory=dict)

    def recall(self, records: Sequence[TrialRecord]) -> None:
        """Take up the families of a study's earlier trials, so that it goes on as it would have."""
        for record in records:
            if (stored := record.attributes.get("family")) is not None:
                family = Family(**stored)
                if family not in self.scored:
                    self.scored.append(family)
            if (stored := record.attributes.get("passed")) is not None:
                self.passed.setdefault(Family(**stored))

    def __call__(self, trial: Suggester) -> Outcome:
        """Ask a trial for its choices and score them."""
        proposal = suggest(trial, self.space)
        if (reason := self._rejection(proposal)) is not None:
            return Outcome(math.inf, (1.0,), {}, rejected=reason)
        family = self._affordable(proposal.family)
        self.score(family)
        if family not in self.scored:
            self.scored.append(family)
        seen = {} if proposal.family not in self.passed else {"passed": proposal.family.to_dict()}
        mixture = self._compose(family, proposal)
        if mixture is None:
            return Outcome(
                math.inf, (1.0,), {}, rejected="the storage is too slow, or fits not all modules"
            )
        outcome = self._outcome(mixture, seen)
        feasible = all(value <= 0 for value in outcome.constraints)
        if feasible and (self.best is None or self._value(mixture) < self._value(self.best)):
            self.best = mixture
        return outcome

    def _step(self, family: Family) -> Callable[[int, int], None]:
        def step(done: int, total: int) -> None:
            self.progress(family, done, total)

        return step

    def score(self, family: Family) -> None:
        """Have a family scored, with those that will be asked for next."""
        step = self._step(family)
        if family in self.expected:
            # GPTQ's settings say most: rounding and AWQ heed a part of them.
            lead = next((f for f in self.expected if f.method == "gptq"), family)
            others = [f for f in self.expected if f not in (lead, family)]
            self.expected = ()
            self.composer.score_together(list(dict.fromkeys([lead, family, *others])), step)
        self.composer.groups(family, step)

    def _rejection(self, proposal: Proposal) -> str | None:
        """Return why arithmetic rules a proposal out before anything is scored."""
        if proposal.uniform is None:
            return None
        if proposal.family.method == "best":
            return "a uniform candidate has one method, not the best of several"
        size = _uniform_size(self.composer, proposal.family, proposal.uniform)
        if size is None:
            return f"{proposal.uniform} fits not all modules"
        if self.goal.max_bytes is not None and size > self.goal.max_bytes:
            return f"{size} bytes are more than the budget of {self.goal.max_bytes}"
        return None

    def _affordable(self, family: Family) -> Family:
        """Return the family, or the nearest scored one where it is not to be scored.

        That is where no more may be spent, or where a look at a few blocks passes it over.
        """
        cost = scoring_cost(family, self.scored)
        if cost == 0 or not self.scored or family in self.usual:
            return family
        look = share_of_a_look(self.composer)
        spent = sum(
            scoring_cost(other, self.scored[:place]) for place, other in enumerate(self.scored)
        ) + look * sum(scoring_cost(other, []) for other in self.passed)
        looks = look > 0 and family.method != BEST
        if looks and family not in self.passed and spent + look * cost <= self.allowance:
            if is_promising(self.composer, family, self.scored, self._step(family)):
                return family
            self.passed[family] = None
        elif not looks and spent + cost <= self.allowance:
            return family

        def distance(other: Family) -> tuple[int, int]:
            mine, theirs = family.to_dict(), other.to_dict()
            return (
                int(family.method != other.method),
                sum(mine[name] != theirs[name] for name in mine),
            )

        return min(self.scored, key=distance)

    def _compose(self, family: Family, proposal: Proposal) -> Mixture | None:
        if proposal.uniform is not None:
            return self.composer.uniform(family, proposal.uniform)
        limit = self.composer.bytes_at(proposal.target_bits or self.space.high_bits)
        if self.goal.max_bytes is not None:
            limit = min(limit, self.goal.max_bytes)
        return self.composer.mixture(family, limit, or_smallest=True)

    def _value(self, mixture: Mixture) -> float:
        return float(mixture.size_bytes) if self.goal.smallest else mixture.predicted_kl

    def _outcome(self, mixture: Mixture, seen: Mapping[str, Any]) -> Outcome:
        constraints = []
        if self.goal.max_bytes is not None:
            constraints.append((mixture.size_bytes - self.goal.max_bytes) / self.goal.max_bytes)
        if self.goal.has_quality_budget:
            constraints.append(math.log(max(mixture.predicted_kl, 1e-12) / self.goal.target_kl))
        return Outcome(
            self._value(mixture), tuple(constraints), {**_attributes(mixture), **seen},
            objectives=(float(mixture.size_bytes), mixture.predicted_kl),
        )  # fmt: skip


def _attributes(mixture: Mixture) -> Mapping[str, Any]:
    return {
        "name": mixture.name,
        "family": mixture.family.to_dict(),
        "size_bytes": mixture.size_bytes,
        "bits_per_weight": mixture.bits_per_weight,
        "predicted_kl": mixture.predicted_kl,
    }


def promising_families(
    scored: Sequence[Family], composer: Composer, max_bytes: int
) -> list[Family]:
    """Return the scored families, for each method the best at a size first.

    Args:
        scored: Families with known scores.
        composer: Prices them.
        max_bytes: Size at which they are compared.
    """
    found: list[tuple[float, int, Family]] = []
    for order, family in enumerate(dict.fromkeys(scored)):
        if not composer.is_scored(family):
            continue
        mixture = composer.mixture(family, max_bytes, or_smallest=True)
        found.append((mixture.predicted_kl, order, family))
    return [family for _, _, family in sorted(found, key=lambda row: row[:2])]


def families_to_measure(
    scorer: Scorer, records: Sequence[TrialRecord], usual: Family, max_bytes: int
) -> list[Family]:
    """Return the scored families, of which at least one is scored now where none was.

    None is where the time was over before the first trial, or where other machines ran all trials:
    their scores lie in caches of their own.

    Args:
        scorer: After the trials.
        records: All trials of the study.
        usual: The family of what an expert would try first.
        max_bytes: Size at which families are compared.
    """
    found = promising_families(scorer.scored, scorer.composer, max_bytes)
    if found:
        return found
    best = min(
        (record for record in records if record.value is not None and record.attributes),
        key=lambda record: (not record.feasible, record.value),
        default=None,
    )
    family = usual if best is None else Family(**best.attributes["family"])
    scorer.score(family)
    return promising_families([family], scorer.composer, max_bytes)


def _uniform_size(composer: Composer, family: Family, storage: str) -> int | None:
    """Return the bytes of a uniform candidate without scoring it; None where it fits not."""
    for scheme in composer.schemes(family):
        if storage_name(scheme) == storage and composer.takes(scheme, composer.linears):
            assignment = dict.fromkeys((linear.name for linear in composer.linears), scheme)
            return composer.size(assignment).total_bytes
    return None
