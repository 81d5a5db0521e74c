"""A layer as an autograd function: forward by torch's kernels, backward from what its codec kept of the input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from palmette.ondevice.codec import Codec, Payload
from palmette.ondevice.functions import Norm, no_autocast, refuse_twice, scale_of
from palmette.ondevice.layer import Layer

_SMALL = 2**16  # numbers; below, two simple operations are faster than a batched product


@dataclass(frozen=True)
class LayerCall:
    """What one call of a layer needs beside its differentiable inputs.

    norm: the batch norm that follows and is computed with the layer. dtype: the type to compute in (autocast), or None.
    rows: the outputs whose weights are trained, or None for all.
    """

    layer: Layer
    codec: Codec
    norm: Norm | None = None
    dtype: torch.dtype | None = None
    rows: tuple[int, ...] | None = None


class _LayerFunction(Function):
    """A layer, and the batch norm that follows it if the call has one."""

    @staticmethod
    def forward(
        ctx: Any,
        call: LayerCall,
        payload: Payload,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        tuned: Tensor | None,  # noqa: ARG004  # its values are in the weight; it is here for its gradient
    ) -> Tensor:
        norm = call.norm
        ctx.call = call if norm is None else replace(call, norm=None)
        ctx.eps = None if norm is None else norm.eps
        others = (None,) * 4 if norm is None else (bias, gamma, norm.mean, norm.var)
        ctx.save_for_backward(weight, *others, *payload)
        with no_autocast(x.device):
            y = folded_forward(call.layer, x, weight, bias, norm, gamma, beta, call.dtype)
        # a view made in here could not be written into by what follows
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_twice()
        with no_autocast(grad.device):
            return (None, None, *_layer_gradients(ctx, grad))


def _layer_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    call: LayerCall = ctx.call
    weight, bias, gamma, mean, var, *payload = ctx.saved_tensors
    _, _, need_x, need_weight, need_bias, need_gamma, need_beta, need_tuned = ctx.needs_input_grad
    layer, norm = call.layer, None if ctx.eps is None else Norm(mean, var, ctx.eps)
    inverse = None if norm is None else norm.inverse_deviation()
    scale = inverse if inverse is None or gamma is None else gamma * inverse
    dx = raw = None
    if need_x:
        dx = call.codec.input_gradient(layer, grad, _folded(layer, weight, scale, call.dtype))
    if need_weight or need_gamma or need_tuned:
        raw = call.codec.weight_gradient(tuple(payload), layer, grad)
        raw = raw if raw.dtype == weight.dtype else raw.to(weight.dtype)
    total = layer.bias_gradient(grad, weight.dtype) if need_bias or need_gamma or need_beta else None
    dgamma = None
    if need_gamma and inverse is not None and raw is not None and total is not None:
        # sum of dL/dy * (layer's output - mean): the output need not be kept, its inner product with the gradient is
        # that of the weight with the weight's gradient
        shift = -mean if bias is None else bias - mean
        dgamma = (_row_products(raw, weight) + shift * total) * inverse
    if raw is not None and scale is not None:
        raw.mul_(layer.per_row(scale if call.rows is None else scale[list(call.rows)]))
    return (
        dx,
        raw if need_weight else None,
        (total if total is None or scale is None else total * scale) if need_bias else None,
        dgamma,
        total if need_beta else None,
        raw if need_tuned else None,
    )


def folded_forward(
    layer: Layer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The layer's output with the norm's scale and shift put into weight and bias: one pass over the output."""
    scale = None
    if norm is not None:
        scale = scale_of(norm, gamma)
        shift = -norm.mean if bias is None else bias - norm.mean
        bias = shift * scale if beta is None else shift * scale + beta
    if dtype is not None and bias is not None:
        bias = bias.to(dtype)
    return layer.forward(x, _folded(layer, weight, scale, dtype), bias)


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row of `a` with that of `b`; without a third tensor of their size if they are large."""
    if a.numel() <= _SMALL:
        return (a * b).flatten(1).sum(1)
    return torch.bmm(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(2)).view(-1)


def _folded(layer: Layer, weight: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """The weight as the forward pass uses it."""
    folded = weight if scale is None else weight * layer.per_row(scale)
    return folded if dtype is None else folded.to(dtype)


def layer_call(
    call: LayerCall,
    payload: Payload,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    tuned: Tensor | None = None,
) -> Tensor:
    """The layer's output, with the batch norm's if the call has one. x is already in the type to compute in.

    payload: what the codec made of x; () when no gradient needs it. tuned: the trained part of a frozen weight.
    """
    result: Tensor = _LayerFunction.apply(call, payload, x, weight, bias, gamma, beta, tuned)  # type: ignore[no-untyped-call]
    return result
