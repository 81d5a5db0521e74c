"""What fits into a memory budget: counted, drawn from and searched exactly, without trial and error.

Peak memory is the largest of terms that depend on one block and the resolution alone, since the widths between blocks
are fixed. At one resolution "peak <= budget" therefore says of each stage, apart from all others, which of its options
(a depth, with a kernel and an expand for each block) are allowed: counts multiply, uniform draws are independent, and
an additive score is largest where each stage's is. Sums that are bounded as well (multiply-adds, parameters, weights in
RAM) couple the stages; palmette.supernet.multichoice then solves the choice among allowed options exactly.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np

from palmette.device import DeviceProfile
from palmette.errors import BudgetError, InputError
from palmette.supernet.multichoice import choose
from palmette.supernet.staged import Array, Configs, StagedSpace, Table
from palmette.supernet.terms import Ints

_MOST_OPTIONS = 2**20


@dataclass(frozen=True)
class Optimum:
    """The best configuration (N = 1), its score, and its peak in the unit of the budget."""

    configs: Configs
    score: float
    peak: int


class ExactSearch:
    """Configurations of a space whose peak memory stays within a budget.

    metric: a name as in `StagedSpace.peak_elements`, budgets in elements; or a DeviceProfile, budgets in bytes as in
    `StagedSpace.peak_bytes`. A budget of None is the profile's RAM; without that, no bound. The profile's flash bounds
    the parameters of what `best` returns. Raises InputError for an unknown metric, and for stages with more than 2**20
    options.
    """

    def __init__(self, space: StagedSpace, metric: str | DeviceProfile = "moofa") -> None:
        self.space, self.metric = space, metric
        self._profile = metric if isinstance(metric, DeviceProfile) else DeviceProfile(weights_in="flash")
        self._unit = "bytes" if isinstance(metric, DeviceProfile) else "elements"
        self._depth, self._pairs = _options(space)
        table = space.peak_table(metric)
        self._fixed, self._peaks = table.fixed, self._spread(table, np.maximum)
        self._costs: dict[str, tuple[Ints, Ints]] = {}

    def count(self, budget: int | None = None) -> int:
        """Number of different networks within the budget, exactly; 0 where none is.

        Raises InputError where weights live in RAM: their sum couples the stages. So do `chance` and `sample`.
        """
        return sum(self._counts(self._alone(budget)))

    def chance(self, budget: int | None = None) -> Fraction:
        """Probability that a random genotype fits: resolution, depths, kernels and expands each drawn evenly.

        It is the share that rejection sampling accepts, not that of different networks: shallow stages hide choices.
        """
        level, depths = self._alone(budget), self.space.depths
        of_depth = [self._depth == depth for depth in depths]
        total = Fraction(0)
        for fixed, stages in zip(self._fixed, self._peaks, strict=True):
            fits = [[Fraction(int((peak[of] <= level).sum()), int(of.sum())) for of in of_depth] for peak in stages]
            total += math.prod(
                [sum(fit, Fraction(0)) / len(depths) for fit in fits], start=Fraction(int(fixed <= level))
            )
        return total / len(self._fixed)

    def sample(self, n: int, rng: np.random.Generator, budget: int | None = None) -> Configs:
        """`n` networks within the budget, each equally likely, independent of each other; exactly uniform.

        Raises BudgetError when none is within it.
        """
        level = self._alone(budget)
        counts = list(accumulate(self._counts(level)))
        if not counts[-1]:
            raise self._nothing_fits(level, {})
        places = np.array([bisect_right(counts, draw) for draw in _draws(rng, n, counts[-1])], dtype=np.int64)
        options = np.zeros((n, self.space.stages), dtype=np.int64)
        for place in np.unique(places):
            rows = np.flatnonzero(places == place)
            for stage, peak in enumerate(self._peaks[place]):
                allowed = np.flatnonzero(peak <= level)
                options[rows, stage] = allowed[rng.integers(len(allowed), size=len(rows))]
        return self._configs(places, options)

    def best(
        self, score: Table, budget: int | None = None, *, macs: int | None = None, params: int | None = None
    ) -> Optimum:
        """The configuration with the largest sum of `score` within the budget and the bounds on its costs; exact.

        score: over the space's resolutions, as `Ridge.table`. The first wins among equals. Raises BudgetError with the
        smallest bound that can be met when nothing fits.
        """
        bounds = {name: bound for name, bound in (("macs", macs), ("params", params)) if bound is not None}
        if self._profile.flash_bytes is not None:
            flash = self._profile.flash_bytes // self._profile.element_bytes
            bounds["params"] = min(flash, bounds.get("params", flash))
        level = self._level(budget)
        found = self._best(score, level, bounds)
        if found is None:
            raise self._nothing_fits(level, bounds)
        return found

    def smallest_budget(self) -> tuple[int, str]:
        """The smallest budget that any configuration meets, and the layer that binds there, with its resolution."""
        tried = [
            (place, self._leanest(place, level))
            for place in range(len(self._fixed))
            for level in (self._levels(place) if self._resident else self._levels(place)[:1])
        ]
        configs = self._configs(np.array([place for place, _ in tried]), np.array([options for _, options in tried]))
        peaks = self._peak(configs)
        names, layers = self.space.layer_elements(*configs.take([peaks.argmin()]), metric=self.metric)
        place = tried[int(peaks.argmin())][0]
        return int(peaks.min()), f"{names[int(layers[0].argmax())]} at resolution {self.space.resolutions[place]}"

    # ---- inside ------------------------------------------------------------------------------------------------------

    @property
    def _resident(self) -> bool:
        return self._profile.weights_in == "ram"

    def _level(self, budget: int | None) -> int:
        bound = self._profile.ram_bytes if budget is None else budget
        return 2**62 if bound is None else int(bound)

    def _alone(self, budget: int | None) -> int:
        """The budget, where it bounds the stages one by one."""
        if self._resident:
            raise InputError(
                "Networks with their weights in RAM cannot be counted or drawn",
                why="the sum of the weights couples the stages",
                fix='Keep the weights in flash (weights_in="flash"), or look for the best network.',
            )
        return self._level(budget)

    def _counts(self, level: int) -> list[int]:
        """Networks within the budget at each resolution."""
        fits = (self._peaks <= level).sum(2)
        return [math.prod(row) * int(fixed <= level) for row, fixed in zip(fits.tolist(), self._fixed, strict=True)]

    def _best(self, score: Table, budget: int, bounds: Mapping[str, int]) -> Optimum | None:
        scores, best = self._spread(score, np.add), -np.inf
        found: tuple[int, list[int]] | None = None
        for bound, place, level, limits in sorted(self._cases(score, scores, budget, bounds), key=lambda c: -c[0]):
            if bound <= best:
                break
            base = float(score.fixed[place])
            fits = [np.flatnonzero(peak <= level) for peak in self._peaks[place]]
            costs = [self._cost(name) for name in limits]
            choice = choose(
                [scores[place, stage, fit] for stage, fit in enumerate(fits)],
                [np.array([c[place, stage, fit] for _, c in costs], dtype=float).T for stage, fit in enumerate(fits)],
                np.array([limits[n] - int(fixed[place]) for n, (fixed, _) in zip(limits, costs, strict=True)]),
                best - base,
            )
            if choice is not None:
                best = choice.score + base
                found = place, [int(fit[option]) for fit, option in zip(fits, choice.options, strict=True)]
        if found is None:
            return None
        configs = self._configs(np.array([found[0]]), np.array([found[1]]))
        return Optimum(configs, best, int(self._peak(configs)[0]))

    def _cases(
        self, score: Table, scores: Array, budget: int, bounds: Mapping[str, int]
    ) -> Iterator[tuple[float, int, int, dict[str, int]]]:
        """(upper bound of the score, resolution, level for the peak, bounds of sums): the problems that cover all.

        With weights in RAM, each level that the peak can reach leaves the rest of the budget to the weights.
        """
        for place in range(len(self._fixed)):
            for level in self._levels(place) if self._resident else [budget]:
                if max(level, self._fixed[place]) > budget or not (self._peaks[place] <= level).any(1).all():
                    continue
                limits = dict(bounds)
                if self._resident:
                    room = (budget - level) // self._profile.element_bytes
                    limits["params"] = min(room, bounds.get("params", room))
                largest = np.where(self._peaks[place] <= level, scores[place], -np.inf).max(1)
                yield float(score.fixed[place] + largest.sum()), place, level, limits

    def _levels(self, place: int) -> list[int]:
        """The peaks that networks of one resolution can have, ascending."""
        least = max(int(self._fixed[place]), int(self._peaks[place].min(1).max()))
        levels = np.unique(self._peaks[place])
        return [least, *levels[levels > least].tolist()]

    def _leanest(self, place: int, level: int) -> list[int]:
        """Of each stage's options at most at this level, the one with the fewest parameters, then the lowest peak."""
        least = []
        for stage, peak in enumerate(self._peaks[place]):
            weights = self._cost("params")[1][place, stage] if self._resident else 0 * peak
            least.append(int(np.lexsort((peak, weights, peak > level))[0]))
        return least

    def _nothing_fits(self, budget: int, bounds: Mapping[str, int]) -> BudgetError:
        need, layer = self.smallest_budget()
        if budget < need:
            return BudgetError(
                f"No configuration of {self.space.name} fits into {budget:,} {self._unit}",
                why=f"{layer} needs {need:,} {self._unit}" + " with all weights" * self._resident,
                fix=f"Allow at least {need:,}.",
            )
        for name, bound in bounds.items():
            fixed, block = self.space.cost_table(name)
            least = self._best(Table(-fixed, -block), budget, {})
            if least is not None and -least.score > bound:
                return BudgetError(
                    f"No configuration of {self.space.name} within the budget has at most {bound:,} {name}",
                    why=f"the smallest has {-least.score:,.0f}",
                    fix="Raise the bound.",
                )
        return BudgetError(
            f"No configuration of {self.space.name} meets all bounds together",
            why=", ".join(f"{name} <= {bound:,}" for name, bound in [(self._unit, budget), *bounds.items()]),
            fix="Raise one of them: each can be met alone.",
        )

    def _cost(self, name: str) -> tuple[Ints, Ints]:
        if name not in self._costs:
            table = self.space.cost_table(name)
            self._costs[name] = table.fixed, self._spread(table, np.add)
        return self._costs[name]

    def _spread(self, table: Table, combine: np.ufunc) -> Array:
        """The sum or the largest of a table's figures over the blocks of each option; [R, stages, options]."""
        flat = table.block.reshape(*table.block.shape[:3], -1)
        spread = np.zeros((len(flat), flat.shape[2], len(self._depth)), dtype=flat.dtype)
        for number, pair in enumerate(self._pairs.T):
            there = slice(int(np.searchsorted(self._depth, number, side="right")), None)  # depths ascend
            part = spread[..., there]
            combine(part, flat[:, number].take(pair[there], axis=-1), out=part)
        return spread.swapaxes(0, 1)

    def _configs(self, places: Ints, options: Ints) -> Configs:
        """Configurations [N] from resolutions [N] and options [N, stages]; zeros where blocks are not there."""
        kernel, expand = np.divmod(self._pairs[options].reshape(len(options), -1), len(self.space.expands))
        kernels, expands = (np.array([*values, 0]) for values in (self.space.kernels, self.space.expands))
        absent = kernel < 0
        return Configs(
            kernels[kernel],
            expands[np.where(absent, -1, expand)],
            self._depth[options],
            np.array(self.space.resolutions)[places],
        )

    def _peak(self, configs: Configs) -> Ints:
        if isinstance(self.metric, DeviceProfile):
            return self.space.peak_bytes(*configs, self.metric)
        return self.space.peak_elements(*configs, self.metric)


