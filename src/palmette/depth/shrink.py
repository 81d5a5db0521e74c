"""`shrink`: a smaller, faster network that is proven to compute what its plan says, with its cost and its controls.

Capture, score, edit, heal, look at validation data, repeat; then collapse, verify, measure, export, report. Every
step is journaled in the run folder, and everything later depends on the journal only, so that a killed run continues
to the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

import palmette.ranks as ranks
from palmette.depth.accounts import side_by_side
from palmette.depth.auto import AutoConfig, explore, ranked, whole_cost
from palmette.depth.opening import Loaders, opened
from palmette.depth.outcome import finish, ranking_rows
from palmette.depth.rounds import expected_seconds, rank, search, summary, target_ms
from palmette.depth.session import (
    Session,
    Settings,
)
from palmette.graph import CollapseRecord, Plan, Verification
from palmette.graph.inputs import Example
from palmette.meter.table import CostTable
from palmette.registry import Method, MethodConfig
from palmette.train.evaluate import evaluate
from palmette.train.loop import HealConfig
from palmette.train.spread import Spread

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ShrinkResult:
    """What `shrink` returns.

    model: plain network in eval mode. cost, dense_cost, rows: the accounting table (rows[0] is dense, rows[1]
    shrunk); `print(result)` shows them side by side. ranking: the first round's scores. expected_seconds: filled by a
    dry run, which trains nothing and returns the dense network.
    """

    model: nn.Module
    plan: Plan
    cost: dict[str, Any]
    dense_cost: dict[str, Any]
    record: CollapseRecord | None
    verification: Verification | None
    rows: list[dict[str, Any]]
    ranking: list[dict[str, Any]]
    run_dir: Path | None
    report: Path | None
    message: str
    split: str = "val"
    exports: dict[str, Any] = field(default_factory=dict)
    expected_seconds: float | None = None

    def __str__(self) -> str:
        return f"{side_by_side(self.rows, self.split)}\n\n{self.message}" if self.rows else self.message


def shrink(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    *,
    example_inputs: Example | None = None,
    method: str | Method = "auto",
    config: MethodConfig | None = None,
    max_drop: float = 0.5,
    target_latency: str | None = None,
    loss_fn: Callable[..., Any] | None = None,
    metric: Callable[..., Any] | None = None,
    protect: Sequence[str] = (),
    run_dir: str | Path | None = None,
    resume: bool = False,
    heal: HealConfig | None = None,
    rounds: int | None = None,
    step: int = 1,
    one_shot: bool = False,
    patience: int = 2,
    pad: str | None = None,
    cost: str | CostTable | None = None,
    threads: int = 1,
    calibration_loader: Iterable[Any] | None = None,
    calibration_batches: int | None = 32,
    controls: bool = True,
    seed: int = 0,
    dry_run: bool = False,
    reproduce: bool = False,
    devices: int = 1,
    nodes: int = 1,
    fabric: Fabric | None = None,
    ray: str | None = None,
    names: dict[str, str] | None = None,
    say: Say | None = None,
) -> ShrinkResult:
    """Make a trained network physically smaller while it loses at most `max_drop` points of validation accuracy.

    model is not changed. Loaders yield (inputs, target); test data is looked at once, at the end. target_latency:
    "3.2ms" or "0.5x". one_shot: remove to the target in one round and heal once. heal: the training after each
    removal. cost: a runtime's name, "macs" or a CostTable. threads: those that latencies are measured with. names: what
    figures.json calls command, model and data. say: called with a line of text at every step, for instance print.
    Without run_dir nothing is kept, exported or reported.
    devices, nodes: train with DDP over that many devices per node and share out the passes over data; Fabric starts the
    processes by running the script again, so call it from one, seed what is random, and use run_dir's result in the
    first process. fabric: one that is launched already. ray: where trials run, "local", "auto" or a cluster's address.
    Raises a PalmetteError for input that cannot be used (nothing is written then) and VerifyError when the result does
    not compute what its plan says.
    """
    settings = Settings(
        max_drop=max_drop,
        target_latency=target_latency,
        rounds=rounds,
        step=step,
        one_shot=one_shot,
        patience=patience,
        controls=controls,
        pad=pad or ("exact" if reproduce else "repad"),  # type: ignore[arg-type]
        calibration_batches=calibration_batches,
        threads=threads,
        reproduce=reproduce,
        seed=seed,
    )
    with opened(
        Loaders(train_loader, val_loader, test_loader, calibration_loader),
        model=model,
        example_inputs=example_inputs,
        method=method,
        config=config,
        settings=settings,
        heal=heal or HealConfig(),
        run_dir=None if run_dir is None or dry_run else Path(run_dir),
        resume=resume,
        cost=cost,
        protect=protect,
        loss_fn=loss_fn,
        metric=metric,
        names=names or {},
        spread=Spread(devices=devices, nodes=nodes, fabric=fabric, ray=ray),
    ) as session:
        return _preview(session) if dry_run else _run(session, say if say and ranks.leads() else _silent)


def _preview(session: Session) -> ShrinkResult:
    """The dry run: the ranking of the first round with predicted gains, and how long healing would take."""
    evaluate(session.dense, session.val, loss_fn=session.loss_fn, metric=session.metric, max_batches=1)
    ranking, rounds, more = _previewed_search(session) if session.method.search else _previewed_rounds(session)
    if session.settings.rounds is not None:
        rounds = min(rounds, session.settings.rounds)
    seconds = expected_seconds(session, rounds)
    takes = "a time unknown for a loader without length" if seconds is None else f"about {max(seconds, 1):.0f} s"
    many = "" if rounds == 1 else "s"
    healing = f"at most {rounds} training{many}" if session.method.search else f"healing in {rounds} round{many}"
    message = (
        f"{len(ranking)} candidate{'s pay' if len(ranking) > 1 else ' pays'}{more}; {healing}: {takes}, "
        "each control as long again"
    )
    nothing = f"Nothing pays on {session.table.runtime}; `palmette sites` lists what each removal saves in MACs"
    return ShrinkResult(
        model=session.dense,
        plan=Plan([]),
        cost={},
        dense_cost={},
        record=None,
        verification=None,
        rows=[],
        ranking=ranking,
        run_dir=None,
        report=None,
        message=message if ranking else nothing,
        expected_seconds=seconds,
    )


def _previewed_rounds(session: Session) -> tuple[list[dict[str, Any]], int, str]:
    """Ranking, number of rounds, and nothing more to say, for a method that removes round by round."""
    pool, trains = session.pool(session.dense), session.method.prepare is not None
    scores = (
        dict.fromkeys((c.name for c in pool), 0.0) if trains else rank(session)(session.dense, pool) if pool else {}
    )
    ranking = [
        {"name": c.name, "score": scores[c.name], "macs_saved": c.macs_saved, "ms_saved": c.ms_saved}
        for c in sorted(pool, key=lambda c: (scores[c.name], -c.macs_saved, c.name))
    ]
    more = f"; {session.method.name} scores them by a training of its own, which a dry run leaves out" if trains else ""
    return ranking, 1 if session.settings.one_shot else -(-len(pool) // session.settings.step), more


def _previewed_search(session: Session) -> tuple[list[dict[str, Any]], int, str]:
    """Ranking, most trainings, and how far the front reaches, for a method with a search of its own."""
    options, points = explore(session, _silent, train=False)
    config = session.config if isinstance(session.config, AutoConfig) else AutoConfig()
    reach = ""
    if points:
        fastest = points[-1].cost / whole_cost(session)
        plans = "1 plan" if len(points) == 1 else f"{len(points)} plans"
        reach = f", and {plans} of them were timed, down to {fastest:.2f}x of the dense cost"
        goal = target_ms(session.settings.target_latency, session.clock(session.dense))
        if goal is not None:
            reach += f"; the target of {goal:.3g} ms is {'within' if points[-1].cost <= goal else 'out of'} reach"
    return ranked(options), config.trainings, reach


def _silent(_: str) -> None:
    return None


def _run(session: Session, say: Say) -> ShrinkResult:
    """Baseline, rounds, outcome."""
    baseline = session.run.once("baseline", lambda: summary(session.evaluate(session.dense, session.val)))
    say(f"dense network: {100 * baseline['accuracy']:.2f} % on {baseline['n']:,} validation samples")
    found = (session.method.search or search)(session, baseline, say)
    outcome = finish(session, found, session.described(), say)
    return ShrinkResult(
        model=outcome.network,
        plan=outcome.plan,
        cost=outcome.rows[1],
        dense_cost=outcome.rows[0],
        record=outcome.record,
        verification=outcome.verification,
        rows=outcome.rows,
        ranking=ranking_rows(session, found),
        run_dir=session.run.folder if session.keep else None,
        report=outcome.report,
        message=outcome.message,
        split="val" if session.test is None else "test",
        exports=outcome.exports,
    )
