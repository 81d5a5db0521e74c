"""Codecs of layer inputs: bytes are as computed, gradients as good as the form allows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from palmette.ondevice.asi import Asi
from palmette.ondevice.codec import Keep, codecs
from palmette.ondevice.fixed_projection import FixedProjection
from palmette.ondevice.gradient_filter import GradientFilter
from palmette.ondevice.hosvd import Hosvd
from palmette.ondevice.layer import conv_layer, linear_layer
from palmette.ondevice.low_bit import LowBit
from palmette.ondevice.svd import Svd
from palmette.registry import get_method

SHAPES = st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple)
TYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def stored(payload: tuple[Tensor, ...]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in payload}.values())


def drawn_codec(draw, shape):
    ranks = tuple(draw(st.integers(1, size)) for size in shape)
    axis = draw(st.integers(1, len(shape) - 1))
    lone = tuple(rank if mode == axis else size for mode, (rank, size) in enumerate(zip(ranks, shape, strict=True)))
    made = [
        Asi(ranks=ranks),
        Asi(ranks=ranks, published=True),
        Hosvd(ranks=ranks),
        Hosvd(ranks=ranks, sequential=False),
        Svd(rank=draw(st.integers(1, 12))),
        LowBit(bits=draw(st.sampled_from([1, 2, 4, 8])), group=draw(st.sampled_from([8, 20, 128]))),
        FixedProjection(ranks=lone, axis=axis),
    ]
    if len(shape) == 4:
        made.append(GradientFilter(r=draw(st.sampled_from([2, 3, 7])), stride=(draw(st.integers(1, 3)), 1)))
    fitting = [codec for codec in made if codec.can_encode(shape)]
    assume(fitting)
    return draw(st.sampled_from(fitting))


@given(st.data(), SHAPES, TYPES)
def test_bytes_are_as_computed(data, shape, dtype):
    codec = drawn_codec(data.draw, shape)
    x = torch.randn(shape, dtype=dtype)
    state = {}
    for _ in range(2):  # the second step starts from the first one's state
        payload = codec.encode(x, state)
        assert stored(payload) == codec.nbytes(shape, x.element_size()), codec
        assert all(t.untyped_storage()._cdata != x.untyped_storage()._cdata for t in payload)


@given(st.data(), SHAPES)
def test_a_smaller_batch_costs_no_more(data, shape):
    codec = drawn_codec(data.draw, shape)
    part = (data.draw(st.integers(1, shape[0])), *shape[1:])
    assert codec.nbytes(part, 4) <= codec.nbytes(shape, 4)
    assert stored(codec.encode(torch.randn(part), {})) <= codec.nbytes(shape, 4)


@given(SHAPES, st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 128]), st.floats(1e-6, 1e6))
def test_low_bit_rounds_to_the_next_level(shape, bits, group, scale):
    x = torch.randn(shape) * scale + scale
    codec = LowBit(bits=bits, group=group)
    layer = linear_layer(x.shape, torch.Size((3, shape[-1])))
    back = codec.decode(codec.encode(x, {}), layer)
    rows = F.pad(x.reshape(-1), (0, -x.numel() % group)).view(-1, group)
    low, high = rows.amin(1), rows.amax(1)
    # half a step, and the rounding of the range's ends to eight bits of mantissa
    step = (high - low) if bits == 1 else (high - low) / (2**bits - 1) / 2  # one bit: the means of two parts
    bound = step + 2**-7 * (low.abs() + (high - low))
    apart = (F.pad((back - x).reshape(-1), (0, -x.numel() % group)).view(-1, group)).abs().amax(1)
    assert bool((apart <= bound * 1.01 + 1e-30).all())


def test_low_bit_of_constants_and_halves():
    layer = linear_layer(torch.Size((4, 8)), torch.Size((3, 8)))
    for value in (0.0, 1.0, -2.5):
        x = torch.full((4, 8), value)
        assert torch.equal(LowBit(bits=1, group=8).decode(LowBit(bits=1, group=8).encode(x, {}), layer), x)


CONVS = [
    ((4, 6, 9, 8), (5, 6, 3, 3), dict(padding=1)),
    ((4, 6, 9, 8), (6, 3, 3, 2), dict(stride=2, groups=2)),
    ((4, 6, 9, 8), (6, 1, 3, 3), dict(padding=(1, 2), dilation=(2, 1), groups=6)),
    ((4, 6, 7), (5, 6, 3), dict(padding=1)),
]


@pytest.mark.parametrize("make", [Asi, Hosvd])
@pytest.mark.parametrize(("x_shape", "w_shape", "options"), CONVS)
def test_all_ranks_give_the_gradient(make, x_shape, w_shape, options):
    layer = conv_layer(torch.Size(x_shape), torch.Size(w_shape), **options)
    x, grad = torch.randn(x_shape, dtype=torch.float64), torch.randn(layer.out_shape, dtype=torch.float64)
    codec = make(ranks=tuple(max(1, size - (mode == 1) * 0) for mode, size in enumerate(x_shape)))
    got = codec.weight_gradient(codec.encode(x, {}), layer, grad)
    assert torch.allclose(got, layer.weight_gradient(x, grad), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [Asi, Hosvd])
@pytest.mark.parametrize(("x_shape", "w_shape", "options"), CONVS)
def test_factors_give_the_gradient_of_what_they_decode_to(make, x_shape, w_shape, options):
    layer = conv_layer(torch.Size(x_shape), torch.Size(w_shape), **options)
    x, grad = torch.randn(x_shape, dtype=torch.float64), torch.randn(layer.out_shape, dtype=torch.float64)
    codec = make(ranks=tuple(max(1, size // 2) for size in x_shape))
    payload = codec.encode(x, {})
    want = layer.weight_gradient(codec.decode(payload, layer), grad)
    assert torch.allclose(codec.weight_gradient(payload, layer, grad), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(7, 6), (3, 5, 6), (2, 3, 4, 6)])
def test_linear_factors_give_the_gradient_of_what_they_decode_to(shape):
    layer = linear_layer(torch.Size(shape), torch.Size((5, 6)))
    x, grad = torch.randn(shape, dtype=torch.float64), torch.randn(layer.out_shape, dtype=torch.float64)
    half = tuple(max(1, size // 2) for size in shape)
    lone = (*shape[:-1], 2)
    for codec in (Asi(ranks=half), Hosvd(ranks=half), Svd(rank=2), FixedProjection(ranks=lone, axis=len(shape) - 1)):
        payload = codec.encode(x, {})
        want = layer.weight_gradient(codec.decode(payload, layer), grad)
        assert torch.allclose(codec.weight_gradient(payload, layer, grad), want, rtol=1e-9, atol=1e-11)


def test_asi_follows_a_subspace():
    """A tensor of low rank is found again from the bases of the step before; a new one within a few steps."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 4, generator=generator))[0]
    layer = linear_layer(torch.Size((64, 200)), torch.Size((3, 200)))
    codec, state = Asi(ranks=(64, 4)), {}
    for step in range(3):
        x = torch.randn(64, 4, generator=generator) @ basis.T
        back = codec.decode(codec.encode(x, state), layer)
        assert float((back - x).norm() / x.norm()) < 1e-4, step


