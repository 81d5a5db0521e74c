"""Dead channels: what goes, what stays, and that nothing that is left computes anything else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from palmette.errors import InputError
from palmette.graph import (
    DeadRecord,
    Edit,
    Plan,
    capture,
    collapse,
    linearize,
    load,
    remove_dead_channels,
    save,
    verify,
)
from palmette.graph.verify import float64_twin
from palmette.meter import CostTable, macs, params

BOUND = 1e-12
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "written-out": lambda x: x * torch.sigmoid(x),
    "threshold": lambda x: F.threshold(x, 0.1, 20.0),
    "none": lambda x: x,
}


class Act(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return ACTS[self.kind](x)


class Block(nn.Module):
    """Two branches, added, concatenated, multiplied or gated; the second may be the input itself."""

    def __init__(self, left: nn.Module, right: nn.Module, how: str) -> None:
        super().__init__()
        self.left, self.right, self.how = left, right, how

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        if self.how == "cat":
            return torch.cat([a, b], 1)
        if self.how == "gate":
            return a * torch.sigmoid(b.mean((2, 3), keepdim=True))
        return a * b if self.how == "mul" else a + b


class WiderShortcut(nn.Module):
    """The parameter-free shortcut of CIFAR ResNets: zeros for the channels that are new."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.sizes = (0, 0, 0, 0, before, after)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], self.sizes)


