"""Weights in 8 bits as a choice: what runs, what is extracted, what is counted and what is stored are one thing."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import palmette as pm
from palmette.cli import main
from palmette.device import DeviceProfile
from palmette.errors import InputError
from palmette.graph.int8 import from_integers, rounded, row_scales, stored_bytes, stored_weights, to_integers
from palmette.meter.memory import peak_bytes
from palmette.supernet.boards import describe
from palmette.supernet.memory import MemoryModel
from palmette.supernet.optimum import Optimizer
from palmette.supernet.sampling import sample_within
from palmette.supernet.specialize import specialize
from palmette.supernet.strategies import phases
from palmette.supernet.supernet import Supernet
from palmette.train.config import HealConfig


def configs(net, count, seed=0):
    rng = np.random.default_rng(seed)
    return [net.min(), *(net.sample(rng) for _ in range(count))]


def in_8_bits(net, config):
    """Names of the weights that a configuration stores in 8 bits, from the names of its choices."""
    active = [c for c in net.space.of_kind("bits") if net.space.active(config, c)]
    return {f"{c.name.removeprefix('bits:')}.weight" for c in active if config[c.name] == 8}


def counted(model, int8):
    """Bytes of a network's parameters: int8 elements and a float32 scale a row, or float32."""
    sizes = {name: (p.numel(), len(p) if p.dim() else 1) for name, p in model.named_parameters()}
    return sum(n + 4 * rows if name in int8 else 4 * n for name, (n, rows) in sizes.items())


# ---- the grid --------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    exponent=st.integers(-44, 30),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_a_weight_on_its_grid_is_what_its_integers_say(seed, shape, exponent, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponent).to(dtype)
    weight[torch.rand(shape[0], generator=generator) < 0.2] = 0
    if not weight.isfinite().all():
        return
    scales, grid = row_scales(weight), rounded(weight)
    integers = to_integers(grid, scales)
    assert integers.dtype == torch.int8
    assert int(integers.abs().max()) <= 127
    assert torch.equal(from_integers(integers, scales).to(dtype), grid)
    assert torch.equal(integers, to_integers(weight, scales))
    assert torch.equal(rounded(-weight), -grid)
    if dtype == torch.float32 and exponent > -30:
        steps = scales.reshape(-1, *(1,) * (weight.dim() - 1))
        assert bool(((weight - grid).abs() <= 0.5001 * steps).all())
        expected = weight.abs().flatten(1).amax(1) / 127
        assert torch.equal(scales, torch.where(expected > 0, expected, torch.ones_like(expected)))


