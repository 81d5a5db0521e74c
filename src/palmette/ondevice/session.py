"""The plain training loop for an adapted model: seeded epochs, a checkpoint after each, the same end after a stop.

Only whole epochs are stored. On a CPU a run that was interrupted and resumed ends in the same weights, bit for bit, as
one that was not, as long as versions and the number of threads stay the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, Optimizer

from palmette.device import format_bytes
from palmette.errors import InputError, RunError, TrainingError
from palmette.graph.inputs import batch_size, call, main_output, split_batch, to_device
from palmette.meter.training import default_loss
from palmette.ondevice.adaptation import Adaptation
from palmette.ondevice.stored import restore, restore_optimizer, state_of
from palmette.ondevice.wasi import FactoredLinear
from palmette.run import first_difference
from palmette.seeding import derive_seed, preserved
from palmette.train.batches import Epoch, check_iterable, check_repeatable, empty, length
from palmette.train.checkpoint import digest, load_checkpoint, model_tensors, save_checkpoint
from palmette.train.config import HealConfig
from palmette.train.evaluate import Evaluation, evaluate
from palmette.train.labels import check_labels
from palmette.train.progress import Report, progress

Kind = Literal["sgd", "momentum", "adam"]
Schedule = Literal["cosine", "constant"]
KINDS: dict[str, tuple[type[Optimizer], dict[str, Any], int, float]] = {
    "sgd": (SGD, {}, 0, 0.05),
    "momentum": (SGD, {"momentum": 0.9}, 1, 0.01),
    "adam": (Adam, {}, 2, 0.001),
}
"""Class, options, numbers kept for each trained one, and the learning rate where none is given."""
CHECKPOINT = "adapt.safetensors"
_FORMAT = 1
_WARMUP = 0.05  # of all steps
_DIVERGED = "Lower the learning rate, or clip at a smaller norm."


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Raises InputError for a value out of bounds."""

    epochs: int
    lr: float
    optimizer: str
    schedule: str
    clip: float | None
    seed: int

    def __post_init__(self) -> None:
        asked = {"optimizer": (self.optimizer, tuple(KINDS)), "schedule": (self.schedule, _SCHEDULES)}
        for name, (value, known) in asked.items():
            if value not in known:
                raise InputError(f"There is no {name} {value!r}", fix=f"Choose one of {', '.join(known)}.")
        self.config()

    def config(self) -> HealConfig:
        """The bounds and the schedule of healing hold here, too."""
        return HealConfig(epochs=self.epochs, lr=self.lr, clip=self.clip, warmup=_WARMUP)

    def rate(self, done: float) -> float:
        """Learning rate when this share of all steps lies behind."""
        return self.config().rate(done) if self.schedule == "cosine" else self.lr


_SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """What `fine_tune` did.

    history: an entry per epoch: epoch (from 0), loss (mean over samples), lr (at its end), kept_bytes (what its plan
    keeps for backward, by formula), and with validation data val_accuracy, val_interval, val_loss, val_n. before,
    after: on test data, where there is any. resumed: epochs that were read from a checkpoint.
    """

    history: list[dict[str, Any]]
    before: Evaluation | None = None
    after: Evaluation | None = None
    resumed: int = 0

    def __str__(self) -> str:
        lines = []
        for entry in self.history:
            judged = f"  validation {100 * entry['val_accuracy']:.2f} %" if "val_accuracy" in entry else ""
            kept = format_bytes(entry["kept_bytes"])
            lines.append(f"epoch {entry['epoch'] + 1}  loss {entry['loss']:.4f}{judged}  keeps {kept}")
        if self.before is not None and self.after is not None:
            lines.append(
                f"test accuracy {100 * self.before.accuracy:.2f} % before, {100 * self.after.accuracy:.2f} % after"
            )
        return "\n".join(lines)


def rate_of(optimizer: str, lr: float | None) -> float:
    """The learning rate, by default that of the optimizer; 0 for an optimizer that `Recipe` will refuse."""
    return KINDS[optimizer][3] if lr is None and optimizer in KINDS else lr or 0.0


