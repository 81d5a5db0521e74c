"""`curve`: the whole front of accuracy and latency of one network on one device, in one run.

The search of `auto` gives the front; points along it are healed, each from the dense network with the same budget,
chosen on validation data and reported on test data. On request every point is also pruned in width and quantised to
8 bits, so that depth, width and precision are traded on one curve.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

import palmette.ranks as ranks
from palmette.depth.accounts import Contender, account, side_by_side
from palmette.depth.auto import explore, hopeful, whole_cost
from palmette.depth.branch import dense_again
from palmette.depth.front import Point
from palmette.depth.opening import Loaders, opened
from palmette.depth.probe import Probes
from palmette.depth.rounds import Round, summary
from palmette.depth.session import Session, Settings
from palmette.depth.variants import left, quantised, widths
from palmette.errors import InputError
from palmette.files import write_json
from palmette.graph import collapse
from palmette.graph import save as save_network
from palmette.graph.inputs import Example
from palmette.meter.table import CostTable
from palmette.registry import MethodConfig
from palmette.report.front import render_front
from palmette.train.loop import HealConfig
from palmette.train.spread import Spread

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class CurveResult:
    """What `curve` returns: `rows` as in figures.json (the first is dense), `best` the name of the row to take."""

    rows: list[dict[str, Any]]
    networks: dict[str, nn.Module]
    best: str
    message: str
    split: str
    run_dir: Path | None
    report: Path | None

    def __str__(self) -> str:
        return f"{side_by_side(self.rows, self.split)}\n\n{self.message}"


def curve(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    *,
    example_inputs: Example | None = None,
    config: MethodConfig | None = None,
    points: int = 4,
    width: Sequence[float] = (),
    int8: bool = False,
    max_drop: float = 0.5,
    loss_fn: Callable[..., Any] | None = None,
    metric: Callable[..., Any] | None = None,
    protect: Sequence[str] = (),
    run_dir: str | Path | None = None,
    resume: bool = False,
    heal: HealConfig | None = None,
    pad: str | None = None,
    cost: str | CostTable | None = None,
    threads: int = 1,
    calibration_loader: Iterable[Any] | None = None,
    calibration_batches: int | None = 32,
    controls: bool = True,
    seed: int = 0,
    devices: int = 1,
    nodes: int = 1,
    fabric: Fabric | None = None,
    ray: str | None = None,
    names: dict[str, str] | None = None,
    say: Say | None = None,
) -> CurveResult:
    """Heal `points` networks along the latency front of `auto` and report them all, with dense and its control.

    model, loaders and options as in `shrink`. width: shares of channels that are pruned away beside each point (needs
    torch-pruning), healed once more. int8: every network also quantised after training (needs ONNX Runtime). The best
    row is the fastest whose validation accuracy is within `max_drop` points of the dense network's. With run_dir the
    folder holds the networks, figures.json, front.svg and report.html. A network that cannot be quantised has no int8
    row, and the message says so. `trainings` of an AutoConfig does not count here: `points` networks are healed.
    Raises a PalmetteError for input that cannot be used; nothing is written then.
    """
    _check(points, width)
    settings = Settings(
        max_drop=max_drop,
        pad=pad or "repad",  # type: ignore[arg-type]
        calibration_batches=calibration_batches,
        threads=threads,
        controls=controls,
        seed=seed,
    )
    with opened(
        Loaders(train_loader, val_loader, test_loader, calibration_loader),
        model=model,
        example_inputs=example_inputs,
        method="auto",
        config=config,
        settings=settings,
        heal=heal or HealConfig(),
        run_dir=None if run_dir is None else Path(run_dir),
        resume=resume,
        cost=cost,
        protect=protect,
        loss_fn=loss_fn,
        metric=metric,
        names=names or {},
        verb="curve",
        more={"points": points, "width": list(width), "int8": int8},
        spread=Spread(devices=devices, nodes=nodes, fabric=fabric, ray=ray),
    ) as session:
        return _run(session, points, tuple(width), int8, say if say and ranks.leads() else _silent)


def _silent(_: str) -> None:
    return None


def _check(points: int, width: Sequence[float]) -> None:
    if points < 1:
        raise InputError(f"points = {points} is out of bounds", fix="Ask for one point or more")
    for ratio in width:
        if not 0 < ratio < 1:
            raise InputError(f"width = {ratio} is out of bounds", fix="Give the share of channels to remove, 0 to 1")
    names = [left(ratio) for ratio in width]
    for ratio, name in zip(width, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"width = {ratio} is given twice", fix="Give each share of channels once")


def _run(session: Session, count: int, width: tuple[float, ...], int8: bool, say: Say) -> CurveResult:
    """Baseline, front, healed points, variants, accounts, files."""
    baseline = session.run.once("baseline", lambda: summary(session.evaluate(session.dense, session.val)))
    say(f"dense network: {100 * baseline['accuracy']:.2f} % on {baseline['n']:,} validation samples")
    options, points = explore(session, say)
    probes = Probes(session, [option for option, _ in options], points)
    variants, refused = [Contender(name="dense", network=session.dense)], list[str]()
    open_points = hopeful(session, points)
    if len(open_points) < len(points):
        gone = len(points) - len(open_points)
        say(f"{gone} of {len(points)} points of the front are left out, predicted to be beyond mending")
    for number, index in enumerate(spread(open_points, count, whole_cost(session))):
        entry = probes.heal(number, index, baseline)
        say(probes.line(entry))
        variants.append(_depth_variant(session, probes, entry))
    if width:
        variants += widths(session, variants, width, say)
    if session.settings.controls and len(variants) > 1:
        say("training the control: dense + same training")
        most = max(variant.trainings for variant in variants)
        again = dense_again(session, most)
        variants.append(Contender(name="dense + same training", network=again, trainings=most))
    if int8:
        small, refused = quantised(session, variants, say)
        variants += small
    rows = _rows(session, variants)
    runtime = _compared(rows, session.table.runtime)
    best = _best(rows, session.settings.max_drop, runtime)
    message = _message(rows, best, session.settings.max_drop, runtime)
    return _written(session, variants, rows, points, best, " ".join([message, *refused]))


def spread(points: Sequence[Point], count: int, whole: float) -> list[int]:
    """Indices of `count` points (or all there are), their costs as evenly spaced below `whole` as the front allows."""
    if len(points) <= count:
        return list(range(len(points)))
    fastest = points[-1].cost
    wanted = [whole + (fastest - whole) * (k + 1) / count for k in range(count)]
    return sorted({min(range(len(points)), key=lambda i: (abs(points[i].cost - w), i)) for w in wanted})


def _depth_variant(session: Session, probes: Probes, entry: Round) -> Contender:
    branch = probes.at(entry.round)
    small, _ = collapse(branch.network, cost=session.table)
    return Contender(name=f"depth {entry.round + 1}", network=small, trainings=1, plan=branch.plan)


def _rows(session: Session, variants: Sequence[Contender]) -> list[dict[str, Any]]:
    """The accounting table of all variants, with what was seen on validation data beside it."""
    chosen = session.run.once(
        "curve-val", lambda: [summary(session.evaluate(v.network, session.val)) for v in variants]
    )
    return [
        {**row, "val": val, "trainings": v.trainings, "int8": v.int8, "width": v.width}
        for v, row, val in zip(variants, account(session, list(variants)), chosen, strict=True)
    ]


def _best(rows: Sequence[dict[str, Any]], max_drop: float, runtime: str) -> str:
    """The row fastest in `runtime` within `max_drop` points of dense on validation data; the control cannot win."""
    dense = rows[0]["val"]["accuracy"]
    kept = [row for row in rows if 100 * (dense - row["val"]["accuracy"]) <= max_drop]
    kept = [row for row in kept if not row["name"].startswith("dense +")]
    return str(min(kept, key=lambda row: float(_clock(row, runtime)["median_ms"]))["name"])


def _compared(rows: Sequence[dict[str, Any]], runtime: str) -> str:
    """The runtime that decided; where it did not run every row, or counts MACs, the last of those that did."""
    everywhere = [e["runtime"] for e in rows[0]["latency"] if all(_runs(row, e["runtime"]) for row in rows)]
    return runtime if runtime in everywhere else str(everywhere[-1])


def _runs(row: dict[str, Any], runtime: str) -> bool:
    return any(entry["runtime"] == runtime for entry in row["latency"])


def _clock(row: dict[str, Any], runtime: str) -> dict[str, Any]:
    """A row's latency in a runtime in which it was timed."""
    return next(entry for entry in row["latency"] if entry["runtime"] == runtime)


