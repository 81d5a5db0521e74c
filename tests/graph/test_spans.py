"""Runs of blocks: which there are, what they are called, what lies inside, and who reads it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from palmette.errors import PlanError
from palmette.graph import Plan, capture, drop, find_sites
from palmette.graph.blend import Blend, Share, insert_blends
from palmette.graph.spans import closed_reason, inside, name_of, run_at, runs, total


def test_every_run_up_to_a_length(nets: ModuleType) -> None:
    gm = capture(nets.tokens(*(nets.Mlp(8, 16) for _ in range(4))), torch.randn(2, 5))
    assert [name_of(r) for r in runs(gm, 2)] == ["1..2", "2..3", "3..4"]
    assert [name_of(r) for r in runs(gm, 4)] == ["1..2", "1..3", "1..4", "2..3", "2..4", "3..4"]


class Nested(nn.Module):
    """x + f(x + g(x)): an inner block within the branch of an outer one."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x + self.g(x))


def test_runs_pass_over_blocks_inside_branches(nets: ModuleType) -> None:
    gm = capture(nets.tokens(nets.Mlp(8, 16), Nested(), nets.Mlp(8, 16)), torch.randn(2, 5))
    found = runs(gm, 3)
    whole = [r for r in found if len(r) == 3]
    assert [[b.path for b in r] for r in whole] == [["1", "2#1", "3"]]
    assert all(run_at(gm, name_of(r))[-1].output is r[-1].output for r in found)


def test_a_name_is_found_again_and_an_unknown_one_is_not(nets: ModuleType) -> None:
    gm = capture(nets.tokens(nets.Mlp(8, 16), nets.Mlp(8, 16)), torch.randn(2, 5))
    assert [b.path for b in run_at(gm, "1..2")] == ["1", "2"]
    assert [b.path for b in run_at(gm, "2")] == ["2"]
    for unknown in ("2..1", "1..9", "7", "1.."):
        with pytest.raises(PlanError, match="No block is called"):
            run_at(gm, unknown)


@pytest.mark.parametrize("outer", ["relu", "norm"])
def test_inside_ends_at_the_sum(nets: ModuleType, outer: str) -> None:
    if outer == "relu":
        net, x = nets.images(*(nets.Conv(6, 4, outer=True) for _ in range(2)), relu=True), torch.randn(2, 3, 5, 5)
    else:
        net, x = (
            nets.lively(nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nets.PostNorm(8), nets.PostNorm(8))),
            torch.randn(2, 5),
        )
    gm = capture(net, x)
    run = runs(gm, 2)[0]
    assert total(run[-1]) is not run[-1].output
    assert run[-1].output.args[0] is total(run[-1])
    assert run[-1].output not in inside(run)
    assert run[0].output in inside(run)
    assert closed_reason(run) == ""


class Tapped(nn.Module):
    """Two blocks; what leaves the first is read at the end, too."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = nn.Linear(5, 8), first, second, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        return self.head(torch.cat([x, self.second(x)], -1))


def test_a_run_whose_inside_is_read_elsewhere_stays(nets: ModuleType) -> None:
    net = nets.lively(Tapped(nets.Mlp(8, 16), nets.Mlp(8, 16)))
    gm = capture(net, torch.randn(2, 5))
    assert "read elsewhere" in closed_reason(run_at(gm, "first..second"))
    site = next(s for s in find_sites(net, torch.randn(2, 5)) if s.kind == "span")
    assert not site.removable
    assert "read elsewhere" in site.reason


def test_dropping_a_span_drops_its_members(nets: ModuleType) -> None:
    net, x = nets.tokens(*(nets.Mlp(8, 16) for _ in range(3))), torch.randn(4, 5)
    span = next(s for s in find_sites(net, x) if s.kind == "span")
    at_once = Plan([drop(span)]).apply(net, x).eval()
    one_by_one = Plan([drop(member) for member in span.members]).apply(net, x).eval()
    assert torch.equal(at_once(x), one_by_one(x))
    assert torch.equal(at_once(x), net[3 + 1](net[0](x)))


def test_a_span_fades_out_as_a_whole(nets: ModuleType) -> None:
    net, x = nets.tokens(*(nets.Mlp(8, 16) for _ in range(3))), torch.randn(4, 5)
    gm = capture(net, x)
    insert_blends(gm, {"1..2": Blend(Share(1.0))})
    assert torch.allclose(gm(x), Plan([drop("1..2")]).apply(net, x).eval()(x))
