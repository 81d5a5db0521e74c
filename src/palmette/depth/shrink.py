"""`shrink`: a smaller, faster network that is proven to compute what its plan says, with its cost and its controls.

Capture, score, edit, heal, look at validation data, repeat; then collapse, verify, measure, export, report. Every
step is journaled in the run folder, and everything later depends on the journal only, so that a killed run continues
to the same weights.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from palmette.depth.accounts import has_onnx, side_by_side
from palmette.depth.outcome import finish, ranking_rows
from palmette.depth.rounds import expected_seconds, rank, search, summary, target_ms
from palmette.depth.session import (
    Calibration,
    Session,
    Settings,
    check_given,
    check_protected,
    example_from,
    first_inputs,
)
from palmette.errors import InputError, PalmetteError
from palmette.graph import CollapseRecord, Plan, Verification, capture, find_sites, weights_hash
from palmette.graph.inputs import Example, batch_size, with_batch
from palmette.meter.table import CostTable
from palmette.registry import Method, MethodConfig, get_method
from palmette.run import Run
from palmette.train.evaluate import evaluate
from palmette.train.loop import HealConfig

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
    method: str | Method = "easier",
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
    names: dict[str, str] | None = None,
    say: Say | None = None,
) -> ShrinkResult:
    """Make a trained network physically smaller while it loses at most `max_drop` points of validation accuracy.

    model is not changed. Loaders yield (inputs, target); test data is looked at once, at the end. target_latency:
    "3.2ms" or "0.5x". one_shot: remove to the target in one round and heal once. heal: the training after each
    removal. cost: a runtime's name, "macs" or a CostTable. threads: those that latencies are measured with. names: what
    figures.json calls command, model and data. say: called with a line of text at every step, for instance print.
    Without run_dir nothing is kept, exported or reported.
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
    chosen, options = check_request(
        method, config=config, reproduce=reproduce, max_drop=max_drop, target_latency=target_latency
    )
    check_given(model, train=train_loader, val=val_loader, test=test_loader, calibration=calibration_loader)
    first_inputs(train_loader, "training")
    example, dense = _captured(model, val_loader, example_inputs)
    _check_sites(dense, example, chosen.kind(options))
    keep = None if run_dir is None or dry_run else Path(run_dir)
    described = {**asdict(settings), "method": chosen.name, "options": asdict(options), "protect": list(protect)}
    described |= {"heal": (heal or HealConfig()).recipe(), "network": weights_hash(model.state_dict())}
    names = {"command": _as_call(chosen.name, settings, heal or HealConfig()), **(names or {})}
    with (
        _folder(keep) as folder,
        closing(Run(folder, resume=resume, command=names["command"], seed=seed, config=described)) as run,
    ):
        session = Session(
            model=model,
            dense=dense,
            example=example,
            train=train_loader,
            val=val_loader,
            test=test_loader,
            calibration=Calibration(calibration_loader or train_loader, calibration_batches, seed),
            method=chosen,
            config=options,
            settings=settings,
            heal=heal or HealConfig(),
            table=_table(cost, run, settings.threads),
            run=run,
            keep=keep is not None,
            protect=check_protected(protect, dense, example),
            loss_fn=loss_fn,
            metric=metric,
        )
        speak = say or _silent
        return _preview(session) if dry_run else _run(session, names, keep, speak)


def check_request(
    method: str | Method,
    *,
    config: MethodConfig | None = None,
    reproduce: bool = False,
    max_drop: float = 0.5,
    target_latency: str | None = None,
) -> tuple[Method, MethodConfig]:
    """What can be refused before anything is loaded: method, its config, bound and target; returns method and config.

    Raises UnknownMethod or InputError.
    """
    chosen = get_method(method)
    Settings(max_drop=max_drop)
    target_ms(target_latency, 1.0)
    return chosen, _config(chosen, config, reproduce)


def _as_call(method: str, settings: Settings, heal: HealConfig) -> str:
    """The call that made a run, without what has no short text: loaders, functions, a method's options."""
    given = {"method": repr(method), "max_drop": repr(settings.max_drop)} | _changed(settings, Settings())
    if _changed(heal, HealConfig()):
        given["heal"] = f"HealConfig({', '.join(f'{k}={v}' for k, v in _changed(heal, HealConfig()).items())})"
    return f"palmette.shrink(model, train_loader, val_loader, {', '.join(f'{k}={v}' for k, v in given.items())})"


def _changed(settings: Any, default: Any) -> dict[str, str]:
    before = asdict(default)
    return {name: repr(value) for name, value in asdict(settings).items() if value != before[name]}


def _silent(_: str) -> None:
    return None


