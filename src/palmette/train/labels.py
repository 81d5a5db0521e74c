"""Labels against logits: faults are told before a kernel crashes on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palmette.errors import DataError

LossFn = Callable[[Tensor, Any], Tensor]
"""`loss_fn(logits, target)` -> scalar, the mean over the batch."""

IGNORED = -100
"""The label that torch's cross entropy leaves out."""


def is_cross_entropy(loss_fn: LossFn | None) -> bool:
    """Whether targets must be class indices below the logits' width (or class probabilities)."""
    return loss_fn is None or loss_fn is F.cross_entropy or isinstance(loss_fn, nn.CrossEntropyLoss)


def check_labels(logits: Tensor, target: Any, where: str) -> Tensor:
    """`target` as cross entropy wants it: int64 class indices [batch, ...], or probabilities of the logits' shape.

    Reading the values makes a GPU wait: give labels as the loader yields them, on the CPU. Raises DataError at `where`.
    """
    if not isinstance(target, Tensor) or logits.dim() < 2:
        what = type(target).__name__ if not isinstance(target, Tensor) else f"logits of shape {tuple(logits.shape)}"
        raise DataError(
            f"Labels cannot be used: {what}", where=where, fix="Yield label tensors for logits [batch, classes]."
        )
    if target.is_floating_point() and target.shape == logits.shape:
        return target
    expected = (logits.shape[0], *logits.shape[2:])
    if target.is_floating_point() or target.is_complex() or tuple(target.shape) != expected:
        raise DataError(
            f"Labels of shape {tuple(target.shape)} and type {target.dtype} do not fit logits {tuple(logits.shape)}",
            where=where,
            fix=f"Yield whole numbers of shape {expected}, or pass loss_fn.",
        )
    labels = target.long()
    if labels.numel():
        low, high = (int(value) for value in torch.aminmax(labels))
        if high >= logits.shape[1] or low < 0:
            _check_range(labels, logits.shape[1], where)
    return labels


def _check_range(labels: Tensor, classes: int, where: str) -> None:
    """Raise DataError naming the first label outside [0, classes) that is not the ignored one."""
    wrong = ((labels < 0) | (labels >= classes)) & (labels != IGNORED)
    if bool(wrong.any()):
        raise DataError(
            f"Label {int(labels[wrong][0])} is out of range",
            where=where,
            why=f"the model's output has {classes} classes, 0 to {classes - 1}",
            fix="Check the number of classes of the model and of the data.",
        )


def task_loss(logits: Tensor, target: Any, loss_fn: LossFn | None) -> Tensor:
    """Mean cross entropy over the batch, or what `loss_fn` says."""
    if loss_fn is not None:
        return loss_fn(logits, target)
    return F.cross_entropy(logits, target)
