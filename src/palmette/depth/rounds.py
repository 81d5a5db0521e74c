"""The rounds of `shrink`: remove, heal, look at validation data, go on while it pays.

A round is accepted when validation accuracy is within `max_drop` points of the dense network's. Curves bounce, so
`patience` rounds in a row may miss before the end (one under `reproduce`); the deepest accepted round wins.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from palmette.depth.branch import Branch, Choice
from palmette.depth.session import Session
from palmette.device import parse_latency
from palmette.errors import InputError
from palmette.graph import Candidate, collapse
from palmette.meter.compute import macs
from palmette.train.batches import length
from palmette.train.evaluate import Evaluation


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round as it is reported; `val_accuracy` is 0..1, `latency_ms` that of the collapsed network at batch 1."""

    round: int
    candidate: str
    sites: tuple[str, ...]
    score: float
    val_accuracy: float
    val_n: int
    val_interval: tuple[float, float]
    macs: int
    latency_ms: float | None
    accepted: bool
    reason: str
    removed: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The round as JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the rounds found: the branch, all rounds, the deepest accepted one (-1: none) and why they ended.

    `branch.at(number)` rebuilds the network of a round. `random(number)`: the control of a round, where it is not as
    many random removals a round.
    """

    branch: Any
    rounds: tuple[Round, ...]
    winner: int
    first_scores: tuple[dict[str, Any], ...]
    ended: str
    random: Callable[[int], Branch] | None = None
    goal: float | None = None

    @property
    def missed(self) -> str:
        """What to say of a target latency that the winner does not reach; nothing when it does, or there was none."""
        found = self.rounds[self.winner].latency_ms if self.winner >= 0 else None
        if self.goal is None or found is None or found <= self.goal:
            return ""
        return f"the target of {self.goal:.3g} ms was not reached: {found:.3g} ms"


def rank(session: Session, branch: Branch | None = None) -> Any:
    """The ranking that `choose` wants: what training watched, where there is some, else the method's score function."""

    def ranking(network: fx.GraphModule, pool: list[Candidate]) -> dict[str, float]:
        watched = None if branch is None else branch.watched
        if watched is not None and all(c.name in watched for c in pool):
            return watched
        return session.method.score(network, pool, session.calibration, session.config, seed=session.settings.seed)

    return ranking


def target_ms(text: str | None, dense_ms: float | None) -> float | None:
    """Milliseconds meant by a target such as "3.2ms" or, relative to the dense network, "0.5x".

    Raises InputError when it does not parse, or when nothing measures milliseconds.
    """
    if text is None:
        return None
    relative = text.strip().lower().endswith("x")
    if relative:
        try:
            factor = float(text.strip()[:-1])
        except ValueError:
            factor = 0.0
        if not 0 < factor < 1:
            raise InputError(f"{text!r} is not a target", fix='Write "0.5x" for half the dense latency, or "3.2ms"')
    if dense_ms is None:
        raise InputError("a target latency needs a clock", fix='Choose cost "onnxruntime" or "eager" instead of "macs"')
    if relative:
        return dense_ms * factor
    try:
        found = parse_latency(text)
    except InputError as error:
        raise InputError(
            f"{text!r} is not a target", fix='Write "0.5x" for half the dense latency, or "3.2ms"'
        ) from error
    if text.strip()[-1] in "0123456789.":
        raise InputError(
            f"the target {text!r} has no unit",
            fix=f'Write "{text.strip()}x" for a share of the dense latency, or "{text.strip()}ms"',
        )
    return found


def met_already(goal: float | None, dense_ms: float | None) -> str:
    """What to say when the dense network is as fast as the goal, both in ms; empty otherwise."""
    if goal is None or dense_ms is None or dense_ms > goal:
        return ""
    return f"the dense network takes {dense_ms:.3g} ms already, and {goal:.3g} ms are allowed"


def search(session: Session, baseline: dict[str, Any], say: Callable[[str], None]) -> Search:
    """Run the rounds until nothing pays, patience or rounds end, or the target latency is reached.

    `baseline`: the dense network's validation summary. Raises InputError for a target that cannot be read.
    """
    settings = session.settings
    dense_ms = session.run.once("dense-latency", lambda: session.clock(session.dense))
    goal = target_ms(settings.target_latency, dense_ms)
    if settings.one_shot and goal is None:
        raise InputError("one shot needs a target latency", fix='Give target_latency, for instance "0.7x"')
    patience = 1 if settings.reproduce else settings.patience
    branch, found, winner, misses = Branch(session, "shrink"), list[Round](), -1, 0
    if met := met_already(goal, dense_ms):
        return Search(branch=branch, rounds=(), winner=-1, first_scores=(), ended=met, goal=goal)
    branch.prepare(session.method)
    scores: tuple[dict[str, Any], ...] = ()
    number, ended = 0, f"the limit of {_rounds(1 if settings.one_shot else settings.rounds or 0)} was reached"
    limit = 1 if settings.one_shot else settings.rounds
    while limit is None or number < limit:
        choice = branch.choose(number, rank(session, branch), until=goal if settings.one_shot else None)
        if choice is None:
            ended = "no candidate is left whose removal pays" if number else _nothing(session, branch.last)
            scores = scores or tuple(branch.last["scores"])
            break
        scores = choice.scores if number == 0 else scores
        entry = _round(session, branch, number, choice, baseline)
        found.append(entry)
        say(line(entry, session))
        winner, misses = (number, 0) if entry.accepted else (winner, misses + 1)
        if entry.accepted and goal is not None and entry.latency_ms is not None and entry.latency_ms <= goal:
            ended = f"the target of {goal:.3g} ms is reached: {entry.latency_ms:.3g} ms"
            break
        if misses >= patience:
            ended = f"{_rounds(misses)} in a row lost more than {_points(settings.max_drop)}"
            break
        number += 1
    if found and winner < 0 and misses < patience:
        ended = f"no round stayed within {_points(settings.max_drop)}, and {ended}"
    return Search(branch=branch, rounds=tuple(found), winner=winner, first_scores=scores, ended=ended, goal=goal)


