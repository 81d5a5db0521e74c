"""A branch: a network on its way through rounds of choose, fit, apply and heal, every step of it journaled.

All that a later step depends on is read from the run folder, never from memory alone: a choice and its fitted plan as
JSON, the healed weights as one safetensors file per round. A killed run therefore continues to the same weights, bit
for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from palmette.depth.choosing import Chooser, Ranking
from palmette.depth.prepared import keep
from palmette.depth.session import Session
from palmette.errors import PlanError
from palmette.graph import Plan
from palmette.registry import Method
from palmette.train.checkpoint import load_checkpoint, load_model_tensors, model_tensors, save_checkpoint
from palmette.train.constraints import zeros_kept
from palmette.train.fade import fade_checkpoint, fade_in
from palmette.train.loop import HealConfig, LossTerm, heal
from palmette.train.spread import steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one round removes: the candidates, their fitted plan, and the ranking that led to it."""

    names: tuple[str, ...]
    sites: tuple[str, ...]
    plan: Plan
    scores: tuple[dict[str, Any], ...]
    refused: dict[str, str]

    @property
    def score(self) -> float:
        """The score of the first candidate chosen."""
        return float(next(row["score"] for row in self.scores if row["name"] == self.names[0]))


class Branch:
    """A copy of the dense network that is edited and healed round by round under the name `label`."""

    def __init__(self, session: Session, label: str) -> None:
        self.session, self.label = session, label
        self.network = copy.deepcopy(session.dense)
        self.plan = Plan([])
        self.fresh: tuple[fx.GraphModule, Plan] | None = None  # what the last plan, not yet healed, was applied to
        self.watched: dict[str, float] | None = None
        self.trainings = 0
        self.last: dict[str, Any] = {}  # the last choice as it was journaled

    def stage(self, number: int, step: str) -> str:
        """The name under which a step of a round is journaled."""
        return f"{self.label}-{number:03d}-{step}"

    def prepare(self, method: Method, *, plain: bool = False) -> None:
        """Train with the method's ingredient, if it has one, and keep its findings with the network.

        plain: as many trainings without the ingredient, for a control.
        """
        if method.prepare is None:
            return
        session, weights = self.session, self.session.run.path(f"{self.label}-prepared.safetensors")
        trained: list[int] = []

        def train(network: fx.GraphModule, *, loss_terms: Sequence[LossTerm] = (), keep_zeros: bool = False) -> None:
            name = f"{self.label}-prepare-{len(trained):03d}"
            trained.append(1)
            self._heal(network, name, loss_terms, keep_zeros)

        def once() -> dict[str, Any]:
            pool, found = session.pool(self.network), dict[str, float]()
            if plain:
                for _ in range(session.run.once("shrink-prepared", _unknown)["trainings"]):
                    train(self.network)
            elif pool and method.prepare is not None:
                seed, loader = session.settings.seed, session.calibration
                found = method.prepare(self.network, pool, train, session.config, loader=loader, seed=seed)
            save_checkpoint(weights, model_tensors(self.network), {"label": self.label})
            return {"found": found, "trainings": len(trained)}

        stored = session.run.once(f"{self.label}-prepared", once)
        for file in session.run.folder.glob(f"{self.label}-prepare-*-checkpoint.safetensors"):
            file.unlink(missing_ok=True)
        load_model_tensors(self.network, load_checkpoint(weights)[0], str(weights))
        self.network.eval()
        self.trainings += stored["trainings"]
        keep(self.network, method.name, stored["found"])

    def choose(
        self, number: int, ranking: Ranking, *, count: int | None = None, until: float | None = None
    ) -> Choice | None:
        """Rank what is left, fit the best legal edits and apply them; None when nothing is left that pays.

        count: take that many candidates, whatever the method would select. until: take as many as bring the collapsed
        network to that many milliseconds.
        """

        def choose() -> dict[str, Any]:
            return Chooser(self.session, self.network).choose(
                ranking, count=count, until=until, clock=self.session.clock
            )

        self.last = stored = self.session.run.once(self.stage(number, "choice"), choose)
        return self.take(stored) if stored["names"] else None

    def take(self, stored: dict[str, Any]) -> Choice:
        """Apply a journaled choice."""
        plan = Plan.from_json(stored["plan"])
        self.fresh = (self.network, plan) if self.session.heal.fade > 0 else None
        self.network = plan.apply(self.network, self.session.example, pad=self.session.settings.pad)
        self.plan = self.plan + plan
        return Choice(
            names=tuple(stored["names"]),
            sites=tuple(stored["sites"]),
            plan=plan,
            scores=tuple(stored["scores"]),
            refused=stored["refused"],
        )

    def heal(self, number: int, method: Method | None = None) -> None:
        """Train the network for one healing schedule, or read its weights back where that was done before.

        Nothing is trained where the method does not heal after a removal.
        A `method` with observers has them in the graph meanwhile; what they found is kept in `watched` for the next
        ranking.
        """
        weights = self.weights(number)
        if not self.session.heals and self.label != "dense":
            save_checkpoint(weights, model_tensors(self.network), {"label": self.label, "round": number})
            return

        def train() -> dict[str, Any]:
            watched = self._train(number, method)
            save_checkpoint(weights, model_tensors(self.network), {"label": self.label, "round": number})
            return {"watched": watched}

        self.watched = self.session.run.once(self.stage(number, "heal"), train)["watched"]
        self.trainings += 1
        for file in (self._checkpoint(number), fade_checkpoint(self._checkpoint(number))):
            file.unlink(missing_ok=True)
        self.load(number)

    def _train(self, number: int, method: Method | None) -> dict[str, float] | None:
        session, name = self.session, f"{self.label}-{number:03d}"
        rest = self._fade_in(name)
        pool = session.pool(self.network) if method is not None and method.watch is not None else []
        if pool and method is not None and method.watch is not None:
            steps = steps_per_epoch(session.train, session.trainer)
            left = steps * rest.epochs - round(rest.begin * steps * rest.epochs)
            method.watch(self.network, pool, session.config, steps=steps if rest.begin == 0 else left)
        self._heal(self.network, name, (), session.method.keeps_zeros, rest)
        self.network.zero_grad(set_to_none=True)
        watched = None
        if pool and method is not None and method.unwatch is not None:
            watched = method.score(self.network, pool, session.calibration, session.config, seed=session.settings.seed)
            method.unwatch(self.network)
        return watched

    def _fade_in(self, name: str) -> HealConfig:
        """Fade the last plan in, where that is asked for: its weights into the network, and what healing is left."""
        session = self.session
        if self.fresh is None:
            return session.heal
        edited, rest = fade_in(
            *self.fresh,
            session.example,
            session.train,
            session.heal,
            pad=session.settings.pad,
            keep_zeros=session.method.keeps_zeros,
            **self._options(name),
        )
        load_model_tensors(self.network, model_tensors(edited), name)
        return rest

    def _heal(
        self,
        network: fx.GraphModule,
        name: str,
        loss_terms: Sequence[LossTerm],
        keep_zeros: bool,
        config: HealConfig | None = None,
    ) -> None:
        """One healing schedule (or what `config` says is left of it), seeded and checkpointed under `name`."""
        session = self.session
        heal(
            network,
            session.train,
            session.heal if config is None else config,
            loss_terms=loss_terms,
            constraints=[zeros_kept(network)] if keep_zeros else (),
            **self._options(name),
        )
        network.eval()

    def _options(self, name: str) -> dict[str, Any]:
        """What every training of this branch is told alike."""
        session = self.session
        return {
            "teacher": session.teacher,
            "loss_fn": session.loss_fn,
            "seed": session.settings.seed,
            "checkpoint": session.run.path(f"{name}-checkpoint.safetensors"),
            "label": name,
            "fabric": session.trainer,
        }

    def weights(self, number: int) -> Path:
        """The file that holds the healed weights of a round."""
        return self.session.run.path(f"{self.label}-{number:03d}.safetensors")

    def _checkpoint(self, number: int) -> Path:
        return self.session.run.path(f"{self.stage(number, 'checkpoint')}.safetensors")

    def load(self, number: int) -> None:
        """Put the healed weights of a round into the network; raises RunError when they are damaged or do not fit."""
        file = self.weights(number)
        load_model_tensors(self.network, load_checkpoint(file)[0], str(file))
        self.network.eval()
        self.fresh = None

    def at(self, number: int) -> Branch:
        """The branch as it was after healing round `number` (-1: the dense network), rebuilt from the run folder."""
        other = Branch(self.session, self.label)
        if number < 0:
            return other
        other.prepare(self.session.method)
        other.trainings += (number + 1) * self.session.heals
        for index in range(number + 1):
            other.choose(index, _never)
        other.load(number)
        return other


def _never(*_: Any) -> dict[str, float]:
    raise PlanError("a round that was not run is asked for", fix="Start the run again in a fresh folder")


def _unknown() -> dict[str, Any]:
    raise PlanError("a training that was not run is asked for", fix="Start the run again in a fresh folder")


def dense_again(session: Session, trainings: int) -> fx.GraphModule:
    """The control "dense + same training": the dense network healed as often as the winner, edits left out."""
    branch = Branch(session, "dense")
    for number in range(trainings):
        branch.heal(number)
    return branch.network


def count_edits(plan: Plan) -> dict[str, int]:
    """How many activations a plan linearises, how many blocks it drops, how many sites get something simpler."""
    kinds = [edit.kind for edit in plan]
    linearized, dropped = kinds.count("linearize"), kinds.count("drop")
    return {"linearized": linearized, "dropped": dropped, "replaced": len(kinds) - linearized - dropped}
