"""A board that bounds the latency: what is drawn and answered keeps it by the table, and what is too slow gives way."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from palmette.device import DeviceProfile
from palmette.errors import BudgetError, InputError
from palmette.supernet import clock
from palmette.supernet.boards import Recipe, parse_board, run_boards
from palmette.supernet.latency import Device, Row, drawn, fit_table, measure_latencies
from palmette.supernet.memory import CLOSE, MemoryModel
from palmette.supernet.sampling import check_feasible, sample_balanced, sample_within
from palmette.supernet.search import Found
from palmette.supernet.specialize import specialize
from palmette.supernet.supernet import Supernet
from palmette.train.config import HealConfig


def table_of(net, milliseconds, count=40, hardware="a stored machine"):
    """A table fitted to the times that a function of configurations gives."""
    configs = drawn(net, count, 0)
    times = [milliseconds(c) for c in configs]
    rows = [Row(c, t, times[0], t / times[0], i > 1 and i % 4 == 0) for i, (c, t) in enumerate(zip(configs, times))]  # noqa: B905
    return fit_table(net, Device("eager", 1, 1, hardware), rows)


def by_work(net):
    memory = MemoryModel(net)
    return lambda c: 0.2 + 1e-6 * float(memory.weights.macs(memory.codes.encode([c]))[0])


def median_time(net, table):
    free = MemoryModel(net, latency=table)
    rng = np.random.default_rng(0)
    return float(np.median(free.latency_ms(free.codes.encode([net.sample(rng) for _ in range(50)]))))


@pytest.fixture
def blobs():
    x, y = torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(0)), torch.arange(96) % 5
    return [DataLoader(TensorDataset(x[a:b], y[a:b]), batch_size=32) for a, b in ((0, 64), (64, 96))]


def test_what_is_drawn_keeps_every_bound(mixed):
    net = Supernet.from_model(*mixed)
    table = table_of(net, by_work(net))
    bound = median_time(net, table)
    smallest = MemoryModel(net).peak_bytes(MemoryModel(net).codes.encode([net.min()]))[0]
    profile = DeviceProfile(latency_ms=bound, ram=2 * int(smallest), weights_in="flash")
    memory = MemoryModel(net, profile, latency=table)
    for draw in (sample_within, sample_balanced):
        codes = draw(memory, 40, np.random.default_rng(0))
        assert memory.fits(codes).all()
        assert (memory.latency_ms(codes) <= bound * (1 + CLOSE)).all()
        assert (memory.peak_bytes(codes) <= 2 * smallest).all()
        assert len(np.unique(codes, axis=0)) > 20


def test_the_smallest_may_be_the_slowest(mixed):
    net = Supernet.from_model(*mixed)
    kernel = net.space.of_kind("kernel")[0]
    table = table_of(net, lambda c: 1.0 + (c[kernel.name] == kernel.values[0]))  # a kernel with no fast path
    memory = MemoryModel(net, DeviceProfile(latency_ms=1.5), latency=table)
    assert memory.latency_ms(memory.codes.encode([net.min()]))[0] > 1.5
    codes = sample_within(memory, 20, np.random.default_rng(0))
    assert memory.fits(codes).all()
    assert memory.fits(sample_balanced(memory, 5, np.random.default_rng(0))).all()
    with pytest.raises(BudgetError, match=r"the smallest takes .* ms by the table of latencies, 0.1 ms are allowed"):
        check_feasible(MemoryModel(net, DeviceProfile(latency_ms=0.1), latency=table))


def test_a_bound_without_a_table_is_refused_before_anything_is_measured(mixed, blobs):
    net = Supernet.from_model(*mixed)
    with pytest.raises(InputError, match="needs a table of latencies"):
        specialize(net, *blobs, profile=DeviceProfile(latency_ms="1ms"), measurements=10)
    with pytest.raises(InputError, match="No table of latencies"):
        MemoryModel(net).latency_ms(np.zeros((1, len(net.space)), dtype=int))


def test_the_answer_is_timed_where_the_table_was_measured(mixed, blobs, tmp_path):
    model, _ = mixed
    net = Supernet.from_model(*mixed)
    table = measure_latencies(net, count=16, runtime="eager")
    free = MemoryModel(net, latency=table)
    times = free.latency_ms(free.codes.encode([net.min(), net.max()]))
    board = DeviceProfile(name="clocked", latency_ms=float(times.mean()), weights_in="flash")
    made = run_boards(
        model, *blobs, boards=[board], latency={"clocked": table}, run_dir=tmp_path / "run",
        recipe=Recipe(heal=HealConfig(epochs=1), measurements=10, rounds=1, batches=1),
    )  # fmt: skip
    (found,) = made.boards
    assert found.latency.measured_ms > 0
    assert found.latency.predicted_ms == found.found.latency_ms <= board.latency_ms * (1 + CLOSE)
    assert "ms by the table" in str(found)
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert figures["boards"][0]["latency"]["bound_ms"] == board.latency_ms
    assert "by the table" in made.report.read_text()


def test_what_is_too_slow_gives_way_to_the_next(tiny, monkeypatch):
    net = Supernet.from_model(*tiny)
    ranked = [Found({"place": i}, 1 - 0.1 * i, 1, 1, 1.0) for i in range(8)]
    took = {0: 5.0, 1: 4.0, 2: 0.9, 3: 0.8}
    monkeypatch.setattr(clock, "timed", lambda _, config, __: took.get(config["place"], 3.0))
    monkeypatch.setattr(clock, "hardware", lambda *_: "here")
    table = table_of(net, by_work(net), hardware="here")
    answer, times = clock.in_time(net, table, 1.0, ranked)
    assert (answer.config["place"], times.measured_ms, times.slower) == (2, 0.9, 2)
    answer, times = clock.in_time(net, table, 0.1, ranked)
    assert (answer.config["place"], times.slower) == (3, 4)
    assert "too slow" in str(times)
    answer, times = clock.in_time(net, table_of(net, by_work(net)), 0.1, ranked)
    assert (answer, times.measured_ms) == (ranked[0], None)
    assert "another machine" in str(times)


def test_a_board_says_its_latency_with_a_unit():
    assert parse_board("a:latency_ms=300us").latency_ms == 0.3
    assert parse_board("a:latency-ms=5").latency_ms == 5.0
