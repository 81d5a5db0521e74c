"""Gradients from factors against autograd on the dense input: every kind of convolution, linears of 2 to 4 modes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from palmette.errors import InputError
from palmette.ondevice import factor_gradients as fg
from palmette.ondevice.tucker import Tucker, dense, hosvd, svd

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIZES = {1: (11,), 2: (9, 7), 3: (6, 5, 7)}

# (axes, kernel, stride, padding, dilation), each with every grouping of GROUPS
SHAPES = [
    (1, (3,), (1,), (1,), (1,)),
    (1, (4,), (3,), (2,), (2,)),  # the last input positions are not used
    (1, (1,), (1,), (0,), (1,)),
    (1, (1,), (2,), (0,), (1,)),
    (2, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, (3, 3), (2, 2), (1, 1), (1, 1)),
    (2, (3, 3), (2, 2), (2, 2), (2, 2)),
    (2, (3, 2), (2, 3), (1, 0), (1, 2)),
    (2, (1, 5), (1, 2), (0, 2), (1, 1)),
    (2, (2, 2), (4, 3), (0, 0), (1, 1)),
    (2, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, (1, 1), (2, 2), (0, 0), (1, 1)),
    (2, (1, 1), (1, 1), (1, 0), (1, 1)),
    (2, (9, 7), (1, 1), (0, 0), (1, 1)),
    (3, (2, 3, 3), (1, 1, 2), (1, 0, 1), (1, 1, 1)),
    (3, (3, 1, 2), (2, 2, 2), (2, 0, 1), (2, 2, 2)),
    (3, (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
]
GROUPS = [(6, 5, 1), (6, 4, 2), (6, 6, 6), (6, 12, 6), (4, 8, 4), (6, 9, 3)]  # input channels, output channels, groups
CASES = list(itertools.product(SHAPES, GROUPS))


def problem(shape, grouping, *, batch=5, seed=0, dtype=torch.float64):
    """(input, output gradient, weight's shape, options) of a convolution on random numbers."""
    axes, kernel, stride, padding, dilation = shape
    channels, outputs, groups = grouping
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, channels, *SIZES[axes]), generator=generator, dtype=torch.float64)
    weight = (outputs, channels // groups, *kernel)
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    out = CONVS[axes](x, torch.zeros(weight, dtype=torch.float64), **options)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), grad.to(dtype), weight, options


def autograd(x, grad, weight, options):
    w = torch.zeros(weight, dtype=x.dtype, requires_grad=True)
    CONVS[x.ndim - 2](x, w, **options).backward(grad)
    return w.grad


def relative(found, true):
    return float((found.double() - true.double()).norm() / true.double().norm().clamp_min(1e-30))


def rank_choices(shape):
    """Ranks that exercise every order: all small, one mode whole at a time, a thin channel mode, a thin batch."""
    small = [max(1, size // 2) for size in shape]
    yield small
    for mode in range(len(shape)):
        yield [size if place == mode else rank for place, (size, rank) in enumerate(zip(shape, small, strict=True))]
    yield [max(1, shape[0] - 1), 1, *small[2:]]
    yield [1, max(1, shape[1] - 1), *small[2:]]


def test_there_are_more_than_72_convolutions():
    assert len(CASES) >= 72


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_at_full_rank_is_the_true_gradient(shape):
    for grouping in GROUPS:
        x, grad, weight, options = problem(shape, grouping)
        true = autograd(x, grad, weight, options)
        whole = hosvd(x, x.shape)
        assert relative(fg.conv_weight_gradient(whole, grad, weight, **options), true) < 1e-9
        # Square orthogonal factors, which no compressor returns, but which run every product at full rank.
        turned = rotated(x)
        assert relative(fg.conv_weight_gradient(turned, grad, weight, **options), true) < 1e-9
        single = Tucker(turned.core.float(), tuple(factor.float() for factor in turned.factors))
        assert relative(fg.conv_weight_gradient(single, grad.float(), weight, **options), true) < 1e-6


def rotated(x):
    """Full-rank Tucker form of x with a factor in every mode."""
    generator = torch.Generator().manual_seed(7)
    core, factors = x, []
    for mode, size in enumerate(x.shape):
        factor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=x.dtype))[0]
        core = torch.tensordot(core, factor, dims=([mode], [0])).movedim(-1, mode)
        factors.append(factor)
    return Tucker(core, tuple(factors))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_at_lower_rank_is_the_gradient_of_the_truncated_input(shape):
    for grouping in GROUPS:
        x, grad, weight, options = problem(shape, grouping)
        for ranks in rank_choices(x.shape):
            kept = hosvd(x, ranks)
            true = autograd(dense(kept), grad, weight, options)
            assert relative(fg.conv_weight_gradient(kept, grad, weight, **options), true) < 1e-9, ranks


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_from_the_svd(shape):
    for grouping in GROUPS:
        x, grad, weight, options = problem(shape, grouping)
        for rank in (2, 5):
            left, right = svd(x, rank)
            true = autograd((left @ right).reshape(x.shape), grad, weight, options)
            found = fg.conv_weight_gradient_from_svd(left, right, x.shape, grad, weight, **options)
            assert relative(found, true) < 1e-9


