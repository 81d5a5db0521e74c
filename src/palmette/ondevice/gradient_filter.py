"""Gradient filter: keep a convolution's input averaged over patches.

Idea: gradients of neighbouring positions are alike, so one value per patch of r x r outputs stands for all; the weight
gradient becomes that of a 1x1 convolution on patches, the same for every place in the kernel. Paper: Yang, Li and
Marculescu, "Efficient On-device Training via Gradient Filtering", CVPR 2023. What differs by default: the input
gradient stays exact, so that no error travels to earlier layers; `reproduce=True` averages it too, as published.
Shapes: x [batch, C, H, W] -> [batch, C, H / (r stride), W / (r stride)]. Cost: below that of the plain gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from palmette.ondevice.codec import Codec, Payload, State
from palmette.ondevice.layer import Layer
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class GradientFilter(Codec):
    """Averages over patches of r x r outputs; stride: of the convolution."""

    name: ClassVar[str] = "gradient_filter"
    r: Annotated[int, Bounds(low=2)] = 2
    stride: tuple[int, ...] = (1, 1)
    filter_input: bool = False

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """One number a channel and patch."""
        sides = (-(-side // (self.r * step)) for side, step in zip(shape[2:], self.stride, strict=True))
        return shape[0] * shape[1] * math.prod(sides) * itemsize

    def can_encode(self, shape: Sequence[int]) -> bool:
        """Two-dimensional convolutions with more than one position."""
        return len(shape) == 4 and math.prod(shape[2:]) > 1

    def encode(self, x: Tensor, state: State) -> Payload:  # noqa: ARG002
        """The averages of the patches."""
        window = [self.r * step for step in self.stride]
        return (F.avg_pool2d(x, window, ceil_mode=True, count_include_pad=False).contiguous(),)

    def weight_gradient(self, payload: Payload, layer: Layer, grad: Tensor) -> Tensor:
        """One gradient per pair of channels, the same at each place of the kernel."""
        (x,) = payload
        sums = self._patches(grad, x.shape[2:], divide=False)
        pointwise = Layer(
            "conv", x.shape, torch.Size((*layer.weight_shape[:2], 1, 1)), (1, 1), (0, 0), (1, 1), layer.groups
        )
        return pointwise.weight_gradient(x, sums).expand(layer.weight_shape).contiguous()

    def input_gradient(self, layer: Layer, grad: Tensor, weight: Tensor) -> Tensor:
        """dL/dx: exact, or constant on each patch as published."""
        if not self.filter_input:
            return layer.input_gradient(grad, weight)
        window = [self.r * step for step in layer.stride]
        sides = [-(-side // size) for side, size in zip(layer.x_shape[2:], window, strict=True)]
        means = self._patches(grad, torch.Size(sides), divide=True)
        total = weight.sum((2, 3), keepdim=True) / math.prod(layer.stride)
        per_patch = torch.conv_transpose2d(means, total, groups=layer.groups)
        spread = per_patch.repeat_interleave(window[0], 2).repeat_interleave(window[1], 3)
        return spread[..., : layer.x_shape[2], : layer.x_shape[3]].contiguous()

    def _patches(self, grad: Tensor, sides: torch.Size, *, divide: bool) -> Tensor:
        """Sums, or means, of the output gradient over patches; what a patch lacks counts as zero."""
        missing = [side * self.r - size for side, size in zip(sides, grad.shape[2:], strict=True)]
        padded = F.pad(grad, (0, missing[1], 0, missing[0]))
        return F.avg_pool2d(padded, self.r) * (1 if divide else self.r**2)


@dataclass(frozen=True, kw_only=True)
class GradientFilterConfig(MethodConfig):
    """r: side of a patch of outputs; None: 2, 4 or 7 by the budget. reproduce: filter the input gradient too."""

    r: Annotated[int | None, Bounds(low=2)] = None
    reproduce: bool = False


@method(
    name="gradient_filter",
    title="Gradient filter: one value for a patch of positions",
    paper="Yang, Li and Marculescu, Efficient On-device Training via Gradient Filtering, CVPR 2023",
    unit="squared gradient error",
    sites="input",
    edit="codec",
    config=GradientFilterConfig,
)
def options(x: Tensor, layer: Layer, config: GradientFilterConfig) -> list[GradientFilter]:
    """The patches to choose from for this input, from coarse to fine; none where the layer has no positions."""
    if layer.kind != "conv" or x.dim() != 4 or math.prod(x.shape[2:]) == 1:
        return []
    sides = (7, 4, 2) if config.r is None else (config.r,)
    return [GradientFilter(r=r, stride=layer.stride, filter_input=config.reproduce) for r in sides]
