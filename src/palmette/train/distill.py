"""Distillation: the edited network learns from the dense one's outputs.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from palmette.errors import InputError


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL(teacher || student) of the softened class distributions, averaged over samples (and positions).

    `student` and `teacher` are logits [batch, classes, ...]. T^2 keeps the gradient's size when T changes.
    Raises InputError when the shapes differ.
    """
    _check(student, teacher)
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher.to(student.dtype) / temperature, dim=1)
    per_position = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=1)
    return per_position.mean() * temperature**2


def imitation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """||student - teacher||^2 / ||teacher||^2 over the batch, for outputs [batch, ...] that are no class scores.

    Raises InputError when the shapes differ.
    """
    _check(student, teacher)
    s, t = (x if x.dtype == torch.float64 else x.float() for x in (student, teacher))
    return (s - t).square().sum() / t.square().sum().clamp_min(1e-12)


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise InputError(
            f"The teacher's outputs {tuple(teacher.shape)} and the model's {tuple(student.shape)} differ in shape",
            fix="Use a teacher with the same classes.",
        )
