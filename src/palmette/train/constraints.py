"""What has to hold after every step of a training, such as pruned weights that stay zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Constraint = Callable[[], None]
"""Called without gradients after each step of the optimizer; restores what must hold, in place."""


def zeros_kept(model: nn.Module) -> Constraint:
    """A constraint by which the weights of two or more axes that are exactly 0 now stay 0.

    Unlike a mask in the optimizer or a parametrisation it leaves the names and shapes of the state as they are. It
    must be made before the training that it belongs to, of the weights that this training starts from.
    """
    held: list[tuple[Tensor, Tensor]] = []
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            zero = parameter.detach() == 0
            if bool(zero.any()):
                held.append((parameter, zero))

    def restore() -> None:
        with torch.no_grad():
            for parameter, zero in held:
                parameter.masked_fill_(zero.to(parameter.device), 0.0)

    return restore
