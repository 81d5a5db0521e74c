"""auto: one search space of all edits, priced on the device's clock, solved exactly for every latency at once.

Idea: time each possible removal (linearised activations, dropped blocks, closed-form linear maps of blocks and spans,
parallel branches, convolutions left out), measure how far it moves the network's answers, choose by dynamic
programming the sets that no other beats, time those collapsed, and let the one that reaches the latency run against
plans of one kind of removal alone (race.py). Papers: Kim et al., "Efficient Latency-Aware CNN Depth Compression via
Two-Stage Dynamic Programming", ICML 2023; Kim et al., "LayerMerge", ICML 2024. Differs: any graph; blocks, spans and
parallel branches beside merges; the importance table is filled by comparing answers after `steps` batches of healing
instead of by hundreds of fine-tunings (`importance="answers"`: without any healing, and without a race); the whole
front instead of one budget. Cost: one pass for all fits, a few batches per removal, some seconds per point of the
front, then healing schedules: at most `trainings`, all steps before counted in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from torch import fx

from palmette.depth.branch import Branch
from palmette.depth.front import Point, measured_front
from palmette.depth.importance import Reference, divergences, reference_of, trial
from palmette.depth.knapsack import Item, front
from palmette.depth.options import Option, find_options
from palmette.depth.probe import Probes
from palmette.depth.race import raced, share_of_healing, steps_for_each
from palmette.depth.rounds import Round, Search, met_already, target_ms
from palmette.depth.session import Session
from palmette.errors import InputError
from palmette.graph import Candidate, Plan, edits_of
from palmette.graph.capture import example_of
from palmette.meter.compute import macs
from palmette.registry import Bounds, MethodConfig, method

HOPE = 0.25
"""Share of the loss of a network that knows nothing beyond which a point has no hope. Measured on two ResNets and a
ViT, healed for two short epochs: up to 14 % of it one or two points were lost, at 25 % three to nine, at 54 % 33."""
UNITS = 4096
"""The dense cost in whole units of gain: the front is exact to a four-thousandth of it."""


@dataclass(frozen=True, kw_only=True)
class AutoConfig(MethodConfig):
    """What `auto` may do (edits), how it measures importance, how fine its front is, how often it may train."""

    linearize: bool = True
    drop: bool = True
    fit_linear: bool = True
    parallelize: bool = True
    identity: bool = True
    longest: Annotated[int, Bounds(low=1, high=8)] = 3
    importance: Literal["answers", "healed"] = "healed"
    batches: Annotated[int | None, Bounds(low=1)] = 8
    steps: Annotated[int, Bounds(low=1)] = 16
    points: Annotated[int, Bounds(low=1)] = 24
    trainings: Annotated[int, Bounds(low=1)] = 3

    @property
    def edits(self) -> tuple[str, ...]:
        """The kinds of edits that are tried; raises InputError when none is left."""
        names = ("linearize", "drop", "fit_linear", "parallelize", "identity")
        chosen = tuple(name for name in names if getattr(self, name))
        if not chosen:
            raise InputError("auto may do nothing", fix=f"Leave one of {', '.join(names)} on")
        return chosen


def search(session: Session, baseline: dict[str, Any], say: Callable[[str], None]) -> Search:
    """Find the front, then heal at most `trainings` of its points: the target, or the fastest that stays in bounds.

    Points are tried by bisection of the latency: an accepted one (validation accuracy within `max_drop`) is the slowest
    that is tried next. With a target, the point that reaches it comes first, and ends the search when it is accepted.
    Raises InputError for a target that cannot be read or reached.
    """
    config, settings = _config(session), session.settings
    dense_ms = session.run.once("dense-latency", lambda: session.clock(session.dense))
    goal = target_ms(settings.target_latency, dense_ms)
    if met := met_already(goal, dense_ms):
        return Search(branch=Branch(session, "auto"), rounds=(), winner=-1, first_scores=(), ended=met, goal=goal)
    options, points = explore(session, say)
    if goal is not None:
        reaching(points, goal, session.table.runtime)
    points, little = _raced(session, options, points, goal, say)
    probes = Probes(session, [o for o, _ in options], points)
    limit = _trainings_left(session, little)
    start = None if goal is None else reaching(points, goal, session.table.runtime)
    found: list[Round] = []
    low, high, winner, ended = -1, len(points) if goal is not None else len(hopeful(session, points)), -1, ""
    while not ended:
        if low + 1 >= high:
            ended = "no other point of the front is left" if points else "no removal pays on the chosen cost"
            break
        if len(found) >= limit:
            ended = f"the limit of {limit} training{'' if limit == 1 else 's'} was reached"
            ended += "" if limit >= config.trainings else " (what was healed a little counts as another)"
            break
        index = start if start is not None and not found else _between(points, low, high, session)
        entry = probes.heal(len(found), index, baseline)
        found.append(entry)
        say(probes.line(entry))
        if not entry.accepted:
            high = index
            continue
        low, winner = index, len(found) - 1
        if goal is not None and index == start:
            ended = f"the target of {goal:.3g} ms is reached: {entry.latency_ms:.3g} ms"
    return Search(
        branch=probes,
        rounds=tuple(found),
        winner=winner,
        first_scores=tuple(ranked(options)),
        ended=ended,
        random=probes.random,
        goal=goal,
    )


def _raced(
    session: Session,
    options: Sequence[tuple[Option, float]],
    points: list[Point],
    goal: float | None,
    say: Callable[[str], None],
) -> tuple[list[Point], int]:
    """The front after the race at the goal, or at the point that is tried first, and all steps that were healed.

    Points that have no hope are left out where there is no goal.
    """
    config, whole = _config(session), whole_cost(session)
    steps = len(options) * local_steps(session, len(options), config)
    if config.importance == "answers" or not points:
        return points, steps
    at = points[_between(points, -1, len(hopeful(session, points)), session)].cost if goal is None else goal
    front_of, more = raced(
        session,
        [option for option, _ in options],
        items(options, whole),
        points,
        at,
        whole=whole,
        most=2 * config.steps,
        batches=config.batches,
        say=say,
    )
    return front_of, steps + more


def _trainings_left(session: Session, little: int) -> int:
    """How many points may be healed in full, when `little` steps of healing are spent already; one at least."""
    left = max(int(_config(session).trainings - share_of_healing(session, little)), 1)
    return left if session.settings.rounds is None else min(left, session.settings.rounds)


def _config(session: Session) -> AutoConfig:
    config = session.config
    return config if isinstance(config, AutoConfig) else AutoConfig()


def explore(
    session: Session, say: Callable[[str], None], *, train: bool = True
) -> tuple[list[tuple[Option, float]], list[Point]]:
    """Every option with its importance, and the measured front: points of falling cost and rising loss.

    train: False compares answers without any healing, whatever the config says.
    """
    config = _config(session) if train else replace(_config(session), importance="answers")
    say("timing what could be removed")
    options = find_options(
        session.dense,
        session.example,
        session.table,
        session.calibration,
        edits=config.edits,
        pad=session.settings.pad,
        protect=session.protect,
        longest=config.longest,
    )
    say(f"{len(options)} removals pay on {session.table.runtime}; measuring what each costs in quality")
    losses = importance(session, options, config)
    scored = [(option, loss) for option in options if (loss := losses[option.key]) is not None]
    picks = front(items(scored, whole_cost(session)))
    say(f"the front has {max(len(picks) - 1, 0)} plans; measuring up to {config.points} of them")
    return scored, measured_front(session, picks, {o.key: o for o, _ in scored}, config.points)


def ranked(options: Iterable[tuple[Option, float]]) -> list[dict[str, Any]]:
    """Options with their importance as a ranking, least important first."""
    return [
        {"name": o.key, "score": s, "macs_saved": o.candidate.macs_saved, "ms_saved": o.candidate.ms_saved}
        for o, s in sorted(options, key=lambda pair: (pair[1], pair[0].key))
    ]


def local_steps(session: Session, options: int, config: AutoConfig) -> int:
    """Steps of healing for each option before it is compared with the dense network."""
    return 0 if config.importance == "answers" else steps_for_each(session, options, config.steps)


def importance(session: Session, options: Sequence[Option], config: AutoConfig) -> dict[str, float | None]:
    """The divergence of each option done alone, journaled one by one; None for those that cannot be done.

    Raises TrainingError when the healing of every option diverges.
    """
    reference = reference_of(session, config.batches)
    session.run.once("hope", lambda: HOPE * reference.ignorance)
    found = divergences(
        session,
        {option.key: option.plan for option in options},
        reference,
        steps=local_steps(session, len(options), config),
        journal="importance",
    )
    return {key: None if isinstance(value, str) else max(float(value), 0.0) for key, value in found.items()}


def hopeful(session: Session, points: Sequence[Point]) -> list[Point]:
    """The points that healing may bring back, by their predicted loss; at least the first. To try one costs a training.

    The bound is a quarter of the loss of a network that knows nothing.
    """
    bound = float(session.run.once("hope", lambda: math.inf))
    return [point for index, point in enumerate(points) if index == 0 or point.loss < bound]


def whole_cost(session: Session) -> float:
    """The dense network's cost in the unit of the options' gains: ms, or MACs where nothing is timed."""
    dense_ms = session.run.once("dense-latency", lambda: session.clock(session.dense))
    return float(macs(session.dense, session.single)) if dense_ms is None else float(dense_ms)


def items(scored: Iterable[tuple[Option, float]], whole: float) -> list[Item]:
    """The options as intervals with whole gains: `whole` is the cost of the dense network."""
    return [
        Item(
            key=option.key,
            start=option.candidate.reach[0],
            end=option.candidate.reach[1],
            gain=round(UNITS * option.gain / whole),
            loss=loss,
        )
        for option, loss in scored
    ]


def reaching(points: Sequence[Point], goal: float, runtime: str) -> int:
    """The first point of the front, the one of least loss, that is as fast as `goal` ms.

    A tighter goal never gives a slower point, because the points' costs fall. Raises InputError when none reaches it.
    """
    for index, point in enumerate(points):
        if point.cost <= goal:
            return index
    least = f"{points[-1].cost:.3g} ms" if points else "the dense network's: nothing pays"
    raise InputError(
        f"a latency of {goal:.3g} ms cannot be reached on {runtime}",
        why=f"the lowest that the removals allow is {least}",
        fix="Ask for a higher latency, or allow more edits",
    )


def _between(points: Sequence[Point], low: int, high: int, session: Session) -> int:
    """The point nearest to the middle of the costs of two points that are not next to each other."""
    slow = points[low].cost if low >= 0 else whole_cost(session)
    fast = points[high].cost if high < len(points) else points[-1].cost
    return min(range(low + 1, high), key=lambda i: (abs(points[i].cost - (slow + fast) / 2), i))


@method(
    name="auto",
    title="auto: all edits in one latency-aware search",
    paper="Kim et al. ICML 2023 (two-stage DP) and LayerMerge, ICML 2024; extended",
    unit="divergence of the answers",
    sites="block",
    edit="linearize, drop, fit_linear, parallelize, identity",
    config=AutoConfig,
    search=search,
)
def score(
    captured: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    config: AutoConfig,
    *,
    seed: int,  # noqa: ARG001 - the interface of scores
) -> dict[str, float]:
    """How far the answers move when a candidate alone is removed, without healing; low = remove first.

    KL(dense || edited) in nats per sample. Raises DataError for an empty loader.
    """
    example = example_of(captured)
    reference = Reference.of(captured, loader, config.batches, classes=True)
    plans = {c.name: Plan(edits_of(c)).fit(captured, loader, example).to_json() for c in candidates}
    found = {
        name: trial(plan, dense=captured, example=example, pad="repad", reference=reference, local=None)
        for name, plan in plans.items()
    }
    worst = max((v for v in found.values() if isinstance(v, float)), default=0.0)
    return {name: worst + 1.0 if isinstance(v, str) else max(v, 0.0) for name, v in found.items()}
