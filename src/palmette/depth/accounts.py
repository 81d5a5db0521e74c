"""The accounting rule: the dense and the shrunk network beside both controls, each with all that was measured of it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from palmette.depth import random_removal
from palmette.depth.branch import Branch, count_edits, dense_again
from palmette.depth.rounds import Search
from palmette.depth.session import Session
from palmette.errors import MissingDependency
from palmette.graph import Candidate, Plan, collapse
from palmette.meter import measure
from palmette.meter.latency import measure_latency
from palmette.meter.running import Packed
from palmette.meter.runtimes import check_runtime, has_onnx
from palmette.stats import paired_difference

MOST_COLUMNS = 6
"""More networks than that are printed one a line."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the table: a name, a network in its final form, and the plan that led to it.

    trainings: healing schedules it has had. width: share of channels pruned away. int8: quantised. costs: its depth,
    MACs, parameters and peak bytes where the network itself cannot be read (a quantised one).
    """

    name: str
    network: nn.Module
    plan: Plan = field(default_factory=Plan)
    trainings: int = 0
    width: float = 0.0
    int8: bool = False
    costs: dict[str, int] | None = None


def contenders(session: Session, found: Search, winner: nn.Module, plan: Plan) -> list[Contender]:
    """Dense, shrunk, and the two controls, which are trained here (resumably) when they are asked for."""
    rows = [Contender(name="dense", network=session.dense, plan=Plan([]))]
    rows.append(Contender(name="shrunk", network=winner, plan=plan))
    if not session.settings.controls or found.winner < 0:
        return rows
    chosen = found.branch.at(found.winner)
    again = dense_again(session, chosen.trainings)
    rows.append(Contender(name="dense + same training", network=again, plan=Plan([])))
    counts = [entry.removed for entry in found.rounds[: found.winner + 1]]
    drawn = found.random(found.winner) if found.random else random_branch(session, counts)
    small, _ = collapse(drawn.network, cost=session.table)
    return [*rows, Contender(name="random removal", network=small, plan=drawn.plan)]


def random_branch(session: Session, counts: list[int]) -> Branch:
    """As many removals a round as the winner's, drawn from the same candidates, with the same training."""
    branch = Branch(session, "random")
    branch.prepare(session.method, plain=True)
    seed = session.settings.seed

    def ranking(network: Any, pool: list[Candidate]) -> dict[str, float]:
        return random_removal.score(network, pool, (), random_removal.RandomConfig(), seed=seed)

    for number, count in enumerate(counts):
        branch.choose(number, ranking, count=count)
        branch.heal(number)
    return branch


def account(session: Session, rows: list[Contender]) -> list[dict[str, Any]]:
    """The rows of figures.json: edits, costs, interleaved latencies, accuracy with n, interval and difference.

    Test data is looked at here and nowhere else, after everything has been decided.
    """
    split = session.val if session.test is None else session.test
    costs = session.run.once("costs", lambda: [row.costs or static(session, row.network) for row in rows], alone=True)
    clocks = session.run.once("latencies", lambda: _latencies(session, rows), alone=True)
    seen = session.run.once("accuracies", lambda: _accuracies(session, rows, split))
    return [
        {"name": row.name, **count_edits(row.plan), **cost, "latency": clocks[row.name], **accuracy}
        for row, cost, accuracy in zip(rows, costs, seen, strict=True)
    ]


def static(session: Session, network: nn.Module) -> dict[str, int]:
    """Depth, MACs, parameters and peak bytes of a network."""
    cost = measure(network, session.example, runtimes=())
    return {"depth": cost.depth, "macs": cost.macs, "params": cost.params, "peak_bytes": cost.peak_bytes}


def _latencies(session: Session, rows: list[Contender]) -> dict[str, list[dict[str, Any]]]:
    networks = {row.name: row.network for row in rows}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in networks}
    for runtime in runtimes(session.table.runtime, list(networks.values())):
        # A network in another runtime's format is timed where it runs: PyTorch would only hand it on.
        shown = {name: n for name, n in networks.items() if not (runtime == "eager" and isinstance(n, Packed))}
        for name, latency in measure_latency(
            shown, session.example, runtime=runtime, threads=session.settings.threads
        ).items():
            found[name].append(latency.to_dict())
    return found


def side_by_side(rows: list[dict[str, Any]], split: str) -> str:
    """The rows as text: one column per network, one line per quantity; the other way round for many networks."""
    lines = [["", *(row["name"] for row in rows)]]
    for label, key in (("depth", "depth"), ("MACs", "macs"), ("parameters", "params"), ("peak bytes", "peak_bytes")):
        lines.append([label, *(f"{row[key]:,}" for row in rows)])
    for clock in rows[0]["latency"]:
        times = [{e["runtime"]: f"{e['median_ms']:.3f}" for e in row["latency"]} for row in rows]
        lines.append([f"{clock['runtime']}, ms", *(found.get(clock["runtime"], "") for found in times)])
    lines.append([f"accuracy ({split}), %", *(f"{100 * row['accuracy']:.2f}" for row in rows)])
    if len(rows) > MOST_COLUMNS:
        lines = [list(column) for column in zip(*lines, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def runtimes(cost: str, networks: list[nn.Module]) -> list[str]:
    """The runtimes that can be timed here: eager, ONNX Runtime where it is installed, and the one that decided.

    The last is left out when it is not installed here, or when one of the networks is in a format that it cannot read.
    """
    found = ["eager", "onnxruntime"] if has_onnx() else ["eager"]
    readable = all(cost in network.runtimes for network in networks if isinstance(network, Packed))
    if cost != "macs" and cost not in found and readable:
        with suppress(MissingDependency):
            found.append(check_runtime(cost))
    return found


def _accuracies(session: Session, rows: list[Contender], split: Iterable[Any]) -> list[dict[str, Any]]:
    evaluations = [session.evaluate(row.network, split) for row in rows]
    dense = evaluations[0]
    return [
        {
            "accuracy": seen.accuracy,
            "n": seen.n,
            "interval": list(seen.interval),
            "difference": list(paired_difference(seen.correct, dense.correct)) if index else None,
        }
        for index, seen in enumerate(evaluations)
    ]