def _round(session: Session, branch: Branch, number: int, choice: Choice, baseline: dict[str, Any]) -> Round:
    """Heal, cost and evaluate what was just edited."""
    branch.heal(number, session.method if session.settings.reproduce else None)
    cost = session.run.once(branch.stage(number, "cost"), lambda: cost_of(session, branch))
    seen = session.run.once(branch.stage(number, "val"), lambda: summary(session.evaluate(branch.network, session.val)))
    return round_of(session, number, choice, cost, seen, baseline)


def round_of(
    session: Session,
    number: int,
    choice: Choice,
    cost: dict[str, Any],
    seen: dict[str, Any],
    baseline: dict[str, Any],
) -> Round:
    """A round as it is reported, from its choice, its cost and its validation summary beside the dense network's."""
    drop = 100 * (baseline["accuracy"] - seen["accuracy"])
    accepted = drop <= session.settings.max_drop
    return Round(
        round=number,
        candidate=", ".join(choice.names),
        sites=choice.sites,
        score=choice.score,
        val_accuracy=seen["accuracy"],
        val_n=seen["n"],
        val_interval=tuple(seen["interval"]),
        macs=cost["macs"],
        latency_ms=cost["latency_ms"],
        accepted=accepted,
        reason=f"{abs(drop):.2f} points {'gained' if drop < 0 else 'lost'}, {session.settings.max_drop:g} allowed",
        removed=len(choice.names),
    )


def line(entry: Round, session: Session, what: str = "", name: str = "round") -> str:
    """A round in words; `what`: in place of the names of what was removed."""
    clock = "" if entry.latency_ms is None else f", {entry.latency_ms:.3g} ms ({session.table.runtime})"
    verdict = "accepted" if entry.accepted else "missed"
    accuracy = f"{100 * entry.val_accuracy:.2f} % on validation"
    return f"{name} {entry.round + 1}: without {what or entry.candidate}: {accuracy}{clock}: {verdict}, {entry.reason}"


def _rounds(number: int) -> str:
    return f"{number} round{'' if number == 1 else 's'}"


def _points(number: float) -> str:
    return f"{number:g} point{'' if number == 1 else 's'}"


def summary(seen: Evaluation) -> dict[str, Any]:
    """What is journaled of an evaluation: accuracy, number of samples, interval."""
    return {"accuracy": seen.accuracy, "n": seen.n, "interval": list(seen.interval)}


def cost_of(session: Session, branch: Branch) -> dict[str, Any]:
    """MACs and latency of the branch as it is now, collapsed."""
    small, _ = collapse(copy.deepcopy(branch.network), cost=session.table)
    return {"macs": macs(small, session.single), "latency_ms": session.clock(small)}


def _nothing(session: Session, choice: dict[str, Any]) -> str:
    """Why the first round removed nothing."""
    scores, refused = choice["scores"], choice["refused"]
    if not scores:
        kind = session.method.kind(session.config)
        return f"no {kind} can be removed at a gain on the chosen cost ({session.table.runtime})"
    if refused:
        name, why = next(iter(refused.items()))
        return f"none of {len(refused)} candidates can be removed, {name} for instance: {why}"
    best = min(scores, key=lambda row: float(row["score"]))
    return (
        f"the method selects none of {len(scores)} candidates; nearest is {best['name']} "
        f"({session.method.unit}: {best['score']:.4g})"
    )


def expected_seconds(session: Session, rounds: int) -> float | None:
    """Seconds that healing `rounds` rounds will take, from timed forward passes (backward counts twice).

    None when the training loader does not know its length.
    """
    batches = length(session.train)
    if batches is None:
        return None
    probe = copy.deepcopy(session.dense)
    begun = time.perf_counter()
    probed = 0
    for batch in itertools.islice(session.calibration, 3):
        session.evaluate(probe, [batch])
        probed += 1
    per_step = 3 * (time.perf_counter() - begun) / max(probed, 1)
    return float(per_step * batches * session.heal.epochs * rounds)
