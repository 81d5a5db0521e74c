"""What once went wrong: loaders with generators of their own, shared and tied weights, tight boards, runs of others."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import palmette as pm
from palmette.device import DeviceProfile
from palmette.errors import DataError, InputError, RunError
from palmette.meter.compute import param_bytes
from palmette.supernet.boards import Recipe, parse_board, parse_tables, run_boards
from palmette.supernet.judge import Judge
from palmette.supernet.latency import LatencyTable, measure_latencies
from palmette.supernet.memory import MemoryModel
from palmette.supernet.resolution import Scaled
from palmette.supernet.search import search
from palmette.supernet.space import Space
from palmette.supernet.specialize import specialize
from palmette.supernet.supernet import Supernet
from palmette.supernet.training import train_supernet
from palmette.train.config import HealConfig


def loader(count=64, *, seed=0, batch=16):
    """A loader that shuffles by a generator of its own, as those of Palmette's data do."""
    x, y = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed)), torch.arange(count) % 5
    return DataLoader(
        TensorDataset(x, y), batch_size=batch, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture
def net(mixed):
    return Supernet.from_model(*mixed)


@pytest.mark.parametrize("edge", [None, 8])
def test_a_judgement_does_not_depend_on_what_was_judged_before(mixed, edge):
    net = Supernet.from_model(*mixed, resolution=() if edge is None else (edge,))
    one, two = net.min(), net.max()
    train, val = loader(), loader(seed=1)

    def losses(*configs):
        judge = Judge(net, train, val, batches=2)
        return {str(c): f.loss for c, f in zip(configs, judge.evaluations(configs, val, "val"), strict=True)}

    first = losses(one, two)
    assert losses(two, one) == first
    assert losses(two)[str(two)] == first[str(two)]
    judge = Judge(net, train, val, batches=2)
    data = val if edge is None else Scaled(val, edge)
    assert pm.evaluate(judge.network(one), data).loss == pytest.approx(first[str(one)], rel=1e-6)


class Siamese(nn.Module):
    """One residual block that is run in two places."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)

    def branch(self, x):
        x = self.stem(x)
        return x + F.relu(self.block(x))

    def forward(self, x):
        return self.head((self.branch(x) * self.branch(x.flip(-1))).mean((2, 3)))


def test_a_shared_layer_counts_as_long_as_one_of_its_places_is_there():
    net = Supernet.from_model(Siamese().eval(), torch.randn(2, 1, 8, 8), round_to=1)
    memory, rng = MemoryModel(net), np.random.default_rng(0)
    configs = [net.max(), net.min(), *(net.sample(rng) for _ in range(10))]
    said = memory.param_bytes(memory.codes.encode(configs))
    real = [param_bytes(net.extract(c)) for c in configs]
    assert (said >= real).all()
    assert said[0] == real[0]


class TiedAutoencoder(nn.Module):
    """Its decoder reads the encoder's weights by value."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 48), nn.Linear(48, 32)

    def forward(self, x):
        z = F.relu(self.b(F.relu(self.a(x))))
        return F.linear(F.relu(F.linear(z, self.b.weight.t())), self.a.weight.t())


def test_weights_that_are_read_beside_their_layer_stay():
    net = Supernet.from_model(TiedAutoencoder().eval(), torch.randn(2, 16))
    assert net.space.of_kind("width") == []
    assert {"a", "b"} <= net.static.keys()


class Named(nn.Module):
    """A layer of the name of an input."""

    def __init__(self):
        super().__init__()
        self.x, self.y = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x):
        return self.y(self.x(x))


def test_a_layer_may_have_the_name_of_an_input():
    x = torch.randn(2, 3, 8, 8)
    net = Supernet.from_model(Named().eval(), x).eval()
    net.activate(net.min())
    torch.testing.assert_close(net.extract()(x), net(x))
    assert net.min() != net.max()


def test_a_board_that_few_networks_fit_gets_one(tiny):
    net = Supernet.from_model(*tiny)
    free = MemoryModel(net)
    least = int(free.param_bytes(free.codes.encode([net.min()]))[0])
    memory = MemoryModel(net, DeviceProfile(flash=least, weights_in="flash"))
    found = search(memory, lambda configs: [0.5] * len(configs), measurements=10)
    assert all(f.param_bytes <= least for f in found.ranked())
    assert 1 <= len(found.ranked()) < 5


@pytest.mark.parametrize("answer", [lambda n: [float("nan")] * n, lambda n: [0.5] * (n - 1)])
def test_a_measure_that_is_none_is_refused(net, answer):
    with pytest.raises(InputError, match="a finite number is needed for each"):
        search(MemoryModel(net), lambda configs: answer(len(configs)), measurements=10)