# ---- gradient filter -------------------------------------------------------------------------------------------------


def published(x: Tensor, weight: Tensor, grad: Tensor, r: int, padding: int) -> tuple[Tensor, Tensor]:
    """Yang et al., section 3, for stride 1 and whole patches, one number at a time: (dL/dx, dL/dw).

    The output gradient is averaged over patches of r x r; the input gradient of a patch is the average's product with
    the kernel summed over its places; every place of the kernel has the gradient sum(x over the patch) * average.
    """
    n, _, height, width = grad.shape
    dx, dw = torch.zeros_like(x), torch.zeros_like(weight)
    for b in range(n):
        for i in range(0, height, r):
            for j in range(0, width, r):
                mean = grad[b, :, i : i + r, j : j + r].mean((1, 2))
                sums = x[b, :, i : i + r, j : j + r].sum((1, 2))
                dw += torch.outer(mean, sums)[:, :, None, None]
                dx[b, :, i : i + r, j : j + r] += (mean @ weight.sum((2, 3)))[:, None, None]
    return dx, dw


@pytest.mark.parametrize("r", [2, 4])
def test_gradient_filter_is_the_published_one(r):
    x, weight = torch.randn(3, 5, 8, 8, dtype=torch.float64), torch.randn(4, 5, 3, 3, dtype=torch.float64)
    layer = conv_layer(x.shape, weight.shape, 1, 1)
    grad = torch.randn(layer.out_shape, dtype=torch.float64)
    dx, dw = published(x, weight, grad, r, 1)
    codec = GradientFilter(r=r, filter_input=True)
    assert torch.allclose(codec.weight_gradient(codec.encode(x, {}), layer, grad), dw)
    assert torch.allclose(codec.input_gradient(layer, grad, weight), dx)
    exact = GradientFilter(r=r).input_gradient(layer, grad, weight)
    assert torch.allclose(exact, layer.input_gradient(grad, weight))


