"""Training a part of a weight for real: frozen channels are not stored, and their gradients are never formed.

The trained part is a compact Parameter of its own, which the optimizer sees in place of the weight; after each step it
is written back into the weight (spec adapt 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from palmette.ondevice.codec import Codec, Payload, State, compact
from palmette.ondevice.layer import Layer
from palmette.ondevice.plan import Slice


@dataclass(frozen=True, kw_only=True)
class Channels(Codec):
    """Some input channels, copied: all that the weight gradient of these channels needs. axis: where they lie in x."""

    name: ClassVar[str] = "channels"
    lossless: ClassVar[bool] = True
    axis: int = 1
    index: tuple[int, ...] = ()

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """The chosen channels."""
        return math.prod(shape) // shape[self.axis] * len(self.index) * itemsize

    def encode(self, x: Tensor, state: State) -> Payload:  # noqa: ARG002
        """A copy of the chosen channels."""
        return (compact(x.index_select(self.axis, _indices(self.index, x.device)).contiguous()),)

    def weight_gradient(self, payload: Payload, layer: Layer, grad: Tensor) -> Tensor:
        """The gradient of the weight's slice that reads these channels."""
        (x,) = payload
        inner = layer.weight_shape[1]
        if layer.groups == 1:
            shape = torch.Size((layer.out_channels, len(self.index), *layer.weight_shape[2:]))
            return replace(layer, x_shape=x.shape, weight_shape=shape).weight_gradient(x, grad)
        index = _indices(self.index, x.device)
        if inner == 1:  # depthwise: each input channel feeds `multiplier` outputs of its own
            multiplier = layer.out_channels // layer.groups
            outputs = (index[:, None] * multiplier + torch.arange(multiplier, device=x.device)).flatten()
            shape = torch.Size((len(outputs), 1, *layer.weight_shape[2:]))
            part = replace(layer, x_shape=x.shape, weight_shape=shape, groups=len(self.index))
            return part.weight_gradient(x, grad.index_select(1, outputs))
        whole = x.new_zeros(layer.x_shape).index_copy_(1, index, x)
        full = layer.weight_gradient(whole, grad)
        return full.index_select(1, torch.unique(index % inner))


@dataclass(frozen=True, kw_only=True)
class Rows(Codec):
    """The whole input, for the gradients of some output channels: one of them needs all of it."""

    name: ClassVar[str] = "rows"
    lossless: ClassVar[bool] = True
    fresh: ClassVar[bool] = False
    keeps_input: ClassVar[bool] = True
    index: tuple[int, ...] = ()

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """All of the input, if nobody else keeps it."""
        return math.prod(shape) * itemsize

    def encode(self, x: Tensor, state: State) -> Payload:  # noqa: ARG002
        """The input itself."""
        return (x,)

    def weight_gradient(self, payload: Payload, layer: Layer, grad: Tensor) -> Tensor:
        """The gradient of the chosen rows of the weight."""
        (x,) = payload
        index = _indices(self.index, x.device)
        if layer.kind == "linear" or layer.groups == 1:
            axis = -1 if layer.kind == "linear" else 1
            shape = torch.Size((len(self.index), *layer.weight_shape[1:]))
            return replace(layer, weight_shape=shape).weight_gradient(x, grad.index_select(axis, index))
        if layer.weight_shape[1] == 1 and layer.out_channels == layer.groups:
            part = replace(
                layer,
                x_shape=torch.Size((x.shape[0], len(self.index), *x.shape[2:])),
                weight_shape=torch.Size((len(self.index), *layer.weight_shape[1:])),
                groups=len(self.index),
            )
            return part.weight_gradient(x.index_select(1, index), grad.index_select(1, index))
        return layer.weight_gradient(x, grad).index_select(0, index)


def _indices(index: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(index, dtype=torch.int64, device=device)


def slice_of(codec: Codec, layer: Layer) -> Slice:
    """The part of the weight that a codec's gradient is of."""
    if isinstance(codec, Rows):
        return Slice(0, codec.index)
    if not isinstance(codec, Channels):
        raise TypeError(codec.name)
    if layer.groups == 1:
        return Slice(1, codec.index)
    if layer.weight_shape[1] == 1:
        multiplier = layer.out_channels // layer.groups
        return Slice(0, tuple(i * multiplier + k for i in codec.index for k in range(multiplier)))
    return Slice(1, tuple(sorted({i % layer.weight_shape[1] for i in codec.index})))


def slice_bytes(codec: Codec, layer: Layer, itemsize: int) -> int:
    """Bytes of the trained part: its gradient's, and once more for each thing that the optimizer keeps."""
    part = slice_of(codec, layer)
    return math.prod(layer.weight_shape) // layer.weight_shape[part.axis] * len(part.index) * itemsize


def taken(weight: Tensor, part: Slice) -> nn.Parameter:
    """The trained part as a Parameter of its own."""
    return nn.Parameter(weight.detach().index_select(part.axis, _indices(part.index, weight.device)).clone())


def put_back(weight: Tensor, part: Slice, tuned: Tensor) -> None:
    """Write the trained part into the weight."""
    with torch.no_grad():
        weight.index_copy_(part.axis, _indices(part.index, weight.device), tuned.detach().to(weight.dtype))


def moved_state(value: Tensor, before: Slice, after: Slice, shape: torch.Size) -> Tensor:
    """What the optimizer keeps for a slice, carried over to another: zero for what was not trained before."""
    if before.axis != after.axis or value.dim() <= before.axis or value.shape[before.axis] != len(before.index):
        return value  # a step count, or nothing per number
    places = {channel: place for place, channel in enumerate(before.index)}
    pairs = [(places[channel], place) for place, channel in enumerate(after.index) if channel in places]
    moved = value.new_zeros(shape)
    if pairs:
        old, new = (torch.tensor(side, device=value.device) for side in zip(*pairs, strict=True))
        moved.index_copy_(after.axis, new, value.index_select(before.axis, old))
    return moved
