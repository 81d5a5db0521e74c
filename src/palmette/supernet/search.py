"""The best network of a trained supernet for a device: measure some, learn from them, solve, measure what was promised.

Source of the loop: LINAS (DyNAS-T, 2022). What differs: the first networks are the largest that fit, and others drawn
among those that fit, without rejection; what the predictor promises is not searched for but solved, exactly unless that
takes long; nothing that does not fit is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from palmette.errors import InputError
from palmette.supernet.codes import Floats
from palmette.supernet.memory import MemoryModel
from palmette.supernet.optimum import Optimizer
from palmette.supernet.predictor import agreement, ridge
from palmette.supernet.sampling import sample_balanced
from palmette.supernet.space import Config, Kind, key_of

Measure = Callable[[Sequence[Config]], list[float]]
"""`measure(configs)` -> the value of each configuration, the larger the better, below 1 for an accuracy."""

FEWEST = 5
"""Measured networks below which nothing is learnt."""
PATIENCE = 2.0
"""Seconds, for each resolution, that the proof of a proposal may take; then the best that is known is taken."""
FOREMOST = 4.0
"""How much more than others a kind of choice weighs where it is foremost."""
FIRST_SHARE = 0.5
"""Share of the measurements that is not proposed by what was learnt."""


@dataclass(frozen=True)
class Found:
    """One network that was measured.

    `latency_ms`: by the table of latencies, None without one. `promised`: what the predictor had said; None for one
    drawn at random.
    """

    config: Config
    value: float
    ram_bytes: int
    param_bytes: int
    latency_ms: float | None = None
    promised: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Search:
    """What a search measured, in order, the best of it, and the best of as many networks drawn at random."""

    found: list[Found]
    random: list[Found]

    @property
    def best(self) -> Found:
        """The network of the largest value; of equals the one that needs less."""
        return _best(self.found)

    @property
    def best_random(self) -> Found:
        """The same among the control."""
        return _best(self.random)

    @property
    def taken(self) -> Found:
        """The best of all that were measured, the control included: what is known is not thrown away."""
        return self.ranked()[0]

    def ranked(self) -> list[Found]:
        """All that were measured, each once, the best first; of equals the one that needs less."""
        every = {key_of(f.config): f for f in (*self.random, *self.found)}
        return sorted(every.values(), key=lambda f: (-f.value, f.ram_bytes, f.param_bytes))

    def promise(self) -> dict[str, Any] | None:
        """How promises and measurements agree, with intervals; None for fewer than three promises."""
        kept = [(f.promised, f.value) for f in self.found if f.promised is not None]
        if len(kept) < 3:
            return None
        return dict(vars(agreement([p for p, _ in kept], [v for _, v in kept])))


def search(
    memory: MemoryModel,
    measure: Measure,
    *,
    measurements: int = 40,
    rounds: int = 3,
    control: bool = True,
    seed: int = 0,
) -> Search:
    """Measure `measurements` networks that fit the memory model's profile, half of them proposed by what was learnt.

    The others are the largest that fit, by several measures of large, and drawn ones. measure: is asked for a round at
    once. rounds: how often the predictor is fitted anew. control: also measure as many networks drawn at random, of
    which the search has the first. Raises BudgetError if nothing fits, naming what binds and the smallest need.
    """
    if measurements < 1 or rounds < 1:
        raise InputError(f"measurements = {measurements}, rounds = {rounds} are out of bounds", fix="Give 1 or more.")
    drawn = drawn_within(memory, measurements, seed)
    count, solver = max(FEWEST, round(FIRST_SHARE * measurements)), Optimizer(memory)
    first = _different([*largest_within(memory, solver)[: count // 2], *drawn])[:count]
    values: dict[str, float] = {}

    def valued(configs: Sequence[Config]) -> list[float]:
        new = [config for config in configs if key_of(config) not in values]
        values.update(zip(map(key_of, new), asked(measure, new), strict=True))
        return [values[key_of(config)] for config in configs]

    def seen(configs: Sequence[Config], promised: Sequence[float | None]) -> list[Found]:
        triples = zip(configs, valued(configs), promised, strict=True)
        return [found_of(memory, config, value, said) for config, value, said in triples]

    found = seen(first, [None] * len(first))
    left = measurements - len(found)
    for number in range(rounds):
        share = left // (rounds - number)
        left -= share
        promised = _proposals(memory, solver, found, share)
        if not promised:
            break
        found += seen(*zip(*promised, strict=True))
    compared = drawn if control else drawn[: max(1, count // 2)]
    return Search(found, seen(compared, [None] * len(compared)))


def drawn_within(memory: MemoryModel, count: int, seed: int) -> list[Config]:
    """Up to `count` different configurations that keep the bounds, spread evenly over the peaks that can be reached."""
    space = memory.net.space
    codes = sample_balanced(memory, 4 * count, np.random.default_rng(seed))
    return _different([space.canonical(memory.codes.decode(code)) for code in codes])[:count]


def largest_within(memory: MemoryModel, solver: Optimizer) -> list[Config]:
    """The largest networks that keep the bounds: by all choices alike, then by each kind of choice foremost.

    A choice counts by its share of its largest value. Bits do not count: a weight loses little by 8 of them, and frees
    memory for all else.
    """
    kinds = [kind for kind in get_args(Kind) if kind != "bits" and memory.net.space.of_kind(kind)]
    found = []
    for foremost in (None, *kinds):
        weights = np.zeros(memory.codes.width)
        for choice in memory.codes.choices:
            if choice.kind != "bits":
                whole = choice.values[-1] / (FOREMOST if choice.kind == foremost else 1.0)
                weights += memory.codes.of(choice.name, [value / whole for value in choice.values])
        answer = solver.best(weights, gap=0.02, seconds=PATIENCE)
        found += [] if answer is None else [answer.config]
    return _different(found)


def _different(configs: Iterable[Config]) -> list[Config]:
    return list({key_of(config): config for config in configs}.values())


def asked(measure: Measure, configs: Sequence[Config]) -> list[float]:
    """What `measure` says of configurations. Raises InputError unless it is a finite number for each."""
    found = [float(value) for value in measure(configs)] if configs else []
    if len(found) != len(configs) or not np.isfinite(found).all():
        raise InputError(
            f"The measure of {len(configs)} networks gave {found}",
            why="a finite number is needed for each, such as an accuracy",
            fix="Look at what it makes of one network: measure([net.max()]).",
        )
    return found


def found_of(memory: MemoryModel, config: Config, value: float, promised: float | None = None) -> Found:
    """A measured configuration with what it needs."""
    code = memory.codes.encode([config])
    ram, params = int(memory.ram_bytes(code)[0]), int(memory.param_bytes(code)[0])
    took = None if memory.latency is None else float(memory.latency_ms(code)[0])
    return Found(config, value, ram, params, took, promised)


def _proposals(
    memory: MemoryModel, solver: Optimizer, found: list[Found], count: int
) -> list[tuple[Config, float | None]]:
    """The `count` best networks that were not measured, by a predictor of the logarithm of the error.

    Any that are left, without a promise, where there are too few to learn from.
    """
    enough = len(found) >= FEWEST
    weights = _learnt(memory, found) if enough else np.zeros(memory.codes.width)
    known = [f.config for f in found]
    made: list[tuple[Config, float | None]] = []
    for _ in range(count):
        taken = memory.codes.encode([*known, *(config for config, _ in made)])
        answer = solver.best(weights, excluded=taken, seconds=PATIENCE)
        if answer is None:
            break
        made.append((answer.config, float(-np.expm1(-answer.value)) if enough else None))
    return made


def _learnt(memory: MemoryModel, found: Sequence[Found]) -> Floats:
    """Weights [codes.width] whose sum over a code is -log(1 - value)."""
    code = np.array([memory.net.space.encode(f.config) for f in found])
    values = -np.log1p(-np.minimum([f.value for f in found], 1 - 1e-6))
    weights, constant, _ = ridge(code, values)
    return np.concatenate([[constant], weights])


def _best(found: Sequence[Found]) -> Found:
    return max(found, key=lambda f: (f.value, -f.ram_bytes, -f.param_bytes))
