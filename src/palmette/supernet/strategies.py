"""Which sub-networks a training step runs: the sandwich rule, one at random, balanced over memory, by phases.

A strategy is a function of the number of the step alone, so that every process of several draws the same sub-networks,
and a resumed training those that an uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from palmette.errors import InputError
from palmette.seeding import derive_seed
from palmette.supernet.memory import MemoryModel
from palmette.supernet.sampling import sample_balanced
from palmette.supernet.space import Config, Space
from palmette.supernet.supernet import Supernet

Draw = Callable[[np.random.Generator], Config]

STRATEGIES = {
    "sandwich": "the largest, the smallest and two at random; the others learn from the largest (BigNAS, 2020)",
    "delayed": "the largest alone for the first half, then the sandwich, faded in (DepS, 2024)",
    "random": "one at random each step (Once-for-All without phases)",
    "balanced": "one at random each step, spread evenly over peak memory (MOOFA, 2024)",
    "progressive": "kernels, depth, widths and heads, bits shrink in phases, taught by the largest (OFA, 2020)",
}
"""Names of the strategies, and what they run in a step."""


@dataclass(frozen=True)
class Step:
    """What one step trains: the first on the task, the others on the answers of the first with a weight."""

    first: Config
    others: tuple[Config, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Strategy:
    """Draws the sub-networks of every step.

    `sandwiched`: the largest on the task, then the smallest and `count` drawn ones, from step `start` on, with a weight
    that rises over as many steps again; else one drawn sub-network on the task, and `count - 1` that learn from it.
    """

    space: Space
    draw: Draw
    seed: int
    count: int = 2
    sandwiched: bool = True
    start: int = 0

    def step(self, number: int) -> Step:
        """The sub-networks of a step, counted from 0."""
        rngs = [np.random.default_rng(derive_seed(self.seed, "sub-nets", number, i)) for i in range(self.count)]
        if not self.sandwiched:
            first, *others = (self.draw(rng) for rng in rngs)
            return Step(first, tuple(others))
        if number < self.start:
            return Step(self.space.max())
        weight = min(1.0, (number - self.start + 1) / self.start) if self.start else 1.0
        return Step(self.space.max(), (self.space.min(), *(self.draw(rng) for rng in rngs)), weight)


def make_strategy(net: Supernet, name: str, *, seed: int, count: int, steps: int | None, start: float) -> Strategy:
    """The strategy of that name, but for "progressive", whose phases `phases` lists.

    steps: of the whole training, needed by "delayed"; start: the share of them before shrinking begins. Raises
    InputError for an unknown name, or "delayed" without a number of steps.
    """
    space = net.space
    if name in ("sandwich", "delayed"):
        if name == "delayed" and steps is None:
            raise InputError("Delayed shrinking needs to know the number of steps", fix="Give the loader a length.")
        return Strategy(space, space.sample, seed, count, True, round((steps or 0) * start) if name == "delayed" else 0)
    if name == "random":
        return Strategy(space, space.sample, seed, count, False)
    if name == "balanced":
        memory = MemoryModel(net)

        def draw(rng: np.random.Generator) -> Config:
            return space.canonical(memory.codes.decode(sample_balanced(memory, 1, rng)[0]))

        return Strategy(space, draw, seed, count, False)
    raise InputError(f"No strategy is called {name!r}", fix=f"Use one of {', '.join(STRATEGIES)}.")


def phases(space: Space) -> list[tuple[str, int, Draw]]:
    """Name, number of sub-networks in a step and draw of each phase of progressive shrinking.

    Kernels first, then the depth, then widths and heads; each of the last two first with its two largest values, as in
    Once-for-All (ICLR 2020, section 3.3), and what an earlier phase opened stays open. The resolution is open in all;
    the bits of weights, which are not in its space, come last.
    """
    order: Sequence[tuple[str, int, dict[str, int | None]]] = (
        ("kernel", 1, {"kernel": None}),
        ("depth_1", 2, {"kernel": None, "depth": 2}),
        ("depth_2", 2, {"kernel": None, "depth": None}),
        ("width_1", 4, {"kernel": None, "depth": None, "width": 2, "heads": 2}),
        ("width_2", 4, {"kernel": None, "depth": None, "width": None, "heads": None}),
        ("bits", 4, {"kernel": None, "depth": None, "width": None, "heads": None, "bits": None}),
    )
    found: list[tuple[str, int, Draw]] = []
    before = None
    for name, count, opened in order:
        open_kinds: dict[str, int | None] = {**opened, "resolution": None}
        allowed = {
            c.name: c.values[-(open_kinds[c.kind] or len(c.values)) :] if c.kind in open_kinds else c.values[-1:]
            for c in space.choices
        }
        if allowed == before or all(len(values) == 1 for values in allowed.values()):
            continue
        before = allowed
        found.append((name, count, partial(_draw_from, space, allowed)))
    return found


def _draw_from(space: Space, allowed: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> Config:
    return space.canonical({name: int(values[rng.integers(len(values))]) for name, values in allowed.items()})
