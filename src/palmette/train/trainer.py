"""One training run: its optimizer, its steps, and its place in the epoch, which can be stored and taken up again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from palmette.errors import DataError, InputError, RunError, TrainingError
from palmette.graph.inputs import batch_size, call, main_output, split_batch, to_device
from palmette.run import first_difference
from palmette.seeding import derive_seed, global_state, restore_globals
from palmette.train.batches import Epoch, batch_fingerprint, dealt, empty, length
from palmette.train.checkpoint import (
    digest,
    load_checkpoint,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from palmette.train.config import HealConfig
from palmette.train.constraints import Constraint
from palmette.train.distill import distillation_loss, imitation_loss
from palmette.train.features import FeatureTaps, NoCommonPlace
from palmette.train.labels import LossFn, check_labels, is_cross_entropy, task_loss
from palmette.train.progress import Report, progress

LossTerm = Callable[[nn.Module, Any, Any], Tensor]
"""`term(model, inputs, output)` -> scalar added to the loss."""

_FORMAT = 1
_SAVE_SHARE = 20  # a checkpoint inside an epoch waits for 20 times what the last one took: at most 5 % of the time
_LOSSES_IN_FLIGHT = 32  # reading a loss makes a GPU wait, so it is looked at once in so many steps; on a CPU at each
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be trained, on what, how; see `heal` for the fields."""

    model: nn.Module
    loader: Any
    config: HealConfig
    teacher: nn.Module | None
    loss_fn: LossFn | None
    loss_terms: Sequence[LossTerm]
    constraints: Sequence[Constraint]
    seed: int
    label: str
    checkpoint: Path | None

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: recipe, seed, label, and digests of the weights at the start."""
        return {
            "label": self.label,
            "seed": self.seed,
            "recipe": self.config.recipe(),
            "start": digest(model_tensors(self.model)),
            "teacher": None if self.teacher is None else digest(model_tensors(self.teacher)),
        }


@dataclass(frozen=True)
class Stored:
    """A checkpoint that belongs to the task."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @classmethod
    def read(cls, path: Path, identity: dict[str, Any]) -> Stored:
        """Load and check. Raises RunError when the file is damaged or belongs to another training."""
        tensors, meta = load_checkpoint(path)
        if meta.get("heal") != _FORMAT:
            raise RunError("The file holds no healing run of this version", where=str(path), fix="Choose another file.")
        difference = first_difference(meta["identity"], identity)
        if difference is not None:
            name, before, now = difference
            raise RunError(
                f"The checkpoint belongs to a training with another {name}",
                where=str(path),
                why=f"{before!r} then, {now!r} now",
                fix="Use the same model, data and options, or another file.",
            )
        return cls(tensors, meta)


