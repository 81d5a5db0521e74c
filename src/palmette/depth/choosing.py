"""What one round removes: candidates ranked, those that go together taken, their edits fitted in one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from palmette.depth.session import Session
from palmette.errors import PlanError, RefusedEdit
from palmette.graph import Candidate, Edit, Plan, collapse

Ranking = Callable[[fx.GraphModule, list[Candidate]], dict[str, float]]
Clock = Callable[[fx.GraphModule], float | None]
"""`clock(network)` -> milliseconds by the cost table."""


class Chooser:
    """Chooses among the candidates of one network."""

    def __init__(self, session: Session, network: fx.GraphModule) -> None:
        self.session, self.network = session, network
        self.pool = session.pool(network)
        self._fits: dict[tuple[str, str], Edit] | None = None

    def choose(
        self, ranking: Ranking, *, count: int | None = None, until: float | None = None, clock: Clock | None = None
    ) -> dict[str, Any]:
        """A journal entry: names and sites taken, their fitted plan, all scores, and why others were refused.

        By default what the method selects, or the `step` best; `count` of them when it is given; or, with `until` and
        a `clock`, as many as bring the collapsed network to `until` ms.
        """
        scores = ranking(self.network, self.pool) if self.pool else {}
        order = sorted(self.pool, key=lambda c: (scores[c.name], -c.macs_saved, c.name))
        refused: dict[str, str] = {}
        if until is not None and clock is not None:
            taken = self._until(order, refused, until, clock)
        elif count is not None:
            taken = self._legal(order, refused, count)
        else:
            wanted = self._selected(order, scores)
            taken = self._legal(wanted, refused, self.session.settings.step if wanted is order else len(wanted))
        return {
            "names": [c.name for c in taken],
            "sites": [site.path for c in taken for site in c.sites],
            "plan": self._plan(taken).to_json(),
            "scores": [
                {"name": c.name, "score": scores[c.name], "macs_saved": c.macs_saved, "ms_saved": c.ms_saved}
                for c in order
            ],
            "refused": refused,
        }

    def _legal(self, order: Sequence[Candidate], refused: dict[str, str], most: int) -> list[Candidate]:
        """The first `most` candidates that can be done together; why the others cannot goes to `refused`."""
        taken: list[Candidate] = []
        for candidate in order:
            if len(taken) == most:
                break
            if self._joins(taken, candidate, refused):
                taken.append(candidate)
        return taken

    def _until(self, order: list[Candidate], refused: dict[str, str], goal: float, clock: Clock) -> list[Candidate]:
        """Candidates in order until the collapsed network needs at most `goal` ms; all of them when it never does."""
        session, taken = self.session, list[Candidate]()
        now = clock(session.dense)
        for candidate in order:
            if now is None or now <= goal:
                break
            if not self._joins(taken, candidate, refused):
                continue
            taken.append(candidate)
            predicted = now - (candidate.ms_saved or 0.0)
            # Predictions of parts add up roughly: near the goal and beyond it the whole network is timed.
            now = self._timed(taken, clock) if predicted <= 1.1 * goal else predicted
        return taken

    def _timed(self, taken: list[Candidate], clock: Clock) -> float | None:
        session = self.session
        edited = self._plan(taken).apply(self.network, session.example, pad=session.settings.pad)
        small, _ = collapse(copy.deepcopy(edited), cost=session.table)
        return clock(small)

    def _joins(self, taken: list[Candidate], candidate: Candidate, refused: dict[str, str]) -> bool:
        if candidate.edit != "linearize" and any(_overlap(candidate, other) for other in taken):
            refused[candidate.name] = "it overlaps with what was taken before"
            return False
        try:
            plan = self._plan([*taken, candidate])
            plan.apply(self.network, self.session.example, pad=self.session.settings.pad)
        except (RefusedEdit, PlanError) as error:
            refused[candidate.name] = str(error)
            return False
        return True

    def _selected(self, order: list[Candidate], scores: dict[str, float]) -> list[Candidate]:
        """The candidates that the method selects for this round; `order` itself where it leaves that to us."""
        session, by_name = self.session, {c.name: c for c in order}
        if session.method.select is None or not order:
            return order

        def losses(names: Sequence[str]) -> float:
            plan = self._plan([by_name[name] for name in names])
            network = plan.apply(self.network, session.example, pad=session.settings.pad) if names else self.network
            return session.evaluate(network, session.calibration).loss

        step = session.settings.step
        return [by_name[n] for n in session.method.select(order, scores, session.config, losses=losses, step=step)]

    def _plan(self, taken: Sequence[Candidate]) -> Plan:
        """The fitted plan of some candidates; all edits of the pool are fitted together, in one pass, once."""
        if not taken:
            return Plan([])
        if self._fits is None:
            edits = {(e.kind, e.site): e for c in self.pool for e in self.session.edits(c)}
            plan, method, data = Plan(edits.values()), self.session.method, self.session.calibration
            if method.fit is not None:
                plan = method.fit(plan, self.network, self.session.config, loader=data)
            fitted = plan.fit(self.network, data, self.session.example)
            self._fits = {(e.kind, e.site): e for e in fitted}
        return Plan([self._fits[e.kind, e.site] for c in taken for e in self.session.edits(c)])


def _overlap(one: Candidate, other: Candidate) -> bool:
    return one.reach[0] < other.reach[1] and other.reach[0] < one.reach[1]