@pytest.mark.parametrize("ranks", [(3, 2, 4, 3), (3, 2, 9, 7), (3, 2, 9, 3)])
def test_padding_may_differ_at_the_two_ends(ranks):
    x, _, weight, options = problem(SHAPES[4], GROUPS[0])
    kept = hosvd(x, ranks)
    padded = F.pad(dense(kept), (2, 0, 0, 1))
    options["padding"] = (0, 0)
    grad = torch.randn(F.conv2d(padded, torch.zeros(weight, dtype=x.dtype), **options).shape, dtype=x.dtype)
    true = autograd(padded, grad, weight, options)
    options["padding"] = ((0, 1), (2, 0))
    assert relative(fg.conv_weight_gradient(kept, grad, weight, **options), true) < 1e-9


@given(
    axes=st.integers(1, 3),
    grouping=st.sampled_from(GROUPS),
    batch=st.integers(1, 6),
    data=st.data(),
)
def test_any_convolution_at_any_ranks(axes, grouping, batch, data):
    def each(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(axes))

    shape = (axes, each(1, 3), each(1, 3), each(0, 2), each(1, 2))
    x, grad, weight, options = problem(shape, grouping, batch=batch)
    kept = hosvd(x, [data.draw(st.integers(1, size + 1)) for size in x.shape])
    true = autograd(dense(kept), grad, weight, options)
    assert torch.allclose(fg.conv_weight_gradient(kept, grad, weight, **options), true, rtol=1e-9, atol=1e-9)


# ---- linear layers ---------------------------------------------------------------------------------------------------

LINEARS = [(7, 6), (5, 4, 6), (4, 3, 5, 6), (1, 9, 4), (30, 3)]


@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_linear_at_full_and_lower_rank(shape):
    x = torch.randn(shape, dtype=torch.float64)
    grad = torch.randn((*shape[:-1], 8), dtype=torch.float64)
    true = grad.reshape(-1, 8).T @ x.reshape(-1, shape[-1])
    assert relative(fg.linear_weight_gradient(hosvd(x, shape), grad), true) < 1e-9
    turned = rotated(x)
    assert relative(fg.linear_weight_gradient(turned, grad), true) < 1e-9
    single = Tucker(turned.core.float(), tuple(factor.float() for factor in turned.factors))
    assert relative(fg.linear_weight_gradient(single, grad.float()), true) < 1e-6
    for ranks in rank_choices(shape):
        kept = hosvd(x, ranks)
        true = grad.reshape(-1, 8).T @ dense(kept).reshape(-1, shape[-1])
        assert relative(fg.linear_weight_gradient(kept, grad), true) < 1e-9
        left, right = fg.linear_weight_gradient_factored(kept, grad)
        assert left.shape == (8, min(ranks[-1], shape[-1]))
        assert (right is None) == (ranks[-1] >= shape[-1])
        assert relative(left if right is None else left @ right.T, true) < 1e-9
    left, right = svd(x, 2)
    true = grad.reshape(-1, 8).T @ (left @ right).reshape(-1, shape[-1])
    assert relative(fg.linear_weight_gradient_from_svd(left, right, shape, grad), true) < 1e-9


@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=4), outputs=st.integers(1, 5), data=st.data())
def test_any_linear_at_any_ranks(shape, outputs, data):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad = torch.randn((*shape[:-1], outputs), generator=generator, dtype=torch.float64)
    kept = hosvd(x, [data.draw(st.integers(1, size + 1)) for size in shape])
    true = grad.reshape(-1, outputs).T @ dense(kept).reshape(-1, shape[-1])
    assert torch.allclose(fg.linear_weight_gradient(kept, grad), true, rtol=1e-9, atol=1e-9)


# ---- counts, types, errors -------------------------------------------------------------------------------------------