def _config(method: Method, config: MethodConfig | None, reproduce: bool) -> MethodConfig:
    """The method's config; raises InputError for another method's, or for `reproduce` where there is no paper form."""
    made = method.make_config() if config is None else config
    if not isinstance(made, method.config):
        raise InputError(f"method {method.name!r} wants a {method.config.__name__}, not a {type(made).__name__}")
    if not reproduce:
        return made
    if "reproduce" not in {field.name for field in dataclasses.fields(made)}:
        raise InputError(f"method {method.name!r} has no paper form to reproduce", fix="Leave reproduce out")
    return dataclasses.replace(made, reproduce=True)  # type: ignore[call-arg]


def _captured(model: nn.Module, val: Iterable[Any], example: Example | None) -> tuple[Example, fx.GraphModule]:
    """Example inputs of batch 2 and the captured network in eval mode."""
    inputs = example_from(val) if example is None else with_batch(example, max(2, batch_size(example)))
    other = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if other:
        raise InputError(
            f"the network's weights are {', '.join(str(d).removeprefix('torch.') for d in sorted(other, key=str))}",
            why="healing, proof and exports are done in float32",
            fix="Call model.float() first, and cast the result",
        )
    return inputs, capture(model, inputs).eval()


def _check_sites(dense: fx.GraphModule, example: Example, kind: str) -> None:
    if not any(site.kind == kind for site in find_sites(dense, example)):
        raise InputError(f"the network has no {kind} to remove", fix="`palmette sites` lists what it has")


def _table(cost: str | CostTable | None, run: Run, threads: int) -> CostTable:
    """The cost table: the caller's own, or one journaled in the run folder."""
    if isinstance(cost, CostTable):
        return cost
    return CostTable(cost or ("onnxruntime" if has_onnx() else "eager"), run.path("cost_table.json"), threads=threads)


@contextmanager
def _folder(run_dir: Path | None) -> Iterator[Path]:
    """The run folder, or a temporary one; one made by this call goes again when it fails before its first result."""
    if run_dir is None:
        with tempfile.TemporaryDirectory(prefix="palmette-") as name:
            yield Path(name) / "run"
        return
    missing = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        yield run_dir
    except PalmetteError:
        if run_dir in missing and not any(run_dir.glob("*-000.safetensors")):
            shutil.rmtree(run_dir, ignore_errors=True)
            for folder in missing[1:]:
                with suppress(OSError):
                    folder.rmdir()
        raise


def _preview(session: Session) -> ShrinkResult:
    """The dry run: the ranking of the first round with predicted gains, and how long healing would take."""
    evaluate(session.dense, session.val, loss_fn=session.loss_fn, metric=session.metric, max_batches=1)
    pool = session.pool(session.dense)
    scores = rank(session)(session.dense, pool) if pool else {}
    ranking = [
        {"name": c.name, "score": scores[c.name], "macs_saved": c.macs_saved, "ms_saved": c.ms_saved}
        for c in sorted(pool, key=lambda c: (scores[c.name], -c.macs_saved, c.name))
    ]
    rounds = -(-len(pool) // session.settings.step)
    if session.settings.rounds is not None:
        rounds = min(rounds, session.settings.rounds)
    seconds = expected_seconds(session, rounds)
    message = (
        f"{len(pool)} candidate{'s pay' if len(pool) > 1 else ' pays'}; healing {rounds} "
        f"round{'' if rounds == 1 else 's'} takes about {max(seconds, 1):.0f} s, each control as long again"
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
        message=message if pool else nothing,
        expected_seconds=seconds,
    )


def _run(session: Session, names: dict[str, str], keep: Path | None, say: Say) -> ShrinkResult:
    """Baseline, rounds, outcome."""
    settings = session.settings
    baseline = session.run.once("baseline", lambda: summary(session.evaluate(session.dense, session.val)))
    say(f"dense network: {100 * baseline['accuracy']:.2f} % on {baseline['n']:,} validation samples")
    found = (session.method.search or search)(session, baseline, say)
    figures = {
        "schema": 1,
        "command": names["command"],
        "method": session.method.name,
        "seed": settings.seed,
        "environment": session.run.environment,
        "model": names.get("model", type(session.model).__name__),
        "data": names.get("data", "given loaders"),
        "max_drop": settings.max_drop,
    }
    outcome = finish(session, found, figures, say)
    return ShrinkResult(
        model=outcome.network,
        plan=outcome.plan,
        cost=outcome.rows[1],
        dense_cost=outcome.rows[0],
        record=outcome.record,
        verification=outcome.verification,
        rows=outcome.rows,
        ranking=ranking_rows(session, found),
        run_dir=keep,
        report=outcome.report,
        message=outcome.message,
        split="val" if session.test is None else "test",
        exports=outcome.exports,
    )
