"""Weights in 8 bits: integers from -127 to 127 with one float32 scale for each output channel, a row of the weight.

The weights of such a layer lie on a grid of 255 values a row, in floating point; what they are stored as is read back
from there, so that a network computes the same before and after it was stored. Biases and all else stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.graph.capture import is_captured

LARGEST = 127
"""Symmetric: -128 is left out, so that zero is zero and a sign can be turned."""
SCALE_BYTES = 4
SHORTEST = 4
"""Elements of a row below which a scale costs what its integers save, in float16 already."""

Stored = tuple[Tensor, Tensor]
"""Integers of a weight's shape, int8, and scales [rows], float32."""


def row_scales(weight: Tensor) -> Tensor:
    """What one step of each row is, [rows] in float32: the largest absolute value by 127; 1 for a row of zeros."""
    steps = (weight.detach().abs().flatten(1).amax(1) / LARGEST).float()
    return torch.where(steps > 0, steps, torch.ones_like(steps))


def to_integers(weight: Tensor, scales: Tensor) -> Tensor:
    """The nearest integers of a weight [rows, ...] under scales [rows], int8."""
    steps = _along(scales, weight).to(torch.promote_types(weight.dtype, torch.float32))
    return (weight.detach() / steps).round().clamp(-LARGEST, LARGEST).to(torch.int8)


def from_integers(integers: Tensor, scales: Tensor) -> Tensor:
    """The weight that integers [rows, ...] under scales [rows] stand for, float32."""
    return integers.float() * _along(scales, integers)


def rounded(weight: Tensor) -> Tensor:
    """The weight [rows, ...] on its grid, in its own dtype; the gradient passes as if it were the weight itself.

    Source: the straight-through estimator (Bengio et al., 2013).
    """
    return _Rounded.apply(weight)  # type: ignore[no-any-return, no-untyped-call]


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        del ctx
        scales = row_scales(weight)
        return from_integers(to_integers(weight, scales), scales).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0]


@torch.no_grad()
def round_weights(gm: fx.GraphModule, names: Iterable[str]) -> None:
    """Put the weights of these names on their grids, in place, and note them as stored in 8 bits.

    Names that the network has not, such as those of blocks that were left out, are passed over.
    """
    own = dict(gm.named_parameters())
    found = {name: row_scales(own[name]) for name in names if name in own}
    for name, scales in found.items():
        own[name].copy_(from_integers(to_integers(own[name], scales), scales))
    note(gm, found)


def note(gm: fx.GraphModule, scales: Mapping[str, Tensor]) -> None:
    """Remember that the weights of these names are stored in 8 bits, with these scales."""
    if scales:
        info = gm.meta["palmette"]
        info["scales"] = {**info.get("scales", {}), **{name: value.cpu() for name, value in scales.items()}}


def without_integers(model: nn.Module) -> nn.Module:
    """A copy that computes the same and stores every weight in floating point; the network itself if it does so."""
    if not stored_weights(model):
        return model
    twin: Any = copy.deepcopy(model)
    del twin.meta["palmette"]["scales"]
    return twin  # type: ignore[no-any-return]


def stored_weights(model: nn.Module) -> dict[str, Stored]:
    """The weights that a network stores in 8 bits, by name, on the CPU.

    Those of `round_weights` that still lie on their grids: what was trained, merged or cut since is stored in floating
    point.
    """
    if not is_captured(model):
        return {}
    meta: Any = model.meta
    own, found = dict(model.named_parameters()), {}
    for name, scales in meta["palmette"].get("scales", {}).items():
        weight = own.get(name)
        if weight is None or len(weight) != len(scales):
            continue
        value = weight.detach().cpu()
        integers = to_integers(value, scales)
        if torch.equal(from_integers(integers, scales).to(value.dtype), value):
            found[name] = integers, scales
    return found


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the parameters as they are stored, scales included; a shared parameter counts once."""
    stored = stored_weights(model)
    return sum(
        stored[name][0].numel() + SCALE_BYTES * len(stored[name][1])
        if name in stored
        else value.numel() * value.element_size()
        for name, value in model.named_parameters()
    )


def _along(scales: Tensor, weight: Tensor) -> Tensor:
    return scales.to(weight.device).reshape(-1, *(1,) * (weight.dim() - 1))