def fine_tune(
    adaptation: Adaptation,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None = None,
    test_loader: Iterable[Any] | None = None,
    *,
    epochs: int,
    lr: float | None = None,
    optimizer: Kind = "sgd",
    run_dir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    schedule: Schedule = "cosine",
    clip: float | None = 2.0,
    say: Callable[[str], None] | None = None,
) -> FineTuned:
    """Train an adapted model within its budget; the model is left adapted, in eval mode.

    Loaders yield (inputs, target) or dicts with labels; no batch may be larger than the sample of the adaptation.
    optimizer: "sgd", "momentum" (0.9) or "adam"; lr: its rate, by default 0.05, 0.01 and 0.001. schedule: "cosine"
    rises over the first twentieth of the steps and falls to zero; "constant". clip: bound on the norm of all gradients.
    A selection method chooses anew after every epoch but the last. Validation data is looked at after every epoch, test
    data before the first and after the last; neither chooses anything.
    say: is told each epoch in a line, and where a resumed training goes on.
    run_dir: after each epoch the state goes into adapt.safetensors there. resume: go on from it, where it is; adapt the
    same model by the same call first. The global random states are as before at the end.

    Raises InputError for options out of bounds and an adaptation that is undone, DataError (empty, one-pass or
    unseedable loader, labels out of range), TrainingError (loss not finite), RunError (a checkpoint that is damaged, of
    another training, or there without `resume`).
    """
    if not adaptation.active:
        raise InputError("The adaptation is undone", fix="Call adapt() again.")
    recipe = Recipe(
        epochs=epochs, lr=rate_of(optimizer, lr), optimizer=optimizer, schedule=schedule, clip=clip, seed=seed
    )
    check_iterable(train_loader)
    file = None if run_dir is None else Path(run_dir) / CHECKPOINT
    if file is not None and file.exists() and not resume:
        raise RunError("There is a checkpoint already", where=str(file), fix="Resume, or choose another folder.")
    loop = _Loop(adaptation, train_loader, val_loader, recipe, file, say or _silent)
    with preserved(train_loader):
        try:
            return loop.run(test_loader)
        finally:
            adaptation.model.eval()


def _silent(_line: str) -> None:
    """Say nothing."""


def _told(entry: dict[str, Any], epochs: int) -> str:
    seen = f", validation {100 * entry['val_accuracy']:.2f} %" if "val_accuracy" in entry else ""
    return f"epoch {entry['epoch'] + 1} of {epochs}: loss {entry['loss']:.4f}{seen}"


