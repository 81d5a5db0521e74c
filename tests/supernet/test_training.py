"""Training with several networks in a step: what is drawn, what learns, and that it goes on where it stopped."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from palmette.device import DeviceProfile
from palmette.errors import BudgetError, InputError
from palmette.supernet.memory import MemoryModel
from palmette.supernet.sampling import check_feasible, sample_balanced, sample_within
from palmette.supernet.strategies import STRATEGIES, make_strategy, phases
from palmette.supernet.supernet import Supernet
from palmette.supernet.training import train_supernet
from palmette.train.config import HealConfig


@pytest.fixture
def task():
    """Images whose label is the colour that is brightest, or none."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(192, 3, 8, 8, generator=generator), torch.arange(192) % 4
    for i, label in enumerate(y.tolist()):
        x[i, label : label + 1] += 1.0
    return x, y


def loader_of(task, size=32):
    return DataLoader(TensorDataset(*task), batch_size=size, shuffle=True, generator=torch.Generator().manual_seed(0))


def supernet(nets):
    torch.manual_seed(0)
    return Supernet.from_model(nets.Tiny().eval(), torch.randn(2, 3, 8, 8))


def loss_of(net, config, task):
    net.eval()
    net.recalibrate(config, [(task[0], None)], batches=1)
    with torch.no_grad(), net.running(config):
        return float(torch.nn.functional.cross_entropy(net(task[0]), task[1]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_all_networks(nets, task, strategy):
    net = supernet(nets)
    ends = (net.min(), net.max())
    before = [loss_of(net, config, task) for config in ends]
    history = train_supernet(net, loader_of(task), HealConfig(epochs=8, lr=0.05), strategy=strategy, seed=1)
    after = [loss_of(net, config, task) for config in ends]
    assert after[1] < 0.8 * before[1]
    assert after[0] < 0.95 * before[0]
    assert net.active == net.max()
    assert {"epoch", "loss", "lr"} <= history[0].keys()


def test_the_sandwich_holds_both_ends_and_draws_by_step_alone(nets):
    net = supernet(nets)
    a, b = (make_strategy(net, "sandwich", seed=3, count=2, steps=10, start=0.5) for _ in range(2))
    steps = [a.step(i) for i in range(20)]
    assert [b.step(i) for i in reversed(range(20))] == steps[::-1]
    assert all(s.first == net.max() and s.others[0] == net.min() and len(s.others) == 3 for s in steps)
    assert len({tuple(sorted(c.items())) for s in steps for c in s.others[1:]}) > 5
    assert make_strategy(net, "sandwich", seed=4, count=2, steps=10, start=0.5).step(0) != steps[0]


def test_delayed_shrinking_starts_late_and_fades_in(nets):
    strategy = make_strategy(supernet(nets), "delayed", seed=0, count=2, steps=20, start=0.5)
    assert [len(strategy.step(i).others) for i in (0, 9, 10, 19)] == [0, 0, 3, 3]
    assert [strategy.step(i).weight for i in (10, 14, 19)] == [0.1, 0.5, 1.0]


def test_phases_open_one_side_after_the_other(nets):
    net = Supernet.from_model(nets.Mixed().eval(), torch.randn(2, 3, 12, 12))
    found = phases(net.space)
    assert [name for name, _, _ in found] == ["kernel", "depth_1", "depth_2", "width_1", "width_2"]
    rng = np.random.default_rng(0)
    most = net.max()
    for name, _, draw in found:
        drawn = [draw(rng) for _ in range(30)]
        changed = {net.space[k].kind for c in drawn for k, v in c.items() if v != most[k]}
        assert (
            changed
            <= {"kernel": {"kernel"}, "depth": {"kernel", "depth"}, "width": {"kernel", "depth", "width"}}[
                name.split("_")[0]
            ]
        )
        assert name.split("_")[0] in changed


def test_a_resumed_training_ends_with_the_same_weights(nets, task, tmp_path):
    config = HealConfig(epochs=2, lr=0.05, checkpoint_every_steps=1)
    whole, cut = supernet(nets), supernet(nets)
    train_supernet(whole, loader_of(task), config, checkpoint=tmp_path / "whole.safetensors")

    class Killed(Exception):
        pass

    class Breaking(DataLoader):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if i == 4:
                    raise Killed
                yield batch

    loader = loader_of(task)
    breaking = Breaking(loader.dataset, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Killed):
        train_supernet(cut, breaking, config, checkpoint=tmp_path / "cut.safetensors")
    fresh = supernet(nets)
    train_supernet(fresh, loader_of(task), config, checkpoint=tmp_path / "cut.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), fresh.parameters(), strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("strategy", ["sandwich", "random"])
def test_two_processes_draw_the_same_and_end_alike(tmp_path, strategy):
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), strategy, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len({json.dumps(config) for config in first["drawn"]}) > 3


def test_only_slices_that_were_drawn_move_without_decay(nets, task):
    net = supernet(nets)
    before = copy.deepcopy(net.network)
    smallest = net.min()
    net.activate(smallest)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.train()(task[0]).square().mean().backward()
    optimizer.step()
    small = net.extract(smallest)
    moved = sum(int((a != b).sum()) for a, b in zip(net.network.parameters(), before.parameters(), strict=True))
    assert 0 < moved <= sum(p.numel() for p in small.parameters())


def test_bad_options_are_refused(nets, task):
    net = supernet(nets)
    for options in ({"strategy": "sandwhich"}, {"sub_nets": 0}, {"start": 1.0}):
        with pytest.raises(InputError):
            train_supernet(net, loader_of(task), **options)


# -- configurations that fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_what_is_sampled_fits(nets, seed):
    net = Supernet.from_model(nets.Mixed().eval(), torch.randn(2, 3, 12, 12))
    free, rng = MemoryModel(net), np.random.default_rng(seed)
    ends = free.codes.encode([net.min(), net.max()])
    (low, high), (few, many) = free.peak_bytes(ends), free.param_bytes(ends)
    profile = DeviceProfile(
        ram=int(rng.integers(low, high + 1)), flash=int(rng.integers(few, many + 1)), weights_in="flash"
    )
    memory = MemoryModel(net, profile)
    codes = sample_within(memory, 200, rng)
    assert memory.fits(codes).all()
    assert len(np.unique(codes, axis=0)) > 1
    assert memory.fits(sample_balanced(memory, 20, rng)).all()


def test_balanced_samples_are_spread_over_the_peaks(nets):
    net = Supernet.from_model(nets.Mixed().eval(), torch.randn(2, 3, 12, 12))
    memory, rng = MemoryModel(net, DeviceProfile(weights_in="flash")), np.random.default_rng(0)
    peaks = memory.peak_bytes(sample_balanced(memory, 100, rng))
    uniform = memory.peak_bytes(memory.codes.encode([net.sample(rng) for _ in range(100)]))
    assert np.percentile(peaks, 25) < np.percentile(uniform, 25)


def test_what_cannot_fit_is_said_with_what_binds(nets):
    net = supernet(nets)
    least = int(MemoryModel(net).peak_bytes(MemoryModel(net).codes.encode([net.min()]))[0])
    with pytest.raises(BudgetError, match=rf"smallest needs {least:,} bytes of RAM .* most is alive at '.+'"):
        check_feasible(MemoryModel(net, DeviceProfile(name="toy", ram=least - 1, weights_in="flash")))
    check_feasible(MemoryModel(net, DeviceProfile(ram=least, weights_in="flash")))
    with pytest.raises(BudgetError, match="bytes of parameters, the flash holds 100"):
        sample_within(MemoryModel(net, DeviceProfile(flash=100)), 1, np.random.default_rng(0))