class Head(nn.Module):
    """Logits of a map [batch, channels, 8, 8], whose rows may be dead too."""

    def __init__(self, channels: int, size: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.linear = nn.Linear(channels * (size * size if how in ("flatten", "view") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flatten":
            x = torch.flatten(x, 1)
        elif self.how == "view":
            x = x.view(x.shape[0], -1)
        elif self.how == "pool":
            x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        else:
            x = x.mean((2, 3))
        return self.linear(x)


def conv(draw: Any, c_in: int, c_out: int, stride: int = 1, depthwise: bool = False) -> list[nn.Module]:
    """A convolution, perhaps with a batch norm that has seen data, and an activation."""
    kernel = draw(st.sampled_from((1, 3)))
    padding = kernel // 2
    groups = c_in if depthwise else 1
    layers: list[nn.Module] = [nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=draw(st.booleans()))]
    if draw(st.booleans()):
        layers.append(nn.BatchNorm2d(c_out))
    return [*layers, Act(draw(st.sampled_from(sorted(ACTS))))]


def pool(draw: Any) -> nn.Module:
    return draw(st.sampled_from((nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(1), nn.Dropout2d(0.2))))


def block(draw: Any, c: int) -> tuple[nn.Module, int, int]:
    """A block for `c` channels: itself, its channels and its stride."""
    kind = draw(st.sampled_from(("add", "cat", "mul", "gate", "mobile", "widen", "plain", "pool")))
    if kind == "pool":
        return pool(draw), c, 1
    if kind == "plain":
        n = draw(st.integers(2, 6))
        return nn.Sequential(*conv(draw, c, n)), n, 1
    if kind == "mobile":
        n = 2 * c
        inner = nn.Sequential(*conv(draw, c, n), *conv(draw, n, n, depthwise=True), *conv(draw, n, c))
        return Block(inner, nn.Identity(), "add"), c, 1
    if kind == "widen":
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        n = c + before + after
        return Block(nn.Sequential(*conv(draw, c, n, 2)), WiderShortcut(before, after), "add"), n, 2
    inner = nn.Sequential(*conv(draw, c, c + 1), *conv(draw, c + 1, c))
    other = nn.Sequential(*conv(draw, c, c)) if draw(st.booleans()) else nn.Identity()
    return Block(inner, other, kind), 2 * c if kind == "cat" else c, 1


def kill(net: nn.Module, generator: torch.Generator) -> None:
    """Zeros in rows, columns, biases and scales, at random."""

    def some(n: int, share: float) -> Tensor:
        return torch.rand(n, generator=generator) < share

    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                m.weight[some(m.weight.shape[0], 0.3)] = 0
                m.weight[:, some(m.weight.shape[1], 0.3)] = 0
                if m.bias is not None:
                    m.bias[some(len(m.bias), 0.5)] = 0
            elif isinstance(m, nn.BatchNorm2d):
                for value in (m.weight, m.bias, m.running_mean):
                    value.copy_(torch.randn(len(value), generator=generator))
                m.running_var.uniform_(0.5, 2.0, generator=generator)
                m.weight[some(len(m.weight), 0.2)] = 0
                m.bias[some(len(m.bias), 0.3)] = 0
                m.running_mean[some(len(m.bias), 0.3)] = 0


@st.composite
def networks(draw: Any) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 10_000)))
    c, size = draw(st.integers(2, 5)), 8
    layers = conv(draw, 3, c)
    for _ in range(draw(st.integers(1, 4))):
        layer, c, stride = block(draw, c)
        size = -(-size // stride)
        layers.append(layer)
    net = nn.Sequential(*layers, Head(c, size, draw(st.sampled_from(("flatten", "view", "pool", "mean")))))
    kill(net, torch.Generator().manual_seed(draw(st.integers(0, 10_000))))
    return net.eval()


def error(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y, z = a(x), b(x)
    assert y.shape == z.shape
    return float((y - z).abs().max() / y.abs().max().clamp_min(1e-3))


def removed(net: nn.Module, x: Tensor, **options: Any) -> tuple[fx.GraphModule, DeadRecord]:
    """The network without dead channels; it was held against the whole one in float64 first."""
    whole = capture(net.double(), x.double())
    before = {k: v.clone() for k, v in whole.state_dict().items()}
    small, record = remove_dead_channels(whole, **options)
    noise = torch.randn(3, *x.shape[1:]).double()
    assert error(net, small, noise) <= BOUND
    assert all(torch.equal(v, before[k]) for k, v in whole.state_dict().items())
    return small, record


def widths(record: DeadRecord) -> dict[str, int]:
    return {entry["producer"]: entry["kept"] for entry in record.narrowed}


def check(net: nn.Module, multiple: int) -> None:
    """Less of it computes the same, there is no more to find, and `collapse` does so with a proof."""
    x = torch.randn(2, 3, 8, 8)
    small, record = removed(copy.deepcopy(net), x, multiple=multiple)
    assert params(small) == record.params_after
    again, rest = remove_dead_channels(small, multiple=multiple)
    assert rest.narrowed == []
    assert again.meta["palmette"] == small.meta["palmette"]
    edited = Plan().apply(net, x)
    collapsed, _ = collapse(edited, cost="macs")
    proof = verify(edited, collapsed, example_inputs=x)
    assert proof.max_relative_error_float64 <= 1e-9


@settings(max_examples=4)
@given(networks(), st.sampled_from((1, 1, 4)))
def test_what_is_left_computes_the_same(net, multiple):
    check(net, multiple)


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from((1, 1, 4)))
def test_what_is_left_computes_the_same_in_many_networks(net, multiple):
    check(net, multiple)


def test_rows_columns_and_what_feeds_them_alone():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        net[2].weight[1] = 0.0  # a constant for the last layer's bias
        net[4].weight[:, 3] = 0.0  # nobody reads this unit
        net[0].weight[2], net[0].bias[2] = 0.0, -1.0  # relu makes it zero
        net[2].weight[[0, 2, 4], 5] = 0.0  # only read by units that go
    small, record = removed(net, torch.randn(2, 4))
    assert widths(record) == {"0": 4, "2": 3}
    assert record.folded == ["4"]
    assert [small.get_submodule(n).weight.shape for n in ("0", "2", "4")] == [(4, 4), (3, 4), (3, 3)]
    assert str(record).startswith("4 dead channels of 2 layers removed")


def two_convs(constant: float, kernel: int, padding: int, act: str = "none") -> nn.Module:
    """Of four channels between two convolutions one carries a constant."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Act(act), nn.Conv2d(4, 2, kernel, padding=padding, bias=False))
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = 0.0, constant
    return net


@pytest.mark.parametrize(
    ("constant", "kernel", "padding", "act", "kept"),
    [
        (0.0, 3, 1, "gelu", 3),
        (-2.0, 3, 1, "relu", 3),
        (0.7, 3, 0, "silu", 3),
        (0.7, 1, 0, "relu6", 3),
        (0.7, 3, 1, "relu", 4),  # zero padding sets 0.7 off at the border
        (0.0, 3, 1, "threshold", 4),  # 20 where there was nothing
        (-0.7, 3, 1, "gelu", 4),
    ],
)
def test_a_constant_goes_where_the_border_does_not_show_it(constant, kernel, padding, act, kept):
    small, record = removed(two_convs(constant, kernel, padding, act), torch.randn(2, 3, 6, 6))
    assert widths(record).get("0", 4) == kept
    folded = kept == 3 and bool(ACTS[act](torch.tensor(constant)) != 0)
    assert (small.get_submodule("2").bias is not None) == folded == (record.folded == ["2"])


def test_every_layer_keeps_a_channel_and_the_output_its_shape():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        net[2].weight.zero_()
        net[4].weight[1] = 0.0
    small, record = removed(net, torch.randn(2, 4))
    assert widths(record) == {"0": 1, "2": 1}
    assert small(torch.randn(5, 4).double()).shape == (5, 3)


def test_a_multiple_keeps_some_dead_channels():
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        net[2].weight[:, :5] = 0.0
    assert widths(removed(net, torch.randn(2, 4), multiple=4)[1]) == {"0": 12}
    assert removed(net, torch.randn(2, 4), multiple=16)[1].narrowed == []


def test_former_activations_lose_channels_with_all_that_fed_them():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 4)
    slopes = (0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    plan = Plan([Edit("linearize", "3", fit="mask", slope=slopes, offset=(0.5,) * 8)])
    edited = plan.apply(net, x)
    small, record = collapse(edited, cost="macs")
    assert verify(edited, small, example_inputs=x).exact
    assert params(small) < 4 * 8 + 8 + 8 * 4 + 4 + 4 * 3 + 3 + 1
    assert record.to_dict()["narrowed"] == record.narrowed


def test_float64_twins_speak_for_narrowed_networks(tmp_path):
    net = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        net[0].weight[:8] = 0.0
    x = torch.randn(2, 4)
    first, _ = collapse(Plan().apply(net, x), cost="macs")
    edited = Plan([linearize("3", fit="identity", force=True)]).apply(first, x)
    small, record = collapse(edited, cost="macs", force=True)
    assert first.get_submodule("0").out_features == 8
    assert record.done
    proof = verify(edited, small, example_inputs=x)
    assert proof.exact
    assert proof.max_relative_error_float64 < 1e-13
    assert error(float64_twin(edited), float64_twin(small), x.double()) > 1e-10  # rounding alone says less
    save(small, tmp_path / "small.safetensors", source=net)
    again = load(net, tmp_path / "small.safetensors")
    assert torch.equal(again(x), small.eval()(x))


def test_where_time_decides_dead_channels_stay_unless_it_falls(tmp_path):
    net = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 3)).eval()
    with torch.no_grad():
        net[2].weight[:, :13] = 0.0
    edited, file = Plan().apply(net, torch.randn(2, 4)), tmp_path / "costs.json"
    collapse(edited, cost=CostTable("eager", file))
    table = json.loads(file.read_text())
    keys = [key for key in table["entries"] if key.startswith("dead channels")]
    assert [json.loads(key.partition("-> ")[2]) for key in keys] == [[["0", 27]], [["0", 32]]]
    for times, kept, reason in (
        ([(1.0, 0.99), (1.0, 1.5)], 40, "1 -> 0.99 ms"),
        ([(1.0, 0.9), (2.0, 1.0)], 32, ""),
        ([(1.0, 0.5), (2.0, 1.9)], 27, ""),
    ):
        for key, (before, after) in zip(keys, times, strict=True):
            table["entries"][key] |= {"before": before, "after": after}
        file.write_text(json.dumps(table))
        small, record = collapse(edited, cost=CostTable.stored(file))
        assert small.get_submodule("0").out_features == kept
        assert record.narrowed == ([] if kept == 40 else [{"producer": "0", "kept": kept, "of": 40}])
        assert reason in record.dead_kept
        assert ("dead channels stay" in str(record)) == bool(reason)


def test_plain_networks_are_refused():
    with pytest.raises(InputError, match="captured"):
        remove_dead_channels(nn.Linear(2, 2))


def test_a_network_pruned_channel_by_channel_becomes_smaller(palmette_data):
    import importlib.util
    import sys

    sys.path.insert(0, str(palmette_data))
    try:
        spec: Any = importlib.util.spec_from_file_location("stored_networks", palmette_data / "networks.py")
        stored = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(stored)
        net = stored.build("cifar10_resnet20_distiller_channel_sparse")[0]
    finally:
        sys.path.remove(str(palmette_data))
    x = torch.randn(2, 3, 32, 32)
    small, record = removed(copy.deepcopy(net), x)
    assert widths(record) == {
        "layer1.0.conv1": 11,
        "layer1.1.conv1": 8,
        "layer1.2.conv1": 8,
        "layer2.0.conv1": 23,
        "layer2.1.conv1": 18,
        "layer3.0.conv1": 51,
        "layer3.1.conv1": 52,
    }
    assert (params(small), macs(small, x.double())) == (229_280, 29_956_736)
