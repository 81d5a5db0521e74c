"""Wide branches: equal to the sum of what they are made of, in float64, for every form; and when they are made."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from palmette.graph import Plan, capture, collapse, linearize, load, parallelize, save, verify
from palmette.graph.ops import remove_dead
from palmette.graph.rewrite import widen
from palmette.graph.spans import run_at
from palmette.graph.widen import Wide, groups, parallel_form, wide_reason
from palmette.meter.table import CostTable

BOUND = 1e-12
CHECKS = list(HealthCheck)


def _wide(edited: Any) -> tuple[Any, list[tuple[int, int]]]:
    """The network with every parallel sum made wide, and the MACs before and after of each."""
    gm, done = copy.deepcopy(edited), []
    while found := groups(gm):
        wide = Wide(gm, found[0])
        done.append(wide.macs)
        widen(gm, wide.decision, wide.maps)
    remove_dead(gm)
    return gm, done


@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS)
@given(data=st.data())
def test_wide_mlps_equal_the_parallel_sum(nets: ModuleType, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    width, norm = data.draw(st.sampled_from([3, 8])), data.draw(st.booleans())
    hidden = data.draw(st.lists(st.sampled_from([1, 5, 16]), min_size=2, max_size=4))
    net = nets.tokens(*(nets.Mlp(width, h, norm=norm) for h in hidden), width=width).double()
    x = torch.randn(*data.draw(st.sampled_from([(4, 5), (2, 3, 5)])), dtype=torch.float64)
    edited = Plan([parallelize(f"1..{len(hidden)}")]).apply(net, x).eval()
    small, done = _wide(edited)
    assert len(done) == 1
    assert nets.relative(edited(x), small(x)) < BOUND
    sizes = [m.out_features for m in small.modules() if isinstance(m, nn.Linear)]
    assert sizes == [width, sum(hidden), width, 3]
    assert sum(isinstance(m, nn.LayerNorm) for m in small.modules()) == norm


@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS)
@given(data=st.data())
def test_wide_convolutions_equal_the_parallel_sum(nets: ModuleType, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    width, kernel = data.draw(st.sampled_from([2, 6])), data.draw(st.sampled_from([1, 3, 5]))
    depthwise = data.draw(st.booleans())
    hidden = data.draw(st.lists(st.sampled_from([1, 4, 7]), min_size=2, max_size=4))
    blocks = [nets.Conv(width, h, kernel=kernel, depthwise=depthwise) for h in hidden]
    net = nets.images(*blocks, width=width).double()
    x = torch.randn(2, 3, *data.draw(st.sampled_from([(5, 5), (8, 7)])), dtype=torch.float64)
    edited = Plan([parallelize(f"1..{len(hidden)}")]).apply(net, x).eval()
    small, done = _wide(edited)
    assert len(done) == 1
    assert nets.relative(edited(x), small(x)) < BOUND
    assert sum(isinstance(m, nn.Conv2d) for m in small.modules()) == 4 + depthwise
    assert done[0][0] == done[0][1]


class Line(nn.Module):
    """x + A x, or x + A norm(x)."""

    def __init__(self, width: int, norm: bool = False) -> None:
        super().__init__()
        self.norm, self.map = nn.LayerNorm(width) if norm else nn.Identity(), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.map(self.norm(x))


@pytest.mark.parametrize("norm", [False, True])
def test_branches_of_one_operation_become_one_with_the_skip(nets: ModuleType, norm: bool, tmp_path: Path) -> None:
    net, x = nets.tokens(Line(8, norm), Line(8, norm), Line(8, norm)), torch.randn(4, 5)
    edited = Plan([parallelize("1..3")]).apply(net, x).eval()
    small, record = collapse(edited, cost="macs")
    assert verify(edited, small, example_inputs=x).exact
    assert sum(isinstance(m, nn.Linear) for m in small.modules()) == 3
    assert ("aten.add" in small.code) == norm
    assert [m.done for m in record.merges] == [True]
    save(small, tmp_path / "net.safetensors", source=net)
    assert torch.equal(load(net, tmp_path / "net.safetensors")(x), small(x))


def test_only_branches_of_one_form_join(nets: ModuleType) -> None:
    class Other(nets.Mlp):  # type: ignore[name-defined, misc]
        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(torch.tanh(self.first(self.norm(x))))

    net, x = nets.tokens(nets.Mlp(8, 4), Other(8, 5), nets.Mlp(8, 6), Other(8, 7), Line(8)), torch.randn(4, 5)
    edited = Plan([parallelize("1..5")]).apply(net, x).eval()
    small, record = collapse(edited, cost="macs")
    assert [m.members for m in record.done] == [
        ("1.first", "1.second", "3.first", "3.second"),
        ("2.first", "2.second", "4.first", "4.second"),
    ]
    assert verify(edited, small, example_inputs=x).exact
    gm = capture(net, x)
    assert wide_reason(gm, run_at(gm, "1..2")) == "its branches have no common wide form"
    assert wide_reason(gm, run_at(gm, "1..3")) == ""


def test_a_slope_of_its_own_keeps_a_branch_apart(nets: ModuleType) -> None:
    class Prelu(nets.Mlp):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__(8, 16)
            self.act = nn.PReLU(1, init=float(torch.rand(())))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.act(self.first(x)))

    net, x = nets.tokens(Prelu(), Prelu()), torch.randn(4, 5)
    gm = capture(net, x)
    assert "no common wide form" in wide_reason(gm, run_at(gm, "1..2"))
    edited = Plan([parallelize("1..2")]).apply(net, x).eval()
    small, record = collapse(edited, cost="macs", force=True)
    assert record.merges == []
    assert torch.equal(small(x), edited(x))


def test_linearised_branches_are_merged_first_and_then_added_up(nets: ModuleType) -> None:
    net, x = nets.images(nets.Conv(6, 12), nets.Conv(6, 12), nets.Conv(6, 9)), torch.randn(2, 3, 7, 7)
    plan = Plan([linearize("1.relu"), linearize("2.relu"), parallelize("1..3")]).fit(net, nets.batches(4, 3, 7, 7), x)
    edited = plan.apply(net, x).eval()
    small, record = collapse(edited, cost="macs", force=True)
    assert [m.members for m in record.done] == [
        ("1.first", "1.second"),
        ("2.first", "2.second"),
        ("1.first", "2.first"),
    ]
    assert verify(edited, small, example_inputs=x).exact
    assert [m.macs_after < m.macs_before for m in record.done] == [True, True, True]


def test_what_does_not_pay_on_the_clock_is_refused(nets: ModuleType, tmp_path: Path) -> None:
    net, x = nets.tokens(nets.Mlp(8, 16), nets.Mlp(8, 16)), torch.randn(4, 5)
    edited = Plan([parallelize("1..2")]).apply(net, x).eval()
    key = Wide(edited, groups(edited)[0]).key
    small: dict[float, Any] = {}
    for after in (0.5, 0.99):
        table = CostTable("eager", tmp_path / f"{after}.json", measure=False)
        table.entries[key] = {"before": 1.0, "after": after}
        small[after], record = collapse(edited, cost=table)
        assert [(m.done, m.ms_before, m.ms_after) for m in record.merges] == [(after == 0.5, 1.0, after)]
    assert "would not pay: 1 -> 0.99 ms" in record.merges[0].reason
    assert torch.equal(small[0.99](x), edited(x))
    assert collapse(edited, cost=table, force=True)[1].done


def test_the_collapsed_network_is_saved_verified_and_trains(nets: ModuleType, tmp_path: Path) -> None:
    net, x = nets.images(nets.Conv(6, 4), nets.Conv(6, 5)), torch.randn(2, 3, 7, 7)
    edited = Plan([parallelize("1..2")]).apply(net, x).eval()
    small, record = collapse(edited, cost="macs")
    assert record.done[0].worst_error < BOUND
    assert record.done[0].reason == "2 branches side by side"
    found = verify(edited, small, example_inputs=x)
    assert found.exact
    assert found.max_relative_error_float64 < BOUND
    save(small, tmp_path / "net.safetensors", source=net)
    assert torch.equal(load(net, tmp_path / "net.safetensors")(x), small(x))
    small.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_both_forms_of_a_run_by_itself(nets: ModuleType) -> None:
    net = nets.tokens(nets.Mlp(8, 16), nets.Mlp(8, 16))
    gm = capture(net, torch.randn(2, 5))
    before, after, inputs = parallel_form(gm, run_at(gm, "1..2"))
    (h,) = inputs
    assert torch.allclose(before(h), net[2](net[1](h)), atol=1e-6)
    assert torch.allclose(after(h), h + (net[1](h) - h) + (net[2](h) - h), atol=1e-6)
    assert sum(n.op == "call_module" for n in after.graph.nodes) < sum(
        n.op == "call_module" for n in before.graph.nodes
    )
