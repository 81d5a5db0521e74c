"""NSGA-II by Optuna: nothing that does not fit, nothing twice, one study for several processes, and Ray for judging."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from palmette.device import DeviceProfile
from palmette.errors import BudgetError, InputError, RunError
from palmette.supernet.evolution import evolve, front, nearest_within
from palmette.supernet.judge import Judge
from palmette.supernet.memory import MemoryModel
from palmette.supernet.sampling import start_of
from palmette.supernet.search import drawn_within
from palmette.supernet.space import key_of
from palmette.supernet.specialize import specialize
from palmette.supernet.supernet import Supernet


@pytest.fixture(scope="module")
def net(nets):
    return Supernet.from_model(nets.trained_like(nets.Mixed()), torch.randn(2, 3, 12, 12))


def listed(net):
    return np.array(list(itertools.product(*(range(len(c.values)) for c in net.space.choices))))


def half(net, **options):
    memory = MemoryModel(net)
    peaks = memory.peak_bytes(listed(net))
    return MemoryModel(net, DeviceProfile(name="half", ram=int(np.median(peaks)), weights_in="flash", **options))


def crossed(net):
    """A value with interactions, which no sum over choices says."""
    weights = np.random.default_rng(0).normal(size=(len(net.space), len(net.space)))

    def value(config):
        share = np.array([c.values.index(config[c.name]) / max(1, len(c.values) - 1) for c in net.space.choices])
        return float(1 / (1 + np.exp(-share @ weights @ share)))

    return value


def counted(value):
    seen = []

    def measure(configs):
        seen.extend(map(key_of, configs))
        return [value(c) for c in configs]

    return measure, seen


def test_nothing_is_measured_twice_or_does_not_fit(net):
    memory = half(net)
    measure, seen = counted(crossed(net))
    found = evolve(memory, measure, trials=60, population=12, seed=1)
    assert len(seen) == len(set(seen)) == len(found) == 60
    assert all(f.ram_bytes <= memory.profile.ram_bytes for f in found)
    again, _ = counted(crossed(net))
    assert evolve(memory, again, trials=60, population=12, seed=1) == found


def test_the_front_comes_near_that_of_all_networks(net):
    memory, value = half(net), crossed(net)
    codes = listed(net)
    codes = codes[memory.fits(codes)]
    every = [memory.net.space.canonical(memory.codes.decode(code)) for code in codes]
    true = max(map(value, every))
    measure, _ = counted(value)
    found = evolve(memory, measure, trials=150, population=20, seed=0)
    random = [value(c) for c in drawn_within(memory, len(found), 0)]
    best = max(f.value for f in found)
    assert best >= max(random) - 1e-3
    assert best >= true - 0.02
    points = front(found)
    assert [p.ram_bytes for p in points] == sorted(p.ram_bytes for p in points)
    assert [p.value for p in points] == sorted(p.value for p in points)
    assert points[-1].value == best


def test_a_space_smaller_than_the_number_of_trials_ends(nets):
    net = Supernet.from_model(nets.trained_like(nets.Tiny()), torch.randn(2, 3, 16, 16))
    measure, seen = counted(crossed(net))
    found = evolve(MemoryModel(net), measure, trials=500, population=8)
    assert len(found) == len(seen) == net.space.size()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_nearest_network_fits_and_is_the_wanted_one_where_that_fits(net, data):
    memory = half(net)
    wanted = np.array([data.draw(st.integers(0, len(c.values) - 1)) for c in net.space.choices])
    code = nearest_within(memory, wanted, start_of(memory))
    assert memory.fits(code[None])[0]
    assert (code <= np.maximum(wanted, 0)).all()
    if memory.fits(wanted[None])[0]:
        assert (code == wanted).all()


@pytest.mark.parametrize("storage", ["journal", pytest.param("sqlite", marks=pytest.mark.slow)])
def test_a_stopped_study_goes_on(net, tmp_path, storage):
    place = tmp_path / "deep" / "study.log" if storage == "journal" else f"sqlite:///{tmp_path}/study.db"
    memory = half(net)
    measure, first = counted(crossed(net))
    evolve(memory, measure, trials=20, population=10, storage=place)
    measure, then = counted(crossed(net))
    found = evolve(memory, measure, trials=45, population=10, storage=place)
    assert len(found) == 45
    assert not set(first) & set(then)
    assert len(first) + len(then) == 45
    with pytest.raises(InputError, match="another supernet, other weights, another device or goal"):
        evolve(MemoryModel(net), measure, trials=5, storage=place)


SCRIPT = """
import importlib.util, sys, torch
from pathlib import Path
from palmette.device import DeviceProfile
from palmette.supernet.evolution import evolve
from palmette.supernet.memory import MemoryModel
from palmette.supernet.supernet import Supernet
spec = importlib.util.spec_from_file_location("nets", sys.argv[1])
nets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nets)
torch.manual_seed(0)
net = Supernet.from_model(nets.trained_like(nets.Mixed()), torch.randn(2, 3, 12, 12))
def measure(configs):
    return [sum(c.values()) / (1 + sum(net.max().values())) for c in configs]
