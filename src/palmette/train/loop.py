"""Healing: the fine-tuning that follows an edit, able to stop anywhere and go on to the same weights.

It runs on Lightning Fabric. Every epoch is seeded from (seed, label, epoch). A checkpoint holds weights, optimizer,
random states and the place in the epoch; on resume the batches before that place are drawn again and left out. On a CPU
the final weights are those of an uninterrupted run, bit for bit, as long as versions and the number of threads stay the
same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.single_device import SingleDeviceStrategy
from torch import nn

from palmette.errors import InputError
from palmette.run import Run
from palmette.seeding import preserved
from palmette.train.batches import check_iterable, check_repeatable
from palmette.train.checkpoint import load_model_tensors
from palmette.train.config import HealConfig
from palmette.train.constraints import Constraint
from palmette.train.labels import LossFn
from palmette.train.trainer import LossTerm, Stored, Task, Trainer, check_task, make_fabric

__all__ = ["HealConfig", "History", "LossTerm", "heal", "healed"]

History = list[dict[str, Any]]
"""One entry per epoch: epoch (from 0), loss (mean over samples), lr (at the end of the epoch)."""


def heal(
    model: nn.Module,
    loader: Iterable[Any],
    config: HealConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    label: str = "heal",
    fabric: Fabric | None = None,
    loss_terms: Sequence[LossTerm] = (),
    constraints: Sequence[Constraint] = (),
) -> History:
    """Train `model` in place and return the history; the model is left in eval mode, on the device where it was.

    loader: yields (inputs, target) or dicts with labels; must start anew at each pass and repeat itself for one seed.
    teacher: the network to distil from with config.distill or config.features > 0; used in eval mode, left untouched.
    loss_fn: `loss_fn(logits, target)` -> mean over the batch; cross entropy by default.
    loss_terms: `term(model, inputs, output)` -> scalar added to the loss; a term must not keep state of its own.
    constraints: functions without arguments, called after each step to restore what must hold (`zeros_kept`).
    checkpoint: a file to store the state in. If it exists, training goes on from there; if it is finished, its weights
    are loaded and nothing else happens.
    fabric: a launched Fabric for several devices (then whole epochs only are stored); by default one device, a GPU if
    there is one. With a warning, batches of one sample are left out when the model has batch normalisation, and the
    feature term when model and teacher have no place in common.

    The global random states are as before at the end. Raises InputError (nothing to train, no teacher), DataError
    (empty, one-pass or unseedable loader, labels out of range), TrainingError (loss not finite; names epoch and step),
    RunError (damaged checkpoint, or one of another training).
    """
    task = Task(
        model=model,
        loader=loader,
        config=HealConfig() if config is None else config,
        teacher=teacher,
        loss_fn=loss_fn,
        loss_terms=loss_terms,
        constraints=constraints,
        seed=seed,
        label=label,
        checkpoint=None if checkpoint is None else Path(checkpoint),
    )
    check_task(task)
    check_iterable(loader)
    with preserved(loader), _left_as_found(model, teacher):
        history, left_out = _heal(task, fabric)
    if left_out:
        warnings.warn(f"{label}: {left_out} batches of one sample were left out (batch normalisation)", stacklevel=2)
    return history


def healed(
    run: Run,
    name: str,
    model: nn.Module,
    loader: Iterable[Any],
    config: HealConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFn | None = None,
    fabric: Fabric | None = None,
    loss_terms: Sequence[LossTerm] = (),
) -> History:
    """`heal` as a stage of a run: done once, resumed where it was cut off, and read from <name>.safetensors ever after.

    The seed is the run's, the label is `name`. Raises what `heal` raises.
    """
    return heal(
        model,
        loader,
        config,
        teacher=teacher,
        loss_fn=loss_fn,
        seed=run.seed,
        checkpoint=run.path(f"{name}.safetensors"),
        label=name,
        fabric=fabric,
        loss_terms=loss_terms,
    )


def _heal(task: Task, fabric: Fabric | None) -> tuple[History, int]:
    """History, and the number of batches left out."""
    identity = {} if task.checkpoint is None else task.identity()
    stored = None
    if task.checkpoint is not None and task.checkpoint.exists():
        stored = Stored.read(task.checkpoint, identity)
        if stored.meta["done"]:
            load_model_tensors(task.model, stored.tensors, str(task.checkpoint))
            return stored.meta["history"], 0
    if task.config.epochs > 0:
        check_repeatable(task.loader, task.seed)
    trainer = Trainer(task, _fabric_for(task, fabric), identity)
    if task.config.features > 0 and trainer.taps is None:
        warnings.warn(f"{task.label}: no place is left whose features could be compared", stacklevel=3)
    return trainer.run(stored), trainer.left_out


def _fabric_for(task: Task, fabric: Fabric | None) -> Fabric:
    """The caller's Fabric, if it is one that `heal` can work with, or one of our own. Raises InputError."""
    if fabric is None:
        return make_fabric(task.model, task.config)
    own, wanted = fabric.strategy.precision.precision, task.config.precision
    if wanted not in ("auto", own):
        raise InputError(f"The Fabric works in {own}, the configuration asks for {wanted}", fix='Set precision="auto".')
    if not isinstance(fabric.strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(f"{type(fabric.strategy).__name__} is not supported", fix='Use one device or strategy="ddp".')
    return fabric


@contextmanager
def _left_as_found(model: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """Put both networks back on their devices, the model into eval mode and the teacher into the modes it had."""
    modes = {module: module.training for module in teacher.modules()} if teacher is not None else {}
    homes = [(network, _device(network)) for network in (model, teacher) if network is not None]
    try:
        yield
    finally:
        model.eval()
        for module, training in modes.items():
            module.training = training
        for network, home in homes:
            if _device(network) != home:
                network.to(home)


def _device(network: nn.Module) -> torch.device:
    """Where the first parameter is; the CPU for a network without any."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