@dataclass
class _Loop:
    """One training on its way."""

    adaptation: Adaptation
    train: Iterable[Any]
    val: Iterable[Any] | None
    recipe: Recipe
    file: Path | None
    say: Callable[[str], None]
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self.adaptation.model

    def run(self, test: Iterable[Any] | None) -> FineTuned:
        """From the start, or from the checkpoint, to the end."""
        if self.recipe.epochs > 0:
            check_repeatable(self.train, self.recipe.seed)
        identity = {} if self.file is None else self._identity()
        stored = None if self.file is None or not self.file.exists() else self._read(identity)
        if stored is None:
            before = None if test is None else self._evaluated(test)
        else:
            packed = stored[1]["before"]
            before = None if packed is None else Evaluation.unpack(packed)
            restore(self.adaptation, stored[0], stored[1]["state"], str(self.file))
            self.epoch, self.history = stored[1]["epoch"], stored[1]["history"]
            self.say(f"resumed after epoch {self.epoch} of {self.recipe.epochs}")
        resumed = self.epoch
        optimizer = self._optimizer()
        if stored is not None:
            restore_optimizer(self.adaptation, optimizer, stored[1]["state"], stored[0])
        elif self.file is not None:
            state_of(self.adaptation, optimizer)  # what cannot be stored is told before there is anything to lose
        self._train(optimizer, identity, before)
        after = None if test is None else self._evaluated(test)
        return FineTuned(history=self.history, before=before, after=after, resumed=resumed)

    def _train(self, optimizer: Optimizer, identity: dict[str, Any], before: Evaluation | None) -> None:
        steps = length(self.train)
        with progress("adapt", None if steps is None else steps * self.recipe.epochs) as report:
            while self.epoch < self.recipe.epochs:
                entry = self._epoch(optimizer, steps, report)
                self.history.append(entry | self._judged())
                self.epoch += 1
                self.say(_told(self.history[-1], self.recipe.epochs))
                if self.epoch < self.recipe.epochs:
                    self.adaptation.next_epoch()
                self._save(optimizer, identity, before)

    # ---- one epoch ---------------------------------------------------------------------------------------------------

    def _epoch(self, optimizer: Optimizer, steps: int | None, report: Report) -> dict[str, Any]:
        key = (self.recipe.seed, "adapt", self.epoch)
        batches = Epoch(self.train, derive_seed(*key, "data"), self.epoch)
        torch.manual_seed(derive_seed(*key, "model"))
        self.model.train()
        kept = self.adaptation.plan.predicted_bytes
        total, samples, rate = 0.0, 0, 0.0
        while True:
            try:
                batch = batches.next()
            except StopIteration:
                break
            step = batches.drawn - 1
            rate = self._rate(step, steps)
            size, loss = self._step(optimizer, batch, rate, step)
            total, samples = total + size * loss, samples + size
            report((steps or 0) * self.epoch + step + 1, f"loss {total / max(samples, 1):.4f}")
        if samples == 0:
            raise empty()
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise TrainingError("Weights are not finite", where=f"after epoch {self.epoch}", fix=_DIVERGED)
        return {"epoch": self.epoch, "loss": total / samples, "lr": rate, "kept_bytes": kept}

    def _rate(self, step: int, steps: int | None) -> float:
        """Learning rate in the middle of the step; per epoch when the loader does not know its length."""
        inside = 0.5 if not steps else min(step + 0.5, steps) / steps
        return self.recipe.rate((self.epoch + inside) / self.recipe.epochs)

    def _step(self, optimizer: Optimizer, batch: Any, rate: float, step: int) -> tuple[int, float]:
        """One step: number of samples and loss; (0, 0) for a batch of one sample that batch norms cannot use."""
        where = f"epoch {self.epoch}, step {step}"
        inputs, target = split_batch(batch)
        size = batch_size(inputs)
        if size == 1 and any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules()):
            return 0, 0.0
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        device = _device(self.model)
        output = call(self.model, to_device(inputs, device))
        if self._has_labels(target):
            target = check_labels(main_output(output), target, where)
        loss = self.adaptation.request.loss(output, to_device(target, device))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"The loss is {value}", where=where, fix=_DIVERGED)
        loss.backward()
        if self.recipe.clip is not None:
            clip_gradients(self.adaptation, self.recipe.clip)
        optimizer.step()
        return size, value

    def _has_labels(self, target: Any) -> bool:
        """Whether to hold the labels against the output, before a kernel stumbles over them."""
        known = isinstance(target, Tensor) and not target.is_floating_point() and target.device.type == "cpu"
        return known and self.adaptation.request.loss is default_loss

    def _judged(self) -> dict[str, Any]:
        if self.val is None:
            return {}
        found = self._evaluated(self.val)
        return {
            "val_accuracy": found.accuracy,
            "val_interval": list(found.interval),
            "val_loss": found.loss,
            "val_n": found.n,
        }

    def _evaluated(self, loader: Iterable[Any]) -> Evaluation:
        return evaluate(self.model, loader, loss_fn=loss_for(self.adaptation.request.loss))

    def _optimizer(self) -> Optimizer:
        kind, options, _, _ = KINDS[self.recipe.optimizer]
        return self.adaptation.optimizer(kind, lr=self.recipe.lr, **options)

    # ---- the checkpoint ----------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: recipe, plan and weights at the start."""
        plan = hashlib.blake2b(self.adaptation.plan.to_json().encode(), digest_size=16).hexdigest()
        start = digest(model_tensors(self.model))
        parts = {"method": self.adaptation.plan.method, "budget": self.adaptation.plan.budget}
        return {**parts, **asdict(self.recipe), "start": start, "plan": plan, "device": _device(self.model).type}

    def _read(self, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The checkpoint. Raises RunError when it is damaged or belongs to another training."""
        where = str(self.file)
        tensors, meta = load_checkpoint(where)
        if meta.get("adapt") != _FORMAT:
            raise RunError("The file holds no training of this version", where=where, fix="Choose another folder.")
        difference = first_difference(meta["identity"], identity)
        if difference is not None:
            name, before, now = difference
            raise RunError(
                f"The checkpoint belongs to a training with another {name}",
                where=where,
                why=f"{before!r} then, {now!r} now",
                fix="Use the same model, data and options, or another folder.",
            )
        return tensors, meta

    def _save(self, optimizer: Optimizer, identity: dict[str, Any], before: Evaluation | None) -> None:
        if self.file is None:
            return
        tensors, state = state_of(self.adaptation, optimizer)
        meta = {"adapt": _FORMAT, "identity": identity, "epoch": self.epoch, "history": self.history, "state": state}
        save_checkpoint(self.file, tensors, meta | {"before": None if before is None else before.pack()})


def clip_gradients(adaptation: Adaptation, most: float) -> float:
    """Scale all gradients, those in factors too, so that their common norm is at most this; returns what it was."""
    standing_in = set() if adaptation.swaps is None else {id(p) for p in adaptation.swaps.parameters()}
    grads = [p.grad for p in adaptation.parameters() if p.grad is not None and id(p) not in standing_in]
    factored = [] if adaptation.swaps is None else [part for *_, part in adaptation.swaps.modules if part.pending]
    squares = [torch.linalg.vector_norm(grad).square() for grad in grads]
    squares += [_squared_norm(part) for part in factored]
    if not squares:
        return 0.0
    norm = float(torch.stack([square.double().cpu() for square in squares]).sum().clamp_min(0).sqrt())
    if norm > most:
        scale = most / norm
        for grad in grads:
            grad.mul_(scale)
        for part in factored:
            part.pending[:] = [(t * scale, u) for t, u in part.pending]
    return norm


def _squared_norm(part: FactoredLinear) -> Tensor:
    """|sum of T U^T|^2, without a tensor of the weight's shape where there are factors."""
    if any(u is None for _, u in part.pending):
        whole = sum(t if u is None else t @ u.T for t, u in part.pending)
        return torch.as_tensor(whole).square().sum()
    pairs = [(a, b) for a in part.pending for b in part.pending]
    return torch.stack([((a[0].T @ b[0]) * (_of(a).T @ _of(b))).sum() for a, b in pairs]).sum()


def _of(pair: tuple[Tensor, Tensor | None]) -> Tensor:
    t, u = pair
    return t if u is None else u


def loss_for(loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor] | None:
    """The loss as `evaluate` takes it: None for cross entropy."""
    return None if loss is default_loss else loss


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
