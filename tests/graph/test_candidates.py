"""Candidates of every kind: what there is, what it saves, where it reaches, what is protected."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from palmette.errors import PlanError
from palmette.graph import Candidate, Plan, candidates, capture, edits_of
from palmette.graph.candidates import EDITS
from palmette.meter.table import CostTable

ALL = [(kind, edit) for kind, edits in EDITS.items() for edit in edits]


def _inverted(width: int) -> nn.Module:
    wide = 6 * width
    middle = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
    return nn.Sequential(nn.Conv2d(width, wide, 1), nn.ReLU6(), middle, nn.ReLU6(), nn.Conv2d(wide, width, 1))


@pytest.mark.parametrize(("kind", "edit"), ALL)
def test_names_are_unique_edits_apply_and_reaches_hold_the_change(nets: ModuleType, kind: str, edit: str) -> None:
    net, x = nets.images(*(nets.Conv(6, 6) for _ in range(3))), torch.randn(2, 3, 7, 7)
    gm = capture(net, x)
    found = candidates(gm, x, kind=kind, edit=edit, longest=3)
    assert found
    assert len({c.name for c in found}) == len(found)
    assert {c.edit for c in found} == {edit}
    last = len(gm.graph.nodes)
    for candidate in found:
        low, high = candidate.reach
        assert 0 < low < high < last
        assert candidate.name == " + ".join(s.path for s in candidate.sites)
        if candidate.sites[0].removable:
            edited = (
                Plan(edits_of(candidate))
                .fit(gm, nets.batches(4, 3, 7, 7), x)
                .apply(gm, x, pad="exact" if kind != "activation" else "repad")
            )
            outside = [
                n.meta["path"]
                for n in list(gm.graph.nodes)[:low] + list(gm.graph.nodes)[high:]
                if n.op == "call_module"
            ]
            assert {n.meta["path"] for n in edited.graph.nodes if n.op == "call_module"} >= set(outside)


def test_spans_are_pairs_unless_longer_ones_are_wanted(nets: ModuleType) -> None:
    x = torch.randn(2, 5)
    gm = capture(nets.tokens(*(nets.Mlp(8, 16) for _ in range(4))), x)
    assert [c.name for c in candidates(gm, x, kind="span")] == ["1..2", "2..3", "3..4"]
    longer = candidates(gm, x, kind="span", longest=3)
    assert [c.name for c in longer] == ["1..2", "1..3", "2..3", "2..4", "3..4"]
    assert [c.macs_saved for c in longer] == [512, 768, 512, 768, 512]
    assert longer[0].reach[1] == longer[4].reach[0]
    blocks = candidates(gm, x, kind="block")
    assert [c.reach for c in blocks] == [(b.reach[0], b.reach[1]) for b in blocks]
    assert all(a.reach[1] == b.reach[0] for a, b in itertools.pairwise(blocks))


def test_what_a_fit_saves_is_less_the_map(nets: ModuleType) -> None:
    x = torch.randn(2, 3, 7, 7)
    gm = capture(nets.images(nets.Conv(6, 6), nets.Conv(6, 6)), x)
    dropped, fitted = (candidates(gm, x, kind="span", edit=e)[0] for e in ("drop", "fit_linear"))
    assert dropped.macs_saved == 4 * 49 * 6 * 6 * 9
    assert fitted.macs_saved == dropped.macs_saved - 49 * 36
    parallel = candidates(gm, x, kind="span", edit="parallelize")[0]
    assert (parallel.macs_saved, parallel.pays) == (0, True)


def test_parallel_spans_pay_only_where_something_gets_wide(nets: ModuleType) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(x) * torch.sigmoid(self.b(x))

    x = torch.randn(2, 5)
    gm = capture(nets.tokens(nets.Mlp(8, 16), Gated(), nets.Mlp(8, 16)), x)
    found = {c.name: c for c in candidates(gm, x, kind="span", edit="parallelize", longest=3)}
    assert {name: c.pays for name, c in found.items()} == {"1..2": False, "1..3": True, "2..3": False}
    assert found["1..2"].reason == "its branches have no common wide form"


def test_windows_are_all_that_pay(nets: ModuleType) -> None:
    net, x = nets.images(_inverted(6), nn.ReLU6(), _inverted(6)), torch.randn(2, 3, 8, 8)
    gm = capture(net, x)
    default = candidates(gm, x)
    assert [c.name for c in default if c.pays] == ["1.1 + 1.3", "3.1 + 3.3"]
    windows = candidates(gm, x, windows=True, longest=5)
    names = [c.name for c in windows]
    assert names == ["1.1 + 1.3", "1.1 + 1.3 + 2 + 3.1 + 3.3", "3.1 + 3.3"]
    assert all(c.pays and c.macs_saved > 0 for c in windows)
    by_name = {c.name: c for c in windows}
    assert by_name["1.1 + 1.3"].macs_saved == next(c for c in default if c.name == "1.1 + 1.3").macs_saved
    assert by_name["1.1 + 1.3"].reach[1] <= by_name["3.1 + 3.3"].reach[0]
    shorter = candidates(gm, x, windows=True, longest=2)
    assert [c.name for c in shorter] == ["1.1 + 1.3", "3.1 + 3.3"]
    assert candidates(gm, x, windows=True, longest=1) == []


def test_first_last_and_protected_stay(nets: ModuleType) -> None:
    net, x = nets.images(nets.Conv(6, 6), nets.Conv(6, 6)), torch.randn(2, 3, 7, 7)
    gm = capture(net, x)
    convolutions = candidates(gm, x, kind="convolution")
    assert [c.name for c in convolutions] == ["1.first", "1.second", "2.first", "2.second"]
    kept = candidates(gm, x, kind="convolution", protect=["1"])
    assert [c.pays for c in kept] == [False, False, True, True]
    assert kept[0].reason == "protected by the user"
    span = candidates(gm, x, kind="span", protect=["2.first"])
    assert [c.pays for c in span] == [True]
    assert [c.pays for c in candidates(gm, x, kind="span", protect=["2"])] == [False]


def test_only_what_keeps_its_shape_can_become_an_identity(nets: ModuleType) -> None:
    layers = [nn.Conv2d(6, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3, padding=1, groups=6)]
    x = torch.randn(2, 3, 9, 9)
    gm = capture(nets.images(*layers, nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)), x)
    assert [c.name for c in candidates(gm, x, kind="convolution")] == ["3"]


@pytest.mark.slow
def test_equal_pieces_are_measured_once(nets: ModuleType) -> None:
    x = torch.randn(2, 5)
    gm = capture(nets.tokens(*(nets.Mlp(8, 16) for _ in range(4))), x)
    table = CostTable("eager")
    for kind, edit in ALL:
        found = candidates(gm, x, kind=kind, edit=edit, cost=table, longest=3)
        alike: dict[int, list[Candidate]] = {}
        for c in found:
            alike.setdefault(c.name.count("..") and int(c.name[-1]) - int(c.name[0]), []).append(c)
        assert all(len({c.ms_saved for c in group}) == 1 for group in alike.values())
    # A merged MLP, a block, a map, two and three in parallel.
    assert len(table.entries) == 5
    again = candidates(gm, x, kind="span", edit="fit_linear", cost=table, longest=3)
    assert again == candidates(gm, x, kind="span", edit="fit_linear", cost=table, longest=3)


def test_unknown_kinds_and_edits_are_told() -> None:
    gm = capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), torch.randn(2, 3))
    with pytest.raises(PlanError, match="Unknown kind of site 'neuron'"):
        candidates(gm, None, kind="neuron")
    with pytest.raises(PlanError, match="kind block knows no edit 'parallelize'"):
        candidates(gm, None, kind="block", edit="parallelize")
