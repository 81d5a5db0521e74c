"""A budget is never exceeded, and the smallest one that is named is the smallest."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from palmette.errors import BudgetError, InputError
from palmette.ondevice.adapt import adapt

METHODS = ("auto", "asi", "hosvd", "svd", "low_bit", "fixed_projection", "gradient_filter")
SCOPES = ("saved", "saved+gradients+optimizer")


def draw_net(kit, draw) -> tuple[nn.Module, int]:
    """A random network of images [batch, 3, side, side]: convolutions, norms, activations, pools, residuals."""
    side, width = draw(st.sampled_from([8, 11, 14])), 4
    pick = lambda *options: draw(st.sampled_from(options))
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]

    def activation() -> nn.Module:
        return pick(nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Tanh)()

    def inplace() -> nn.Module:
        return pick(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)(inplace=True)

    for _ in range(draw(st.integers(1, 4))):
        out = pick(4, 6)
        kind = pick("plain", "plain", "folded", "folded", "residual", "pool", "drop", "depthwise")
        if kind == "plain":
            layers += [nn.Conv2d(width, out, pick(1, 3), pick(1, 2), 1, bias=pick(True, False)), activation()]
            width = out
        elif kind == "folded":
            layers += [*kit.conv_bn(width, out, pick(1, 3), pick(1, 2)), inplace()]
            width = out
        elif kind == "residual":
            inner = [*kit.conv_bn(width, 2 * width), inplace(), nn.Conv2d(2 * width, width, 1)]
            layers += [kit.Residual(nn.Sequential(*inner), outer=pick(True, False))]
        elif kind == "depthwise":
            layers += [nn.BatchNorm2d(width), activation(), nn.Conv2d(width, width, 3, 1, 1, groups=width)]
        elif kind == "pool":
            layers += [pick(nn.MaxPool2d, nn.AvgPool2d)(2, 2, 1)]
        else:
            layers += [nn.Dropout(0.3)]
    layers += [nn.Flatten(2), kit.Swapped(), nn.LayerNorm(width), nn.Linear(width, 8), activation(), nn.Linear(8, 4)]
    net = kit.lively(nn.Sequential(*layers, kit.Swapped(), kit.Mean()))
    if pick(True, False, False):
        for parameter in list(net.parameters())[: draw(st.integers(1, 4))]:
            parameter.requires_grad_(False)
    return net, side


def spent(adaptation, copies: int) -> int:
    """What the scope counts, as measured."""
    measured = adaptation.measured
    return measured.saved_bytes + copies * measured.gradient_bytes


def check_plan(kit, data) -> None:
    """One random network, batch, method, scope and budget."""
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    net, side = draw_net(kit, data.draw)
    n = data.draw(st.integers(1, 9))
    x, y = torch.randn(n, 3, side, side), torch.arange(n) % 4
    method, scope = data.draw(st.sampled_from(METHODS)), data.draw(st.sampled_from(SCOPES))
    copies = 0 if scope == "saved" else 1 + data.draw(st.integers(0, 2))
    share, part = data.draw(st.floats(0.01, 1.05)), data.draw(st.integers(1, max(n - 1, 1)))
    options = {"method": method, "scope": scope, "optimizer_copies": max(copies - 1, 0)}
    exact = adapt(net, (x, y), method="lossless")
    budget = int(spent(exact, copies) * share)
    exact.undo()
    try:
        adaptation = kit.exactly(net, x, y, budget=budget, **options)
    except BudgetError as error:
        least = kit.smallest(error)
        assert least > budget
        adaptation = kit.exactly(net, x, y, budget=least, **options)
        assert spent(adaptation, copies) <= least
        adaptation.undo()
        with pytest.raises(BudgetError):
            adapt(net, (x, y), budget=least - 1, **options)
        return
    assert spent(adaptation, copies) <= budget
    kit.step(net, x, y)
    if n > 1:  # an odd last batch
        adaptation.request = dataclasses.replace(adaptation.request, x=x[:part], y=y[:part])
        assert adaptation.measure().saved_bytes <= adaptation.plan.predicted_bytes
    adaptation.undo()


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_plans(kit, data):
    check_plan(kit, data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_thousand_random_plans(kit, data):
    check_plan(kit, data)


def test_the_smallest_budget_holds_where_a_codec_is_worse_than_nothing(kit):
    """One bit for a batch of one misses the gradient by more than leaving the layer out does."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.3), nn.Flatten(2), kit.Swapped(), nn.LayerNorm(4)]
    layers += [nn.Linear(4, 8), nn.Hardswish(), nn.Linear(8, 4), kit.Swapped(), kit.Mean()]
    net, sample = kit.lively(nn.Sequential(*layers)), (torch.randn(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(BudgetError) as caught:
        adapt(net, sample, budget=68)
    least = kit.smallest(caught.value)
    assert least > 68
    kit.exactly(net, *sample, budget=least).undo()
    with pytest.raises(BudgetError):
        adapt(net, sample, budget=least - 1)


@pytest.mark.parametrize("method", METHODS)
def test_odd_batches_keep_no_more_and_larger_ones_are_refused(kit, method):
    net, (x, y) = kit.small_cnn(), kit.batch(8)
    adaptation = kit.exactly(net, x, y, budget=60_000, method=method)
    for n in (1, 3, 7):
        adaptation.request = dataclasses.replace(adaptation.request, x=x[:n], y=y[:n])
        assert adaptation.measure().saved_bytes <= adaptation.plan.predicted_bytes
    with pytest.raises(InputError, match="larger than planned"):
        net(torch.zeros(9, 3, 12, 12))
    with pytest.raises(InputError, match="larger than planned"):
        net(torch.zeros(2, 3, 13, 12))
    with torch.no_grad():
        assert net(torch.zeros(9, 3, 12, 12)).shape == (9, 4)


@pytest.mark.parametrize("method", ["auto", "asi", "low_bit"])
def test_a_bound_on_the_peak(kit, method):
    net, (x, y) = kit.small_cnn(), kit.batch(16)
    exact = adapt(net, (x, y), method="lossless")
    budget = int(exact.measured.peak_bytes * 0.9)
    exact.undo()
    try:
        adaptation = kit.exactly(net, x, y, budget=budget, method=method, scope="peak")
    except BudgetError as error:  # compressing needs room of its own
        budget = kit.smallest(error)
        adaptation = kit.exactly(net, x, y, budget=budget, method=method, scope="peak")
    assert adaptation.measured.peak_bytes <= budget


def test_a_budget_that_the_exact_forms_meet_costs_nothing(kit):
    net, (x, y) = kit.small_cnn(), kit.batch()
    want = kit.step(kit.frozen(net), x, y)
    adaptation = adapt(net, (x, y), budget="1MiB")
    assert kit.apart(want, kit.step(net, x, y)) < 1e-5
    assert not adaptation.plan.frozen


def test_auto_freezes_where_nothing_else_helps(kit):
    net, (x, y) = kit.small_cnn(), kit.batch()
    adaptation = kit.exactly(net, x, y, budget="4KiB")
    assert adaptation.plan.frozen
    assert adaptation.measured.saved_bytes <= 4096
    _, gradients = kit.step(net, x, y)
    assert any(gradient is not None for gradient in gradients.values())
    adaptation.undo()
    assert all(p.requires_grad for p in net.parameters())


def test_a_smaller_budget_costs_more_error(kit):
    net, (x, y) = kit.small_cnn(), kit.batch()
    want = kit.step(kit.frozen(net), x, y)[1]
    losses = []
    for budget in (60_000, 30_000, 12_000):
        adaptation = kit.exactly(net, x, y, budget=budget)
        got = kit.step(net, x, y)[1]
        adaptation.undo()
        losses.append(sum(float((want[n] - (0 if g is None else g)).square().sum()) for n, g in got.items()))
    assert losses == sorted(losses)


def test_a_budget_of_the_wrong_kind(kit):
    net, (x, y) = kit.small_cnn(), kit.batch()
    for budget in ("much", -1):
        with pytest.raises(InputError):
            adapt(net, (x, y), budget=budget)
