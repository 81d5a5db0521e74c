"""The tables of a training step say what `measure_training` measures; bounds, samples and optima follow from them."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import palmette as pm
from palmette.cli import main
from palmette.device import DeviceProfile
from palmette.errors import BudgetError, InputError
from palmette.supernet.memory import MemoryModel
from palmette.supernet.optimum import Optimizer
from palmette.supernet.sampling import check_feasible, sample_within
from palmette.supernet.specialize import specialize
from palmette.supernet.supernet import Supernet
from palmette.supernet.train_trace import measured_step, target_of


class Skips(nn.Module):
    """Batch norms, a max pool, dropout and a chain of blocks whose input another part reads too; one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.chain = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.GELU(), nn.Dropout(0.2), nn.Conv2d(24, 16, 1))
            for _ in range(3)
        )
        self.merge, self.twice = nn.Conv2d(32, 24, 3, padding=1), nn.Linear(24, 24)
        self.head = nn.Linear(24, 4)

    def forward(self, x):  # [B, 3, H, W] -> [B, 4]
        x = stem = F.max_pool2d(F.silu(self.norm(self.stem(x))), 2)
        for block in self.chain:
            x = x + block(x)
        x = F.leaky_relu(self.merge(torch.cat([x, stem], 1))).mean((2, 3))
        return self.head(self.twice(torch.tanh(self.twice(x))))


