"""Recorded narrowing: what a decision keeps, that it is plain JSON, and that another network refuses it."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from palmette.errors import InputError, PlanError
from palmette.graph import capture, load, resize, save
from palmette.graph.channels import Channels
from palmette.graph.resize import decide, ranges


class Net(nn.Module):
    """Everything that a decision can name: rows, columns, norms, depthwise convolutions, scales, sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.scale = nn.Parameter(torch.randn(6, 1, 1), requires_grad=False)
        self.register_buffer("offset", torch.randn(1, 6, 1, 1))
        self.wide, self.head = nn.Conv2d(8, 5, 1), nn.Linear(5 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.stem(x)).relu()) * self.scale + self.offset
        x = nn.functional.pad(x, (0, 0, 0, 0, 2, 0))
        return self.head(self.wide(x).relu().reshape(-1, 80))


def masked(net: nn.Module) -> nn.Module:
    """The network with zeros where channels 1 and 4 of the stem and 2 and 3 of the last convolution were."""
    with torch.no_grad():
        net.wide.weight[:, [2 + 1, 2 + 4]] = 0.0
        for channel in (2, 3):
            net.head.weight[:, channel * 16 : (channel + 1) * 16] = 0.0
    return net.eval()


def narrowed(net: nn.Module, x: Tensor):
    """`net` without those channels, and the decision."""
    gm = capture(net, x)
    channels = Channels(gm)
    by_path = {n.meta["path"]: n for n in channels.writers}
    removed = torch.zeros_like(channels.pinned)
    removed[channels.of(by_path["stem"])[[1, 4]]] = True
    removed[channels.of(by_path["wide"])[[2, 3]]] = True
    decision = decide(channels, removed)
    return resize(gm, decision), decision


def test_what_stays_computes_what_zeros_would():
    net, x = masked(Net()), torch.randn(2, 3, 4, 4)
    small, decision = narrowed(net, x)
    assert torch.allclose(small(x), net(x), atol=1e-6)
    assert small.stem.weight.shape == (4, 3, 3, 3)
    assert small.norm.num_features == 4
    assert (small.depthwise.groups, small.depthwise.in_channels, small.depthwise.out_channels) == (4, 4, 4)
    assert (small.wide.in_channels, small.wide.out_channels, small.head.in_features) == (6, 3, 48)
    assert small.scale.shape == (4, 1, 1)
    assert not small.scale.requires_grad
    assert small.offset.shape == (1, 4, 1, 1)
    assert "offset" in dict(small.named_buffers())
    assert [s["sizes"] for s in decision["sizes"]] == [[0, 0, 0, 0, 2, 0], [-1, 48]]
    assert decision["layers"][0] == {"path": "stem", "rows": {"keep": [[0, 1], [2, 4], [5, 6]], "of": 6}}
    shapes = {n.meta["path"]: n.meta["shape"] for n in small.graph.nodes if n.op == "call_module"}
    assert (shapes["norm"], shapes["wide"]) == ((2, 4, 4, 4), (2, 3, 4, 4))
    small.train()(x).sum().backward()
    assert small.stem.weight.grad.shape == (4, 3, 3, 3)


def test_a_narrowed_network_is_rebuilt_from_its_source(tmp_path):
    net, x = masked(Net()), torch.randn(2, 3, 4, 4)
    small, decision = narrowed(net, x)
    assert small.meta["palmette"]["steps"] == [{"resize": json.loads(json.dumps(decision))}]
    save(small, tmp_path / "net.safetensors", source=net)
    again = load(Net(), tmp_path / "net.safetensors")
    assert torch.equal(again(x), small(x))
    assert again.meta["palmette"]["steps"] == small.meta["palmette"]["steps"]


def test_another_network_refuses_a_decision(tmp_path):
    net, x = masked(Net()), torch.randn(2, 3, 4, 4)
    small, decision = narrowed(net, x)
    with pytest.raises(PlanError, match="'stem' has 4 channels where the plan narrows 6"):
        resize(small, decision)
    with pytest.raises(PlanError, match="no operation 'stem'"):
        resize(capture(nn.Sequential(nn.Linear(2, 2)), torch.randn(2, 2)), decision)
    with pytest.raises(PlanError, match="is no layer"):
        resize(capture(net, x), {**decision, "layers": [{**decision["layers"][0], "path": "relu"}]})
    for keep in ([], [[0, 7]]):
        entry = {"path": "stem", "rows": {"keep": keep, "of": 6}}
        with pytest.raises(PlanError, match="narrows 6"):
            resize(capture(net, x), {**decision, "layers": [entry]})
    small.meta["palmette"]["steps"][0]["resize"]["layers"][0].pop("path")
    save(small, tmp_path / "net.safetensors")
    with pytest.raises(InputError, match="damaged"):
        load(net, tmp_path / "net.safetensors")


def test_nothing_to_narrow_leaves_no_trace():
    gm = capture(Net(), torch.randn(2, 3, 4, 4))
    channels = Channels(gm)
    decision = decide(channels, torch.zeros_like(channels.pinned))
    assert resize(gm, decision) is gm
    assert "steps" not in gm.meta["palmette"]


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_ranges_say_what_stays(keep):
    found = ranges(torch.tensor(keep))
    assert [i for start, stop in found for i in range(start, stop)] == [i for i, k in enumerate(keep) if k]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))