class Trainer:
    """Runs a task on a Fabric; `left_out` counts the batches of one sample that batch normalisation cannot use."""

    def __init__(self, task: Task, fabric: Fabric, identity: dict[str, Any]) -> None:
        """Set up model, optimizer and teacher on the Fabric's device."""
        self.task, self.config, self.fabric, self.identity = task, task.config, fabric, identity
        self.optimizer = make_optimizer(task.model, task.config)
        self.wrapped, self.stepper = fabric.setup(task.model, self.optimizer)
        self.loader = dealt(task.loader, fabric)
        if task.teacher is not None:
            task.teacher.eval().to(fabric.device)
        self.steps = length(self.loader)
        (self.epoch, self.step), self.stop = self._part()
        self.samples = self.left_out = 0
        self.loss_sum = 0.0
        self.history: list[dict[str, Any]] = []
        self.in_flight: list[tuple[int, int, Tensor]] = []  # step, samples, loss
        self.patience = 1 if fabric.device.type == "cpu" else _LOSSES_IN_FLIGHT
        self.saved_at, self.save_cost = time.monotonic(), 0.0
        self.last_batch: Any = None
        self.normalises = any(isinstance(module, _BATCH_NORMS) for module in task.model.modules())
        self.taps: FeatureTaps | None = None
        if self.config.features > 0 and task.teacher is not None:
            with suppress(NoCommonPlace):  # an edit took the last one: the answers are left to learn from
                self.taps = FeatureTaps(task.model, task.teacher)

    def _part(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(epoch, step) where training begins, and where it stops. Raises DataError when the steps cannot be told."""
        config = self.config
        if (config.begin, config.end) == (0.0, 1.0):
            return (0, 0), (config.epochs, 0)
        if self.steps is None:
            raise DataError("The loader does not know its length", fix="Give it __len__, or set begin=fade=0, end=1.")
        total = self.steps * config.epochs
        return divmod(round(config.begin * total), self.steps), divmod(round(config.end * total), self.steps)

    def run(self, stored: Stored | None) -> list[dict[str, Any]]:
        """Train from the start or from `stored` to the end and return the history."""
        with nullcontext() if self.taps is None else self.taps.inserted():
            return self._run(stored)

    def _run(self, stored: Stored | None) -> list[dict[str, Any]]:
        batches = self._begin() if stored is None else self._restore(stored)
        self.wrapped.train()
        total = None if self.steps is None else self.steps * self.config.epochs
        with progress(self.task.label, total) as report:
            while (self.epoch, self.step) < self.stop:
                self._run_epoch(self._start_epoch() if batches is None else batches, report)
                batches = None
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.task.model.parameters()):
            raise TrainingError("Weights are not finite after the last step", where=self.task.label, fix=_DIVERGED)
        self._save(done=True)
        self._agree()
        return self.history

    def _agree(self) -> None:
        """Give every process the first one's weights: running statistics of batch normalisation are gathered apart."""
        if self.fabric.world_size > 1:
            for tensor in model_tensors(self.task.model).values():
                tensor.copy_(self.fabric.broadcast(tensor))

    def _begin(self) -> Epoch | None:
        """The epoch in which a part of the schedule begins, or None at the start of one."""
        if self.step == 0:
            return None
        batches = self._start_epoch()
        batches.drop(self.step)
        return batches

    def _start_epoch(self) -> Epoch:
        """Seed everything for the epoch; ranks draw the same order of samples and dropout of their own."""
        key = (self.task.seed, self.task.label, self.epoch)
        batches = Epoch(self.loader, derive_seed(*key, "data"), self.epoch)
        torch.manual_seed(derive_seed(*key, "model", self.fabric.global_rank))
        return batches

    def _run_epoch(self, batches: Epoch, report: Report) -> None:
        while (self.epoch, self.step) != self.stop:
            try:
                batch = batches.next()
            except StopIteration:
                break
            self._train_step(batch)
            self.step += 1
            if len(self.in_flight) >= self.patience:
                self._collect_losses()
                report((self.steps or 0) * self.epoch + self.step, f"loss {self.loss_sum / self.samples:.4f}")
            if self.task.checkpoint is not None and self._is_due():
                self.last_batch = batch
                self._save(batches=batches)
        self._end_epoch()

    def _end_epoch(self) -> None:
        self._collect_losses()
        total = torch.tensor([self.loss_sum, float(self.samples)], dtype=torch.float64)
        if self.fabric.world_size > 1:
            total = torch.as_tensor(self.fabric.all_reduce(total.to(self.fabric.device), reduce_op="sum"))
        loss_sum, samples = total.tolist()
        if samples == 0:
            raise empty()
        last = self._rate(max(self.step - 1, 0))
        self.history.append({"epoch": self.epoch, "loss": loss_sum / samples, "lr": last})
        self.epoch, self.step, self.samples, self.loss_sum = self.epoch + 1, 0, 0, 0.0
        due = time.monotonic() - self.saved_at >= min(self.config.checkpoint_seconds, _SAVE_SHARE * self.save_cost)
        if due and self.epoch < self.config.epochs:
            self._save()

    def _train_step(self, batch: Any) -> None:
        raw_inputs, target = split_batch(batch)
        size = batch_size(raw_inputs)
        if size == 1 and self.normalises:
            self.left_out += 1
            return
        rate = self._rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs = to_device(raw_inputs, self.fabric.device)
        loss = self._loss(inputs, target, call(self.wrapped, inputs))
        self.in_flight.append((self.step, size, loss.detach()))
        if self.patience == 1:
            self._collect_losses()
        self.stepper.zero_grad()
        self.fabric.backward(loss)
        if self.config.clip is not None:
            self.fabric.clip_gradients(self.wrapped, self.stepper, max_norm=self.config.clip, error_if_nonfinite=False)
        self.stepper.step()
        for restore in self.task.constraints:
            restore()

    def _loss(self, inputs: Any, target: Any, output: Any) -> Tensor:
        """Task, distillation and extra terms. Labels are checked where they can be read without making a GPU wait."""
        logits = main_output(output)
        weight = self.config.distill
        known = self._known(inputs)
        if weight == 0 or known is None:
            loss = self._task_loss(logits, target)
        else:
            classes = is_cross_entropy(self.task.loss_fn)
            loss = (
                distillation_loss(logits, known, self.config.temperature) if classes else imitation_loss(logits, known)
            )
            if weight < 1:
                loss = (1 - weight) * self._task_loss(logits, target) + weight * loss
        if self.taps is not None:
            loss = loss + self.config.features * self.taps.loss()
        for term in self.task.loss_terms:
            loss = loss + term(self.task.model, inputs, output)
        return loss

    def _task_loss(self, logits: Tensor, target: Any) -> Tensor:
        if is_cross_entropy(self.task.loss_fn) and (self.epoch == 0 or not getattr(target, "is_cuda", False)):
            target = check_labels(logits, target, self._place(self.step))
        return task_loss(logits, to_device(target, logits.device), self.task.loss_fn)

    def _known(self, inputs: Any) -> Tensor | None:
        """The teacher's logits, where they or its features are wanted: one pass serves both."""
        teacher = self.task.teacher
        if teacher is None or (self.config.distill == 0 and self.taps is None):
            return None
        precision = self.fabric.strategy.precision
        with torch.no_grad(), self.fabric.autocast():
            return main_output(precision.convert_output(call(teacher, precision.convert_input(inputs))))

    def _collect_losses(self) -> None:
        """Read the losses in flight. Raises TrainingError naming epoch and step of the first that is not finite."""
        if not self.in_flight:
            return
        if len(self.in_flight) == 1:
            values = [self.in_flight[0][2].item()]
        else:
            values = torch.stack([loss.double() for _, _, loss in self.in_flight]).tolist()
        for (step, size, _), value in zip(self.in_flight, values, strict=True):
            if not math.isfinite(value):
                raise TrainingError(f"The loss is {value}", where=self._place(step), fix=_DIVERGED)
            self.loss_sum += value * size
            self.samples += size
        self.in_flight.clear()

    def _place(self, step: int) -> str:
        return f"{self.task.label}, epoch {self.epoch}, step {step}"

    def _rate(self, step: int) -> float:
        """Learning rate in the middle of the step; per epoch when the loader does not know its length."""
        inside = 0.5 if not self.steps else min(step + 0.5, self.steps) / self.steps
        return self.config.rate((self.epoch + inside) / self.config.epochs)

    def _is_due(self) -> bool:
        """Whether to store the state inside an epoch; several processes store whole epochs only."""
        if self.fabric.world_size > 1:
            return False
        every = self.config.checkpoint_every_steps
        wait = max(self.config.checkpoint_seconds, _SAVE_SHARE * self.save_cost)
        return (every is not None and self.step % every == 0) or time.monotonic() - self.saved_at >= wait

    def _save(self, *, batches: Epoch | None = None, done: bool = False) -> None:
        """Store the state; inside an epoch with the random states and the place, at the end with the weights alone."""
        if self.task.checkpoint is None or self.fabric.global_rank != 0:
            return
        started = time.monotonic()
        self._collect_losses()
        meta: dict[str, Any] = {"heal": _FORMAT, "identity": self.identity, "done": done, "history": self.history}
        stored = model_tensors(self.task.model)
        if not done:
            tensors, rest = optimizer_tensors(self.optimizer)
            stored |= tensors
            place = {"epoch": self.epoch, "step": self.step, "loss_sum": self.loss_sum, "samples": self.samples}
            meta |= {"place": place, "optimizer": rest, "device": self.fabric.device.type}
            meta["scaler"] = self.fabric.strategy.precision.state_dict()
            if batches is not None:
                stored |= global_state() | {"rng.data": batches.state}
                meta["batch"] = batch_fingerprint(self.last_batch)
        save_checkpoint(self.task.checkpoint, stored, meta)
        self.saved_at = time.monotonic()
        self.save_cost = self.saved_at - started

    def _restore(self, stored: Stored) -> Epoch | None:
        """Take up a stored state; the epoch it lies in, or None at the start of one. Raises RunError, DataError."""
        where, meta = str(self.task.checkpoint), stored.meta
        if meta["device"] != self.fabric.device.type:
            raise RunError(
                f"The checkpoint was written on {meta['device']}, this is {self.fabric.device.type}",
                where=where,
                fix="Resume on the same kind of device, or delete the file.",
            )
        load_model_tensors(self.task.model, stored.tensors, where)
        load_optimizer_tensors(self.optimizer, stored.tensors, meta["optimizer"], where)
        self.fabric.strategy.precision.load_state_dict(meta["scaler"])
        self.history = meta["history"]
        place = meta["place"]
        self.epoch, self.step = place["epoch"], place["step"]
        self.loss_sum, self.samples = place["loss_sum"], place["samples"]
        if self.step == 0:
            return None
        batches = self._start_epoch()
        batches.skip(self.step, stored.tensors["rng.data"], meta["batch"], where)
        restore_globals(stored.tensors)
        return batches


_DIVERGED = "Lower the learning rate, add warm-up, or undo the last edit."


def make_optimizer(model: nn.Module, config: HealConfig) -> Optimizer:
    """The optimizer of `config` over the parameters that want gradients; weight decay for two axes or more."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in wanted if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in wanted if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def make_fabric(model: nn.Module, config: HealConfig) -> Fabric:
    """One device (where the model is, a GPU if there is one, else the CPU) in the precision that the config asks for.

    "auto" is the precision of the model's weights on a CPU and for weights that are not float32, mixed on a GPU.
    """
    parameter = next(model.parameters())
    devices: list[int] | int = 1
    if parameter.device.type == "cpu" and torch.cuda.is_available():
        accelerator, devices = "cuda", [torch.cuda.current_device()]
    elif parameter.device.type == "cpu":
        accelerator = "cpu"
    else:
        accelerator, devices = parameter.device.type, [parameter.device.index or 0]
    precision: Any = config.precision  # one of PRECISIONS
    if precision == "auto":
        own = {torch.float64: "64-true", torch.bfloat16: "bf16-true", torch.float16: "16-true"}
        mixed = "bf16-mixed" if accelerator == "cuda" and torch.cuda.is_bf16_supported() else "16-mixed"
        precision = own.get(parameter.dtype, mixed if accelerator == "cuda" else "32-true")
    logger = logging.getLogger("lightning_fabric.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)  # one healing in many is no place to announce the precision
    try:
        return Fabric(accelerator=accelerator, devices=devices, precision=precision)
    finally:
        logger.setLevel(level)


def check_task(task: Task) -> None:
    """Refuse what cannot be trained. Raises InputError."""
    if not any(parameter.requires_grad for parameter in task.model.parameters()):
        raise InputError("The model has no parameter to train", fix="Set requires_grad on some parameters.")
    for field in ("distill", "features"):
        if getattr(task.config, field) > 0 and task.teacher is None:
            raise InputError(
                "Distillation needs a teacher", where=f"HealConfig.{field}", fix=f"Pass teacher=, or {field}=0."
            )
    if task.teacher is task.model:
        raise InputError("The teacher is the model itself", fix="Pass a copy, made before the edit.")