def test_runs_of_other_weights_are_not_gone_on_with(net, nets, tmp_path):
    board = DeviceProfile(name="b", weights_in="flash")
    options = {"profile": board, "measurements": 10, "batches": 1, "run_dir": tmp_path / "run"}
    specialize(net, loader(), loader(seed=1), **options)
    torch.manual_seed(5)
    other = Supernet.from_model(nets.Mixed().eval(), torch.randn(2, 3, 12, 12))
    with pytest.raises(RunError, match="network"):
        specialize(other, loader(), loader(seed=1), resume=True, **options)


def test_another_board_joins_a_run_without_training_again(mixed, tmp_path):
    recipe = Recipe(heal=HealConfig(epochs=1), measurements=10, batches=1, control=False)
    options = {"recipe": recipe, "run_dir": tmp_path / "run"}
    first = run_boards(mixed[0], loader(), loader(seed=1), boards=[parse_board("a:weights_in=flash")], **options)
    second = run_boards(
        mixed[0], loader(), loader(seed=1), boards=[parse_board("b:weights_in=flash")], resume=True, **options
    )
    for p, q in zip(first.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(p, q)
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert [board["profile"]["name"] for board in figures["boards"]] == ["a", "b"]


def test_boards_say_yes_or_no_in_words_and_names_are_folders():
    assert parse_board("a:inplace_elementwise=False").inplace_elementwise is False
    assert parse_board("a:inplace_elementwise=YES").inplace_elementwise is True
    for text in ("a:inplace_elementwise=maybe", "..:ram=1KiB", ".:ram=1KiB", "a:ram=1KiB,ram=2KiB", "a:dtype=int4"):
        with pytest.raises(InputError):
            parse_board(text)
    with pytest.raises(InputError, match="Boards cannot be called"):
        run_boards(nn.Identity(), [], [], boards=[DeviceProfile(name="a/b")])


def test_a_network_without_anything_elastic_is_told_so(mixed):
    net = Supernet.from_model(*mixed, width=(), kernel=(), depth=0, heads=())
    memory = MemoryModel(net)
    assert memory.param_bytes(memory.codes.encode([net.max()]))[0] == param_bytes(net.extract())
    for call in (
        lambda: train_supernet(net, loader()),
        lambda: specialize(net, loader(), loader(), profile=pm.DeviceProfile()),
    ):
        with pytest.raises(InputError, match="Nothing in the network is elastic"):
            call()


@pytest.mark.parametrize(
    "options",
    [
        {"width": 0.5}, {"width": ("a",)}, {"kernel": 3}, {"kernel": (4,)}, {"kernel": (3.0,)}, {"bits": 8},
        {"resolution": (8.5,)}, {"depth": 1.5}, {"round_to": 2.5}, {"protect": ("nope",)}, {"heads": (0.5, True)},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(mixed, options):
    with pytest.raises(InputError):
        Supernet.from_model(*mixed, **options)


def test_double_precision_is_refused(mixed):
    with pytest.raises(InputError, match=r"model.float\(\)"):
        Supernet.from_model(mixed[0].double(), mixed[1].double())


def test_batches_that_measure_nothing_are_refused(net):
    with pytest.raises(InputError, match="batches = 0"):
        net.recalibrate(net.min(), loader(), 0)
    with pytest.raises(DataError, match="no loader"):
        net.recalibrate(net.min(), None)


def test_a_table_of_a_like_supernet_is_refused(net, nets, tmp_path):
    table = measure_latencies(net, count=12, runtime="eager", path=tmp_path / "table.json")
    assert parse_tables([f"a={tmp_path / 'table.json'}"], [parse_board("a:latency_ms=1")]) == {"a": table}
    wider = Supernet.from_model(nets.Mixed().eval(), torch.randn(2, 3, 16, 16))
    with pytest.raises(InputError, match="another supernet"):
        MemoryModel(wider, latency=table)
    raw = json.loads((tmp_path / "table.json").read_text())
    for damaged in ({**raw, "entries": []}, {**raw, "rows": [{}]}, {**raw, "largest": []}):
        (tmp_path / "table.json").write_text(json.dumps(damaged))
        with pytest.raises(RunError, match="damaged"):
            LatencyTable.load(tmp_path / "table.json")


def test_spaces_from_elsewhere_are_looked_at():
    choice = {"name": "a", "kind": "width", "values": [1, 2], "owner": None}
    for wrong in (
        {"kind": "colour"},
        {"values": [1.5, 2]},
        {"values": ["1", "2"]},
        {"owner": ["nobody", 1]},
        {"owner": ["a"]},
    ):
        with pytest.raises(InputError):
            Space.from_json(json.dumps({"palmette_space": 1, "choices": [{**choice, **wrong}]}))