found = evolve(MemoryModel(net), measure, trials=40, population=10, storage=sys.argv[2])
print(len(found))
"""


def test_two_processes_share_a_study(nets, tmp_path):
    place, file = tmp_path / "study.log", Path(__file__).with_name("nets.py")
    commands = [[sys.executable, "-c", SCRIPT, str(file), str(place)] for _ in range(2)]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
    said = [int(p.communicate(timeout=240)[0]) for p in running]
    assert said == [40, 40]
    torch.manual_seed(0)
    memory = MemoryModel(Supernet.from_model(nets.trained_like(nets.Mixed()), torch.randn(2, 3, 12, 12)))
    found = evolve(memory, lambda _: [], trials=40, population=10, storage=place)
    assert len({key_of(f.config) for f in found}) == 40


def test_what_cannot_be_is_refused(net, tmp_path):
    measure, seen = counted(crossed(net))
    for options in ({"trials": 0}, {"population": 1}, {"goals": ()}, {"goals": ("speed",)}):
        with pytest.raises(InputError, match="out of bounds"):
            evolve(MemoryModel(net), measure, **options)
    with pytest.raises(BudgetError):
        evolve(MemoryModel(net, DeviceProfile(ram=8)), measure)
    with pytest.raises(RunError, match="storage of the study"):
        evolve(MemoryModel(net), measure, storage="nosuchdatabase://here")
    assert not seen


@pytest.fixture
def blobs():
    x, y = torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(0)), torch.arange(96) % 4
    train = DataLoader(TensorDataset(x[:64], y[:64]), batch_size=16, shuffle=True)
    return train, DataLoader(TensorDataset(x[64:], y[64:]), batch_size=32)


def test_specialize_by_evolution_and_again_from_its_folder(net, blobs, tmp_path):
    profile = half(net).profile
    options = {"profile": profile, "measurements": 12, "batches": 1, "searcher": "nsga2"}
    options["storage"] = tmp_path / "study.log"
    found = specialize(net, *blobs, run_dir=tmp_path / "run", **options)
    assert len(found.search.found) == 12
    assert found.found.ram_bytes <= profile.ram_bytes
    again = specialize(net, *blobs, run_dir=tmp_path / "run", resume=True, **options)
    x = next(iter(blobs[1]))[0]
    assert again.config == found.config
    assert torch.equal(again.model(x), found.model(x))  # batch norms are measured again, and alike
    with pytest.raises(InputError, match="'genetic' is out of bounds"):
        specialize(net, *blobs, profile=profile, searcher="genetic")


@pytest.mark.slow
def test_workers_of_ray_judge_as_this_process_does(nets, blobs, tmp_path):
    net = Supernet.from_model(nets.trained_like(nets.Mixed()), torch.randn(2, 3, 12, 12), resolution=(8,))
    rng = np.random.default_rng(0)
    configs = [net.max(), net.min(), *(net.sample(rng) for _ in range(2))]
    here = Judge(net, *blobs, batches=2)
    away = Judge(net, *blobs, batches=2, ray="local", folder=tmp_path)
    found = here.evaluations(configs, blobs[1], "val")
    there = away.evaluations(configs, blobs[1], "val")
    assert [f.accuracy for f in found] == [f.accuracy for f in there]
    assert [f.loss for f in found] == pytest.approx([f.loss for f in there], rel=1e-4)
    assert away(configs) == here(configs)  # from the folder
