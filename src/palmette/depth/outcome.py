"""From the deepest accepted round to files: collapse, verify, account, export, report."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

import palmette.ranks as ranks
from palmette.deploy import export_all
from palmette.deploy.huggingface import is_hugging_face, save_pretrained
from palmette.depth.accounts import account, contenders
from palmette.depth.branch import Branch
from palmette.depth.rounds import Search
from palmette.depth.session import Session
from palmette.errors import PalmetteError, VerifyError
from palmette.files import write_atomic, write_json
from palmette.graph import CollapseRecord, Plan, Verification, collapse, verify
from palmette.graph import save as save_network
from palmette.graph.inputs import split_batch
from palmette.report import render

FLOAT32_BOUND = 1e-4
"""Largest relative output error of the collapsed network against the edited one that `shrink` lets pass."""


@dataclass(frozen=True)
class Outcome:
    """What is handed back: the final network in eval mode, its plan and proofs, the table, and a sentence."""

    network: nn.Module
    plan: Plan
    record: CollapseRecord | None
    verification: Verification | None
    rows: list[dict[str, Any]]
    message: str
    report: Path | None = None
    exports: dict[str, Any] = field(default_factory=dict)


def finish(session: Session, found: Search, figures: dict[str, Any], say: Callable[[str], None]) -> Outcome:
    """Turn what the rounds found into a proven network, its accounts and its files.

    Raises VerifyError when the collapsed network does not compute what the edited one does.
    """
    if found.winner < 0:
        say("nothing was removed: keeping the dense network")
    winner = found.branch.at(found.winner)
    network, record, verification = _collapsed(session, winner, found.winner >= 0)
    if session.settings.controls and found.winner >= 0:
        say("training the controls: dense + same training, random removal")
    rows = account(session, contenders(session, found, network, winner.plan))
    message = _message(session, found, rows)
    outcome = Outcome(network, winner.plan, record, verification, rows, message)
    return _written(session, outcome, found, figures, say) if session.keep else outcome


def _written(
    session: Session, outcome: Outcome, found: Search, figures: dict[str, Any], say: Callable[[str], None]
) -> Outcome:
    """The outcome with its files: plan, weights, exports, figures, report."""
    write_atomic(session.run.path("plan.json"), outcome.plan.to_json() + "\n")
    save_network(outcome.network, session.run.path("model.safetensors"), source=session.model)
    say("exporting")
    exports = session.run.once("exports", lambda: _exports(session, outcome.network), alone=True)
    record, verification = outcome.record, outcome.verification
    figures = figures | {
        "rounds": [entry.to_dict() for entry in found.rounds],
        "scores": ranking_rows(session, found),
        "rows": outcome.rows,
        "split": "val" if session.test is None else "test",
        "merges": record.to_dict()["merges"] if record else [],
        "verification": verification.to_dict() if verification else {},
        "export": exports,
        "message": outcome.message,
    }
    write_json(session.run.path("figures.json"), figures)
    report = ranks.from_first(lambda: str(render(session.run.folder)))
    return replace(outcome, report=Path(report), exports=exports)


def _collapsed(
    session: Session, winner: Branch, changed: bool
) -> tuple[nn.Module, CollapseRecord | None, Verification | None]:
    """The winner as a smaller plain network, held against the edited one on real and random batches."""
    if not changed:
        return winner.network.eval(), None, None
    network, record = collapse(winner.network, cost=session.table)
    network.eval()
    batches = [split_batch(batch)[0] for batch in itertools.islice(iter(session.val), 2)]
    verification = verify(winner.network, network, batches, example_inputs=session.example)
    if not verification.exact:
        error = verification.max_relative_error_float64
        raise VerifyError(
            f"the collapsed network differs from the edited one by {error:.1e} in float64",
            why="every merge done claims to be exact, which allows 1e-10",
            fix="Please report the plan.json of this run; `--pad exact` or protecting the last site may help",
        )
    if not verification.max_relative_error <= FLOAT32_BOUND:
        raise VerifyError(
            f"the collapsed network differs from the edited one by {verification.max_relative_error:.1e}",
            why=f"at most {FLOAT32_BOUND:g} relative error is let pass in float32",
            fix="Please report the plan.json of this run; `--pad exact` or protecting the last site may help",
        )
    return network, record, verification


def _exports(session: Session, network: nn.Module) -> dict[str, Any]:
    """Write model.pt2, model.onnx where ONNX is installed, and huggingface/ for a model of transformers.

    A format that fails is named, and the run goes on.
    """
    batches = [split_batch(batch)[0] for batch in itertools.islice(iter(session.val), 1)]
    found = export_all(network, session.example, session.run.folder, batches=batches)
    if is_hugging_face(session.model):
        try:
            folder = session.run.path("huggingface")
            report = save_pretrained(
                network, session.model, folder, session.example, batches=batches, dense=session.dense
            )
            found["huggingface"] = report.parity.to_dict() | {"standard": report.standard}
        except PalmetteError as error:
            found["huggingface"] = {"error": str(error)}
    return found


def ranking_rows(session: Session, found: Search) -> list[dict[str, Any]]:
    """The ranking of the first round as figures.json has it; entropy where the unit is bits."""
    unit = session.method.unit
    return [
        {"round": 0, "unit": unit, "entropy": row["score"] if unit == "bits" else None, **row}
        for row in found.first_scores
    ]


def _message(session: Session, found: Search, rows: list[dict[str, Any]]) -> str:
    """What happened in one sentence, with the resolved difference where something was removed."""
    bound = session.settings.max_drop
    within = f"within {bound:g} point{'' if bound == 1 else 's'}"
    if found.winner < 0:
        tried = len(found.rounds) if found.random else 0
        several = f"none of the {tried} networks that were healed" if tried > 1 else "the one network that was healed"
        lost = f"{several} {'stayed' if tried > 1 else 'did not stay'} {within}, and " if tried else ""
        return f"Nothing was removed: {lost}{found.ended}. The dense network is returned."
    shrunk = rows[1]
    difference, low, high = shrunk["difference"]
    verdict = within if -low <= bound else f"whether it is {within} is not resolved"
    removed = shrunk["linearized"] + shrunk["dropped"] + shrunk["replaced"]
    missed = f"; {found.missed}" if found.missed else ""
    return (
        f"{removed} site{'s' if removed > 1 else ''} removed {_way(found)}; "
        f"accuracy {difference:+.2f} points [{low:+.2f}, {high:+.2f}] on {shrunk['n']} samples: {verdict}. "
        f"The {'search' if found.random else 'rounds'} ended because {found.ended}{missed}."
    )


def _way(found: Search) -> str:
    """In how many rounds the winner was reached, or for a search of its own among how many networks it was chosen."""
    if not found.random:
        return f"in {found.winner + 1} round{'s' if found.winner else ''}"
    healed = len(found.rounds)
    return "at once" if healed == 1 else f"at once; {healed} networks were healed, one was kept"
