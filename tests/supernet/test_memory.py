"""The tables say what the meter measures, to the byte, and the optimum is what listing all configurations gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from palmette.device import DeviceProfile
from palmette.graph.capture import capture
from palmette.meter.compute import param_bytes
from palmette.meter.memory import peak_bytes
from palmette.supernet.memory import MemoryModel
from palmette.supernet.optimum import Optimizer
from palmette.supernet.supernet import Supernet


def test_bytes_are_those_of_the_extracted_network(any_model):
    model, x = any_model
    net = Supernet.from_model(model, x)
    memory = MemoryModel(net)
    rng = np.random.default_rng(0)
    configs = [net.max(), net.min(), *(net.sample(rng) for _ in range(10))]
    codes = memory.codes.encode(configs)
    networks = [net.extract(c) for c in configs]
    assert memory.peak_bytes(codes).tolist() == [peak_bytes(n, 1, hold_inputs=False) for n in networks]
    assert memory.param_bytes(codes).tolist() == [param_bytes(n) for n in networks]
    assert len(set(memory.peak_bytes(codes).tolist())) > 1


def test_weights_in_ram_and_integers_of_one_byte(mixed):
    net = Supernet.from_model(*mixed)
    code = MemoryModel(net).codes.encode([net.max()])
    wide, narrow = MemoryModel(net), MemoryModel(net, DeviceProfile(dtype="int8"))
    assert wide.peak_bytes(code) == 4 * narrow.peak_bytes(code)
    assert wide.param_bytes(code) == 4 * narrow.param_bytes(code)
    assert wide.ram_bytes(code) == wide.peak_bytes(code) + wide.param_bytes(code)
    assert MemoryModel(net, DeviceProfile(weights_in="flash")).ram_bytes(code) == wide.peak_bytes(code)


def test_in_place_steps_need_one_tensor_instead_of_two():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 4, 1)
    )
    net = Supernet.from_model(model.eval(), torch.randn(2, 3, 8, 8))
    code = MemoryModel(net).codes.encode([net.max()])
    plane = 4 * 8 * 8

    def flags(act, dw):
        return {"inplace_elementwise": act, "inplace_depthwise": dw}

    peaks = {
        (act, dw): int(
            MemoryModel(net, DeviceProfile(inplace_elementwise=act, inplace_depthwise=dw)).peak_bytes(code)[0]
        )
        for act, dw in itertools.product((False, True), repeat=2)
    }
    assert peaks == {
        (False, False): 32 * plane,
        (True, False): 32 * plane,
        (False, True): 32 * plane,
        (True, True): 20 * plane,
    }


def test_what_binds_is_named(mixed):
    net = Supernet.from_model(*mixed)
    memory = MemoryModel(net)
    found = memory.binding(net.max())
    code = memory.codes.encode([net.max()])
    assert found.peak_bytes == memory.peak_bytes(code)[0]
    assert dict(memory.per_step(net.max()))[found.path] == found.peak_bytes
    assert len(memory.per_step(net.min())) < len(memory.per_step(net.max()))


def listed(net):
    """All codes of a small space, and a model of its memory without bounds."""
    memory = MemoryModel(net)
    codes = np.array(list(itertools.product(*(range(len(c.values)) for c in net.space.choices))))
    return memory, codes


def value_of(memory, code, weights):
    net, config = memory.net, memory.codes.decode(code)
    columns = [memory.codes.first[c.name] + i for c, i in zip(net.space.choices, code, strict=True)]
    active = [net.space.active(config, c) for c in net.space.choices]
    return sum(weights[column] for column, on in zip(columns, active, strict=True) if on)


@pytest.mark.parametrize("weights_in", ["flash", "ram"])
@pytest.mark.parametrize("flash", [False, True])
def test_the_optimum_is_that_of_brute_force(tiny, weights_in, flash):
    net = Supernet.from_model(*tiny)
    free, codes = listed(net)
    rng = np.random.default_rng(flash)
    for _ in range(8):
        at = codes[rng.integers(len(codes))][None]
        ram = int(free.peak_bytes(at)[0]) + (int(free.param_bytes(at)[0]) if weights_in == "ram" else 0)
        bound = int(np.median(free.param_bytes(codes))) if flash else None
        memory = MemoryModel(net, DeviceProfile(ram=ram, flash=bound, weights_in=weights_in))
        weights = rng.normal(size=memory.codes.width) + 0.3
        weights[0] = 0.0
        allowed = codes[memory.fits(codes)]
        found = Optimizer(memory).best(weights)
        if not len(allowed):
            assert found is None
            continue
        best = max(value_of(memory, code, weights) for code in allowed)
        assert found.value == pytest.approx(best, abs=1e-6)
        assert memory.fits(memory.codes.encode([found.config]))[0]


def test_looser_budgets_are_never_worse_and_answers_can_be_excluded(tiny):
    net = Supernet.from_model(*tiny)
    free, codes = listed(net)
    weights = np.abs(np.random.default_rng(1).normal(size=free.codes.width))
    weights[0] = 0.0
    values = []
    for ram in np.unique(free.peak_bytes(codes)):
        memory = MemoryModel(net, DeviceProfile(ram=int(ram), weights_in="flash"))
        values.append(Optimizer(memory).best(weights).value)
    assert values == sorted(values)
    memory = MemoryModel(net)
    first = Optimizer(memory).best(weights)
    second = Optimizer(memory).best(weights, excluded=memory.codes.encode([first.config]))
    assert second.config != first.config
    assert second.value <= first.value


def test_an_excluded_network_is_not_found_again_by_other_values_of_blocks_that_are_gone(tiny):
    net = Supernet.from_model(*tiny)
    memory = MemoryModel(net)
    weights = np.zeros(memory.codes.width)  # the fewest blocks win: choices of those left out are free
    for choice in net.space.of_kind("depth"):
        weights[memory.codes.first[choice.name]] = 1.0
    assert net.space.of_kind("depth")
    excluded = []
    for _ in range(6):
        found = Optimizer(memory).best(weights, excluded=memory.codes.encode(excluded) if excluded else None)
        assert found.config not in excluded
        excluded.append(found.config)


def test_codes_and_configurations_are_one_to_one(mixed):
    net = Supernet.from_model(*mixed)
    codes, rng = MemoryModel(net).codes, np.random.default_rng(0)
    for _ in range(20):
        config = net.sample(rng)
        assert net.space.canonical(codes.decode(codes.encode([config])[0])) == config


def test_a_peak_is_measured_on_the_captured_original(mixed):
    model, x = mixed
    net = Supernet.from_model(model, x)
    code = MemoryModel(net).codes.encode([net.max()])
    assert MemoryModel(net).peak_bytes(code)[0] == peak_bytes(capture(model, x), 1, hold_inputs=False)


def test_operators_that_a_runtime_takes_apart_count_as_it_runs_them(mixed):
    net = Supernet.from_model(*mixed)
    memory = MemoryModel(net, DeviceProfile(operators="core"))
    rng = np.random.default_rng(0)
    configs = [net.max(), net.min(), *(net.sample(rng) for _ in range(5))]
    found = memory.peak_bytes(memory.codes.encode(configs)).tolist()
    assert found == [peak_bytes(net.extract(c), 1, hold_inputs=False, operators="core") for c in configs]
    assert found[0] > MemoryModel(net).peak_bytes(memory.codes.encode(configs))[0]
