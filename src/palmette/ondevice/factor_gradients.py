"""Weight gradients straight from the compressed input of a layer, without rebuilding it.

The gradient is linear in the input, so every sum over a mode can be taken on the layer's output gradient or on the
small core, whichever is cheaper. With the exact input's Tucker form the result is the exact gradient; with a truncated
one it is the gradient that the truncated input would give. Source: AMC (NeurIPS 2024) for convolutions with one group,
generalised to any stride, padding, dilation and grouping; linear layers contract every leading mode first.
Everything is computed in float32 at least and returned so; the orders are chosen by multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from palmette.errors import InputError
from palmette.ondevice.tucker import Tucker, cheapest_order, clamp_ranks, exact_arithmetic, mode_product

Padding = Sequence[int | tuple[int, int]]  # of each axis: the same at both ends, or (before, after)


class _Geometry(NamedTuple):
    """One convolution on one input: `kept` holds a rank for each compressed mode of the input, None for the others."""

    shape: tuple[int, ...]
    kept: tuple[int | None, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def core(self) -> tuple[int, ...]:
        return tuple(size if rank is None else rank for size, rank in zip(self.shape, self.kept, strict=True))

    @property
    def padded(self) -> tuple[int, ...]:
        return tuple(size + sum(ends) for size, ends in zip(self.shape[2:], self.padding, strict=True))

    @property
    def outputs(self) -> tuple[int, ...]:
        axes = zip(self.padded, self.weight[2:], self.stride, self.dilation, strict=True)
        return tuple((size - (kernel - 1) * dilation - 1) // stride + 1 for size, kernel, stride, dilation in axes)

    @property
    def pointwise(self) -> bool:
        """Each output position sees one input position: the layer is linear over batch and positions."""
        return self.groups == 1 and max(self.weight[2:] + self.stride) == 1 and self.padded == self.shape[2:]


class _Plan(NamedTuple):
    """How a gradient is computed: multiply-adds, and which modes of the core are brought to full size, in order.

    contracted: the modes of the output gradient that are contracted with their factors, in order.
    """

    macs: int
    expanded: tuple[int, ...]
    contracted: tuple[int, ...]


def conv_weight_gradient(
    tucker: Tucker,
    grad: Tensor,
    weight_shape: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient [C', C/G, *kernel] of a 1-, 2- or 3-D convolution's weight.

    tucker: the input [B, C, *size]; grad: of the output [B, C', *size']. Stride, padding and dilation one per axis.
    Kernels of one position at stride 1 without padding contract every mode of grad and rebuild no position; otherwise
    positions are rebuilt at the ranks of batch and channels (at all channels where grouping makes that cheaper).
    InputError where the shapes do not fit.
    """
    geometry = _geometry(_shape(tucker, grad), _kept(tucker), weight_shape, stride, padding, dilation, groups)
    expected = (geometry.shape[0], geometry.weight[0], *geometry.outputs)
    if grad.shape != expected:
        raise InputError(
            "the output gradient does not fit the convolution", why=f"its shape is {tuple(grad.shape)}, not {expected}"
        )
    with exact_arithmetic(grad.device):
        tucker, grad = _computable(tucker, grad)
        plan = _conv_plan(geometry)
        core, grad = _prepared(tucker, grad, plan, geometry.padding)
        factor = None if 1 in plan.expanded else tucker.factors[1]
        if geometry.pointwise:
            partial = _inner(grad, core, 1)
        else:
            partial = _correlated(core, grad, geometry, groups if factor is None else 1)
        if factor is not None:
            partial = _all_channels(partial.flatten(2) if partial.ndim > 2 else partial[..., None], factor, groups)
        return partial.reshape(geometry.weight)


def linear_weight_gradient(tucker: Tucker, grad: Tensor) -> Tensor:
    """Gradient [O, I] of a linear layer's weight; tucker: the input [..., I], grad: of the output [..., O]."""
    left, right = linear_weight_gradient_factored(tucker, grad)
    with exact_arithmetic(grad.device):
        return left if right is None else left @ right.T


