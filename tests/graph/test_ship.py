"""Captured networks on the way to another process: nothing that the nodes know is lost, nothing is shared."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from palmette.graph import Plan, capture, collapse, drop, find_sites, linearize
from palmette.graph.inputs import call
from palmette.graph.ship import Crate, packed, unpacked


class Shared(nn.Module):
    """One linear map used twice, one buffer that is not saved, dictionaries in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = self.one
        self.register_buffer("offset", torch.arange(4.0), persistent=False)

    def forward(self, x, scale=None):
        h = self.two(torch.relu(self.one(x) + self.offset))
        return {"h": h if scale is None else h * scale, "both": (x, h)}


class Residual(nn.Module):
    """A convolutional block with a norm, functional activations and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.drop, self.hidden, self.head = nn.Dropout(0.1), nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + F.gelu(self.norm(self.conv(x)))
        return self.head(F.relu(self.hidden(self.drop(x.mean((2, 3))))))


NETWORKS = {
    "shared": (Shared, {"x": torch.randn(2, 4), "scale": torch.ones(2, 1)}),
    "residual": (Residual, torch.randn(2, 3, 8, 8)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)),
}


def sent(network):
    """The network as it arrives, by the serialisation that Ray builds on."""
    return unpacked(pickle.loads(pickle.dumps(packed(network))))


def same(one, other, inputs) -> None:
    assert str(one.graph) == str(other.graph)
    assert one.code == other.code
    assert [node.meta for node in one.graph.nodes] == [node.meta for node in other.graph.nodes]
    assert one.meta == other.meta
    assert {path: m.training for path, m in one.named_modules()} == {p: m.training for p, m in other.named_modules()}
    before, after = one.state_dict(), other.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, _ in one.named_parameters()] == [name for name, _ in other.named_parameters()]
    leaves = torch.utils._pytree.tree_leaves
    pairs = zip(leaves(call(one, inputs)), leaves(call(other, inputs)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_arrives_as_it_was_sent(name) -> None:
    build, inputs = NETWORKS[name]
    network = capture(build(), inputs).eval()
    arrived = sent(network)
    same(network, arrived, inputs)
    assert [str(site) for site in find_sites(arrived, inputs)] == [str(site) for site in find_sites(network, inputs)]


def test_it_trains_on_its_own() -> None:
    build, inputs = NETWORKS["residual"]
    network = capture(build(), inputs).train()
    arrived = sent(network)
    call(arrived, inputs).sum().backward()
    with torch.no_grad():
        arrived.get_parameter("head.weight").zero_()
    assert network.get_parameter("head.weight").abs().sum() > 0
    assert network.get_parameter("head.weight").grad is None


def test_an_edited_and_a_collapsed_network_arrive() -> None:
    build, inputs = NETWORKS["residual"]
    dense = capture(build(), inputs).eval()
    sites = find_sites(dense, inputs)
    activation = next(site for site in sites if site.kind == "activation" and site.removable)
    block = next(site for site in sites if site.kind == "block")
    edited = Plan([linearize(activation), drop(block)]).fit(dense, [inputs], inputs).apply(dense, inputs).eval()
    same(edited, sent(edited), inputs)
    small, _ = collapse(sent(edited), cost="macs", force=True)
    expected, _ = collapse(edited, cost="macs", force=True)
    same(expected.eval(), sent(small.eval()), inputs)


def test_a_plan_applies_to_what_arrived() -> None:
    build, inputs = NETWORKS["residual"]
    dense = capture(build(), inputs).eval()
    block = next(site for site in find_sites(dense, inputs) if site.kind == "block")
    same(Plan([drop(block)]).apply(dense, inputs), Plan([drop(block)]).apply(sent(dense), inputs), inputs)


def test_a_frozen_norm_stays_frozen() -> None:
    build, inputs = NETWORKS["residual"]
    network = capture(build(), inputs).train()
    network.get_submodule("norm").eval()
    arrived = sent(network)
    assert arrived.training
    assert not arrived.get_submodule("norm").training


def test_shared_weights_stay_shared() -> None:
    build, inputs = NETWORKS["shared"]
    arrived = sent(capture(build(), inputs))
    assert sum(1 for _ in arrived.parameters()) == 2


def test_another_process_can_unpack_it(tmp_path) -> None:
    build, inputs = NETWORKS["attention"]
    network = capture(build(), inputs).eval()
    file = tmp_path / "crate"
    file.write_bytes(pickle.dumps((packed(network), inputs)))
    text = (
        "import pickle, sys, torch; from palmette.graph.ship import unpacked\n"
        "crate, inputs = pickle.load(open(sys.argv[1], 'rb'))\n"
        "torch.set_num_threads(1); print(unpacked(crate)(inputs).double().sum().item())"
    )
    said = subprocess.run([sys.executable, "-c", text, str(file)], check=True, capture_output=True, text=True).stdout
    assert float(said) == network(inputs).double().sum().item()


def test_other_things_pass_through() -> None:
    plain = nn.Linear(2, 2)
    assert packed(plain) is plain
    assert unpacked(3) == 3
    assert isinstance(packed(capture(plain, torch.randn(2, 2))), Crate)
