"""How good a network is on held-out data, with the answer per image, so that two networks can be compared in pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import palmette.ranks as ranks
from palmette.errors import InputError
from palmette.graph.inputs import call, main_output, split_batch, to_device
from palmette.stats import mean_interval, wilson_interval
from palmette.train.batches import check_iterable, drawn, empty
from palmette.train.labels import IGNORED, LossFn, check_labels, is_cross_entropy, task_loss

Metric = Callable[[Tensor, Any], Tensor]
"""`metric(logits, target)` -> one value in [0, 1] per sample, shape [batch]."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found on `n` samples."""

    accuracy: float
    """Mean of `correct`, in [0, 1]."""
    n: int
    """Samples seen."""
    loss: float
    """Mean over samples."""
    correct: np.ndarray[Any, np.dtype[Any]] = field(repr=False)
    """Per sample, in the loader's order: right or wrong (bool), or the metric's value (float64). Shape [n]."""
    interval: tuple[float, float]
    """95 % interval of the accuracy: Wilson for right or wrong, normal approximation for a metric."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the answers per sample."""
        return {"accuracy": self.accuracy, "n": self.n, "loss": self.loss, "interval": list(self.interval)}

    def pack(self) -> dict[str, Any]:
        """JSON-able with the answers per sample: packed bits in hexadecimal, or a list of values."""
        bits = self.correct.dtype == np.bool_
        answers = np.packbits(self.correct).tobytes().hex() if bits else self.correct.tolist()
        return {**self.to_dict(), "correct": answers}

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> Evaluation:
        """The evaluation that `pack` wrote."""
        answers = packed["correct"]
        if isinstance(answers, str):
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(answers), dtype=np.uint8), count=packed["n"])
            correct: np.ndarray[Any, np.dtype[Any]] = bits.astype(np.bool_)
        else:
            correct = np.asarray(answers, dtype=np.float64)
        low, high = packed["interval"]
        return cls(packed["accuracy"], packed["n"], packed["loss"], correct, (low, high))


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    metric: Metric | None = None,
    max_batches: int | None = None,
) -> Evaluation:
    """Run `model` over `loader` in eval mode, without gradients, on the model's device.

    The Evaluation has `accuracy` (0 to 1), `interval` (95 %), `n`, `loss`, and `correct`, one value per sample.
    loader: yields (inputs, target) or dicts with labels; it is seeded alike at each call, so that a shuffling or
    augmenting loader shows every network the same samples in the same order.
    loss_fn: `loss_fn(logits, target)` -> mean over the batch; cross entropy by default.
    metric: one value in [0, 1] per sample; by default whether the largest logit is the label's (per image the share of
    right positions, for dense predictions). Samples whose logits are not finite count as wrong.

    Of several processes that work together each answers its share of the batches; all get the same Evaluation, that of
    one process. Modes and random states are as before at the end. Raises DataError (empty loader, labels out of range)
    and InputError (metric of another shape).
    """
    check_iterable(loader, once=True)
    if max_batches is not None and max_batches < 1:
        raise InputError(f"max_batches = {max_batches} is out of bounds", fix="It must be >= 1 or None.")
    modes = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    losses: list[tuple[int, Tensor]] = []
    answers: list[Tensor] = []
    model.eval()
    try:
        with torch.no_grad(), ranks.joint(), drawn(loader, 0) as epoch:
            while max_batches is None or epoch.drawn < max_batches:
                try:
                    batch = epoch.next()
                except StopIteration:
                    break
                if not ranks.mine(epoch.drawn - 1):
                    continue
                inputs, target = split_batch(batch)
                logits = main_output(call(model, to_device(inputs, device)))
                if is_cross_entropy(loss_fn):
                    target = check_labels(logits, target, f"evaluation, batch {epoch.drawn - 1}")
                target = to_device(target, device)
                losses.append((logits.shape[0], task_loss(logits, target, loss_fn).detach()))
                answers.append(_answers(logits, target, metric))
    finally:
        for module, training in modes:
            module.training = training
    return _summary(*_of_all(losses, answers))


def _of_all(losses: list[tuple[int, Tensor]], answers: list[Tensor]) -> tuple[list[tuple[int, Tensor]], list[Tensor]]:
    """The losses and answers of all batches in the loader's order, from the shares of several processes."""
    if ranks.count() == 1:
        return losses, answers
    own = [[n, float(v.double()), a.tolist(), a.dtype == torch.bool] for (n, v), a in zip(losses, answers, strict=True)]
    shares = ranks.gathered(own)
    rows = [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]
    return (
        [(size, torch.tensor(loss, dtype=torch.float64)) for size, loss, _, _ in rows],
        [torch.tensor(a, dtype=torch.bool if truth else torch.float64) for _, _, a, truth in rows],
    )


def _answers(logits: Tensor, target: Any, metric: Metric | None) -> Tensor:
    """One value per sample [batch]: bool, or float64."""
    if metric is not None:
        values: Any = metric(logits, target)
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
            raise InputError(
                f"The metric returned {_described(values)} for a batch of {logits.shape[0]}",
                why="networks are compared sample by sample",
                fix="Return one value in [0, 1] per sample.",
            )
        return values if values.dtype == torch.bool else values.double()
    if not isinstance(target, Tensor) or logits.dim() < 2:
        raise InputError("Accuracy needs logits [batch, classes] and label tensors", fix="Pass metric.")
    labels = target.argmax(dim=1) if target.is_floating_point() and target.shape == logits.shape else target
    if labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise InputError(
            f"Targets {tuple(labels.shape)} are no labels for logits {tuple(logits.shape)}", fix="Pass metric."
        )
    right = (logits.argmax(dim=1) == labels) & torch.isfinite(logits).all(dim=1)
    if right.dim() == 1:
        return right
    counted = (labels != IGNORED).flatten(1)
    return (right.flatten(1) & counted).sum(dim=1).double() / counted.sum(dim=1).clamp(min=1)


def _described(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _summary(losses: list[tuple[int, Tensor]], answers: list[Tensor]) -> Evaluation:
    """Means and interval. Raises DataError when there was nothing."""
    if not answers:
        raise empty()
    correct = torch.cat(answers).cpu().numpy()
    n = int(correct.size)
    if n == 0:
        raise empty()
    values = torch.stack([loss.double() for _, loss in losses]).tolist()
    loss = sum(size * value for (size, _), value in zip(losses, values, strict=True)) / n
    interval = wilson_interval(int(correct.sum()), n) if correct.dtype == np.bool_ else mean_interval(correct)
    return Evaluation(float(correct.mean()), n, loss, correct, interval)
