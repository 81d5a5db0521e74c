"""Resolution as a choice: on smaller images what runs, is extracted, computed, searched and saved is one network."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import palmette as pm
from palmette.device import DeviceProfile
from palmette.errors import InputError
from palmette.graph.capture import capture, example_of
from palmette.graph.inputs import with_batch
from palmette.meter.compute import macs, param_bytes
from palmette.meter.memory import peak_bytes
from palmette.supernet.latency import measure_latencies
from palmette.supernet.memory import MemoryModel
from palmette.supernet.optimum import Optimizer
from palmette.supernet.resolution import resized
from palmette.supernet.strategies import phases
from palmette.supernet.supernet import Supernet


@pytest.fixture
def net(mixed):
    return Supernet.from_model(*mixed, resolution=(8, 10)).eval()


def configs(net, count=6):
    rng = np.random.default_rng(0)
    sides = [net.max() | {"resolution": edge} for edge in net.space["resolution"].values]
    return [*sides, net.min(), *(net.sample(rng) for _ in range(count))]


@torch.no_grad()
def test_what_is_extracted_computes_on_small_images_what_is_active(net, mixed):
    model, x = mixed
    assert net.space["resolution"].values == (8, 10, 12)
    assert torch.equal(net(x), model(x))
    for config in configs(net):
        net.activate(config)
        small = net.extract()
        scaled = net.scaled(x)
        assert scaled.shape[-1] == config["resolution"] == example_of(small).shape[-1]
        torch.testing.assert_close(small(scaled), net(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(net(scaled), net(x), rtol=0, atol=0)  # what has its size already is left alone
    net.activate(net.max() | {"resolution": 8})
    torch.testing.assert_close(net(x), model(resized(x, 8)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operators", ["own", "core"])
def test_bytes_and_multiply_adds_are_those_of_the_extracted_network(net, operators):
    memory = MemoryModel(net, DeviceProfile(operators=operators))
    found = configs(net, 10)
    networks = [net.extract(c) for c in found]
    codes = memory.codes.encode(found)
    peaks = [peak_bytes(n, 1, hold_inputs=False, operators=operators) for n in networks]
    assert memory.peak_bytes(codes).tolist() == peaks
    assert memory.param_bytes(codes).tolist() == [param_bytes(n) for n in networks]
    assert memory.weights.macs(codes).tolist() == [macs(n, with_batch(example_of(n), 1)) for n in networks]
    assert sum(bytes_ for _, bytes_ in memory.per_step(found[0])) < sum(b for _, b in memory.per_step(found[2]))


def test_the_optimum_is_that_of_brute_force(tiny):
    net = Supernet.from_model(*tiny, resolution=(8, 12))
    free, rng = MemoryModel(net), np.random.default_rng(3)
    codes = np.array(list(itertools.product(*(range(len(c.values)) for c in net.space.choices))))
    peaks = free.peak_bytes(codes)
    chosen = set()
    for share in (0.05, 0.2, 0.5, 0.9):
        memory = MemoryModel(net, DeviceProfile(ram=int(np.quantile(peaks, share)), weights_in="flash"))
        weights = rng.normal(size=memory.codes.width)
        found = Optimizer(memory).best(weights)
        fits = codes[memory.fits(codes)]
        assert found.value == pytest.approx((memory.codes.mattering(fits) @ weights).max(), abs=1e-6)
        assert memory.fits(memory.codes.encode([found.config]))[0]
        chosen.add(found.config["resolution"])
    assert len(chosen) > 1


def test_a_table_of_latencies_knows_the_resolution(net, tmp_path):
    table = measure_latencies(net, count=12, path=tmp_path / "table.json", runtime="eager")
    assert table.entries["resolution"].keys() == {8, 10, 12}
    memory = MemoryModel(net, DeviceProfile(latency_ms=1e3), latency=table)
    assert np.isfinite(memory.latency_ms(memory.codes.encode(configs(net)))).all()


def test_batch_norms_are_measured_on_images_of_the_size(net, mixed):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, 12, 12, generator=generator)
    loader = DataLoader(TensorDataset(x, torch.zeros(32, dtype=torch.long)), batch_size=16)
    config = net.max() | {"resolution": 8}
    net.recalibrate(config, loader)
    first = net.extract(config).get_submodule("bn")
    convolved = torch.cat([mixed[0].stem(resized(part, 8)) for part in x.split(16)])
    torch.testing.assert_close(first.running_mean, convolved.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_saved_network_is_rebuilt_with_its_size(net, mixed, tmp_path):
    model, x = mixed
    small = net.extract(net.min())
    pm.save(small, tmp_path / "small.safetensors", source=model)
    back = pm.load(model, tmp_path / "small.safetensors")
    scaled = net.scaled(x, net.min())
    assert torch.equal(back(scaled), small(scaled))
    assert example_of(back).shape == scaled.shape
    assert peak_bytes(back) == peak_bytes(small)


def test_phases_leave_the_resolution_open(net):
    drawn = {draw(np.random.default_rng(i))["resolution"] for _, _, draw in phases(net.space)[:1] for i in range(30)}
    assert drawn == {8, 10, 12}


class Flat(nn.Module):
    """Reads every pixel by itself, so that no other size will do."""

    def __init__(self, reshape):
        super().__init__()
        self.conv, self.head, self.reshape = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 64, 5), reshape

    def forward(self, x):  # [B, 3, 8, 8] -> [B, 5]
        x = self.conv(x)
        return self.head(x.flatten(1) if self.reshape == "flatten" else x.view(-1, 1024))


@pytest.mark.parametrize("reshape", ["flatten", "view"])
@pytest.mark.parametrize("captured", [False, True])
def test_a_size_that_the_network_does_not_take_is_told(reshape, captured):
    model, x = Flat(reshape).eval(), torch.randn(4, 3, 8, 8)
    net = Supernet.from_model(capture(model, x) if captured else model, x, resolution=(4,))
    assert "resolution" not in net.max()
    assert "size" in net.static["resolution:4"]


def test_other_inputs_stay_as_they_are(transformer, mixed):
    net = Supernet.from_model(*transformer, resolution=(4,))
    assert net.static["resolution"] == "no input is a square image"
    for edges in ((0,), (64,), (-3, 8)):
        with pytest.raises(InputError, match="images of 12 pixels"):
            Supernet.from_model(*mixed, resolution=edges)
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    image, same, number = resized((torch.randn(2, 3, 8, 8), mask, 3), 4)
    assert image.shape == (2, 3, 4, 4)
    assert same is mask
    assert number == 3
