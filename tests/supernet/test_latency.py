"""Tables of latency: what is fitted to stored times, what is kept in the file, what the optimum does with them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from palmette.device import DeviceProfile
from palmette.errors import InputError, RunError
from palmette.graph.inputs import with_batch
from palmette.meter.compute import macs
from palmette.supernet import latency
from palmette.supernet.latency import Device, LatencyTable, Row, drawn, fit_table, measure_latencies
from palmette.supernet.memory import MemoryModel
from palmette.supernet.optimum import Optimizer
from palmette.supernet.supernet import Supernet

DEVICE = Device("onnxruntime", 1, 1, "a stored machine")


def stored_table(net, count=40, noise=0.0):
    """A table of times that follow multiply-adds and the number of steps, as one fitted to a device would."""
    memory, rng = MemoryModel(net), np.random.default_rng(0)
    configs = drawn(net, count, 0)
    codes = memory.codes.encode(configs)
    times = 0.2 + 1e-6 * memory.weights.macs(codes) * (1 + noise * rng.normal(size=len(codes)))
    drift = rng.uniform(1, 1.5, len(codes))
    rows = [
        Row(c, float(t * d), float(times[0] * d), float(t / times[0]), i > 1 and i % 4 == 0)
        for i, (c, t, d) in enumerate(zip(configs, times, drift, strict=True))
    ]
    return memory, fit_table(net, DEVICE, rows), times


def test_multiply_adds_are_those_of_the_extracted_network(mixed):
    model, x = mixed
    net = Supernet.from_model(model, x)
    memory, rng = MemoryModel(net), np.random.default_rng(0)
    configs = [net.max(), net.min(), *(net.sample(rng) for _ in range(5))]
    found = memory.weights.macs(memory.codes.encode(configs)).tolist()
    assert found == [macs(net.extract(c), with_batch(x, 1)) for c in configs]


def test_a_table_predicts_networks_that_it_was_not_fitted_to(mixed):
    net = Supernet.from_model(*mixed)
    memory, table, _ = stored_table(net, noise=0.02)
    assert table.error.n == 9
    assert table.error.low <= table.error.mean <= table.error.high < 6
    assert table.error.rank > 0.9
    codes = memory.codes.encode(drawn(net, 60, 1))
    predicted, true = table.predict(memory, codes), 0.2 + 1e-6 * memory.weights.macs(codes)
    assert np.corrcoef(predicted, true)[0, 1] > 0.98
    linear = memory.codes.mattering(codes) @ table.vector(memory.codes)
    assert predicted == pytest.approx(
        linear + table.ms_per_mac * memory.weights.macs(codes) + table.ms_per_byte * memory.param_bytes(codes)
    )


def test_bits_of_weights_take_no_time(mixed):
    net = Supernet.from_model(*mixed, bits=(8, 32))
    whole = {c.name: 32 for c in net.space.of_kind("bits")}
    memory, table, _ = stored_table(net)
    configs = [net.sample(np.random.default_rng(seed)) for seed in range(20)]
    assert all(table.entries[name][8] == table.entries[name][32] for name in whole)
    times = [table.predict(memory, memory.codes.encode(c)) for c in (configs, [{**c, **whole} for c in configs])]
    assert times[0].tolist() == pytest.approx(times[1].tolist())
    assert all(row.config == {**row.config, **whole} for row in table.rows)


def test_what_does_not_matter_costs_nothing(mixed):
    net = Supernet.from_model(*mixed)
    memory, table, _ = stored_table(net)
    hanging = next(c for c in net.space.choices if c.owner and c.owner[1] > net.space[c.owner[0]].values[0])
    small = net.max() | {hanging.owner[0]: hanging.owner[1] - 1}
    other = small | {hanging.name: hanging.values[0]}
    one, two = table.predict(memory, memory.codes.encode([small, other]))
    assert one == two


def test_codes_that_matter_are_those_of_the_space(any_model):
    net = Supernet.from_model(*any_model)
    codes, rng = MemoryModel(net).codes, np.random.default_rng(0)
    configs = [net.max(), net.min(), *(net.sample(rng) for _ in range(20))]
    found = codes.mattering(codes.encode(configs))
    assert (found[:, 1:] == np.stack([net.space.encode(c) for c in configs])).all()


def test_a_bound_on_latency_gives_the_optimum_of_brute_force(tiny):
    net = Supernet.from_model(*tiny)
    free, table, _ = stored_table(net, count=30)
    codes = np.array(list(itertools.product(*(range(len(c.values)) for c in net.space.choices))))
    times, rng = table.predict(free, codes), np.random.default_rng(2)
    for quantile in (0.0, 0.1, 0.4, 0.8):
        bound = float(np.quantile(times, quantile)) + 1e-6
        memory = MemoryModel(net, DeviceProfile(latency_ms=bound, weights_in="flash"), latency=table)
        weights = rng.uniform(0, 1, memory.codes.width)
        weights[0] = 0.0
        found = Optimizer(memory).best(weights)
        best = (memory.codes.mattering(codes[times <= bound]) @ weights).max()
        assert found.value == pytest.approx(best, abs=1e-6)
        assert table.predict(memory, memory.codes.encode([found.config]))[0] <= bound + 1e-6
    memory = MemoryModel(net, DeviceProfile(latency_ms=float(times.min()) * 0.9), latency=table)
    assert Optimizer(memory).best(np.ones(memory.codes.width)) is None


def test_depth_that_hangs_together_is_bounded_as_it_runs(mixed):
    net = Supernet.from_model(*mixed)
    free, table, times = stored_table(net)
    bound = float(np.median(times))
    memory = MemoryModel(net, DeviceProfile(latency_ms=bound), latency=table)
    weights = np.random.default_rng(0).uniform(0.1, 1, memory.codes.width)
    found = Optimizer(memory).best(weights)
    assert table.predict(memory, memory.codes.encode([found.config]))[0] <= bound + 1e-6
    assert Optimizer(free).best(weights).value >= found.value


def test_a_bound_without_a_table_is_refused(tiny):
    net = Supernet.from_model(*tiny)
    with pytest.raises(InputError, match="needs a table of latencies"):
        MemoryModel(net, DeviceProfile(latency_ms=1.0))


def test_a_table_of_another_supernet_is_refused(tiny, mixed):
    _, table, _ = stored_table(Supernet.from_model(*tiny))
    other = MemoryModel(Supernet.from_model(*mixed))
    with pytest.raises(InputError, match="another supernet"):
        table.vector(other.codes)


def test_a_table_goes_through_its_file(tiny, tmp_path):
    net = Supernet.from_model(*tiny)
    memory, table, _ = stored_table(net)
    table.save(tmp_path / "table.json")
    back = LatencyTable.load(tmp_path / "table.json")
    assert back == table
    assert (back.vector(memory.codes) == table.vector(memory.codes)).all()


@pytest.fixture
def timed(monkeypatch):
    """How many networks were timed; their times are stored: a microsecond for every thousand parameters."""
    seen = []

    def sizes(models, *_, **__):
        seen.append(len(models))
        return {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}

    monkeypatch.setattr(latency, "runners", sizes)
    monkeypatch.setattr(latency, "_rounds", lambda passes, _: {k: [0.1 + 1e-4 * n] * 3 for k, n in passes.items()})
    monkeypatch.setattr(latency, "check_runtime", lambda name: name)
    monkeypatch.setattr(latency, "hardware", lambda *_: "a stored machine")
    return seen


def test_a_killed_measurement_goes_on_to_the_same_table(tiny, tmp_path, timed):
    net = Supernet.from_model(*tiny)
    whole = measure_latencies(net, count=16, path=tmp_path / "whole.json")
    assert sum(timed) == 4 * 5  # each group of four with the largest
    raw = json.loads((tmp_path / "whole.json").read_text())
    cut = {k: raw[k] for k in ("palmette_latency", "device", "choices")} | {"rows": raw["rows"][:8]}
    (tmp_path / "cut.json").write_text(json.dumps(cut))
    with pytest.raises(RunError, match="not finished"):
        LatencyTable.load(tmp_path / "cut.json")
    timed.clear()
    said = []
    assert measure_latencies(net, count=16, path=tmp_path / "cut.json", say=said.append) == whole
    assert sum(timed) == 2 * 5
    assert said[-1].startswith("16 of 16 networks")


def test_time_runs_out_after_the_fewest_networks(tiny, timed):
    table = measure_latencies(Supernet.from_model(*tiny), count=40, budget_seconds=0.0)
    assert len(table.rows) == 12


def test_a_file_of_something_else_is_refused(tiny, mixed, tmp_path, timed):
    path = tmp_path / "table.json"
    net = Supernet.from_model(*tiny)
    measure_latencies(net, count=12, path=path)
    with pytest.raises(RunError, match="another threads"):
        measure_latencies(net, count=12, path=path, threads=2)
    with pytest.raises(RunError, match="another supernet"):
        measure_latencies(Supernet.from_model(*mixed), count=12, path=path)
    path.write_text("{}")
    with pytest.raises(RunError, match="no latency table"):
        LatencyTable.load(path)


def test_too_little_is_refused(tiny):
    net = Supernet.from_model(*tiny)
    with pytest.raises(InputError, match="At least 12"):
        measure_latencies(net, count=3)
    narrow = Supernet.from_model(torch.nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(InputError, match="too few"):
        drawn(narrow, 20, 0)
    with pytest.raises(InputError, match="too few"):
        fit_table(net, DEVICE, [])
