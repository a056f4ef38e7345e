"""Compose candidates: a family's scores and a size or KL limit in, an assignment of modules out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from advisor.errors import InfeasibleError, InputError
from advisor.formats.layouts import expert_scheme_fits
from advisor.schemes import BF16, Scheme
from advisor.search.allocation import Allocation, Groups, Option, allocate, allocate_for_score
from advisor.search.fallbacks import nothing_fits
from advisor.search.families import BEST, Family, is_measured_alone, schemes_of, with_16_bit
from advisor.search.mixture import Mixture
from advisor.search.outer import outer_schemes
from advisor.search.pace import solve_in_time
from advisor.search.prices import Prices
from advisor.search.scores import ScoreBook, fits
from advisor.search.space import kernel_view, storage_name
from advisor.search.ties import tied_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from advisor.engines.options import MixtureOptions
    from advisor.methods.settings import QuantizationSettings
    from advisor.modelspec import LinearSpec, ModelSpec
    from advisor.modelspec.outer import OuterModule
    from advisor.predict.size import SizeEstimate
    from advisor.search.outer import OuterBook
    from advisor.search.pace import Pace


class Composer:
    """Knows what each option costs and scores, for one model, engine and format."""

    def __init__(
        self,
        spec: ModelSpec,
        linears: Sequence[LinearSpec],
        offered: MixtureOptions,
        book: ScoreBook,
        settings: QuantizationSettings,
        *,
        outer: OuterBook | None = None,
        experts_as_one: bool = False,
        pace: Pace | None = None,
    ) -> None:
        """Prepare.

        Args:
            spec: The model's tensors.
            linears: Its quantizable modules, fused as the engine does.
            offered: What the engine mixes in one checkpoint, and which modules that does not fit.
            book: Scores.
            settings: The methods' settings that families refine.
            outer: Scores of embedding and head, where they are to be quantized too.
            experts_as_one: Whether the engine unpacks all experts of all layers by one scheme.
            pace: A limit on time.

        Raises:
            InputError: Nothing that is offered fits this model; says why of each scheme.
        """
        self.options = with_16_bit(offered.schemes)
        if not any(scheme.is_quantized for scheme in self.options):
            raise InputError(nothing_fits(offered))
        self.linears = tuple(linears)
        self._experts_as_one = experts_as_one and any(linear.is_expert for linear in linears)
        if self._experts_as_one:
            self.options = tuple(s for s in self.options if s.symmetric is not False)
        self.settings = settings
        self._unfit = {kernel_view(scheme): names for scheme, names in offered.unfit.items()}
        self._prices = Prices(spec, offered.format, self.linears)
        self.book = book
        self._outer = outer
        self._pace = pace
        self._groups: dict[Family, Groups] = {}
        self._ends: tuple[SizeEstimate, SizeEstimate] | None = None
        self.outer = () if outer is None else outer.modules

    def size(self, assignment: Mapping[str, Scheme]) -> SizeEstimate:
        """Return the exact size of a checkpoint."""
        return self._prices.checkpoint(assignment)

    def takes(self, scheme: Scheme, members: Iterable[LinearSpec]) -> bool:
        """Whether a scheme's groups divide all of these modules and a kernel runs each."""
        unfit = self._unfit.get(kernel_view(scheme), frozenset())
        return all(fits(scheme, m) and m.name not in unfit for m in members)

    def schemes(self, family: Family) -> tuple[Scheme, ...]:
        """Return every scheme whose scores a family needs."""
        found = [
            scheme
            for method in family.methods
            for scheme in schemes_of(family, self.options, method)
        ]
        return tuple(dict.fromkeys(found))

    def is_scored(self, family: Family) -> bool:
        """Whether the family's scores are known already."""
        return not self.book.missing(
            self.schemes(family), family.settings(self.settings), family.samples
        )

    def score_together(
        self,
        families: Sequence[Family],
        progress: Callable[[int, int], None] | None = None,
        *,
        sampled: bool = False,
    ) -> None:
        """Score families in one walk over the model, as far as they are alike.

        Statistics and weights are read once, and GPTQ on several grids shares a Cholesky factor
        and a loop.

        Args:
            families: Of the first all schemes are scored, of the others those whose scores the
                first one's settings give as well.
            progress: Called with (input groups done, in all).
            sampled: As :meth:`advisor.search.scores.ScoreBook.scores` takes it.
        """
        lead = families[0]
        settings = lead.settings(self.settings)
        if lead.method == "gptq" and lead.clip == "mse":  # to it the same, and others' usual
            settings = replace(settings, clip="gptq")
        schemes = list(self.schemes(lead))
        for family in families[1:]:
            own = family.settings(self.settings), family.samples
            schemes += [
                scheme
                for scheme in self.schemes(family)
                if self.book.is_same(scheme, settings, lead.samples, own)
            ]
        self.book.scores(schemes, settings, lead.samples, progress, sampled=sampled)

    def groups(self, family: Family, progress: Callable[[int, int], None] | None = None) -> Groups:
        """Return the knapsack's groups, scoring the family where it is not known yet."""
        if family not in self._groups:
            self._groups[family] = self._group(family, progress)
        return self._groups[family]

    def _group(self, family: Family, progress: Callable[[int, int], None] | None) -> Groups:
        """Make a family's groups."""
        schemes = self.schemes(family)
        scores = self.book.scores(schemes, family.settings(self.settings), family.samples, progress)
        result: dict[str, list[Option]] = {}
        for key, members in self._ties(family).items():
            options = []
            for scheme in schemes:
                known = all(linear.name in scores[scheme] for linear in members)
                if not known or not self.takes(scheme, members):
                    continue
                must = self._experts_as_one and members[0].is_expert
                if must and not expert_scheme_fits(scheme):
                    continue
                cost = sum(self._prices.module(linear, scheme) for linear in members)
                score = sum(scores[scheme][linear.name].kl for linear in members)
                options.append(Option(str(scheme), cost, score))
            result[key] = options
        for module in self.outer:
            result[module.name] = self._outer_options(module, family)
        return result

    def _outer_options(self, module: OuterModule, family: Family) -> list[Option]:
        """Return what an embedding or a head may take."""
        settings = family.settings(self.settings)
        options = []
        for scheme in self._outer_schemes(module, family):
            score = 0.0
            if self._outer is not None:
                score = self._outer.score(module, scheme, settings, family.samples).kl
            options.append(Option(str(scheme), self._prices.outer(module, scheme), score))
        return options

    def _outer_schemes(self, module: OuterModule, family: Family) -> list[Scheme]:
        schemes = outer_schemes(module, self.schemes(family))
        return [scheme for scheme in schemes if self.takes(scheme, [module.linear])]

    def mixture(self, family: Family, max_bytes: int, *, or_smallest: bool = False) -> Mixture:
        """Return the best mixture within a size.

        Args:
            family: Settings and scores.
            max_bytes: Bytes of the checkpoint's weight files.
            or_smallest: Where even the smallest mixture is larger, return that one.

        Raises:
            InfeasibleError: Even the smallest mixture is larger.
        """
        groups = self.groups(family)
        cheapest = sum(min(option.cost for option in options) for options in groups.values())
        kept = {m.name: self._outer_schemes(m, Family(BEST))[0] for m in self.outer}
        limit = max_bytes - self._prices.beside(kept, self.outer)
        while limit > cheapest:
            solve = partial(allocate, limit=limit)
            found = self._named(family, self._in_time(family, solve, groups, "score"))
            excess = found.size_bytes - max_bytes
            if excess <= 0:
                return found
            limit -= excess  # the file header's offsets are a few digits longer than assumed
        found = self._named(family, allocate(groups, cheapest))
        if found.size_bytes > max_bytes and not or_smallest:
            raise InfeasibleError(
                f"the smallest checkpoint has {found.size_bytes:,} bytes, more than {max_bytes:,}."
            )
        return found

    def mixture_for(self, family: Family, max_kl: float) -> Mixture:
        """Return the smallest mixture within a predicted KL.

        Raises:
            InfeasibleError: Even 16-bit scores more, which cannot be unless ``max_kl`` < 0.
        """
        groups = self.groups(family)
        solve = partial(allocate_for_score, limit=max_kl)
        return self._named(family, self._in_time(family, solve, groups, "cost"))

    def _in_time(
        self, family: Family, solve: Callable[[Groups], Allocation], groups: Groups, objective: str
    ) -> Allocation:
        """Return what a solver finds, fast enough if time has a limit."""
        if self._pace is None:
            return solve(groups)
        seconds = self._pace.of_groups(groups, self._ties(family))
        return solve_in_time(solve, groups, seconds, self._pace.limit, objective)

    def uniform(self, family: Family, storage: str) -> Mixture | None:
        """Return the candidate of one scheme for all modules; None if it is too slow or unfit.

        Args:
            family: A family of one method.
            storage: As :func:`advisor.search.space.storage_name` prints it.
        """
        schemes = [s for s in self.schemes(family) if storage_name(s) == storage]
        found = [s for s in schemes if self.takes(s, self.linears)]
        candidates = [self._uniform(family, scheme) for scheme in found]
        candidates = [c for c in candidates if self._pace is None or self._pace.keeps(c.assignment)]
        return min(candidates, key=lambda candidate: candidate.predicted_kl, default=None)

    def bytes_at(self, bits_per_weight: float) -> int:
        """Return the bytes of a checkpoint whose quantizable weights take that many bits."""
        smallest, _ = self.smallest_and_largest()
        beside = smallest.total_bytes - smallest.quantizable_bytes
        parameters = sum(linear.parameters for linear in self.linears)
        return int(beside + bits_per_weight * parameters / 8)

    def uniforms(self, family: Family) -> list[Mixture]:
        """Return all uniform candidates of a family, by rising size."""
        if family.method == BEST:
            return []
        present: dict[str, Mixture] = {}
        for symmetric in (True, False) if family.symmetric is None else (family.symmetric,):
            own = replace(family, symmetric=symmetric)
            schemes = [s for s in self.schemes(own) if s.is_quantized and not is_measured_alone(s)]
            storages = [storage_name(s) for s in schemes]
            for storage in dict.fromkeys(storages):
                if (candidate := self.uniform(own, storage)) is not None:
                    present.setdefault(candidate.name, candidate)
        return sorted(present.values(), key=lambda candidate: candidate.size_bytes)

    def smallest_and_largest(self) -> tuple[SizeEstimate, SizeEstimate]:
        """Return the sizes of the smallest checkpoint, and of the largest quantized one."""
        if self._ends is not None:
            return self._ends
        schemes = [s for s in self.options if s.is_quantized]
        modules = [
            (members, [s for s in schemes if self.takes(s, members)] or [BF16])
            for members in self._ties(Family(BEST)).values()
        ]
        ends = [(m, self._outer_schemes(m, Family(BEST)) or [BF16]) for m in self.outer]
        self._ends = self._prices.extremes(modules, ends)
        return self._ends

    def _uniform(self, family: Family, scheme: Scheme) -> Mixture:
        scores = self.book.scores([scheme], family.settings(self.settings), family.samples)
        assignment = {linear.name: scheme for linear in self.linears}
        size = self.size(assignment)
        predicted = sum(scores[scheme][linear.name].kl for linear in self.linears)
        return Mixture(
            str(scheme), family, assignment, size.total_bytes, size.bits_per_weight, predicted
        )

    def _named(self, family: Family, allocation: Allocation) -> Mixture:
        schemes = {str(scheme): scheme for scheme in self.schemes(family)}
        assignment = {}
        for key, members in self._ties(family).items():
            for linear in members:
                assignment[linear.name] = schemes[allocation.choice[key]]
        for module in self.outer:
            known = {str(scheme): scheme for scheme in self._outer_schemes(module, family)}
            assignment[module.name] = known[allocation.choice[module.name]]
        size = self.size(assignment)
        ends = {module.name for module in self.outer}
        used = {s for name, s in assignment.items() if s.is_quantized or name not in ends}
        name = str(used.pop()) if len(used) == 1 else f"mixed-{size.bits_per_weight:.2f}bpw"
        return Mixture(
            name, family, assignment, size.total_bytes, size.bits_per_weight, allocation.score
        )

    def _ties(self, family: Family) -> dict[str, list[LinearSpec]]:
        return tied_modules(self.linears, family, experts_as_one=self._experts_as_one)
