"""Rival plans of one latency, each healed a little as a whole: what decides which kinds of removals a front is made of.

Losses of single removals are summed along the front, and the sums mislead where healing is to follow: a linear map in
place of a block looks harmless at once, so that many are taken, while a dropped block, far worse at first, mends and
saves more. So the plan of the common front runs against those that use one kind of removal alone, after the same few
steps of healing, and the front of the best goes on. No paper. Cost: at most half a healing, and some timings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from palmette.depth.front import Point, measured_front, thinned
from palmette.depth.importance import divergences, reference_of
from palmette.depth.knapsack import Item, Pick, front
from palmette.depth.options import Option
from palmette.depth.session import Session
from palmette.train.batches import length

LEAST_STEPS = 4
"""Fewer steps of healing say less than none: they move every network by about as much."""
POINTS = 6
"""How many points of a front of one kind are timed near the goal, and how many along the rest of it."""


def steps_for_each(session: Session, many: int, most: int) -> int:
    """Steps of healing for each of `many` networks: `most`, unless all together would pass half a healing schedule.

    Too few to mend anything are none.
    """
    schedule = length(session.train)
    steps = most if schedule is None else min(most, session.heal.epochs * schedule // max(2 * many, 1))
    return steps if steps >= min(LEAST_STEPS, most) else 0


def share_of_healing(session: Session, steps: int) -> float:
    """Steps as a share of the healing schedule; 0 for a loader that does not know its length."""
    schedule = session.heal.epochs * (length(session.train) or 0)
    return steps / schedule if schedule else 0.0


def raced(
    session: Session,
    options: Sequence[Option],
    items: Sequence[Item],
    points: list[Point],
    goal: float,
    *,
    whole: float,
    most: int,
    batches: int | None,
    say: Callable[[str], None],
) -> tuple[list[Point], int]:
    """The front to go on with, `points` or that of one kind of removal alone, and the steps of healing it took to tell.

    items: the options in the knapsack's terms. goal: the cost at which the fronts are compared, each by its first point
    that reaches it; whole: that of the dense network. most: steps of healing of each rival; batches: how much
    validation data its answers are compared on. Journaled.
    """
    fronts = {"all": points} | _of_one_kind(session, options, items, goal, whole)
    rivals: dict[str, Point] = {}
    for name, found in fronts.items():
        point = next((p for p in found if p.cost <= goal), None)
        if point is not None and all(set(point.keys) != set(rival.keys) for rival in rivals.values()):
            rivals[name] = point
    steps = steps_for_each(session, len(rivals), most)
    if len(rivals) < 2 or steps == 0:
        return points, 0
    say(f"healing {len(rivals)} rival plans a little: {', '.join(rivals)}")
    plans = {name: point.plan for name, point in rivals.items()}
    losses = divergences(session, plans, reference_of(session, batches), steps=steps, journal="race")
    known = {name: value for name, value in losses.items() if not isinstance(value, str)}
    best = min(known, key=lambda name: (known[name], name != "all"), default="all")
    return _on_one_scale(fronts[best], rivals, known, best), steps * len(rivals)


def _on_one_scale(points: list[Point], rivals: dict[str, Point], known: dict[str, float], best: str) -> list[Point]:
    """The winner's points, their predicted losses in proportion to those of the common front as the race found them."""
    if best == "all" or not known.get("all") or not rivals[best].loss:
        return points
    factor = rivals["all"].loss / rivals[best].loss * known[best] / known["all"]
    return [replace(point, loss=factor * point.loss) for point in points]


def _of_one_kind(
    session: Session, options: Sequence[Option], items: Sequence[Item], goal: float, whole: float
) -> dict[str, list[Point]]:
    """The timed front of each kind of removal alone that may reach the goal; none where there is but one kind."""
    kinds = sorted({option.candidate.edit for option in options})
    by_key = {option.key: option for option in options}
    found: dict[str, list[Point]] = {}
    for kind in kinds if len(kinds) > 1 else ():
        picks = front([item for item in items if by_key[item.key].candidate.edit == kind])
        chosen = _near(picks, whole - goal, whole, by_key)
        if chosen:
            found[kind] = measured_front(session, chosen, by_key, len(chosen))
    return found


def _near(picks: Sequence[Pick], needed: float, whole: float, options: dict[str, Option]) -> list[Pick]:
    """Some picks whose summed savings are about what is needed, and some others; none where all save too little."""
    saved = {pick.keys: sum(options[key].gain for key in pick.keys) for pick in picks}
    near = [pick for pick in picks if 0.85 * needed <= saved[pick.keys] <= needed + 0.25 * whole]
    if not near:
        return []
    chosen = {pick.keys for pick in [*thinned(near, POINTS), *thinned(picks, POINTS)] if pick.keys}
    return [pick for pick in picks if pick.keys in chosen]