def _options(space: StagedSpace) -> tuple[Ints, Ints]:
    """The options of a stage: depth [O], and per block kernel * E + expand, or -1 where there is none [O, B]."""
    every, expands = np.arange(len(space.kernels) * len(space.expands)), np.array(space.expands)
    allowed = dict.fromkeys(space.depths, every)
    for depth, expand in space.tied or ():
        allowed[depth] = every[expands[every % len(expands)] == expand]
    count = sum(len(pairs) ** depth for depth, pairs in allowed.items())
    if count > _MOST_OPTIONS:
        raise InputError(
            f"A stage of {space.name} has {count:,} options, more than {_MOST_OPTIONS:,}",
            fix="Offer fewer kernels, expands or blocks.",
        )
    depths, rows = [], []
    for depth, pairs in allowed.items():
        grid = pairs[np.indices((len(pairs),) * depth).reshape(depth, -1).T]
        rows.append(np.pad(grid, ((0, 0), (0, space.blocks - depth)), constant_values=-1))
        depths.append(np.full(len(grid), depth))
    return np.concatenate(depths), np.concatenate(rows)


def _draws(rng: np.random.Generator, n: int, below: int) -> Iterator[int]:
    """`n` integers of any size, each below `below` with equal probability: bits are drawn until they are."""
    bits = below.bit_length()
    for _ in range(n):
        draw = below
        while draw >= below:
            draw = int.from_bytes(rng.bytes(-(-bits // 8)), "big") >> (-bits % 8)
        yield draw
