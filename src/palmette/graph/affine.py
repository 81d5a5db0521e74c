"""Exact algebra of affine maps: convolutions of any rank, linears (rank 0) and per-channel maps, composed in float64.

A map is y = conv(pad(x), weight) + bias. `edge` says that the last input channel is a constant one: the map then sees
where zero padding begins, which keeps a bias in front of a padded convolution exact (policy bias_map).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """An affine map in float64: weight [O, I/groups, *kernel] and bias [O].

    Stride, padding (before, after) and dilation are per spatial axis.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    edge: bool = False

    @property
    def rank(self) -> int:
        """Number of spatial axes; 0 for a linear layer."""
        return self.weight.dim() - 2

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size per spatial axis."""
        return tuple(self.weight.shape[2:])

    @property
    def padded(self) -> bool:
        """Whether any side is padded."""
        return any(self.before) or any(self.after)

    @property
    def pointwise(self) -> bool:
        """Whether one output position reads one input position only."""
        return all(k == 1 for k in self.kernel)

    @property
    def in_channels(self) -> int:
        """Input channels, the constant one not counted."""
        return self.weight.shape[1] * self.groups - self.edge

    @property
    def out_channels(self) -> int:
        """Output channels."""
        return self.weight.shape[0]


def diagonal(slope: Tensor, offset: Tensor, rank: int) -> Affine:
    """The per-channel map slope * x + offset: a depthwise 1x1 convolution (rank > 0) or a diagonal linear (rank 0)."""
    c = slope.numel()
    if rank == 0:
        return Affine(torch.diag(slope.double()), offset.double())
    ones, zeros = (1,) * rank, (0,) * rank
    return Affine(slope.double().view(c, 1, *ones), offset.double(), ones, zeros, zeros, ones, c)


def scaled(a: Affine, slope: Tensor, offset: Tensor) -> Affine:
    """The map slope * a(x) + offset, per output channel."""
    s = slope.double()
    return replace(a, weight=a.weight * s.view(-1, *[1] * (a.weight.dim() - 1)), bias=a.bias * s + offset.double())


def padded_before(a: Affine, before: tuple[int, ...], after: tuple[int, ...]) -> Affine:
    """`a` behind a zero padding of its input."""
    return replace(a, before=_plus(a.before, before), after=_plus(a.after, after))


def inexact_reason(first: Affine, second: Affine) -> str:
    """Why second(first(x)) is not one affine map of x, "" if it is exactly one.

    Maps on the meta device are judged by shape.
    """
    if not second.padded:
        return ""
    if not first.pointwise:
        return "zero padding between two kernels larger than 1x1"
    if first.bias.is_meta or bool((first.bias != 0).any()):  # without weights, a bias counts
        return "a bias in front of zero padding"
    return ""


def with_edge(a: Affine) -> Affine:
    """The same map with its bias carried by a constant-one input channel; needs a pointwise unpadded map."""
    a = regrouped(a, 1)
    column = a.bias.view(-1, 1, *[1] * a.rank)
    return replace(a, weight=torch.cat([a.weight, column], 1), bias=torch.zeros_like(a.bias), edge=True)


def can_carry_edge(a: Affine) -> bool:
    """Whether `with_edge` keeps the function."""
    return a.pointwise and not a.padded and not a.edge and a.rank > 0


def regrouped(a: Affine, groups: int) -> Affine:
    """The same map written with fewer groups (`groups` divides a.groups): zeros where groups did not meet."""
    if a.groups == groups:
        return a
    merge = a.groups // groups
    o, i = a.out_channels // groups, a.weight.shape[1]
    per = a.out_channels // a.groups
    if a.weight.is_meta:
        return replace(a, weight=a.weight.new_empty(groups * o, i * merge, *a.kernel), groups=groups)
    weight = a.weight.new_zeros(groups, o, i * merge, *a.kernel)
    source = a.weight.view(groups, merge, per, i, *a.kernel)
    for m in range(merge):
        weight[:, m * per : (m + 1) * per, m * i : (m + 1) * i] = source[:, m]
    return replace(a, weight=weight.flatten(0, 1), groups=groups)


def compose(first: Affine, second: Affine) -> Affine:
    """second(first(x)) as one map. Exact when `inexact_reason` is empty; otherwise right in the interior only."""
    groups = math.gcd(first.groups, second.groups)
    a, b = regrouped(first, groups), regrouped(second, groups)
    rank = a.rank
    step = [_common_step(a, b, d) for d in range(rank)]
    reach_a = [a.dilation[d] // step[d] if a.kernel[d] > 1 else 0 for d in range(rank)]
    reach_b = [a.stride[d] * b.dilation[d] // step[d] if b.kernel[d] > 1 else 0 for d in range(rank)]
    kernel = [1 + reach_a[d] * (a.kernel[d] - 1) + reach_b[d] * (b.kernel[d] - 1) for d in range(rank)]
    o, i = b.out_channels // groups, a.weight.shape[1]
    if a.weight.is_meta:
        weight, bias = a.weight.new_empty(groups * o, i, *kernel), b.bias
    else:
        weight, bias = _products(a, b, groups, kernel, reach_a, reach_b)
    return Affine(
        weight,
        bias,
        tuple(x * y for x, y in zip(a.stride, b.stride, strict=True)),
        tuple(p + s * q for p, s, q in zip(a.before, a.stride, b.before, strict=True)),
        tuple(p + s * q for p, s, q in zip(a.after, a.stride, b.after, strict=True)),
        tuple(step),
        groups,
        a.edge,
    )


def merged_map(maps: list[Affine], pad: str) -> Affine:
    """All maps of a run as one, taken as exact; "bias_map" carries a bias in front of padding in an edge channel."""
    merged = maps[0]
    for m in maps[1:]:
        carried = pad == "bias_map" and inexact_reason(merged, m) and can_carry_edge(merged)
        merged = compose(with_edge(merged) if carried else merged, m)
    return merged


def _products(
    a: Affine, b: Affine, groups: int, kernel: list[int], reach_a: list[int], reach_b: list[int]
) -> tuple[Tensor, Tensor]:
    """Weight and bias of b(a(x)): every tap of b shifts the kernel of a."""
    rank, o, i = a.rank, b.out_channels // groups, a.weight.shape[1]
    wa = a.weight.view(groups, -1, i, *a.kernel)  # [G, M/G, I/G, *ka]
    wb = b.weight.view(groups, o, -1, *b.kernel)  # [G, O/G, M/G, *kb]
    weight = a.weight.new_zeros(groups, o, i, *kernel)
    for tap in itertools.product(*(range(k) for k in b.kernel)):
        place = tuple(
            slice(
                reach_b[d] * tap[d],
                reach_b[d] * tap[d] + max(reach_a[d], 1) * (a.kernel[d] - 1) + 1,
                max(reach_a[d], 1),
            )
            for d in range(rank)
        )
        part = torch.einsum("gom,gmi...->goi...", wb[(slice(None),) * 3 + tap], wa)
        weight[(slice(None),) * 3 + place] += part
    sums = wb.flatten(3).sum(3) if rank else wb  # [G, O/G, M/G]
    bias = torch.einsum("gom,gm->go", sums, a.bias.view(groups, -1)).flatten() + b.bias
    return weight.flatten(0, 1), bias


def _common_step(a: Affine, b: Affine, d: int) -> int:
    """Dilation of the composed kernel along axis d: the greatest step on which every tap lies."""
    steps = [a.dilation[d]] * (a.kernel[d] > 1) + [a.stride[d] * b.dilation[d]] * (b.kernel[d] > 1)
    return math.gcd(*steps) if steps else 1


def skip_reason(a: Affine) -> str:
    """Why x + a(x) is not one convolution, "" if it is."""
    if a.in_channels != a.out_channels:
        return "input and output channels differ"
    for d in range(a.rank):
        if a.stride[d] != 1 or a.before[d] + a.after[d] != a.dilation[d] * (a.kernel[d] - 1):
            return "the kernel does not keep the size of its input"
        if a.before[d] % a.dilation[d]:
            return "no kernel tap lies on the centre"
    return ""


def plus_skip(a: Affine) -> Affine:
    """The map x + a(x): the identity kernel added at the centre tap."""
    weight = a.weight.clone()
    centre = tuple(a.before[d] // a.dilation[d] for d in range(a.rank))
    per = a.out_channels // a.groups
    for channel in range(a.out_channels):
        weight[(channel, channel % per, *centre)] += 1.0
    return replace(a, weight=weight)


def macs_per_position(a: Affine) -> int:
    """Multiply-adds for one output position of one sample."""
    return a.weight.numel()


def _plus(x: tuple[int, ...], y: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(p + q for p, q in zip(x, y, strict=True))
