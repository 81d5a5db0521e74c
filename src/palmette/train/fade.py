"""Gradual edits: over the first part of healing a plan's edits fade in, then they are made, then healing goes on.

An activation gives (1 - t) f(z) + t (slope z + offset), a block (1 - t) block(x) + t x, while t rises from 0 to 1 as
half a cosine: slowly where the network is first disturbed, and slowly where the last nonlinearity goes. Decay of slopes
in place of a sudden edit is due to Ben Dror et al., "Layer Folding", BMVC 2022, whose shares are learnt; here they
follow the schedule, so that the edit is complete when the time is up.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, fx, nn

from palmette.errors import PlanError, RefusedEdit
from palmette.graph.activations import find_activations
from palmette.graph.blend import insert_blends, remove_blends
from palmette.graph.capture import capture
from palmette.graph.plan import Edit, Plan
from palmette.graph.sites import site_axis
from palmette.graph.spans import run_at
from palmette.train.batches import dealt, length
from palmette.train.checkpoint import model_tensors
from palmette.train.config import HealConfig
from palmette.train.constraints import zeros_kept
from palmette.train.loop import heal


class Fading(nn.Module):
    """(1 - t) y + t (slope z + offset) of a site's input z and output y; t is 1 after `steps` calls of `advance`.

    slope, offset: [C] along `axis`, or None for t z. The steps done are a buffer, so that a checkpoint holds them.
    """

    done: Tensor
    slope: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        steps: int,
        slope: Tensor | None = None,
        offset: Tensor | None = None,
        axis: int = -1,
        *,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.steps, self.axis = steps, axis
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))
        for name, values in (("slope", slope), ("offset", offset)):
            if values is not None and trainable:
                self.register_parameter(name, nn.Parameter(values.detach().clone()))
            else:
                self.register_buffer(name, None if values is None else values.detach().clone())

    def advance(self) -> None:
        """Count a step of training."""
        self.done += 1

    def share(self) -> Tensor:
        """The share t in the middle of the present step, a scalar in [0, 1]: half a cosine over the steps."""
        through = (self.done.double() + 0.5) / max(self.steps, 1)
        t = 0.5 - 0.5 * torch.cos(math.pi * through)
        return torch.where(self.done >= self.steps, torch.ones_like(t), t)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """The mix, of the shape of `before` and `after`."""
        t = self.share().to(after.dtype)
        fitted = before
        if self.slope is not None and self.offset is not None:
            shape = [1] * before.dim()
            shape[self.axis] = -1
            fitted = before * self.slope.view(shape) + self.offset.view(shape)
        return (1 - t) * after + t * fitted

    def extra_repr(self) -> str:
        """How far it is, for printing."""
        return f"{int(self.done)} of {self.steps} steps"


def heal_fading(
    network: nn.Module,
    plan: Plan,
    example_inputs: Any,
    loader: Iterable[Any],
    config: HealConfig,
    *,
    pad: str = "repad",
    checkpoint: Path | None = None,
    keep_zeros: bool = False,
    **options: Any,
) -> fx.GraphModule:
    """`plan.apply` and `heal` in one: an edited, healed copy of `network`, whose edits were faded in.

    network: the one from before the plan. config.fade: the share of the schedule over which the edits fade in; with 0
    they are made at once. options: those of `heal`. checkpoint: where the state is stored; that of the fade lies beside
    it, named <stem>-fade. The whole schedule is as long as that of `heal`, with the same batches and learning rates.
    Raises what `Plan.apply` and `heal` raise; DataError for a loader without a length, if there is something to fade.
    """
    edited, rest = fade_in(
        network, plan, example_inputs, loader, config, pad=pad, checkpoint=checkpoint, keep_zeros=keep_zeros, **options
    )
    heal(
        edited,
        loader,
        rest,
        checkpoint=checkpoint,
        constraints=[zeros_kept(edited)] if keep_zeros else (),
        **options,
    )
    return edited


def fade_in(
    network: nn.Module,
    plan: Plan,
    example_inputs: Any,
    loader: Iterable[Any],
    config: HealConfig,
    *,
    pad: str = "repad",
    checkpoint: Path | None = None,
    keep_zeros: bool = False,
    **options: Any,
) -> tuple[fx.GraphModule, HealConfig]:
    """The first part of `heal_fading`: the edited network and the settings of the healing that is left to do.

    Linearisations and removals of blocks fade in, and slopes of an affine fit train meanwhile. Other edits are made at
    once, before the fade; where that would hide a site from the others, everything is. Padding moves when an edit is
    made, so for a fading one at the end of the fade.
    """
    before = capture(network, example_inputs)
    edited = plan.apply(before, example_inputs, pad)  # what cannot be done is refused before anything is trained
    steps = _steps(loader, config, options.get("fabric")) if config.fade > 0 else 0
    if steps == 0:
        return edited, config
    blended, gradual = _prepared(before, plan, edited, example_inputs, pad)
    if len(gradual) == 0:
        return edited, config
    fading = _fadings(blended, gradual, steps or 0)
    switch = config.begin + config.fade * (config.end - config.begin)
    insert_blends(blended, fading)

    def advance() -> None:
        for module in fading.values():
            module.advance()

    heal(
        blended,
        loader,
        dataclasses.replace(config, end=switch),
        checkpoint=None if checkpoint is None else fade_checkpoint(checkpoint),
        constraints=[advance, *([zeros_kept(blended)] if keep_zeros else ())],
        **options,
    )
    trained = Plan([_as_trained(edit, fading.get(edit.site)) for edit in gradual])
    remove_blends(blended)
    return trained.apply(blended, example_inputs, pad), dataclasses.replace(config, begin=switch)


def fade_checkpoint(checkpoint: Path) -> Path:
    """Where the state of the fade lies, beside that of the healing after it."""
    return checkpoint.with_name(f"{checkpoint.stem}-fade{checkpoint.suffix}")


def _steps(loader: Iterable[Any], config: HealConfig, fabric: Fabric | None) -> int | None:
    """Steps of the fade in each process; None for a loader without a length, which `heal` refuses."""
    batches = length(dealt(loader, fabric))
    if batches is None:
        return None
    total = config.epochs * batches
    switch = config.begin + config.fade * (config.end - config.begin)
    return round(switch * total) - round(config.begin * total)


def _prepared(
    before: fx.GraphModule, plan: Plan, edited: fx.GraphModule, example_inputs: Any, pad: str
) -> tuple[fx.GraphModule, Plan]:
    """The network with all that cannot fade in made, and the plan of what can; an empty one if that is no way there."""
    gradual = Plan([edit for edit in plan if edit.kind in ("linearize", "drop")])
    if len(gradual) in (0, len(plan)):
        return before, gradual
    try:
        start = Plan([edit for edit in plan if edit not in gradual.edits]).apply(before, example_inputs, pad)
        end = gradual.apply(start, example_inputs, pad)
    except (PlanError, RefusedEdit):  # the order of the plan matters
        return before, Plan()
    shapes = [{name: tensor.shape for name, tensor in model_tensors(gm).items()} for gm in (end, edited)]
    return (start, gradual) if shapes[0] == shapes[1] else (before, Plan())


def _fadings(gm: fx.GraphModule, plan: Plan, steps: int) -> dict[str, Fading]:
    """A module for each activation that is to be linearised and for each block that is to go."""
    activations = {a.path: a for a in find_activations(gm)}
    found: dict[str, Fading] = {}
    for edit in plan:
        if edit.kind == "drop":
            found |= {block.path: Fading(steps) for block in run_at(gm, edit.site)}
        else:
            slope, offset = (
                None if v is None else torch.tensor(v, dtype=torch.float64) for v in (edit.slope, edit.offset)
            )
            axis = site_axis(gm, activations[edit.site])
            found[edit.site] = Fading(steps, slope, offset, axis, trainable=edit.fit == "affine")
    return found


def _as_trained(edit: Edit, fading: Fading | None) -> Edit:
    """The edit with the slopes that its fading module has learnt."""
    if fading is None or fading.slope is None or fading.offset is None:
        return edit
    slope, offset = (tuple(values.detach().double().tolist()) for values in (fading.slope, fading.offset))
    return dataclasses.replace(edit, slope=slope, offset=offset)