def test_gradient_filter_is_exact_where_its_premise_holds():
    """A pointwise layer whose input and gradient are constant on patches loses nothing."""
    constant = lambda c: torch.randn(3, c, 4, 4, dtype=torch.float64).repeat_interleave(2, 2).repeat_interleave(2, 3)
    x, grad = constant(5), constant(4)
    layer = conv_layer(x.shape, torch.Size((4, 5, 1, 1)))
    codec = GradientFilter(r=2, filter_input=True)
    weight = torch.randn(4, 5, 1, 1, dtype=torch.float64)
    assert torch.allclose(codec.weight_gradient(codec.encode(x, {}), layer, grad), layer.weight_gradient(x, grad))
    assert torch.allclose(codec.input_gradient(layer, grad, weight), layer.input_gradient(grad, weight))


@pytest.mark.parametrize(("stride", "groups", "size"), [((2, 2), 1, 9), ((1, 2), 2, 7), ((2, 1), 4, 10)])
def test_gradient_filter_on_odd_sizes(stride, groups, size):
    x = torch.randn(2, 4, size, size + 1, dtype=torch.float64)
    layer = conv_layer(x.shape, torch.Size((4, 4 // groups, 3, 3)), stride, 1, 1, groups)
    grad = torch.randn(layer.out_shape, dtype=torch.float64)
    weight = torch.randn(layer.weight_shape, dtype=torch.float64)
    codec = GradientFilter(r=2, stride=stride, filter_input=True)
    assert codec.weight_gradient(codec.encode(x, {}), layer, grad).shape == layer.weight_shape
    assert codec.input_gradient(layer, grad, weight).shape == x.shape


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["asi", "hosvd", "svd", "low_bit", "fixed_projection", "gradient_filter"])
def test_options_go_from_coarse_to_fine_and_round_trip(name):
    entry = get_method(name)
    x = torch.randn(8, 12, 10, 10)
    layer = conv_layer(x.shape, torch.Size((6, 12, 3, 3)), 1, 1)
    offered = entry.score(x, layer, entry.make_config())
    sizes = [codec.nbytes(x.shape, 4) for codec in offered]
    assert sizes == sorted(sizes)
    assert 0 < sizes[-1] < math.prod(x.shape) * 4
    assert {codec.name for codec in offered} == {name} <= set(codecs())
    for codec in offered:
        options = codec.to_dict()
        assert codecs()[options.pop("codec")](**options) == codec
        assert hash(codec) == hash(codecs()[name](**options))


def test_keep_is_the_input():
    x = torch.randn(3, 4)
    assert Keep().encode(x, {})[0] is x
    assert Keep().nbytes((3, 4), 4) == 48