def linear_weight_gradient_factored(tucker: Tucker, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same gradient as T [O, r] and U [I, r] of orthonormal columns: T U^T; U is None where r is I.

    InputError where the leading modes of the two differ.
    """
    shape = _shape(tucker, grad, linear=True)
    with exact_arithmetic(grad.device):
        tucker, grad = _computable(tucker, grad)
        core, grad = _prepared(tucker, grad, _linear_plan(shape, _kept(tucker), grad.shape[-1]), ())
        return _inner(grad, core, core.ndim - 1), tucker.factors[-1]


def conv_weight_gradient_from_svd(
    left: Tensor,
    right: Tensor,
    x_shape: Sequence[int],
    grad: Tensor,
    weight_shape: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of `conv_weight_gradient` for an input kept as left [B, K] times right [K, rest] (AMC's SVD)."""
    tucker = _from_svd(left, right, x_shape)
    return conv_weight_gradient(
        tucker, grad, weight_shape, stride=stride, padding=padding, dilation=dilation, groups=groups
    )


def linear_weight_gradient_from_svd(left: Tensor, right: Tensor, x_shape: Sequence[int], grad: Tensor) -> Tensor:
    """The gradient [O, I] of a linear layer for an input kept as left [B, K] times right [K, rest]."""
    return linear_weight_gradient(_from_svd(left, right, x_shape), grad)


def conv_macs(
    x_shape: Sequence[int],
    ranks: Sequence[int],
    weight_shape: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int,
) -> int:
    """Multiply-adds of `conv_weight_gradient` on an input of this shape kept at these ranks.

    A rank at or above its mode's size is a mode without a factor. For the SVD: (K, C, *size) with K below the batch.
    """
    kept = _compressed(x_shape, ranks)
    return _conv_plan(_geometry(tuple(x_shape), kept, weight_shape, stride, padding, dilation, groups)).macs


def linear_macs(x_shape: Sequence[int], ranks: Sequence[int], out_features: int, *, factored: bool = False) -> int:
    """Multiply-adds of `linear_weight_gradient`, or of its factored form, on an input kept at these ranks."""
    kept = _compressed(x_shape, ranks)
    last = 0 if factored or kept[-1] is None else kept[-1] * x_shape[-1] * out_features
    return _linear_plan(tuple(x_shape), kept, out_features).macs + last


# ---- what the input is -----------------------------------------------------------------------------------------------


def _compressed(shape: Sequence[int], ranks: Sequence[int]) -> tuple[int | None, ...]:
    kept = clamp_ranks(shape, ranks)
    return tuple(rank if rank < size else None for rank, size in zip(kept, shape, strict=True))


def _kept(tucker: Tucker) -> tuple[int | None, ...]:
    return tuple(None if factor is None else factor.shape[1] for factor in tucker.factors)


def _shape(tucker: Tucker, grad: Tensor, *, linear: bool = False) -> tuple[int, ...]:
    """The shape of the tensor kept, checked against the output gradient's."""
    pairs = zip(tucker.core.shape, tucker.factors, strict=True)
    shape = tuple(rank if factor is None else factor.shape[0] for rank, factor in pairs)
    if grad.ndim != len(shape) or (linear and grad.shape[:-1] != shape[:-1]):
        raise InputError(
            "the output gradient does not fit the input", why=f"its shape is {tuple(grad.shape)}, the input's {shape}"
        )
    return shape


def _from_svd(left: Tensor, right: Tensor, x_shape: Sequence[int]) -> Tucker:
    """A Tucker form with a factor of the batch only; that `left` is not orthonormal changes nothing in the formulas."""
    return Tucker(right.reshape(-1, *x_shape[1:]), (left, *[None] * (len(x_shape) - 1)))


def _computable(tucker: Tucker, grad: Tensor) -> tuple[Tucker, Tensor]:
    kind = torch.promote_types(torch.promote_types(tucker.core.dtype, grad.dtype), torch.float32)
    factors = tuple(None if factor is None else factor.detach().to(kind) for factor in tucker.factors)
    return Tucker(tucker.core.detach().to(kind), factors), grad.detach().to(kind)


def _geometry(
    shape: tuple[int, ...],
    kept: tuple[int | None, ...],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
    groups: int,
) -> _Geometry:
    axes = len(shape) - 2
    if not 1 <= axes <= 3 or {len(weight_shape) - 2, len(stride), len(padding), len(dilation)} != {axes}:
        raise InputError(
            "stride, padding, dilation and kernel need one entry for each of 1 to 3 axes",
            why=f"the input is {shape}, the weight {tuple(weight_shape)}",
        )
    if shape[1] != weight_shape[1] * groups or weight_shape[0] % groups:
        raise InputError(
            "the weight does not fit the input", why=f"{tuple(weight_shape)}, {groups} groups, input {shape}"
        )
    ends = tuple(entry if isinstance(entry, tuple) else (entry, entry) for entry in padding)
    return _Geometry(shape, kept, tuple(weight_shape), tuple(stride), ends, tuple(dilation), groups)


# ---- orders ----------------------------------------------------------------------------------------------------------


def _contraction(
    grad_shape: Sequence[int], core: Sequence[int], kept: Sequence[int | None], channel: int, outputs: int
) -> _Plan:
    """The cheaper way to contract everything but `channel`: the batch mode of grad first, or the core's expanded."""
    modes = [mode for mode, rank in enumerate(kept) if rank is not None and mode != channel]
    plans = []
    for expanded in [(0,), ()] if 0 in modes else [()]:
        contracted = [mode for mode in modes if mode not in expanded]
        steps = tuple((grad_shape[mode], core[mode], core[mode]) for mode in contracted)
        macs, order = cheapest_order(math.prod(grad_shape), steps)
        sizes = [grad_shape[mode] if mode in expanded else size for mode, size in enumerate(core)]
        macs += math.prod(sizes) * outputs + (math.prod(core) * grad_shape[0] if expanded else 0)
        plans.append(_Plan(macs, expanded, tuple(contracted[step] for step in order)))
    return min(plans)


def _linear_plan(shape: tuple[int, ...], kept: tuple[int | None, ...], outputs: int) -> _Plan:
    """Without the last product, by the factor of the features."""
    core = [size if rank is None else rank for size, rank in zip(shape, kept, strict=True)]
    return _contraction((*shape[:-1], outputs), core, kept, len(shape) - 1, outputs)


def _conv_plan(geometry: _Geometry) -> _Plan:
    """The cheapest plan that does not bring batch, channels and positions all to full size, as the input is.

    But for grouped convolutions whose batch has no factor: there every other way costs as much as without groups.
    """
    shape, kept, weight = geometry.shape, geometry.kept, geometry.weight
    if geometry.pointwise:
        plan = _contraction((shape[0], weight[0], *shape[2:]), geometry.core, kept, 1, weight[0])
        return plan._replace(macs=plan.macs + (0 if kept[1] is None else math.prod(weight) * kept[1]))
    axes = tuple(mode for mode, rank in enumerate(kept) if mode > 1 and rank is not None)
    choices = [axes]
    if kept[1] is not None and kept[0] is not None:
        choices += [(*axes, 1), (*axes, 0)]
    elif kept[1] is not None and geometry.groups > 1:
        choices += [(*axes, 1)]
    return min(_rebuilding(geometry, choice) for choice in choices)


def _rebuilding(geometry: _Geometry, modes: tuple[int, ...]) -> _Plan:
    """Bring these modes of the core to full size, contract the batch of grad unless it is among them, and correlate."""
    weight, core = geometry.weight, geometry.core
    full = (*geometry.shape[:2], *geometry.padded)
    macs, order = cheapest_order(math.prod(core), tuple((core[mode], full[mode], full[mode]) for mode in modes))
    outputs = weight[0] * math.prod(geometry.outputs)
    batch, rank = (full[0], None) if 0 in modes else (core[0], geometry.kept[0])
    macs += 0 if rank is None else full[0] * outputs * rank
    factored = geometry.kept[1] is not None and 1 not in modes
    macs += batch * outputs * (core[1] if factored else weight[1]) * math.prod(weight[2:])
    macs += math.prod(weight) * core[1] if factored else 0
    return _Plan(macs, tuple(modes[step] for step in order), () if rank is None else (0,))


# ---- products --------------------------------------------------------------------------------------------------------


def _prepared(tucker: Tucker, grad: Tensor, plan: _Plan, padding: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """The core with the plan's modes at full size, and the output gradient with the plan's modes contracted.

    Zero rows on a position's factor are the padding of the tensor that it stands for.
    """
    core = tucker.core
    for mode in plan.expanded:
        factor = tucker.factors[mode]
        if factor is not None:
            rows = padding[mode - 2] if mode > 1 else (0, 0)
            core = mode_product(core, F.pad(factor, (0, 0, *rows)), mode)
    for mode in plan.contracted:
        factor = tucker.factors[mode]
        if factor is not None:
            grad = mode_product(grad, factor.T, mode)
    return core, grad


def _inner(grad: Tensor, core: Tensor, channel: int) -> Tensor:
    """Sum [O, r] of products over every mode but the channels'."""
    summed = [mode for mode in range(core.ndim) if mode != channel]
    products: Tensor = torch.tensordot(grad, core, dims=(summed, summed))
    return products


def _correlated(core: Tensor, grad: Tensor, geometry: _Geometry, groups: int) -> Tensor:
    """The weight gradient [C', c, *kernel] of a convolution on the core, its batch and channels those of the core.

    c: the core's channels over the groups, which are 1 where those channels are ranks: all outputs see all of them.
    """
    bare = [ends if rank is None else (0, 0) for ends, rank in zip(geometry.padding, geometry.kept[2:], strict=True)]
    if any(map(any, bare)):
        core = F.pad(core, [rows for ends in reversed(bare) for rows in ends])
    weight = grad.new_empty(()).expand(geometry.weight[0], core.shape[1] // groups, *geometry.weight[2:])
    zeros = (0,) * (core.ndim - 2)
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, core, weight, None, geometry.stride, zeros, geometry.dilation, False, zeros, groups, (False, True, False)
    )[1]
    return found


def _all_channels(partial: Tensor, factor: Tensor, groups: int) -> Tensor:
    """[C', r, k] times the rows [C/G, r] of each output channel's group: [C', C/G, k]."""
    outputs, rank, kernel = partial.shape
    rows = factor.reshape(groups, 1, -1, rank)
    return torch.matmul(rows, partial.reshape(groups, -1, rank, kernel)).reshape(outputs, -1, kernel)
