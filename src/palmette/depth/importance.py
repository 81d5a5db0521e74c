"""What a removal costs in quality: how far the network's answers move when it alone is done.

Kim et al. 2023 and LayerMerge measure the accuracy after a short fine-tune of each possible removal. Here the answers
of the edited network are compared with the dense one's on the same samples, which needs no labels and has far less
noise than accuracy: KL(dense || edited) in nats per sample for class scores, relative squared error for other outputs.
Optionally after a short local healing. Cost: one pass over a few batches per removal; the fits of all removals share
one pass.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from palmette.depth.session import Calibration, Session
from palmette.errors import DataError, PalmetteError, TrainingError
from palmette.graph import Plan
from palmette.graph.inputs import Example, call, main_output, split_batch, to_device
from palmette.train.labels import LossFn, is_cross_entropy
from palmette.train.loop import HealConfig, heal
from palmette.trials import run_trials

UNDONE = "refused"
"""What a trial gives instead of a number when the removal cannot be done."""
DIVERGED = f"{UNDONE}: its local healing diverges"


@dataclass(frozen=True)
class Reference:
    """The dense network's answers on a few batches; `classes`: whether they are class scores."""

    inputs: tuple[Any, ...]
    outputs: tuple[Tensor, ...]
    classes: bool

    @classmethod
    def of(cls, dense: nn.Module, loader: Iterable[Any], batches: int | None, *, classes: bool) -> Reference:
        """Run the dense network once over the first batches. Raises DataError for an empty loader."""
        inputs = tuple(split_batch(batch)[0] for batch in itertools.islice(iter(loader), batches))
        if not inputs:
            raise DataError("no batch is left to compare networks on", fix="Give a validation loader that is not empty")
        return cls(inputs, tuple(_answers(dense, inputs)), classes)

    @property
    def ignorance(self) -> float:
        """The divergence of a network that knows nothing: equal scores for all classes, or zeros."""
        if not self.classes:
            return 1.0
        entropies = [-(p.exp() * p).sum(1) for p in (F.log_softmax(y.double(), dim=1) for y in self.outputs)]
        classes = self.outputs[0].shape[1]
        return math.log(classes) - float(torch.cat([e.flatten() for e in entropies]).mean())

    def divergence(self, network: nn.Module) -> float:
        """Mean over samples of KL(dense || network), or the relative squared error. Infinite where it is not finite."""
        total, weight = 0.0, 0.0
        for expected, found in zip(self.outputs, _answers(network, self.inputs), strict=True):
            if self.classes:
                p, q = F.log_softmax(expected.double(), dim=1), F.log_softmax(found.double(), dim=1)
                total += float((p.exp() * (p - q)).sum())
                weight += p.numel() / p.shape[1]
            else:
                total += float((expected.double() - found.double()).square().sum())
                weight += float(expected.double().square().sum())
        value = total / weight if weight else 0.0
        return value if value == value else float("inf")


def _answers(network: nn.Module, inputs: Sequence[Any]) -> Iterator[Tensor]:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    with torch.no_grad():
        for batch in inputs:
            yield main_output(call(network, to_device(batch, device))).detach().cpu()


@dataclass(frozen=True, kw_only=True)
class LocalHealing:
    """A short training of each edited network before it is compared: `steps` batches of distillation from the dense."""

    batches: tuple[Any, ...]
    config: HealConfig
    loss_fn: LossFn | None = None
    seed: int = 0

    @classmethod
    def of(cls, loader: Iterable[Any], steps: int, config: HealConfig, seed: int, loss_fn: LossFn | None) -> Any:
        """The healing of `steps` batches with the recipe of `config`, for one epoch."""
        short = HealConfig(**{**config.to_dict(), "epochs": 1, "fade": 0.0, "distill": max(config.distill, 0.9)})
        return cls(batches=tuple(itertools.islice(iter(loader), steps)), config=short, loss_fn=loss_fn, seed=seed)

    def __call__(self, network: fx.GraphModule, dense: fx.GraphModule) -> None:
        """Train `network` in place."""
        heal(network, self.batches, self.config, teacher=dense, loss_fn=self.loss_fn, seed=self.seed, label="local")
        network.eval()


def trial(
    plan: str, *, dense: fx.GraphModule, example: Example, pad: str, reference: Reference, local: LocalHealing | None
) -> float | str:
    """The divergence of the dense network with one fitted plan (JSON) applied; UNDONE and why when it cannot be."""
    try:
        network = Plan.from_json(plan).apply(dense, example, pad=pad).eval()
        if local is not None:
            local(network, copy.deepcopy(dense))
        return reference.divergence(network)
    except TrainingError:
        return DIVERGED
    except PalmetteError as error:
        return f"{UNDONE}: {error}"


def reference_of(session: Session, batches: int | None) -> Reference:
    """The dense network's answers on that many batches of validation data, the same ones when a run is resumed."""
    compared = Calibration(session.val, batches, session.settings.seed)
    return Reference.of(session.dense, compared, batches, classes=is_cross_entropy(session.loss_fn))


def divergences(
    session: Session, plans: Mapping[str, Plan], reference: Reference, *, steps: int, journal: str
) -> dict[str, float | str]:
    """What `trial` gives for each fitted plan, by name, after `steps` steps of local healing; journaled one by one.

    journal: the folder of the run that holds them. Raises TrainingError when the healing of every one diverges.
    """
    seed, local = session.settings.seed, None
    if steps:
        lessons = Calibration(session.train, steps, seed)
        local = LocalHealing.of(lessons, steps, session.heal, seed, session.loss_fn)
    measure = partial(
        trial,
        dense=session.dense,
        example=session.example,
        pad=session.settings.pad,
        reference=reference,
        local=local,
    )
    found: dict[str, float | str] = run_trials(
        measure,
        {name: plan.to_json() for name, plan in plans.items()},
        journal=session.run.path(journal),
        ray=session.ray,
        seed=seed,
        label=journal,
    )
    if found and all(value == DIVERGED for value in found.values()):
        raise TrainingError("No option can be healed", where="local healing, epoch 0", fix="Use a lower learning rate.")
    return found
