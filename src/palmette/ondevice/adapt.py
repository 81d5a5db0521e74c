"""The verb `adapt`: a budget in bytes in, a model out that trains within it, and the proof of what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, cast

from torch import Tensor, nn

from palmette.device import parse_bytes
from palmette.errors import BudgetError, InputError, PlanError
from palmette.meter.training import default_loss
from palmette.ondevice.adaptation import Adaptation
from palmette.ondevice.install import Before, freeze_norms, input_shapes, is_adapted, remove
from palmette.ondevice.mode import Engine
from palmette.ondevice.plan import MemoryPlan
from palmette.ondevice.planner import Costs, draft
from palmette.ondevice.search import Request, searched, training_only
from palmette.ondevice.selection import Selector
from palmette.ondevice.trace import trace
from palmette.ondevice.tuning import Tuning
from palmette.ondevice.wasi import Swaps, WasiConfig
from palmette.registry import MethodConfig, method_of

Scope = Literal["saved", "saved+gradients+optimizer", "peak"]
SCOPES = ("saved", "saved+gradients+optimizer", "peak")


def adapt(
    model: nn.Module,
    sample: tuple[Any, Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    budget: str | int | None = None,
    *,
    scope: Scope = "saved",
    method: str = "auto",
    config: MethodConfig | Mapping[str, Any] | None = None,
    freeze_bn: bool = True,
    optimizer_copies: int = 0,
    plan: MemoryPlan | str | None = None,
) -> Adaptation:
    """Make `model` train within `budget` bytes, in place; returns the handle that reports and undoes it.

    sample: (x, y), a batch as large as any that will come. loss_fn(output, y) -> scalar; cross entropy for integer
    targets and the squared error for others by default. budget: "512KiB", a number of bytes, or None for the exact
    forms alone. scope: what the budget bounds: "saved" is what autograd keeps for backward,
    "saved+gradients+optimizer" adds a gradient for each trained parameter and `optimizer_copies` more (1: momentum, 2:
    Adam), "peak" is the most that is alive at once, weights left out. method: "auto", "lossless", or one of `palmette
    methods`; config: its options. freeze_bn: batch norms use their running statistics, also after `train()`.
    plan: one made before (a MemoryPlan or its JSON), instead of planning.

    Raises BudgetError when the budget cannot be met (names the smallest that can, and what binds), InputError for bad
    arguments and a model already adapted, PlanError for a plan of another model.
    """
    request = _request(model, sample, loss_fn, budget, scope, method, config, optimizer_copies)
    before = Before()
    with ExitStack() as undo:
        undo.callback(lambda: remove(model, before))
        if freeze_bn:
            freeze_norms(model, before)
        vanilla = trace(model, request.x, request.y, request.loss)
        tuning = swaps = None
        if plan is not None:
            made = _given(plan, request, model)
        elif request.entry is not None and request.entry.sites == "channel":
            tuning, made = Tuning.open(model, request, vanilla, cast(Selector, request.entry.score(request.config)))
        else:
            made = searched(model, request, vanilla)
        if method == "wasi":
            swaps = Swaps()
            undo.callback(swaps.undo)
            made = _with_factors(model, request, made, swaps)
        engine = Engine(made, waits_for_optimizer=tuning is not None or swaps is not None)
        adaptation = Adaptation(
            model, request, made, engine, before, vanilla_saved=vanilla.stock_bytes(), tuning=tuning, swaps=swaps
        )
        adaptation.start()
        undo.pop_all()
    return adaptation


def _with_factors(model: nn.Module, request: Request, made: MemoryPlan, swaps: Swaps) -> MemoryPlan:
    """The plan after linear layers were put into factors: what they keep is their own affair, and counted anew."""
    gone = swaps.make(model, dict(made.codecs), cast(WasiConfig, request.config))
    with swaps.set_aside():
        found = trace(model, request.x, request.y, request.loss)
    codecs = {key: codec for key, codec in made.codecs.items() if f"{key}.weight" not in gone}
    again = draft(found, codecs, Costs.of(model, 0))
    return replace(made, codecs=codecs, stock=again.stock, folds=dict(again.folds), predicted_bytes=again.saved)


def _given(plan: MemoryPlan | str, request: Request, model: nn.Module) -> MemoryPlan:
    """A plan made before, if it fits this model."""
    made = MemoryPlan.from_json(plan) if isinstance(plan, str) else plan
    if not isinstance(made, MemoryPlan):
        raise PlanError(f"A {type(made).__name__} is no plan", fix="Pass a MemoryPlan, or the text of its to_json().")
    if made.slices or made.method == "wasi":
        raise PlanError(
            f"A plan of {made.method!r} cannot be given back",
            why="it changes as it trains",
            fix="Pass the method and the budget: the same seed chooses the same.",
        )
    if request.budget is not None and made.predicted_bytes > request.budget:
        raise BudgetError(
            f"The plan keeps {made.predicted_bytes:,} bytes, the budget is {request.budget:,}", fix="Plan anew."
        )
    names = {name for name, _ in model.named_parameters()}
    strange = sorted(set(made.frozen) - names)
    if strange:
        raise PlanError("The plan is of another model", why=f"it has no parameter {strange[0]!r}", fix="Plan anew.")
    shapes = input_shapes(request.x)
    pairs = [pair for s, p in zip(shapes, made.inputs, strict=False) for pair in zip(s, p, strict=False)]
    if any(size > planned for size, planned in pairs):
        raise PlanError("The sample is larger than the plan's", why=f"{shapes} against {made.inputs}", fix="Plan anew.")
    with training_only(model, made.frozen):
        found = trace(model, request.x, request.y, request.loss)
    wanted = {entry.key for entry in found.layers()}
    if wanted != set(made.codecs) or dict(made.folds) != found.folds:
        apart = sorted(wanted ^ set(made.codecs)) or ["the batch norms"]
        raise PlanError("The plan is of another model", why=f"they differ at {apart[0]}", fix="Plan anew.")
    return made


def _request(
    model: nn.Module,
    sample: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    budget: str | int | None,
    scope: str,
    method: str,
    config: MethodConfig | Mapping[str, Any] | None,
    copies: int,
) -> Request:
    if is_adapted(model):
        raise InputError("The model is adapted already", fix="Call undo() on its adaptation first.")
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise InputError("The sample is not a pair", fix="Pass sample=(x, y), a batch as the training loop has it.")
    if scope not in SCOPES:
        raise InputError(f"There is no scope {scope!r}", fix=f"Choose one of {', '.join(SCOPES)}.")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("There is nothing to train: all parameters are frozen", fix="Set requires_grad on some.")
    entry = None if method in ("auto", "lossless") else method_of("adapt", method)
    options: MethodConfig | None = None
    if copies < 0 or not isinstance(copies, int):
        raise InputError(f"optimizer_copies={copies!r} is no number", fix="Write 0, 1 (momentum) or 2 (Adam).")
    if entry is not None and entry.sites == "channel" and scope == "peak":
        raise InputError(
            f"{method!r} cannot bound the peak", why="it counts what is kept", fix="Take scope='saved', or a codec."
        )
    if isinstance(config, MethodConfig):
        if entry is not None and not isinstance(config, entry.config):
            other = type(config).__name__
            raise InputError(f"{other} has no options of {method!r}", fix=f"Pass {entry.config.__name__}.")
        options = config
    elif entry is not None:
        options = entry.make_config(**dict(config or {}))
    elif config:
        raise InputError(f"method {method!r} takes no options", fix="Leave config out.")
    x, y = sample
    return Request(
        x=x,
        y=y,
        loss=loss_fn or default_loss,
        budget=None if budget is None else parse_bytes(budget),
        scope=scope,
        method=method,
        entry=entry,
        config=options,
        copies=0 if scope == "saved" else 1 + copies,
    )
