"""One set of weights and all its sub-networks: what is active computes what is extracted, and trains nothing else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import palmette as pm
from palmette.errors import DataError, InputError
from palmette.meter.compute import macs
from palmette.supernet.supernet import Supernet


def configs(net, count, seed=0):
    rng = np.random.default_rng(seed)
    return [net.min(), *(net.sample(rng) for _ in range(count))]


def test_the_largest_is_the_original(any_model):
    model, x = any_model
    net = Supernet.from_model(model, x).eval()
    with torch.no_grad():
        assert torch.equal(net(x), model(x))
    assert net.active == net.max()


def test_what_is_extracted_computes_what_is_active(any_model):
    model, x = any_model
    net = Supernet.from_model(model, x).eval()
    outputs = []
    with torch.no_grad():
        for config in configs(net, 12):
            net.activate(config)
            active, extracted = net(x), net.extract()
            torch.testing.assert_close(extracted(x), active, rtol=1e-5, atol=1e-6)
            outputs.append(active)
    assert any(not torch.allclose(outputs[0], y) for y in outputs[1:])


def test_every_side_is_found(mixed, transformer):
    net = Supernet.from_model(*mixed)
    kinds = {kind: len(net.space.of_kind(kind)) for kind in ("width", "depth", "kernel")}
    assert kinds == {"width": 7, "depth": 1, "kernel": 2}
    assert net.static["squeeze"] == "it is the squeeze of a gate, which is small"
    assert "reach the output" in net.static["head"]
    assert net.space["depth:add"].values == (2, 3, 4)
    net = Supernet.from_model(*transformer)
    assert {kind: len(net.space.of_kind(kind)) for kind in ("width", "depth", "heads")} == {
        "width": 5, "depth": 1, "heads": 4,
    }  # fmt: skip
    (stage,) = net.space.of_kind("depth")
    assert stage.values == (2, 3, 4)  # layers, each of two blocks


def test_sides_can_be_left_alone_and_paths_protected(mixed):
    model, x = mixed
    net = Supernet.from_model(model, x, width=(), kernel=(), depth=1)
    assert [c.kind for c in net.space.choices] == ["depth"]
    net = Supernet.from_model(model, x, protect=["stem", "right"])
    names = [c.name for c in net.space.choices]
    assert "kernel:right" not in names
    assert not any(name.endswith(":stem") for name in names)
    assert net.static["right"] == "it is protected"
    net = Supernet.from_model(model, x, protect=["add"])
    assert net.static["depth:add"] == "a block of it is protected"
    assert net.space.of_kind("depth") == []
    for options in ({"width": (0.0, 1.0)}, {"depth": -1}, {"round_to": 0}, {"heads": (2.0,)}):
        with pytest.raises(InputError, match="out of bounds"):
            Supernet.from_model(model, x, **options)


def test_a_smaller_network_is_really_smaller(any_model):
    model, x = any_model
    net = Supernet.from_model(model, x)
    small = net.extract(net.min())
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    assert macs(small, x) < 0.6 * macs(model, x)


def test_inactive_slices_have_gradients_of_exactly_zero(any_model):
    model, x = any_model
    net = Supernet.from_model(model, x).train()
    for config in configs(net, 4):
        net.zero_grad()
        with net.running(config):
            net(x).square().sum().backward()
        live = {name: p.shape for name, p in net.extract(config).named_parameters()}
        for name, p in net.network.named_parameters():
            touched = 0 if p.grad is None else int((p.grad != 0).sum())
            assert touched <= (live[name].numel() if name in live else 0), name
            if name in live and p.grad is not None and live[name].numel() < p.numel():
                assert touched < p.numel(), name


def test_gradients_are_those_of_the_extracted_network(any_model):
    model, x = any_model
    net = Supernet.from_model(model, x).train().double()
    x = x.double()
    config = configs(net, 1, seed=3)[1]
    small = net.extract(config).train()
    small(x).square().sum().backward()
    with net.running(config):
        net(x).square().sum().backward()
    for name, p in small.named_parameters():
        own = dict(net.network.named_parameters())[name].grad
        torch.testing.assert_close(own.abs().sum(), p.grad.abs().sum(), rtol=1e-9, atol=1e-9)


def test_training_a_part_leaves_the_shared_statistics_alone(mixed):
    model, x = mixed
    net = Supernet.from_model(model, x).train()
    before = {k: v.clone() for k, v in net.network.named_buffers()}
    with net.running(net.min()):
        net(x)
    assert all(torch.equal(v, before[k]) for k, v in net.network.named_buffers())
    net(x)
    assert not all(torch.equal(v, before[k]) for k, v in net.network.named_buffers())


def test_recalibration_touches_no_weight_and_is_extracted(mixed):
    model, _ = mixed
    x = torch.randn(32, 3, 12, 12) * 3 + 1
    net = Supernet.from_model(model, x[:2]).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    config = net.min()
    with torch.no_grad(), net.running(config):
        stale = net(x)
        net.recalibrate(config, [(x[:16], None), (x[16:], None)], batches=2)
        fresh = net(x)
        assert not torch.allclose(stale, fresh)
        torch.testing.assert_close(net.extract()(x), fresh, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    small = net.extract(config)
    kept = small.stem(x)
    means = (kept[:16].mean((0, 2, 3)) + kept[16:].mean((0, 2, 3))) / 2
    torch.testing.assert_close(small.bn.running_mean, means, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="empty"):
        net.recalibrate(config, [])


def test_an_extracted_network_is_saved_loaded_and_exported(any_model, tmp_path):
    model, x = any_model
    net = Supernet.from_model(model, x)
    config = configs(net, 1, seed=5)[1]
    small = net.extract(config)
    pm.save(small, tmp_path / "small.safetensors", source=model)
    again = pm.load(copy.deepcopy(model), tmp_path / "small.safetensors")
    assert torch.equal(again(x), small(x))
    pm.export(small, x, tmp_path / "small.pt2")


def test_a_supernet_is_copied_and_its_state_goes_round(any_model):
    model, x = any_model
    net = Supernet.from_model(model, x).eval()
    config = configs(net, 1)[1]
    twin = copy.deepcopy(net)
    other = Supernet.from_model(copy.deepcopy(model), x).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.01)
        other.load_state_dict(net.state_dict())
        for each in (net, twin, other):
            each.activate(config)
        assert torch.equal(other(x), net(x))
        assert not torch.equal(twin(x), net(x))


def test_a_configuration_that_is_none_is_refused(tiny):
    net = Supernet.from_model(*tiny)
    with pytest.raises(InputError, match="cannot be 7"):
        net.activate({**net.max(), "width:stem": 7})
    with pytest.raises(InputError, match="has no choice 'x'"):
        net.activate({**net.max(), "x": 1})
    with pytest.raises(InputError, match="asks for 'width:stem'"):
        net.activate({k: v for k, v in net.max().items() if k != "width:stem"})
