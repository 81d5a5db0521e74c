"""Trained slices against the full gradient: the same numbers for every layer, and an optimizer that follows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import palmette as pm
from palmette.ondevice.layer import conv_layer, linear_layer
from palmette.ondevice.plan import Slice
from palmette.ondevice.slices import Channels, Rows, moved_state, slice_bytes, slice_of

SELECTIONS = ["trady", "medyate", "sparse_update", "velocity", "neq", "scotti"]

LAYERS = {
    "dense": ((2, 6, 7, 7), (8, 6, 3, 3), {"padding": 1}),
    "strided": ((2, 6, 7, 8), (8, 6, 3, 3), {"stride": 2}),
    "pointwise": ((2, 6, 5, 5), (8, 6, 1, 1), {}),
    "depthwise": ((2, 6, 7, 7), (6, 1, 3, 3), {"padding": 1, "groups": 6}),
    "depthwise strided": ((2, 6, 9, 8), (6, 1, 5, 3), {"stride": 2, "padding": 2, "groups": 6}),
    "multiplier": ((2, 6, 7, 7), (12, 1, 3, 3), {"groups": 6}),
    "conv1d": ((2, 6, 9), (8, 6, 3), {}),
}


def pair(name):
    x_shape, weight_shape, options = LAYERS[name]
    layer = conv_layer(torch.Size(x_shape), torch.Size(weight_shape), **options)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(x_shape, dtype=torch.float64, generator=generator)
    return layer, x, torch.randn(layer.out_shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("codec", [Channels(axis=1, index=(1, 4)), Rows(index=(0, 3, 5))])
def test_a_slice_has_the_full_gradients_numbers(name, codec):
    layer, x, grad = pair(name)
    full = layer.weight_gradient(x, grad)
    part = slice_of(codec, layer)
    got = codec.weight_gradient(codec.encode(x, {}), layer, grad)
    assert torch.allclose(got, full.index_select(part.axis, torch.tensor(part.index)), atol=1e-10)
    assert got.numel() * 4 == slice_bytes(codec, layer, 4)


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 6), (2, 3, 4, 6)])
def test_slices_of_linear_layers(shape):
    layer = linear_layer(torch.Size(shape), torch.Size((8, 6)))
    x, grad = torch.randn(shape, dtype=torch.float64), torch.randn((*shape[:-1], 8), dtype=torch.float64)
    full = layer.weight_gradient(x, grad)
    columns, rows = Channels(axis=len(shape) - 1, index=(0, 5)), Rows(index=(2, 7))
    assert torch.allclose(columns.weight_gradient(columns.encode(x, {}), layer, grad), full[:, [0, 5]])
    assert torch.allclose(rows.weight_gradient(rows.encode(x, {}), layer, grad), full[[2, 7]])


@pytest.mark.parametrize("groups", [2, 3])
def test_channels_of_a_grouped_convolution_carry_the_part_of_the_gradient_that_they_make(groups):
    layer = conv_layer(torch.Size((2, 6, 5, 5)), torch.Size((6, 6 // groups, 3, 3)), groups=groups)
    x, grad = torch.randn(2, 6, 5, 5, dtype=torch.float64), torch.randn(layer.out_shape, dtype=torch.float64)
    codec = Channels(axis=1, index=(1, 4))
    kept = torch.zeros_like(x).index_copy_(1, torch.tensor([1, 4]), x[:, [1, 4]])
    part = slice_of(codec, layer)
    want = layer.weight_gradient(kept, grad).index_select(part.axis, torch.tensor(part.index))
    assert torch.allclose(codec.weight_gradient(codec.encode(x, {}), layer, grad), want)


@given(
    before=st.sets(st.integers(0, 9), min_size=1), after=st.sets(st.integers(0, 9), min_size=1), axis=st.integers(0, 1)
)
def test_optimizer_state_moves_with_its_channel(before, after, axis):
    old, new = Slice(axis, tuple(sorted(before))), Slice(axis, tuple(sorted(after)))
    whole = torch.zeros(10, 10).index_fill(axis, torch.tensor(old.index), 1.0) * torch.arange(1.0, 101).view(10, 10)
    value = whole.index_select(axis, torch.tensor(old.index))
    moved = moved_state(value, old, new, whole.index_select(axis, torch.tensor(new.index)).shape)
    assert torch.equal(moved, whole.index_select(axis, torch.tensor(new.index)))


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(),
        nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(),
        nn.Linear(24, 4),
    )  # fmt: skip


@pytest.mark.parametrize("method", SELECTIONS)
def test_the_compact_gradients_are_slices_of_the_networks(method):
    model, x, y = small(), torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    F.cross_entropy(model(x), y).backward()
    full = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    adaptation = pm.adapt(model, (x, y), F.cross_entropy, budget="24KiB", method=method)
    adaptation.optimizer(torch.optim.SGD, lr=0.1)
    F.cross_entropy(model(x), y).backward()
    assert adaptation.plan.slices
    for key, part in adaptation.plan.slices.items():
        want = full[f"{key}.weight"].index_select(part.axis, torch.tensor(part.index))
        assert torch.allclose(adaptation.engine.tuned[key].grad, want, atol=1e-6), key
        assert model.get_parameter(f"{key}.weight").grad is None


@pytest.mark.parametrize("method", SELECTIONS)
def test_steps_of_slices_are_those_of_plain_sgd_on_these_channels(method):
    model, x, y = small(), torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    twin = small()
    adaptation = pm.adapt(model, (x, y), F.cross_entropy, budget="24KiB", method=method)
    parts = dict(adaptation.plan.slices)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        twin.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                mask = torch.zeros_like(p) if name not in trained else torch.ones_like(p)
                part = parts.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
                if part is not None:
                    mask.index_fill_(part.axis, torch.tensor(part.index), 1.0)
                velocity[name] = 0.9 * velocity[name] + p.grad * mask
                p -= 0.1 * velocity[name]
    adaptation.undo()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name


def test_a_selection_without_its_optimizer_is_told_so():
    model, x, y = small(), torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    pm.adapt(model, (x, y), F.cross_entropy, budget="24KiB", method="trady")
    model(x)
    with pytest.warns(UserWarning, match=r"adaptation\.optimizer"):
        model(x)


def test_channels_change_with_the_epochs_and_weights_that_leave_keep_what_they_learned():
    model, x, y = small(), torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    adaptation = pm.adapt(model, (x, y), F.cross_entropy, budget="2KiB", method="trady", config={"coverage": 1.0})
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    seen = set()
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        seen.add(tuple(sorted((key, part.index) for key, part in adaptation.plan.slices.items())))
        adaptation.next_epoch()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert adaptation.measure().saved_bytes == adaptation.plan.predicted_bytes <= 2 * 1024
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in adaptation.parameters()}
    assert len(seen) > 1


def prepared(method="trady", budget="24KiB"):
    model, x, y = small(), torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    adaptation = pm.adapt(model, (x, y), F.cross_entropy, budget=budget, method=method)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return model, (x, y), adaptation, step


def test_weights_that_the_user_loads_are_not_overwritten():
    model, _, adaptation, step = prepared()
    best = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        step()
    model.load_state_dict(best)
    adaptation.undo()
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    step()  # the old optimizer still holds the compact parameters
    for key in adaptation.plan.slices:
        assert torch.equal(model.state_dict()[f"{key}.weight"], best[f"{key}.weight"])


def test_the_models_own_zero_grad_reaches_the_compact_parameters():
    model, (x, y), adaptation, _ = prepared()
    F.cross_entropy(model(x), y).backward()
    assert any(tuned.grad is not None for tuned in adaptation.engine.tuned.values())
    model.zero_grad()
    assert all(tuned.grad is None for tuned in adaptation.engine.tuned.values())


def test_measuring_leaves_compact_gradients():
    model, (x, y), adaptation, _ = prepared()
    F.cross_entropy(model(x), y).backward()
    before = {key: tuned.grad.clone() for key, tuned in adaptation.engine.tuned.items()}
    adaptation.measure()
    assert all(torch.equal(tuned.grad, before[key]) for key, tuned in adaptation.engine.tuned.items())


def test_selection_cannot_bound_the_peak_and_says_so():
    with pytest.raises(pm.PalmetteError, match="peak"):
        pm.adapt(small(), (torch.randn(8, 3, 8, 8), torch.arange(8) % 4), budget="1MiB", scope="peak", method="neq")


class Forked(nn.Module):
    """Two convolutions that read one tensor, and a smooth activation that keeps its input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.d, self.l = nn.Conv2d(8, 16, 3, 2, 1, groups=2), nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.n(self.a(x)))
        x = F.hardswish(self.d(F.relu(self.b(x) + self.c(x))))
        return self.l(x.mean((2, 3)))


@pytest.mark.parametrize("scope", ["saved", "saved+gradients+optimizer"])
@pytest.mark.parametrize("method", SELECTIONS)
def test_no_epoch_of_a_selection_exceeds_its_budget(method, scope):
    x, y = torch.randn(8, 3, 12, 12), torch.arange(8)
    for budget in (6000, 20_000, 40_000, 90_000):
        try:
            adaptation = pm.adapt(Forked(), (x, y), F.cross_entropy, budget, scope=scope, method=method)
        except pm.PalmetteError:
            continue
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(adaptation.model(x), y).backward()
            optimizer.step()
            adaptation.next_epoch()
            found = adaptation.measure()
            gradients = found.gradient_bytes if scope != "saved" else 0
            assert found.saved_bytes + gradients <= budget
