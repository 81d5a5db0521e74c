"""WASI: the thin step against a dense twin in float64, and training through the factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import palmette as pm
from palmette.errors import InputError
from palmette.ondevice.wasi import FactoredLinear, factors, iterated, thin_step


def random_step(seed, outputs=14, inputs=11, rank=4, energy=0.9):
    generator = torch.Generator().manual_seed(seed)
    weight, t, u = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((outputs, inputs), (outputs, rank), (inputs, rank))
    )
    return factors(weight, energy), [(t, torch.linalg.qr(u)[0])]


@given(seed=st.integers(0, 10_000), lagged=st.booleans(), rate=st.floats(0.0, 1.0), count=st.integers(1, 3))
def test_the_thin_step_is_the_dense_one(seed, lagged, rate, count):
    (left, right), gradient = random_step(seed)
    gradient = gradient * count
    whole = left @ right - rate * sum(t @ u.T for t, u in gradient)
    thin, dense = thin_step(left, right, gradient, rate, lagged=lagged), iterated(whole, left, lagged=lagged)
    assert torch.allclose(thin[0] @ thin[1], dense[0] @ dense[1], atol=1e-9)
    assert torch.allclose(thin[0].T @ thin[0], torch.eye(left.shape[1], dtype=torch.float64), atol=1e-9)


def test_the_published_recursion_as_the_specification_writes_it():
    (left, right), [(t, u)] = random_step(3)
    rate = 0.3
    new_right = right.T @ (left.T @ left) - rate * u @ (t.T @ left)
    moved = left @ (right @ new_right) - rate * t @ (u.T @ new_right)
    got = thin_step(left, right, [(t, u)], rate, lagged=True)
    assert torch.allclose(got[1].T, new_right, atol=1e-12)
    assert torch.allclose(got[0] @ (got[0].T @ moved), moved, atol=1e-9)


def test_a_step_projected_on_the_new_basis_is_nearer_than_the_lagged_one():
    (left, right), gradient = random_step(1)
    whole = left @ right - 0.5 * gradient[0][0] @ gradient[0][1].T
    gaps = []
    for lagged in (False, True):
        new_left, new_right = thin_step(left, right, gradient, 0.5, lagged=lagged)
        gaps.append(float((whole - new_left @ new_right).norm()))
    assert gaps[0] <= gaps[1]


def test_without_a_step_nothing_moves():
    (left, right), gradient = random_step(2)
    new_left, new_right = thin_step(left, right, gradient, 0.0)
    assert torch.allclose(new_left @ new_right, left @ right, atol=1e-10)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.parametrize("config", [{}, {"error_feedback": True}, {"reproduce": True}])
def test_it_trains_in_factors_and_undo_gives_their_product(config):
    model, x, y = mlp(), torch.randn(32, 24), torch.arange(32) % 4
    adaptation = pm.adapt(model, (x, y), F.cross_entropy, budget="8KiB", method="wasi", config=config)
    assert adaptation.measured.saved_bytes == adaptation.plan.predicted_bytes
    swapped = [module for module in model if isinstance(module, FactoredLinear)]
    assert swapped
    assert not any(isinstance(module, nn.Linear) and module.weight.numel() == 0 for module in model)
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not config.get("reproduce"):  # one step late, the published form may wander at this rate
        assert losses[-1] < losses[0]
    with torch.no_grad():
        before = model(x)
    adaptation.undo()
    assert all(isinstance(module, nn.Linear | nn.ReLU) for module in model)
    with torch.no_grad():
        assert torch.allclose(model(x), before, atol=1e-5)


def test_momentum_is_refused():
    model, x, y = mlp(), torch.randn(32, 24), torch.arange(32) % 4
    adaptation = pm.adapt(model, (x, y), F.cross_entropy, budget="8KiB", method="wasi")
    with pytest.raises(InputError, match="plain SGD"):
        adaptation.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    with pytest.raises(InputError, match="plain SGD"):
        adaptation.optimizer(torch.optim.Adam, lr=0.1)


def test_a_model_without_linear_layers_is_refused_and_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
    x = torch.randn(4, 1, 5, 5)
    with pytest.raises(InputError, match="no linear layer"):
        pm.adapt(model, (x, None), lambda out, _: out.square().mean(), budget="1MiB", method="wasi")
    assert "forward" not in model.__dict__


def adapted(budget="8KiB"):
    model, x, y = mlp(), torch.randn(32, 24), torch.arange(32) % 4
    adaptation = pm.adapt(model, (x, y), F.cross_entropy, budget=budget, method="wasi")
    parts = [module for module in model if isinstance(module, FactoredLinear)]
    return model, (x, y), adaptation, parts


@pytest.mark.parametrize("how", ["optimizer", "model", "zeros"])
def test_cleared_gradients_move_nothing_and_do_not_pile_up(how):
    model, (x, y), adaptation, parts = adapted()
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0)

    def clear():
        (model if how == "model" else optimizer).zero_grad(set_to_none=how != "zeros")

    for _ in range(4):
        clear()
        F.cross_entropy(model(x), y).backward()
    assert all(len(part.pending) == 1 for part in parts)
    before = [part.dense() for part in parts]
    clear()
    optimizer.step()
    for part, old in zip(parts, before, strict=True):
        assert torch.allclose(part.dense(), old, atol=1e-5)


def test_clipping_reaches_the_factors():
    model, (x, y), adaptation, parts = adapted()
    optimizer = adaptation.optimizer(torch.optim.SGD, lr=1.0)
    before = [part.dense() for part in parts]
    (1e4 * F.cross_entropy(model(x), y)).backward()
    torch.nn.utils.clip_grad_norm_(adaptation.parameters(), 1e-6)
    optimizer.step()
    for part, old in zip(parts, before, strict=True):
        assert float((part.dense() - old).norm()) < 1e-3


def test_two_micro_batches_are_one_batch():
    moved = []
    for pieces in (1, 2):
        model, (x, y), adaptation, parts = adapted("64KiB")
        optimizer = adaptation.optimizer(torch.optim.SGD, lr=0.1)
        for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            (F.cross_entropy(model(a), b) / pieces).backward()
        assert all(len(part.pending) == pieces for part in parts)
        optimizer.step()
        moved.append([part.dense() for part in parts])
    for one, two in zip(*moved, strict=True):
        assert torch.allclose(one, two, atol=0.02)