def test_the_gradient_passes_the_grid_unchanged():
    weight = torch.randn(4, 5, requires_grad=True)
    factor = torch.randn(4, 5)
    (rounded(weight) * factor).sum().backward()
    assert torch.equal(weight.grad, factor)


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_every_layer_with_a_weight_of_its_own_has_the_choice(mixed, transformer):
    model, x = mixed
    net = Supernet.from_model(model, x, bits=(8, 32))
    own = {f"bits:{name}" for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {c.name for c in net.space.of_kind("bits")} == own
    assert all(c.values == (8, 32) for c in net.space.of_kind("bits"))
    assert net.space["bits:chain.1.0"].owner == ("depth:add", 3)
    assert net.space["bits:stem"].owner is None
    assert "of bits" in describe(net)
    assert not Supernet.from_model(model, x).space.of_kind("bits")
    assert not Supernet.from_model(model, x, bits=(32,)).space.of_kind("bits")
    assert Supernet.from_model(model, x, bits=(8,)).space == net.space
    protected = Supernet.from_model(model, x, bits=(8,), protect=["stem", "chain"]).space.of_kind("bits")
    assert {c.name for c in protected} == {name for name in own if not name.startswith(("bits:stem", "bits:chain"))}
    assert len(Supernet.from_model(*transformer, bits=(8,)).space.of_kind("bits")) == 2 + 4 * 6
    assert [name for name, _, _ in phases(net.space)][-1] == "bits"


@pytest.mark.parametrize("bits", [(4, 32), (8, 16), (0,), (-8, 8)])
def test_other_bits_are_refused(tiny, bits):
    with pytest.raises(InputError, match="is not possible"):
        Supernet.from_model(*tiny, bits=bits)


class Odd(nn.Module):
    """A tied weight, a layer that is called twice, a weight without a module, rows of one and of three elements."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.twice = nn.Linear(8, 8)
        self.bare = nn.Parameter(torch.randn(8, 8))
        self.thin, self.three = nn.Conv1d(8, 8, 1, groups=8), nn.Conv1d(8, 8, 3, padding=1, groups=8)

    def forward(self, x):  # [B, 8] -> [B, 8]
        x = torch.relu(self.second(torch.relu(self.first(x))))
        x = nn.functional.linear(self.twice(torch.relu(self.twice(x))), self.bare)
        return self.three(self.thin(x[..., None]))[..., 0]


def test_shared_weights_and_short_rows_have_no_choice_and_a_bare_weight_has_one():
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(3, 8)
    net = Supernet.from_model(model, x, bits=(8, 32)).eval()
    (choice,) = net.space.of_kind("bits")
    config = {**net.max(), choice.name: 8}
    with torch.no_grad(), net.running(config):
        small = net.extract()
        torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-6)
        assert set(stored_weights(small)) == {"bare"}
        assert not torch.equal(net(x), model(x))
    memory = MemoryModel(net)
    assert memory.param_bytes(memory.codes.encode([config]))[0] == counted(small, {"bare"})


# ---- what runs and what is extracted ---------------------------------------------------------------------------------


def test_the_largest_is_the_original(any_model):
    model, x = any_model
    net = Supernet.from_model(model, x, bits=(8, 32)).eval()
    with torch.no_grad():
        assert torch.equal(net(x), model(x))
    assert all(net.max()[c.name] == 32 for c in net.space.of_kind("bits"))
    assert not stored_weights(net.extract(net.max()))


def test_what_is_extracted_computes_what_is_active_and_is_what_it_was_counted_to_be(any_model):
    model, x = any_model
    net = Supernet.from_model(model, x, bits=(8, 32)).eval()
    memory = MemoryModel(net)
    with torch.no_grad():
        for config in configs(net, 8):
            net.activate(config)
            small, int8 = net.extract(), in_8_bits(net, config)
            torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)
            assert set(stored_weights(small)) == int8
            for name in int8:
                rows = small.state_dict()[name].flatten(1)
                steps = rows / (rows.abs().amax(1, keepdim=True) / 127)
                torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
            code = memory.codes.encode([config])
            assert memory.param_bytes(code)[0] == counted(small, int8) == stored_bytes(small)
            assert memory.peak_bytes(code)[0] == peak_bytes(small, 1, hold_inputs=False)


def test_only_the_weights_change_and_only_to_the_grid(tiny):
    model, x = tiny
    net = Supernet.from_model(model, x, bits=(8, 32)).eval()
    config = {**net.max(), "bits:a": 8}
    found, source = net.extract(config).state_dict(), model.state_dict()
    for name, value in source.items():
        expected = value
        if name == "a.weight":
            steps = (value.abs().amax((1, 2, 3)) / 127).reshape(-1, 1, 1, 1)
            expected = (value / steps).round().clamp(-127, 127) * steps
            assert not torch.equal(value, expected)
        assert torch.equal(found[name], expected), name


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_gradients_are_straight_through_and_exactly_zero_elsewhere(any_model):
    model, x = any_model
    net = Supernet.from_model(model, x, bits=(8, 32)).train()
    for config in configs(net, 2):
        net.zero_grad()
        with net.running(config):
            net(x).square().sum().backward()
        small = net.extract(config).train()
        small(x).square().sum().backward()
        live = dict(small.named_parameters())
        for name, p in net.network.named_parameters():
            if name not in live:
                assert p.grad is None or not p.grad.any(), name
                continue
            assert int((p.grad != 0).sum()) <= live[name].numel(), name
            torch.testing.assert_close(p.grad.abs().sum(), live[name].grad.abs().sum(), rtol=1e-3, atol=1e-3)


def test_a_supernet_with_bits_trains_in_every_phase(tiny):
    model, x = tiny
    net = Supernet.from_model(model, x, width=(0.5, 1.0), kernel=(), bits=(8, 32))
    data = DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8) % 4), batch_size=4)
    before = {name: p.clone() for name, p in net.named_parameters()}
    pm.train_supernet(net, data, HealConfig(epochs=1, lr=0.05), strategy="progressive")
    assert any(not torch.equal(p, before[name]) for name, p in net.named_parameters())


# ---- bounds ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(nets):
    torch.manual_seed(0)
    net = Supernet.from_model(nets.trained_like(nets.Mixed()), torch.randn(2, 3, 8, 8), bits=(8, 32))
    return net, MemoryModel(net)


@given(seed=st.integers(0, 10**6))
def test_more_bits_never_need_less(shared, seed):
    net, memory = shared
    config = net.sample(np.random.default_rng(seed))
    for choice in net.space.of_kind("bits"):
        both = memory.param_bytes(memory.codes.encode([{**config, choice.name: v} for v in (8, 32)]))
        assert both[0] < both[1] if net.space.active(config, choice) else both[0] == both[1]


@given(seed=st.integers(0, 10**6))
def test_the_terms_add_up_to_the_bytes(shared, seed):
    net, memory = shared
    codes = memory.codes.encode([net.sample(np.random.default_rng(seed))])
    onehot = memory.codes.onehot(codes)[0]
    total = sum(amount * np.prod(onehot[list(columns)]) for columns, amount in memory.weights.terms().items())
    assert round(total) == memory.param_bytes(codes)[0]


def test_weights_in_ram_shrink_and_activations_multiply_adds_and_devices_of_8_bits_do_not(shared):
    net, memory = shared
    names = [c.name for c in net.space.of_kind("bits")]
    codes = memory.codes.encode([net.max(), {**net.max(), **dict.fromkeys(names, 8)}])
    whole, small = memory.param_bytes(codes)
    assert small < 0.3 * whole
    assert memory.ram_bytes(codes)[0] - memory.ram_bytes(codes)[1] == whole - small
    assert len(set(memory.peak_bytes(codes).tolist())) == len(set(memory.weights.macs(codes).tolist())) == 1
    narrow = MemoryModel(net, DeviceProfile(dtype="int8")).param_bytes(codes)
    assert narrow.tolist() == [whole // 4] * 2
    half = MemoryModel(net, DeviceProfile(dtype="float16")).param_bytes(codes)
    int8 = in_8_bits(net, {**net.max(), **dict.fromkeys(names, 8)})
    own = dict(net.network.named_parameters())
    assert half[1] == sum(p.numel() + 4 * len(p) if name in int8 else 2 * p.numel() for name, p in own.items())


@pytest.mark.parametrize("weights_in", ["flash", "ram"])
def test_the_optimum_under_a_bound_is_that_of_brute_force(tiny, weights_in):
    net = Supernet.from_model(*tiny, width=(0.5, 1.0), kernel=(3,), bits=(8, 32))
    free = MemoryModel(net)
    codes = np.array(list(itertools.product(*(range(len(c.values)) for c in net.space.choices))))
    need = free.param_bytes(codes)
    rng = np.random.default_rng(0)
    for share in (0.02, 0.2, 0.6):
        bound = {"flash": int(np.quantile(need, share))}
        if weights_in == "ram":
            bound = {"ram": int(np.quantile(free.ram_bytes(codes), share))}
        memory = MemoryModel(net, DeviceProfile(weights_in=weights_in, **bound))
        weights = rng.normal(size=memory.codes.width) + 0.3
        values = memory.codes.mattering(codes) @ weights
        allowed = memory.fits(codes)
        found = Optimizer(memory).best(weights)
        assert found.value == pytest.approx(values[allowed].max(), abs=1e-6)
        assert memory.fits(memory.codes.encode([found.config]))[0]
        assert memory.fits(sample_within(memory, 50, rng)).all()


def test_a_tight_board_gets_weights_in_8_bits(tmp_path, nets):
    torch.manual_seed(0)
    x, y = torch.randn(96, 3, 8, 8), torch.arange(96) % 4
    for i, label in enumerate(y.tolist()):
        x[i, label : label + 1] += 1.0
    train, val = (DataLoader(TensorDataset(x[a:b], y[a:b]), batch_size=32) for a, b in ((0, 64), (64, 96)))
    source = nets.trained_like(nets.Mixed())
    net = Supernet.from_model(source, x[:2], bits=(8, 32))
    plain = MemoryModel(Supernet.from_model(source, x[:2]))
    least = int(plain.param_bytes(plain.codes.encode([plain.net.min()]))[0])  # no network in 32 bits keeps this bound
    board = DeviceProfile(name="tight", flash=least - 1, weights_in="flash")
    options = {"profile": board, "source": source, "measurements": 10, "rounds": 1, "batches": 1}
    found = specialize(net, train, val, run_dir=tmp_path / "run", **options)
    assert in_8_bits(net, found.config)
    assert found.measured["param_bytes"] == found.found.param_bytes < least
    again = pm.load(source, tmp_path / "run" / "model.safetensors")
    assert torch.equal(again(x[:4]), found.model(x[:4]))
    assert stored_bytes(again) == found.found.param_bytes


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_file_holds_integers_and_gives_the_same_network(any_model, tmp_path):
    model, x = any_model
    net = Supernet.from_model(model, x, bits=(8, 32))
    small = net.extract(net.min())
    file, float_file = tmp_path / "small.safetensors", tmp_path / "float.safetensors"
    pm.save(small, file, source=model)
    again = pm.load(copy.deepcopy(model), file)
    assert torch.equal(again(x), small(x))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in small.state_dict().items())
    assert set(stored_weights(again)) == set(stored_weights(small))
    pm.save(again, tmp_path / "again.safetensors", source=model)
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    pm.save(net.extract({**net.min(), **{c.name: 32 for c in net.space.of_kind("bits")}}), float_file, source=model)
    saved = sum(3 * integers.numel() - 4 * len(scales) for integers, scales in stored_weights(small).values())
    assert float_file.stat().st_size - file.stat().st_size > 0.6 * saved


def test_weights_that_were_trained_afterwards_are_stored_as_they_are(tiny, tmp_path):
    model, x = tiny
    net = Supernet.from_model(model, x, bits=(8, 32))
    small = net.extract(net.min())
    with torch.no_grad():
        small.get_submodule("stem").weight.mul_(1.01).add_(0.001)
    assert in_8_bits(net, net.min()) - set(stored_weights(small)) == {"stem.weight"}
    pm.save(small, tmp_path / "small.safetensors", source=model)
    assert torch.equal(pm.load(model, tmp_path / "small.safetensors")(x), small(x))


def test_onnx_holds_integers_and_has_the_size_that_was_computed(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128),
        nn.ReLU(), nn.Conv2d(128, 192, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 96),
        nn.ReLU(), nn.Linear(96, 10),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    net = Supernet.from_model(model, x, bits=(8, 32))
    small = net.extract({**net.max(), **{c.name: 8 for c in net.space.of_kind("bits")}})
    file = tmp_path / "small.onnx"
    parity = pm.export(small, x, file)
    assert parity.relative_error < 1e-5
    graph = onnx.load(file).graph
    onnx.checker.check_model(onnx.load(file), full_check=True)
    kinds = [t.data_type for t in graph.initializer if len(t.dims) > 1]
    assert kinds == [onnx.TensorProto.INT8] * 5
    assert [n.op_type for n in graph.node].count("DequantizeLinear") == 5
    computed = stored_bytes(small)
    assert computed > 300_000
    assert abs(file.stat().st_size - computed) < 0.02 * computed + 8192
    pm.save(small, tmp_path / "small.safetensors", source=model)
    assert abs((tmp_path / "small.safetensors").stat().st_size - computed) < 0.02 * computed + 8192


def test_products_of_matrices_keep_floating_point_activations(fused, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model, x = fused
    net = Supernet.from_model(model, x, bits=(8, 32))
    assert pm.export(net.extract(net.min()), x, tmp_path / "small.onnx").relative_error < 1e-5
    kinds = [t.data_type for t in onnx.load(tmp_path / "small.onnx").graph.initializer if len(t.dims) > 1]
    assert kinds == [onnx.TensorProto.INT8] * len(stored_weights(net.extract(net.min())))


def test_quantising_activations_too_starts_from_floating_point(tiny, tmp_path):
    pytest.importorskip("onnxruntime")
    model, x = tiny
    small = Supernet.from_model(model, x, bits=(8,)).extract(Supernet.from_model(model, x, bits=(8,)).min())
    made = pm.quantize_int8(small, x, [torch.randn(8, 3, 16, 16)], tmp_path / "int8.onnx", min_snr_db=5.0)
    assert made.share > 0.9
    assert stored_weights(small)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_command_takes_bits(capsys, tmp_path):
    command = ["specialize", "-m", "palmette:digits-mobile", "-d", "digits", "-r", str(tmp_path / "run"), "--dry-run"]
    for bits, code, said in (("8", 0, "of bits"), ("x", 2, "integer"), ("4", 2, "is not possible")):
        with pytest.raises(SystemExit) as left:
            main([*command, "-b", "nano:flash=1MiB,weights_in=flash", "--bits", bits])
        assert left.value.code == code
        printed = capsys.readouterr()
        assert said in printed.out + printed.err
