"""What a healing run may be told, with the bounds of each field."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from palmette.errors import InputError

PRECISIONS = ("auto", "32-true", "64-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true")


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """Settings of `heal`. Raises InputError naming the field that is out of bounds."""

    epochs: int = 5
    """Passes over the loader, >= 0; 0 leaves the model as it is."""
    lr: float = 0.01
    """Peak learning rate, > 0; it rises over `warmup`, then falls to zero as half a cosine."""
    optimizer: str = "sgd"
    """"sgd" (Nesterov momentum where momentum > 0) or "adamw"."""
    momentum: float = 0.9
    """Momentum of sgd, in [0, 1)."""
    weight_decay: float = 1e-4
    """>= 0; applied to weights of two or more axes, not to biases and normalisation."""
    warmup: float = 0.0
    """Share of all steps over which the learning rate rises linearly, in [0, 1)."""
    distill: float = 0.0
    """Weight w of the distillation term, in [0, 1]: loss = (1 - w) task + w distillation.

    The term is T^2 KL(teacher || model) over classes; with a loss_fn other than cross entropy the relative squared
    error of the outputs.
    """
    temperature: float = 2.0
    """Softening of both distributions in the distillation term, > 0."""
    features: float = 0.0
    """Weight of the feature term, >= 0: the relative squared error against the teacher inside the network is added."""
    fade: float = 0.0
    """Share of all steps over which an edit is faded in, in [0, 1); 0 makes it at once. Read by `heal_fading`."""
    begin: float = 0.0
    """Where in the schedule to start, a share of its steps in [0, 1): what lies before is left out."""
    end: float = 1.0
    """Where in the schedule to stop, a share of its steps in (begin, 1]."""
    precision: str = "auto"
    """One of Fabric's names; "auto" is the model's own precision on a CPU and mixed precision on a GPU."""
    clip: float | None = 5.0
    """Bound on the norm of the gradient, > 0; None for no bound."""
    checkpoint_seconds: float = 30.0
    """Least time between two checkpoints inside an epoch, >= 0."""
    checkpoint_every_steps: int | None = None
    """A checkpoint after each so many steps of an epoch as well, >= 1."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        self._check("epochs", self.epochs >= 0 and isinstance(self.epochs, int), "a whole number >= 0")
        self._check("lr", math.isfinite(self.lr) and self.lr > 0, "> 0")
        self._check("optimizer", self.optimizer in ("sgd", "adamw"), '"sgd" or "adamw"')
        self._check("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._check("weight_decay", 0 <= self.weight_decay < math.inf, ">= 0")
        self._check("warmup", 0 <= self.warmup < 1, "in [0, 1)")
        self._check("distill", 0 <= self.distill <= 1, "in [0, 1]")
        self._check("temperature", 0 < self.temperature < math.inf, "> 0")
        self._check("features", 0 <= self.features < math.inf, ">= 0")
        self._check("fade", 0 <= self.fade < 1, "in [0, 1)")
        self._check("begin", 0 <= self.begin < 1, "in [0, 1)")
        self._check("end", self.begin < self.end <= 1, "in (begin, 1]")
        self._check("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        self._check("clip", self.clip is None or self.clip > 0, "> 0 or None")
        self._check("checkpoint_seconds", self.checkpoint_seconds >= 0, ">= 0")
        every = self.checkpoint_every_steps
        self._check("checkpoint_every_steps", every is None or every >= 1, ">= 1 or None")

    def _check(self, name: str, holds: bool, bounds: str) -> None:
        if not holds:
            raise InputError(
                f"{name} = {getattr(self, name)!r} is out of bounds", where="HealConfig", fix=f"It must be {bounds}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Every field, JSON-able."""
        return dataclasses.asdict(self)

    def recipe(self) -> dict[str, Any]:
        """The fields that decide the weights: all but how often checkpoints are written.

        Fields added since the first version count where they differ from their default, so that older runs go on.
        """
        later = {name: getattr(HealConfig, name) for name in ("features", "fade", "begin", "end")}
        return {
            name: value
            for name, value in self.to_dict().items()
            if not name.startswith("checkpoint_") and not (name in later and value == later[name])
        }

    def rate(self, done: float) -> float:
        """Learning rate when the share `done` of all steps, in [0, 1], lies behind."""
        if done < self.warmup:
            return self.lr * done / self.warmup
        rest = (min(done, 1.0) - self.warmup) / (1 - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * rest))