class PostNorm(nn.Module):
    """Blocks whose norm and activation stand behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 24, 3, padding=1, bias=False),
                nn.BatchNorm2d(24),
                nn.ReLU(),
                nn.Conv2d(24, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x):  # [B, 3, H, W] -> [B, 4]
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def measured(network, x):
    network = network.train()
    with torch.no_grad():
        y = target_of(network(x))
    return pm.measure_training(network, x, y).peak_bytes


def some(net, count, seed=0):
    rng = np.random.default_rng(seed)
    return [net.max(), net.min(), *(net.sample(rng) for _ in range(count))]


@pytest.mark.parametrize("name", ["mixed", "tiny", "transformer", "fused"])
def test_the_peak_of_a_step_is_what_is_measured_on_the_extracted_network(name, request):
    model, x = request.getfixturevalue(name)
    net = Supernet.from_model(model, x)
    configs = some(net, 15)
    memory = MemoryModel(net, mode="train", batch=2)
    found = memory.peak_bytes(memory.codes.encode(configs)).tolist()
    assert found == [measured(net.extract(c), x) for c in configs]
    assert len(set(found)) > 5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sides"), [("OFA", (64, 96)), ("MOOFA", (128, 160))])
def test_staged_spaces_say_what_is_measured_on_their_networks(name, sides):
    space, rng = getattr(pm.supernet, name), np.random.default_rng(0)
    kernel, expand = (rng.choice(choices, (4, 20)) for choices in (space.kernels, space.expands))
    depth, side = rng.choice(space.depths, (4, 5)), np.array([*sides, *sides])
    found = space.peak_elements(kernel, expand, depth, side, mode="train")
    for place, elements in enumerate(found.tolist()):
        with FakeTensorMode():
            network = space.build(kernel[place], expand[place], depth[place]).train()
            x = torch.randn(1, 3, side[place], side[place])
            assert 4 * elements == pm.measure_training(network, x, torch.zeros(1, dtype=torch.long)).peak_bytes
    assert (found > 2 * space.peak_elements(kernel, expand, depth, side, "activations")).all()
    with pytest.raises(InputError, match="No mode"):
        space.peak_elements(kernel, expand, depth, side, mode="both")


@pytest.mark.parametrize("build", [Skips, PostNorm])
@pytest.mark.parametrize("batch", [1, 3])
def test_other_networks_need_no_more_and_little_less(build, batch):
    torch.manual_seed(0)
    x = torch.randn(max(2, batch), 3, 16, 16)
    net = Supernet.from_model(build().eval(), x, depth=3)
    assert net.space.of_kind("depth")
    configs = some(net, 15)
    memory = MemoryModel(net, mode="train", batch=batch)
    found = memory.peak_bytes(memory.codes.encode(configs))
    share = found / np.array([measured(net.extract(c), x[:batch].clone()) for c in configs])
    assert share.min() >= 1
    assert share.max() <= 1.05


def test_each_resolution_has_its_own_step(mixed):
    model, x = mixed
    net = Supernet.from_model(model, x, resolution=(8, 12))
    memory = MemoryModel(net, mode="train", batch=2)
    configs = [{**c, "resolution": edge} for c in some(net, 4) for edge in (8, 12)]
    found = memory.peak_bytes(memory.codes.encode(configs)).tolist()
    assert found == [measured(net.extract(c), net.scaled(x, c)) for c in configs]


def test_bytes_are_of_the_device_and_the_step_is_measured_without_data(tiny):
    net = Supernet.from_model(*tiny)
    wide, narrow = (MemoryModel(net, DeviceProfile(dtype=d), mode="train", batch=2) for d in ("float32", "float16"))
    code = wide.codes.encode([net.max()])
    labels = 2 * 8
    assert wide.peak_bytes(code) - labels == 2 * (narrow.peak_bytes(code) - labels)
    assert wide.ram_bytes(code) == wide.peak_bytes(code) + wide.param_bytes(code)
    assert measured_step(net.extract(net.max()), 2) == wide.peak_bytes(code)[0]
    assert wide.peak_bytes(code) > 2 * MemoryModel(net).peak_bytes(code)
    assert wide.binding(net.max()).path.endswith("backward")
    assert max(size for _, size in wide.per_step(net.max())) == wide.peak_bytes(code)[0]


def test_a_hundred_thousand_take_seconds(mixed):
    memory = MemoryModel(Supernet.from_model(*mixed), mode="train")
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(len(c.values), size=100_000) for c in memory.codes.choices], axis=1)
    begun = time.perf_counter()
    memory.peak_bytes(codes)
    assert time.perf_counter() - begun < 5


def test_the_optimum_is_that_of_brute_force(tiny):
    net = Supernet.from_model(*tiny)
    free = MemoryModel(net, mode="train", batch=2)
    codes = np.array(list(itertools.product(*(range(len(c.values)) for c in net.space.choices))))
    rng = np.random.default_rng(0)
    peaks = {"flash": free.peak_bytes(codes), "ram": free.ram_bytes(codes)}
    for turn, weights_in in itertools.product(range(4), ("flash", "ram")):
        bound = int(peaks[weights_in][rng.integers(len(codes))])
        memory = free.bounded(ram=bound)
        memory.profile = DeviceProfile(ram=bound, weights_in=weights_in)
        weights = rng.normal(size=memory.codes.width) + 0.3 * (turn % 2)
        weights[0] = 0.0
        allowed = codes[memory.fits(codes)]
        found = Optimizer(memory).best(weights)
        columns = [[memory.codes.first[c.name] + i for c, i in zip(net.space.choices, k, strict=True)] for k in allowed]
        active = [[net.space.active(memory.codes.decode(k), c) for c in net.space.choices] for k in allowed]
        best = max(weights[c][np.array(a)].sum() for c, a in zip(np.array(columns), active, strict=True))
        assert found.value == pytest.approx(best, abs=1e-6)
        assert memory.fits(memory.codes.encode([found.config]))[0]


def test_samples_keep_the_bound_and_what_cannot_is_told_so(mixed):
    net = Supernet.from_model(*mixed)
    free = MemoryModel(net, DeviceProfile(weights_in="flash"), mode="train", batch=2)
    low, high = free.peak_bytes(free.codes.encode([net.min(), net.max()]))
    memory = free.bounded(ram=int(low + high) // 2)
    drawn = sample_within(memory, 20, np.random.default_rng(0))
    assert memory.fits(drawn).all()
    for code in drawn[:4]:
        network = net.extract(memory.codes.decode(code))
        assert measured(network, torch.randn(2, 3, 12, 12)) <= memory.profile.ram_bytes
    with pytest.raises(BudgetError, match=r"for a training step at batch 2 .*backward'"):
        check_feasible(free.bounded(ram=int(low) - 1))


def test_what_cannot_be_counted_is_refused(tiny):
    net = Supernet.from_model(*tiny)
    for options in ({"mode": "both"}, {"mode": "train", "batch": 0}, {"batch": 2}):
        with pytest.raises(InputError, match="cannot be counted"):
            MemoryModel(net, **options)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1))
    narrow = Supernet.from_model(pooled.eval(), torch.randn(2, 3, 4, 4))
    with pytest.raises(InputError, match="larger batch"):
        MemoryModel(narrow, mode="train")
    MemoryModel(narrow, mode="train", batch=2)


def test_specialize_answers_with_a_network_that_trains_within_the_bound(mixed):
    model, x = mixed
    net = Supernet.from_model(model, x)
    free = MemoryModel(net, DeviceProfile(weights_in="flash"), mode="train", batch=2)
    low, high = free.peak_bytes(free.codes.encode([net.min(), net.max()]))
    board = DeviceProfile(name="board", ram=int(low + high) // 2, weights_in="flash")
    loader = [(torch.randn(8, 3, 12, 12), torch.arange(8) % 5)]
    options = {"measurements": 10, "rounds": 1, "batches": 1, "control": False}
    found = specialize(net, loader, loader, profile=board, mode="train", batch=2, **options)
    peak = measured(found.model, x)
    assert found.measured["float32_peak_bytes"] == peak <= board.ram_bytes
    assert "to train at batch 2" in str(found)
    assert found.to_dict()["mode"] == "train"


def test_the_command_line_bounds_a_training_step(capsys):
    def run(*more):
        with pytest.raises(SystemExit) as left:
            main(["specialize", "-m", "palmette:digits-mobile", "-d", "digits", "--dry-run", "--mode", "train", *more])
        return left.value.code, capsys.readouterr()

    code, said = run("-b", "board:weights_in=flash", "--train-batch", "2")
    assert code == 0
    assert "RAM to train at batch 2" in said.out + said.err
    code, said = run("-b", "board:ram=8KiB")
    assert code
    assert "for a training step at batch 1" in " ".join((said.out + said.err).split())