def _message(rows: Sequence[dict[str, Any]], best: str, max_drop: float, runtime: str) -> str:
    dense, row = rows[0], next(row for row in rows if row["name"] == best)
    if row is dense:
        return f"No other network stayed within {max_drop:g} points of the dense one on validation data."
    clock, before = _clock(row, runtime), _clock(dense, runtime)
    difference, low, high = row["difference"]
    within = "within" if -low <= max_drop else "not resolved against"
    return (
        f"{best} is the fastest within {max_drop:g} points on validation data: "
        f"{before['median_ms'] / clock['median_ms']:.2f}x in {clock['runtime']}, accuracy {difference:+.2f} points "
        f"[{low:+.2f}, {high:+.2f}] on {row['n']} samples, {within} {max_drop:g}."
    )


def _written(
    session: Session,
    variants: Sequence[Contender],
    rows: list[dict[str, Any]],
    points: Sequence[Point],
    best: str,
    message: str,
) -> CurveResult:
    folder = session.run.folder
    split = "val" if session.test is None else "test"
    report = None
    if session.keep:
        for variant in itertools.islice(variants, 1, None):
            if not variant.int8:
                name = re.sub(r"[^a-z0-9]+", "-", variant.name).strip("-")
                save_network(variant.network, folder / f"{name}.safetensors", source=session.model)
        front = [{"loss": p.loss, "macs": p.macs, "latency_ms": p.latency_ms, "removals": list(p.keys)} for p in points]
        figures = session.described() | {
            "kind": "curve",
            "rows": rows,
            "front": front,
            "split": split,
            "best": best,
            "message": message,
            "cost_runtime": session.table.runtime,
        }
        write_json(folder / "figures.json", figures)
        report = Path(ranks.from_first(lambda: str(render_front(folder))))
    networks = {variant.name: variant.network for variant in variants}
    return CurveResult(
        rows=rows,
        networks=networks,
        best=best,
        message=message,
        split=split,
        run_dir=folder if session.keep else None,
        report=report,
    )
