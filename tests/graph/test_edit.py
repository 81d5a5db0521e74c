"""Convolutions that become identities, alone and between linearised neighbours."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from palmette.errors import PlanError, RefusedEdit
from palmette.graph import Plan, collapse, find_sites, identity, linearize, load, save, verify


def test_a_convolution_goes_and_its_norm_stays(nets: ModuleType) -> None:
    net, x = nets.images(nets.Conv(6, 6), nets.Conv(6, 6)), torch.randn(2, 3, 7, 7)
    edited = Plan([identity("1.first")]).apply(net, x).eval()
    h = net[0](x)
    body = h + net[1].second(torch.relu(net[1].bn(h)))
    assert torch.allclose(edited(x), net[3](net[2](body)), atol=1e-6)
    assert "1.first.weight" not in edited.state_dict()


def test_merged_kernels_do_not_grow_over_an_identity(nets: ModuleType, tmp_path: Path) -> None:
    net, x = nets.images(nets.Conv(6, 6), nets.Conv(6, 6)), torch.randn(2, 3, 7, 7)
    sizes = []
    for extra in ([], [identity("1.second")]):
        plan = Plan([linearize("1.relu"), *extra]).fit(net, nets.batches(4, 3, 7, 7), x)
        edited = plan.apply(net, x).eval()
        small, _ = collapse(edited, cost="macs", force=True)
        assert verify(edited, small, example_inputs=x).exact
        sizes.append(small.get_submodule("1.first").kernel_size)
        save(small, tmp_path / "net.safetensors", source=net)
        assert torch.equal(load(net, tmp_path / "net.safetensors")(x), small(x))
    assert sizes == [(5, 5), (3, 3)]


def test_linears_become_identities_too(nets: ModuleType) -> None:
    net, x = nets.tokens(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(2, 4, 5)
    edited = Plan([identity("3")]).apply(net, x).eval()
    assert torch.allclose(edited(x), net[4](net[2](net[1](net[0](x)))), atol=1e-6)


def test_what_cannot_become_an_identity_is_refused(nets: ModuleType) -> None:
    net, x = nets.images(nets.Conv(6, 4), nets.Conv(6, 6)), torch.randn(2, 3, 7, 7)
    for site in ("0", "1.first", "3"):
        with pytest.raises(RefusedEdit, match="changes the shape of its input, or is the network's first or last"):
            Plan([identity(site)]).apply(net, x)
    with pytest.raises(PlanError, match="No convolution is called"):
        Plan([identity("1.bn")]).apply(net, x)
    with pytest.raises(PlanError, match="cannot be replaced by the identity"):
        identity(next(s for s in find_sites(net, x) if s.kind == "block"))


class Doubled(nn.Module):
    """Two convolutions with nothing between them, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x))


def test_neighbours_that_nothing_separated_merge_where_it_pays(nets: ModuleType) -> None:
    net, x = (
        nets.images(Doubled(), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()),
        torch.randn(2, 3, 7, 7),
    )
    edited = Plan([]).apply(net, x).eval()
    small, record = collapse(edited, cost="macs")
    # The stem and the first convolution, and the pair of 3x3, pad in between or would cost more: they stay, silently.
    assert [m.members for m in record.merges] == [("1.body.0", "1.body.2")]
    assert verify(edited, small, example_inputs=x).exact
    forced, again = collapse(edited, cost="macs", force=True, allow_inexact=True)
    assert [m.members for m in again.merges] == [m.members for m in record.merges]
    assert torch.equal(forced(x), small(x))
