"""The autograd functions behind an adapted network; each keeps through `save_for_backward` just what it needs.

Gradients are exact given what is kept: a layer's weight gradient comes from its codec's payload, everything else from
masks and parameters. None can be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from palmette.errors import TrainingError
from palmette.ondevice.bits import pack_between, pack_bits, pack_small, unpack_bits, unpack_small
from palmette.ondevice.codec import Codec, Payload
from palmette.ondevice.layer import Layer

_ATEN = torch.ops.aten
_NO_CONTEXT = nullcontext()


@dataclass(frozen=True)
class Norm:
    """A batch norm in eval mode: y = (x - mean) / sqrt(var + eps) * gamma + beta, per channel."""

    mean: Tensor
    var: Tensor
    eps: float

    def inverse_deviation(self) -> Tensor:
        """1 / sqrt(var + eps)."""
        return (self.var + self.eps).rsqrt()


def refuse_twice() -> None:
    """Raise TrainingError inside a backward pass that is itself recorded."""
    if torch.is_grad_enabled():
        raise TrainingError(
            "An adapted network cannot be differentiated twice",
            why="what would be needed for second derivatives is not kept",
            fix="Leave create_graph out, or call undo() first.",
        )


def no_autocast(device: torch.device) -> Any:
    """A context without autocast on the device; free where there is none anyway."""
    if not torch.is_autocast_enabled(device.type):
        return _NO_CONTEXT
    return torch.autocast(device_type=device.type, enabled=False)


def scale_of(norm: Norm, gamma: Tensor | None) -> Tensor:
    """What the norm multiplies a channel with."""
    inverse = norm.inverse_deviation()
    return inverse if gamma is None else gamma * inverse


class _Masked(Function):
    """An activation whose slope is `inside` between its bends and `outside` elsewhere: one bit per number."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        compute: Callable[[Tensor], Tensor],
        bends: tuple[float, float],
        slopes: tuple[float, float],
    ) -> Tensor:
        y = compute(x)
        if y is x:
            ctx.mark_dirty(x)
        low, high = bends
        ctx.last = _is_channels_last(y)
        ctx.shape, ctx.slopes = y.shape, slopes
        ctx.save_for_backward(pack_between(_in_memory_order(y, ctx.last), low, high))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_twice()
        (bits,) = ctx.saved_tensors
        mask = _unpacked(bits, ctx.shape, ctx.last)
        inside, outside = ctx.slopes
        if outside == 0.0:
            return (grad * mask if inside == 1.0 else grad * mask * inside), None, None, None
        return torch.where(mask.view(torch.bool), grad * inside, grad * outside), None, None, None


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _in_memory_order(x: Tensor, channels_last: bool) -> Tensor:
    return x.permute(0, 2, 3, 1) if channels_last else x


