"""Kernels that are learned from larger ones: centres at first, extracted as they run, trained with the supernet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import palmette as pm
from palmette.supernet.supernet import Supernet
from palmette.supernet.training import train_supernet
from palmette.train.config import HealConfig


@pytest.fixture
def net(mixed):
    return Supernet.from_model(*mixed, transforms=True).eval()


def small(net, **sizes):
    return net.max() | {name: sizes.get(name, min(net.space[name].values)) for name in kernels(net)}


def kernels(net):
    return [choice.name for choice in net.space.of_kind("kernel")]


@torch.no_grad()
def stirred(net):
    for matrix in net.transforms.parameters():
        matrix += 0.1 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(len(matrix)))
    return net


def test_a_matrix_for_each_step_of_each_kernel(net):
    shapes = {name: tuple(p.shape) for name, p in net.transforms.matrices.items()}
    assert shapes == {"depthwise:5-3": (9, 9), "right:7-5": (25, 25), "right:5-3": (9, 9)}


@torch.no_grad()
def test_they_begin_as_centres(net, mixed):
    plain = Supernet.from_model(*mixed).eval()
    for config in (net.max(), small(net)):
        net.activate(config)
        plain.activate(config)
        assert torch.equal(net(mixed[1]), plain(mixed[1]))


@torch.no_grad()
def test_what_is_extracted_is_what_runs(net, mixed, tmp_path):
    model, x = mixed
    before, rng = net(x), np.random.default_rng(0)
    stirred(net)
    assert torch.equal(net(x), before)  # the largest has no smaller kernel
    for config in (small(net), net.min(), *(net.sample(rng) for _ in range(8))):
        net.activate(config)
        alone = net.extract()
        torch.testing.assert_close(alone(x), net(x), rtol=1e-5, atol=1e-6)
        pm.save(alone, tmp_path / "net.safetensors", source=model)
        assert torch.equal(pm.load(model, tmp_path / "net.safetensors")(x), alone(x))
    assert not any("matrices" in name for name in alone.state_dict())


@torch.no_grad()
def test_steps_are_chained_over_the_channels(net):
    stirred(net)
    weight = net.network.get_submodule("right").weight
    seven = net.transforms.matrices["right:7-5"], net.transforms.matrices["right:5-3"]
    out = torch.empty(*weight.shape[:2], 3, 3)
    for i, j in np.ndindex(*weight.shape[:2]):
        five = (seven[0] @ weight[i, j, 1:6, 1:6].flatten()).view(5, 5)
        out[i, j] = (seven[1] @ five[1:4, 1:4].flatten()).view(3, 3)
    torch.testing.assert_close(net.transforms("right", weight, 3), out)
    assert torch.equal(net.transforms("right", weight, 7), weight)


def test_they_learn_with_the_supernet_and_resume(mixed, tmp_path):
    model, x = mixed
    data = DataLoader(TensorDataset(torch.randn(16, 3, 12, 12), torch.arange(16) % 5), batch_size=8)
    one = Supernet.from_model(model, x, transforms=True)
    train_supernet(one, data, HealConfig(epochs=2, lr=0.05), checkpoint=tmp_path / "net.safetensors")
    assert all(not torch.equal(p, torch.eye(len(p))) for p in one.transforms.parameters())
    again = Supernet.from_model(model, x, transforms=True)
    train_supernet(again, data, HealConfig(epochs=2, lr=0.05), checkpoint=tmp_path / "net.safetensors")
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), again.parameters(), strict=True))


def test_a_network_without_kernels_has_none(transformer):
    assert Supernet.from_model(*transformer, transforms=True).transforms is None
