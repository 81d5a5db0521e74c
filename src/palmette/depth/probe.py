"""Points of the front brought to life: edited, healed and looked at on validation data, each from the dense network."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from palmette.depth.branch import Branch, Choice
from palmette.depth.front import Point
from palmette.depth.options import Option, joined
from palmette.depth.rounds import Round, cost_of, line, round_of, summary
from palmette.depth.session import Session
from palmette.errors import PlanError, RefusedEdit


class PlanBranch(Branch):
    """The dense network with one given plan, healed once, under the name `label`."""

    def adopt(self, keys: Sequence[str], options: dict[str, Option], score: float) -> Choice:
        """Apply the joint plan of the options `keys`."""

        def choice() -> dict[str, Any]:
            plan = joined(options[key] for key in keys)
            return {
                "names": list(keys),
                "sites": [edit.site for edit in plan],
                "plan": plan.to_json(),
                "scores": [{"name": key, "score": score} for key in keys],
                "refused": {},
            }

        return self.take(self.session.run.once(self.stage(0, "choice"), choice))


class Probes:
    """Healed points of one front, numbered in the order in which they were tried."""

    def __init__(self, session: Session, options: Sequence[Option], points: Sequence[Point]) -> None:
        self.session, self.points = session, points
        self.options = {option.key: option for option in options}

    def heal(self, number: int, index: int, baseline: dict[str, Any]) -> Round:
        """Edit and heal point `index` as probe `number`, and look at it on validation data; journaled."""
        index = int(self.session.run.once(f"probe-{number:03d}", lambda: index))
        branch, choice = self._edited(number)
        branch.heal(0)
        run = self.session.run
        cost = run.once(branch.stage(0, "cost"), lambda: cost_of(self.session, branch))
        seen = run.once(
            branch.stage(0, "val"), lambda: summary(self.session.evaluate(branch.network, self.session.val))
        )
        return round_of(self.session, number, choice, cost, seen, baseline)

    def line(self, entry: Round) -> str:
        """A probe in words."""
        return line(
            entry, self.session, what=f"{entry.removed} removal{'s' if entry.removed > 1 else ''}", name="point"
        )

    def _edited(self, number: int) -> tuple[PlanBranch, Choice]:
        index = int(self.session.run.once(f"probe-{number:03d}", _unknown))
        point = self.points[index]
        branch = PlanBranch(self.session, f"auto-{number:03d}")
        return branch, branch.adopt(point.keys, self.options, point.loss)

    def at(self, number: int) -> Branch:
        """The branch of probe `number` as it was after healing (-1: the dense network)."""
        if number < 0:
            return Branch(self.session, "auto")
        branch, _ = self._edited(number)
        branch.load(0)
        branch.trainings = 1
        return branch

    def random(self, number: int) -> Branch:
        """The control of probe `number`: options drawn at random until they save as much by the table, healed alike."""
        point = self.points[int(self.session.run.once(f"probe-{number:03d}", _unknown))]
        wanted = sum(self.options[key].gain for key in point.keys)
        keys = self.session.run.once("random-picks", lambda: self._drawn(wanted))
        branch = PlanBranch(self.session, "random")
        branch.adopt(keys, self.options, 0.0)
        branch.heal(0)
        return branch

    def _drawn(self, wanted: float) -> list[str]:
        taken: list[Option] = []
        seed = self.session.settings.seed
        for option in sorted(self.options.values(), key=lambda o: hashlib.sha256(f"{seed}/{o.key}".encode()).digest()):
            if sum(o.gain for o in taken) >= wanted:
                break
            start, end = option.candidate.reach
            apart = all(end <= o.candidate.reach[0] or o.candidate.reach[1] <= start for o in taken)
            if apart and self._legal([*taken, option]):
                taken.append(option)
        return [o.key for o in sorted(taken, key=lambda o: o.candidate.reach)]

    def _legal(self, options: Sequence[Option]) -> bool:
        try:
            joined(options).apply(self.session.dense, self.session.example, pad=self.session.settings.pad)
        except (RefusedEdit, PlanError):
            return False
        return True


def _unknown() -> int:
    raise PlanError("a probe that was not run is asked for", fix="Start the run again in a fresh folder")