def counted(function):
    """Multiply-adds that torch's own counter sees."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("shape", [SHAPES[place] for place in (0, 1, 5, 7, 10, 15, 16)], ids=str)
def test_conv_macs_are_what_is_done(shape):
    for grouping in GROUPS:
        x, grad, weight, options = problem(shape, grouping)
        for ranks in rank_choices(x.shape):
            kept = hosvd(x, ranks)
            expected = fg.conv_macs(x.shape, ranks, weight, **options)
            # torch counts the weight gradient of a grouped convolution as if it had one group
            if options["groups"] == 1:
                assert counted(lambda: fg.conv_weight_gradient(kept, grad, weight, **options)) == expected  # noqa: B023
            assert expected > 0


def test_conv_macs_of_one_depthwise_layer_by_hand():
    ranks, weight = (2, 3, 9, 7), (6, 1, 3, 3)
    macs = fg.conv_macs((5, 6, 9, 7), ranks, weight, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=6)
    positions = 9 * 7
    assert macs == 2 * 3 * positions * 6 + 5 * 2 * 6 * positions + 2 * 6 * 9 * positions


@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_linear_macs_are_what_is_done(shape):
    x, grad = torch.randn(shape), torch.randn(*shape[:-1], 8)
    for ranks in rank_choices(shape):
        kept = hosvd(x, ranks)
        assert counted(lambda: fg.linear_weight_gradient(kept, grad)) == fg.linear_macs(shape, ranks, 8)  # noqa: B023
        factored = counted(lambda: fg.linear_weight_gradient_factored(kept, grad))  # noqa: B023
        assert factored == fg.linear_macs(shape, ranks, 8, factored=True)


def test_linear_macs_are_those_of_the_specification():
    batch, tokens, features, outputs, ranks = 128, 49, 768, 3072, (20, 10, 60)
    macs = fg.linear_macs((batch, tokens, features), ranks, outputs)
    a, b, c = ranks
    contracted_in_the_order_written = batch * tokens * outputs * a + a * tokens * outputs * b
    assert macs <= contracted_in_the_order_written + a * b * c * outputs + outputs * features * c


def test_a_thin_channel_mode_expands_the_batch_on_the_core_instead():
    options = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    x, weight = (64, 32, 10, 10), (48, 32, 3, 3)
    released = 64 * 40 * 48 * 100 + 40 * 2 * 48 * 9 * 100  # the batch contracted, then correlated
    assert fg.conv_macs(x, (40, 2, 3, 3), weight, **options) < released


def test_half_factors_are_computed_in_float32():
    x, grad, weight, options = problem(SHAPES[4], GROUPS[0], dtype=torch.float32)
    kept = hosvd(x, (3, 3, 4, 4), dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fg.conv_weight_gradient(kept, grad.bfloat16(), weight, **options)
    assert found.dtype == torch.float32
    true = autograd(dense(kept), grad.bfloat16().float(), weight, options)
    assert relative(found, true) < 1e-5


def test_nothing_is_recorded_and_no_random_number_drawn():
    x, grad, weight, options = problem(SHAPES[4], GROUPS[0])
    before = torch.get_rng_state()
    kept = hosvd(x.requires_grad_(), (3, 3, 4, 4))
    found = fg.conv_weight_gradient(kept, grad.requires_grad_(), weight, **options)
    assert not found.requires_grad
    assert torch.equal(found, fg.conv_weight_gradient(kept, grad, weight, **options))
    assert torch.equal(before, torch.get_rng_state())
    assert not fg.linear_weight_gradient(
        hosvd(x, (2, 2, 2, 2)), torch.ones(5, 6, 9, 3, requires_grad=True)
    ).requires_grad


def test_shapes_without_data():
    with FakeTensorMode():
        kept = hosvd(torch.empty(8, 6, 9, 7), (3, 3, 4, 4))
        options = dict(stride=(2, 1), padding=(1, 0), dilation=(1, 1), groups=3)
        found = fg.conv_weight_gradient(kept, torch.empty(8, 9, 5, 5), (9, 2, 3, 3), **options)
        assert found.shape == (9, 2, 3, 3)
        assert fg.linear_weight_gradient(kept, torch.empty(8, 6, 9, 5)).shape == (5, 7)


@pytest.mark.parametrize(
    ("grad", "weight", "changes"),
    [
        ((5, 5, 9, 6), (5, 6, 3, 3), {}),
        ((5, 5, 9), (5, 6, 3, 3), {}),
        ((5, 5, 9, 7), (5, 4, 3, 3), {}),
        ((5, 5, 9, 7), (5, 3, 3, 3), {"groups": 2}),
        ((5, 5, 9, 7), (5, 6, 3, 3), {"stride": (1,)}),
    ],
)
def test_what_does_not_fit_is_refused(grad, weight, changes):
    kept = hosvd(torch.randn(5, 6, 9, 7), (2, 2, 2, 2))
    options = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1) | changes
    with pytest.raises(InputError):
        fg.conv_weight_gradient(kept, torch.randn(grad), weight, **options)


def test_a_linear_gradient_of_another_batch_is_refused():
    with pytest.raises(InputError, match="does not fit the input"):
        fg.linear_weight_gradient(hosvd(torch.randn(4, 6), (2, 2)), torch.randn(5, 3))