def _unpacked(bits: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    if not channels_last:
        return unpack_bits(bits, shape)
    batch, channels, height, width = shape
    return unpack_bits(bits, torch.Size((batch, height, width, channels))).permute(0, 3, 1, 2)


def masked_activation(
    x: Tensor, compute: Callable[[Tensor], Tensor], bends: tuple[float, float], slopes: tuple[float, float]
) -> Tensor:
    """`compute(x)`, where the gradient is known from whether the output lies strictly between `bends`.

    compute may work in place. slopes: (inside, outside).
    """
    result: Tensor = _Masked.apply(x, compute, bends, slopes)  # type: ignore[no-untyped-call]
    return result


class _EvalNorm(Function):
    """Batch norm in eval mode that keeps its parameters, and the input's payload only for a trainable gamma."""

    @staticmethod
    def forward(
        ctx: Any,
        norm: Norm,
        codec: Codec | None,
        payload: Payload,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
    ) -> Tensor:
        ctx.norm_eps, ctx.codec = norm.eps, codec
        ctx.layer = Layer("linear", x.shape, torch.Size((x.shape[1], x.shape[1])))
        ctx.save_for_backward(norm.mean, norm.var, gamma, *payload)
        with no_autocast(x.device):
            return torch.batch_norm(x, gamma, beta, norm.mean, norm.var, False, 0.0, norm.eps, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_twice()
        mean, var, gamma, *payload = ctx.saved_tensors
        norm = Norm(mean, var, ctx.norm_eps)
        _, _, _, need_x, need_gamma, need_beta = ctx.needs_input_grad
        view, axes = (1, -1, *[1] * (grad.dim() - 2)), [0, *range(2, grad.dim())]
        dx = (grad * scale_of(norm, gamma).view(view)).to(grad.dtype) if need_x else None
        total = grad.sum(axes) if need_gamma or need_beta else None
        dgamma = None
        if need_gamma and total is not None:
            x = ctx.codec.decode(tuple(payload), ctx.layer)
            dgamma = ((grad * x).sum(axes) - mean * total) * norm.inverse_deviation()
        return None, None, None, dx, dgamma, total if need_beta else None


def eval_norm(
    norm: Norm, x: Tensor, gamma: Tensor | None, beta: Tensor | None, codec: Codec | None = None, payload: Payload = ()
) -> Tensor:
    """Batch norm of x [batch, channels, ...] by its running statistics; codec and payload: for a trainable gamma."""
    result: Tensor = _EvalNorm.apply(norm, codec, payload, x, gamma, beta)  # type: ignore[no-untyped-call]
    return result


class _Dropout(Function):
    """Dropout that keeps one bit per number; draws from the generator what torch's own draws."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, inplace: bool) -> Tensor:
        noise = torch.empty_like(x).bernoulli_(1 - p)
        ctx.last, ctx.shape, ctx.scale = _is_channels_last(x), x.shape, 1 / (1 - p) if p < 1 else 0.0
        ctx.save_for_backward(pack_bits(_in_memory_order(noise != 0, ctx.last)))
        if p < 1:
            noise.div_(1 - p)
        if inplace:
            ctx.mark_dirty(x)
            return x.mul_(noise)
        return x * noise

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_twice()
        (bits,) = ctx.saved_tensors
        dx: Tensor = (grad * _unpacked(bits, ctx.shape, ctx.last)).mul_(ctx.scale)
        return dx, None, None


def dropout(x: Tensor, p: float, inplace: bool) -> Tensor:
    """Training-mode dropout with probability p."""
    result: Tensor = _Dropout.apply(x, p, inplace)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class Window:
    """A two-dimensional pooling window: sizes as (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil: bool

    @property
    def bits(self) -> int | None:
        """Bits that tell a place in the window: 2, 4 or 8; None for a window too large."""
        places = self.kernel[0] * self.kernel[1]
        return next((bits for bits in (2, 4, 8) if places <= 2**bits), None)


class _MaxPool(Function):
    """Max pooling that keeps, per output, the place within its window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        y: Tensor
        y, index = _ATEN.max_pool2d_with_indices(
            x, window.kernel, window.stride, window.padding, window.dilation, window.ceil
        )
        ctx.window, ctx.x_shape, ctx.y_shape = window, x.shape, y.shape
        index -= _corners(window, x.shape, y.shape, index.device)  # to the offset within the window
        place = torch.take(_places(window, x.shape[-1], index.device), index)
        ctx.save_for_backward(pack_small(place, window.bits or 8))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_twice()
        window: Window = ctx.window
        (packed,) = ctx.saved_tensors
        place = unpack_small(packed, ctx.y_shape, window.bits or 8)
        index = torch.take(_offsets(window, ctx.x_shape[-1], grad.device), place.long())
        index += _corners(window, ctx.x_shape, ctx.y_shape, grad.device)
        dx = grad.new_zeros((*ctx.x_shape[:-2], ctx.x_shape[-2] * ctx.x_shape[-1]))
        dx.scatter_add_(-1, index.flatten(-2), grad.flatten(-2))
        return dx.view(ctx.x_shape), None


def _offsets(window: Window, width: int, device: torch.device) -> Tensor:
    """Distance in memory from a window's corner to each of its places."""
    rows = torch.arange(window.kernel[0], device=device) * (window.dilation[0] * width)
    return (rows[:, None] + torch.arange(window.kernel[1], device=device) * window.dilation[1]).flatten()


def _places(window: Window, width: int, device: torch.device) -> Tensor:
    """The place at each distance; zeros where there is none. In a narrow image a later place may share a distance."""
    offsets = _offsets(window, width, device)
    table = torch.zeros(int(offsets[-1]) + 1, dtype=torch.uint8, device=device)
    return table.index_copy_(0, offsets, torch.arange(len(offsets), dtype=torch.uint8, device=device))


def _corners(window: Window, x_shape: torch.Size, y_shape: torch.Size, device: torch.device) -> Tensor:
    """Index in the input's plane where each window begins [h, w]; below zero in the padding."""
    rows = torch.arange(y_shape[-2], device=device) * window.stride[0] - window.padding[0]
    columns = torch.arange(y_shape[-1], device=device) * window.stride[1] - window.padding[1]
    return rows[:, None] * x_shape[-1] + columns


def max_pool2d(x: Tensor, window: Window) -> Tensor:
    """Max pooling of x [batch, channels, height, width]."""
    result: Tensor = _MaxPool.apply(x, window)  # type: ignore[no-untyped-call]
    return result


class _ShapeOnly(Function):
    """An operation whose gradient needs no more of the input than its shape."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compute: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.backward_of, ctx.shape = backward, x.shape
        return compute(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_twice()
        dx: Tensor = ctx.backward_of(grad, grad.new_empty(1).expand(ctx.shape))
        return dx, None, None


def shape_only(x: Tensor, compute: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`compute(x)`; its gradient is `backward(grad, something of x's shape)`."""
    result: Tensor = _ShapeOnly.apply(x, compute, backward)  # type: ignore[no-untyped-call]
    return result


class _Smooth(Function):
    """A smooth activation in place: what autograd would keep is a copy of the input, which others may use, too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, source: Tensor, compute: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]
    ) -> Tensor:
        ctx.backward_of = backward
        ctx.save_for_backward(source)
        ctx.mark_dirty(x)
        return compute(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_twice()
        return ctx.backward_of(grad, *ctx.saved_tensors), None, None, None


def smooth_in_place(
    x: Tensor, source: Tensor, compute: Callable[[Tensor], Tensor], backward: Callable[..., Tensor]
) -> Tensor:
    """`compute(x)` in place; `source`: a copy of x, kept for `backward(grad, source)`."""
    result: Tensor = _Smooth.apply(x, source, compute, backward)  # type: ignore[no-untyped-call]
    return result
