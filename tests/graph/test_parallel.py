"""Blocks side by side: what is computed then, what is lost, and when it is refused."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palmette.errors import DataError, PlanError, RefusedEdit
from palmette.graph import Plan, capture, cross_term, cross_terms, drop, find_sites, linearize, load, parallelize, save
from palmette.graph.parallel import parallel_reason
from palmette.graph.spans import run_at


def test_every_branch_reads_the_input_of_the_span(nets: ModuleType) -> None:
    net, x = nets.tokens(*(nets.Mlp(8, 16) for _ in range(3))), torch.randn(4, 5)
    edited = Plan([parallelize("1..3")]).apply(net, x).eval()
    h = net[0](x)
    total = h + sum(net[i](h) - h for i in (1, 2, 3))
    assert torch.allclose(edited(x), net[4](total), atol=1e-6)
    assert [b.path for b in run_at(edited, "1..3")] == ["1..3"]


def test_a_parallel_block_can_be_edited_on(nets: ModuleType, tmp_path: Any) -> None:
    net, x = nets.tokens(*(nets.Mlp(8, 16) for _ in range(4))), torch.randn(4, 5)
    edited = Plan([parallelize("1..2"), parallelize("1..2..3"), drop("4")]).apply(net, x).eval()
    h = net[0](x)
    total = h + sum(net[i](h) - h for i in (1, 2, 3))
    assert torch.allclose(edited(x), net[5](total), atol=1e-6)
    save(edited, tmp_path / "net.safetensors", source=net)
    assert torch.equal(load(net, tmp_path / "net.safetensors")(x), edited(x))
    gone = Plan([drop("1..2..3")]).apply(edited, x).eval()
    assert torch.allclose(gone(x), net[5](h), atol=1e-6)


def _by_hand(blocks: list[nn.Module], x: Tensor) -> float:
    """Mean over later blocks and samples of |F(s) - F(x)| / |F(s)|, s: what the block reads in the network."""
    s, terms = blocks[0](x), []
    for block in blocks[1:]:
        true, apart = block(s) - s, block(x) - x
        terms.append(((true - apart).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)).mean())
        s = block(s)
    return float(torch.stack(terms).mean())


@pytest.mark.parametrize("size", [2, 3])
def test_the_cross_term_is_what_later_branches_miss(nets: ModuleType, size: int) -> None:
    net = nets.tokens(*(nets.Mlp(8, 16) for _ in range(3))).double()
    loader = nets.batches(6, 4, 5, dtype=torch.float64)
    gm = capture(net, loader[0][0][:2])
    before, code = {k: v.clone() for k, v in gm.state_dict().items()}, gm.code
    with torch.no_grad():
        expected = _by_hand([net[i] for i in range(1, size + 1)], torch.cat([net[0](x) for x, _ in loader]))
    assert cross_term(gm, f"1..{size}", loader) == pytest.approx(expected)
    assert gm.code == code
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())


def test_all_spans_in_one_pass_and_as_by_themselves(nets: ModuleType) -> None:
    net = nets.images(*(nets.Conv(6, 4) for _ in range(3)))
    loader, passes = nets.batches(4, 3, 5, 5), list[int]()
    gm = capture(net, loader[0][0])

    class Counted:
        def __iter__(self) -> Any:
            passes.append(1)
            return iter(loader)

    spans = ["1..2", "2..3", "1..3"]
    found = cross_terms(gm, spans, Counted())
    assert len(passes) == 1
    assert found == pytest.approx({span: cross_term(gm, span, loader) for span in spans})


def test_branches_that_do_not_see_each_other_lose_nothing(nets: ModuleType) -> None:
    class Half(nn.Module):
        def __init__(self, upper: bool) -> None:
            super().__init__()
            self.map = nn.Linear(8, 8)
            mask = torch.zeros(8, 8)
            mask[:4, :4] = 1
            with torch.no_grad():
                self.map.weight.mul_(mask.flip(0, 1) if upper else mask)
                self.map.bias.mul_(mask.diagonal().flip(0) if upper else mask.diagonal())

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(self.map(x)) @ torch.diag((self.map.weight.abs().sum(1) > 0).float())

    net = nets.tokens(Half(False), Half(True))
    gm = capture(net, torch.randn(2, 5))
    assert cross_term(gm, "1..2", nets.batches(8, 5)) == 0.0


def test_padding_does_not_change_a_cross_term(nets: ModuleType) -> None:
    net = nets.lively(nets.Masked([nets.Mlp(8, 16), nets.Mlp(8, 16)], 8))
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 4).float()
    terms = []
    for pad in (0, 7):
        ids = torch.tensor([[3, 1, 4, pad, pad]] * 4)
        batch = {"input_ids": ids, "attention_mask": mask}
        terms.append(cross_term(capture(net, batch), "blocks.0..blocks.1", [(batch, torch.zeros(4))]))
    assert terms[0] == terms[1] > 0


def test_what_cannot_stand_in_parallel_is_refused(nets: ModuleType) -> None:
    outer, x = nets.images(*(nets.Conv(6, 4, outer=True) for _ in range(2)), relu=True), torch.randn(2, 3, 5, 5)
    with pytest.raises(RefusedEdit, match="ends in an activation or norm behind its sum"):
        Plan([parallelize("2..3")]).apply(outer, x)
    net, x = nets.tokens(nets.Mlp(8, 16), nets.Mlp(8, 16)), torch.randn(2, 5)
    with pytest.raises(RefusedEdit, match="single block"):
        Plan([parallelize("1")]).apply(net, x)
    gm = capture(outer, torch.randn(2, 3, 5, 5))
    with pytest.raises(PlanError, match="cannot be parallelised"):
        cross_terms(gm, ["2..3"], nets.batches(2, 3, 5, 5))
    with pytest.raises(PlanError, match="cannot be parallelised"):
        parallelize(next(s for s in find_sites(net, x) if s.kind == "block"))
    with pytest.raises(DataError, match="empty"):
        cross_term(capture(net, x), "1..2", [])


def test_a_linearised_outer_activation_does_not_hide_the_block(nets: ModuleType) -> None:
    net, x = nets.images(*(nets.Conv(6, 4, outer=True) for _ in range(2)), relu=True), torch.randn(2, 3, 5, 5)
    outer = [s for s in find_sites(net, x) if s.kind == "activation" and s.path in ("2.relu#1", "3.relu#1")]
    edits = [linearize(s, "identity", force=True) for s in (*outer, "1")]
    freed = Plan(edits).apply(net, x, pad="exact")
    assert parallel_reason(freed, run_at(freed, "2")) == "it is a single block"
