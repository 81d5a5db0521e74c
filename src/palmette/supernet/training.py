"""Train a supernet, so that every network in it is worth extracting.

It is healing with more than one network in a step: the same Fabric, checkpoints, distillation and resume. The first
sub-network of a step learns the task; the others learn from its answers (in-place distillation, BigNAS 2020), or, where
the phases of Once-for-All have a teacher, all learn from that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor, nn

from palmette.errors import InputError
from palmette.graph.inputs import call, main_output
from palmette.supernet.strategies import Strategy, make_strategy, phases
from palmette.supernet.supernet import Supernet, check_elastic
from palmette.train.batches import length
from palmette.train.config import HealConfig
from palmette.train.distill import distillation_loss, imitation_loss
from palmette.train.labels import LossFn, is_cross_entropy
from palmette.train.loop import History, heal

TEACHING = 0.5
"""Weight of the teacher's answers in the phases of progressive shrinking; the task has the other half (OFA: 1 to 1)."""


def train_supernet(
    net: Supernet,
    loader: Iterable[Any],
    config: HealConfig | None = None,
    *,
    strategy: str = "sandwich",
    sub_nets: int = 2,
    start: float = 0.5,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    fabric: Fabric | None = None,
) -> History:
    """Train a supernet in place, and return the history of `heal`; statistics of batch norms are to be measured anew.

    loader: yields (inputs, target). config: epochs, rate, optimizer; for "progressive" the epochs of each phase.
    strategy: a name in `STRATEGIES`. sub_nets: drawn at random in a step. start: "delayed" trains the largest alone for
    that share of the steps. loss_fn: of the task; cross entropy by default. checkpoint: a file to go on from; for
    "progressive" one for each phase, named after it. fabric: a launched Fabric for several devices; all of them draw
    the same sub-networks. Sources: BigNAS (ECCV 2020), DepS (2024), InstaTune (2023: a supernet from trained weights,
    at fine-tuning), Once-for-All (ICLR 2020), MOOFA (2024).

    Raises InputError for an unknown strategy or no sub-network, and what `heal` raises.
    """
    if sub_nets < 1 or not 0 <= start < 1:
        raise InputError(f"sub_nets = {sub_nets}, start = {start} are out of bounds", fix="Give 1 or more, and [0, 1).")
    check_elastic(net)
    config = HealConfig() if config is None else config
    common: dict[str, Any] = {"loss_fn": loss_fn, "seed": seed, "fabric": fabric}
    if strategy == "progressive":
        return _in_phases(net, loader, config, None if checkpoint is None else Path(checkpoint), common)
    batches = length(loader)
    steps = None if batches is None else batches * config.epochs
    made = make_strategy(net, strategy, seed=seed, count=sub_nets, steps=steps, start=start)
    file = None if checkpoint is None else Path(checkpoint)
    return _trained(net, loader, config, made, {**common, "checkpoint": file, "label": strategy})


def _in_phases(
    net: Supernet, loader: Iterable[Any], config: HealConfig, checkpoint: Path | None, common: dict[str, Any]
) -> History:
    teacher = copy.deepcopy(net.network)
    history: History = []
    for name, count, draw in phases(net.space):
        strategy = Strategy(net.space, draw, common["seed"], count, sandwiched=False)
        file = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.stem}-{name}{checkpoint.suffix}")
        taught = replace(config, distill=config.distill or TEACHING)
        options = {**common, "checkpoint": file, "label": f"progressive, {name}", "teacher": teacher}
        history += [{**entry, "phase": name} for entry in _trained(net, loader, taught, strategy, options)]
    return history


def _trained(
    net: Supernet, loader: Iterable[Any], config: HealConfig, strategy: Strategy, options: dict[str, Any]
) -> History:
    net.forget_statistics()
    trainee = _Trainee(net, strategy, classes=is_cross_entropy(options["loss_fn"]))
    before = net.active
    try:
        return heal(trainee, loader, config, loss_terms=[trainee.others], **options)
    finally:
        net.activate(before)


class _Trainee(nn.Module):
    """A supernet whose forward pass in training is the first sub-network of the step."""

    steps: Tensor

    def __init__(self, net: Supernet, strategy: Strategy, *, classes: bool) -> None:
        super().__init__()
        self.net, self.strategy, self.classes = net, strategy, classes
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the first sub-network of the step; in eval mode that of the active configuration."""
        if not self.training:
            return self.net(*args, **kwargs)
        step = self.strategy.step(int(self.steps))
        self.steps += 1
        with self.net.running(step.first):
            return self.net(*args, **kwargs)

    def others(self, _: nn.Module, inputs: Any, output: Any) -> Tensor:
        """What the other sub-networks of the step have still to learn from the answers of the first."""
        step = self.strategy.step(int(self.steps) - 1)
        known = main_output(output)
        taught, mixed = known.detach(), _is_mixed(known, self.net)
        total = known.new_zeros(())
        if dist.is_available() and dist.is_initialized():  # DDP waits for a gradient of every parameter, drawn or not
            total = total + sum((p.flatten()[0] * 0 for p in self.net.parameters()), start=total)
        for config in step.others:
            with self.net.running(config), torch.autocast(known.device.type, known.dtype, enabled=mixed):
                answer = main_output(call(self.net, inputs))
            loss = distillation_loss(answer, taught, 1.0) if self.classes else imitation_loss(answer, taught)
            total = total + step.weight * loss
        return total


def _is_mixed(output: Tensor, net: Supernet) -> bool:
    """Whether the first sub-network ran in a smaller type than its weights have."""
    return output.dtype in (torch.float16, torch.bfloat16) and next(net.parameters()).dtype == torch.float32
