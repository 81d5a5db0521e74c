"""Open a run: everything checked before anything is written, the network captured, the folder locked."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import palmette.ranks as ranks
from palmette.depth.rounds import target_ms
from palmette.depth.session import (
    Calibration,
    Session,
    Settings,
    check_given,
    check_protected,
    example_from,
    first_inputs,
)
from palmette.errors import InputError, PalmetteError, TrainingError
from palmette.graph import capture, find_sites, weights_hash
from palmette.graph.inputs import Example, batch_size, with_batch
from palmette.meter.runtimes import has_onnx
from palmette.meter.table import CostTable
from palmette.registry import Method, MethodConfig, method_of
from palmette.run import Run
from palmette.train.labels import is_cross_entropy
from palmette.train.loop import HealConfig
from palmette.train.spread import Spread


@dataclass(frozen=True)
class Loaders:
    """The data of a run; each yields (inputs, target). Without `calibration` the training data serve."""

    train: Iterable[Any]
    val: Iterable[Any]
    test: Iterable[Any] | None = None
    calibration: Iterable[Any] | None = None


@contextmanager
def opened(
    data: Loaders,
    *,
    model: nn.Module,
    example_inputs: Example | None,
    method: str | Method,
    config: MethodConfig | None,
    settings: Settings,
    heal: HealConfig,
    run_dir: Path | None,
    resume: bool,
    cost: str | CostTable | None,
    protect: Sequence[str],
    loss_fn: Callable[..., Any] | None,
    metric: Callable[..., Any] | None,
    names: dict[str, str],
    verb: str = "shrink",
    more: dict[str, Any] | None = None,
    spread: Spread | None = None,
) -> Iterator[Session]:
    """The session of a run in `run_dir`, or in a temporary folder.

    more: further options that a resumed run must agree with. spread: where it may work; several processes are started
    once everything has been checked. Raises a PalmetteError for input that cannot be used; nothing is written then.
    """
    chosen, options = check_request(
        method,
        config=config,
        reproduce=settings.reproduce,
        max_drop=settings.max_drop,
        target_latency=settings.target_latency,
    )
    check_given(model, train=data.train, val=data.val, test=data.test, calibration=data.calibration)
    first_inputs(data.train, "training")
    example, dense = _captured(model, data.val, example_inputs)
    _check_sites(dense, example, chosen, options)
    _check_loss(chosen, loss_fn)
    described = {**asdict(settings), "method": chosen.name, "options": asdict(options), "protect": list(protect)}
    described |= {"heal": heal.recipe(), "network": weights_hash(model.state_dict()), **(more or {})}
    names = {"command": _as_call(verb, chosen.name, settings, heal), **names}
    spread = spread or Spread()
    with (
        spread.entered(heal.precision, data.train) as fabric,
        _folder(run_dir) as folder,
        closing(
            Run(folder, resume=resume, command=names["command"], seed=settings.seed, config=described | _processes())
        ) as run,
    ):
        yield Session(
            model=model,
            dense=dense,
            example=example,
            train=data.train,
            val=data.val,
            test=data.test,
            calibration=Calibration(data.calibration or data.train, settings.calibration_batches, settings.seed),
            method=chosen,
            config=options,
            settings=settings,
            heal=heal,
            table=_table(cost, run, settings.threads),
            run=run,
            keep=run_dir is not None,
            protect=check_protected(protect, dense, example),
            loss_fn=loss_fn,
            metric=metric,
            names=names,
            fabric=fabric,
            ray=spread.ray,
        )


def _processes() -> dict[str, Any]:
    """How many processes train, which a resumed run must agree with: so many batches make up one step."""
    return {"processes": ranks.count()} if ranks.count() > 1 else {}


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
    chosen = method_of("shrink", method)
    Settings(max_drop=max_drop)
    target_ms(target_latency, 1.0)
    return chosen, _config(chosen, config, reproduce)


def _as_call(verb: str, method: str, settings: Settings, heal: HealConfig) -> str:
    """The call that made a run, without what has no short text: loaders, functions, a method's options."""
    given = {"method": repr(method), "max_drop": repr(settings.max_drop)} | _changed(settings, Settings())
    if _changed(heal, HealConfig()):
        given["heal"] = f"HealConfig({', '.join(f'{k}={v}' for k, v in _changed(heal, HealConfig()).items())})"
    return f"palmette.{verb}(model, train_loader, val_loader, {', '.join(f'{k}={v}' for k, v in given.items())})"


def _check_loss(method: Method, loss_fn: Callable[..., Any] | None) -> None:
    """Refuse a method whose score is cross entropy for a network that is trained with another loss."""
    if method.cross_entropy and not is_cross_entropy(loss_fn):
        raise InputError(
            f"method {method.name!r} scores by cross entropy, and another loss_fn was given",
            fix="Choose a method whose score needs no labels, such as affine_residual or auto",
        )


def _changed(settings: Any, default: Any) -> dict[str, str]:
    before = asdict(default)
    return {name: repr(value) for name, value in asdict(settings).items() if value != before[name]}


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


def _check_sites(dense: fx.GraphModule, example: Example, method: Method, config: MethodConfig) -> None:
    """Refuse a network without a site of the method's kind; a search of its own takes sites of every kind."""
    kind = "site" if method.search else method.kind(config)
    sites = find_sites(dense, example)
    if not (sites if method.search or kind in ("convolution", "layer") else [s for s in sites if s.kind == kind]):
        raise InputError(f"the network has no {kind} to remove", fix="`palmette sites` lists what it has")


def _table(cost: str | CostTable | None, run: Run, threads: int) -> CostTable:
    """The cost table: the caller's own, or one journaled in the run folder."""
    if isinstance(cost, CostTable):
        return cost
    return CostTable(cost or ("onnxruntime" if has_onnx() else "eager"), run.path("cost_table.json"), threads=threads)


@contextmanager
def _folder(run_dir: Path | None) -> Iterator[Path]:
    """The run folder, or a temporary one; one made by this call goes again when it holds nothing to go on from."""
    if run_dir is None:
        name = ranks.from_first(lambda: tempfile.mkdtemp(prefix="palmette-"))
        try:
            yield Path(name) / "run"
            ranks.wait()
        finally:
            if ranks.leads():
                shutil.rmtree(name, ignore_errors=True)
        return
    missing = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        yield run_dir
    except PalmetteError as error:
        if ranks.leads() and run_dir in missing and not _worth_keeping(run_dir, error):
            shutil.rmtree(run_dir, ignore_errors=True)
            for folder in missing[1:]:
                with suppress(OSError):
                    folder.rmdir()
        raise


def _worth_keeping(run_dir: Path, error: PalmetteError) -> bool:
    """Whether a failed run has trained: networks, or options healed by a run whose settings are not what was wrong."""
    trained, settings = any(run_dir.glob("*.safetensors")), isinstance(error, InputError | TrainingError)
    return trained or (not settings and any(run_dir.glob("importance/*.json")))
