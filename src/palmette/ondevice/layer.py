"""Convolutions and linear layers as arithmetic: the output, and each gradient by itself.

Shapes: x [batch, channels, *space] or [..., features]; weight [out, in / groups, *kernel] or [out, in].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """One call of a convolution or linear layer; the four tuples are empty for a linear layer."""

    kind: Literal["conv", "linear"]
    x_shape: torch.Size
    weight_shape: torch.Size
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def channel_axis(self) -> int:
        """The axis of x along which the layer's inputs lie."""
        return 1 if self.kind == "conv" else len(self.x_shape) - 1

    @property
    def geometry(self) -> dict[str, Any]:
        """Stride, padding, dilation and groups, as keywords."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def out_channels(self) -> int:
        """Output channels or features."""
        return self.weight_shape[0]

    @cached_property
    def is_depthwise(self) -> bool:
        """Whether each input channel has one output channel of its own, in two dimensions."""
        return self.groups == self.out_channels == self.x_shape[1] > 1 and len(self.stride) == 2

    @cached_property
    def out_shape(self) -> torch.Size:
        """Shape of the output."""
        if self.kind == "linear":
            return torch.Size((*self.x_shape[:-1], self.out_channels))
        space = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                self.x_shape[2:], self.weight_shape[2:], self.stride, self.padding, self.dilation, strict=True
            )
        )
        return torch.Size((self.x_shape[0], self.out_channels, *space))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output, by the same kernels as `torch.nn.functional`."""
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        none = [0] * len(self.stride)
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, False, none, self.groups
        )  # as conv1d, conv2d and conv3d call it

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """dL/dx from dL/dy; exact, it needs no input (spec adapt 1.1)."""
        if self.kind == "linear":
            return grad.matmul(weight)
        extra = self._output_padding
        if extra is not None:
            return torch.convolution(
                grad, weight, None, self.stride, self.padding, self.dilation, True, extra, self.groups
            )
        shape_only = grad.new_empty(1).expand(self.x_shape)
        return self._backward(grad, shape_only, weight, (True, False, False))[0]

    def weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """dL/dw from the input and dL/dy."""
        if self.kind == "linear":
            return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        if self.is_depthwise and x.device.type == "cpu":
            return self._depthwise_gradient(x, grad)
        return self._backward(grad, x, grad.new_empty(1).expand(self.weight_shape), (False, True, False))[1]

    def bias_gradient(self, grad: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """dL/db: the sum over all but the output channels."""
        if self.kind == "linear":
            return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=dtype)
        return grad.sum([0, *range(2, grad.dim())], dtype=dtype)

    def per_channel(self, values: Tensor) -> Tensor:
        """Values of the output channels, shaped to multiply the output."""
        return values if self.kind == "linear" else values.view(-1, *[1] * len(self.stride))

    def per_row(self, values: Tensor) -> Tensor:
        """Values of the output channels, shaped to multiply the weight."""
        return values.view(-1, *[1] * (len(self.weight_shape) - 1))

    def macs(self) -> int:
        """Multiply-adds of the forward pass; the input and the weight gradient cost as many each."""
        return math.prod(self.out_shape) * math.prod(self.weight_shape[1:])

    def _depthwise_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Each plane of x correlated with its plane of the gradient: one depthwise convolution of all planes.

        torch's own depthwise weight gradient is several times slower on a CPU.
        """
        planes = x.shape[0] * x.shape[1]
        found = torch.conv2d(
            x.reshape(1, planes, *x.shape[2:]),
            grad.reshape(planes, 1, *grad.shape[2:]),
            None,
            self.dilation,
            self.padding,
            self.stride,
            planes,
        )
        rows, columns = self.weight_shape[2:]
        return found[..., :rows, :columns].view(x.shape[0], -1, 1, rows, columns).sum(0)

    @cached_property
    def _output_padding(self) -> list[int] | None:
        """Rows of the input that the last window does not reach, per axis; None where torch takes no such number."""
        sizes = zip(
            self.x_shape[2:],
            self.out_shape[2:],
            self.weight_shape[2:],
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        extra = [x - ((y - 1) * s - 2 * p + d * (k - 1) + 1) for x, y, k, s, p, d in sizes]
        allowed = all(e < max(s, d) for e, s, d in zip(extra, self.stride, self.dilation, strict=True))
        return extra if allowed else None

    def _backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        none = [0] * len(self.stride)
        found: tuple[Tensor, Tensor, Tensor] = _ATEN.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, none, self.groups, wanted
        )
        return found


@lru_cache(maxsize=4096)  # a model calls the same layers again at every step
def conv_layer(
    x_shape: torch.Size,
    weight_shape: torch.Size,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Layer:
    """A convolution; a number stands for all axes."""
    axes = len(weight_shape) - 2
    return Layer(
        "conv",
        torch.Size(x_shape),
        torch.Size(weight_shape),
        _per_axis(stride, axes),
        _per_axis(padding, axes),
        _per_axis(dilation, axes),
        groups,
    )


@lru_cache(maxsize=4096)
def linear_layer(x_shape: torch.Size, weight_shape: torch.Size) -> Layer:
    """A linear layer on the last axis."""
    return Layer("linear", torch.Size(x_shape), torch.Size(weight_shape))


def _per_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * (axes if len(value) == 1 else 1)
