"""NEPENTHE against its three changes to EGP, in both forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from palmette.depth import egp, nepenthe
from palmette.depth.egp import EgpConfig
from palmette.depth.nepenthe import NepentheConfig
from palmette.depth.pruning import find_layers
from palmette.depth.shrink import shrink
from palmette.errors import DataError
from palmette.graph import Candidate, capture, find_sites
from palmette.registry import check_method, get_method


def _captured(model, example):
    network = capture(model.eval(), example)
    sites = [site for site in find_sites(network, example) if site.kind == "activation"]
    found = [Candidate(name=s.path, sites=(s,), macs_saved=0, ms_saved=None, pays=True, reason="") for s in sites]
    return network, found


@pytest.mark.slow
def test_it_behaves_as_every_method_must() -> None:
    assert len(check_method("nepenthe")) >= 13


class Skip(nn.Module):
    """relu(relu(x) + branch(relu(x))) with a branch that is dead: the second ReLU changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        nn.init.zeros_(self.branch.weight)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.branch(x)))


def test_zeros_are_neither_on_nor_off() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    network, found = _captured(Skip(), x[:2])
    data = [(x, torch.zeros(64))]
    scores = nepenthe.score(network, found, data, NepentheConfig(), seed=0)
    assert scores[found[0].name] > 0.3
    assert scores[found[1].name] == 0.0
    assert egp.score(network, found, data, EgpConfig(), seed=0)[found[1].name] > 0.3


def test_a_layers_entropy_is_that_of_its_lively_neurons_over_the_whole_set() -> None:
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
    x = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [-1.0]])]
    network, found = _captured(model, x[0])
    scores = nepenthe.score(network, found, [(b, b) for b in x], NepentheConfig(reproduce=True), seed=0)
    assert scores[found[0].name] == pytest.approx(0.811278, abs=1e-6)  # H(3/4); one batch alone has entropy 0
    with pytest.raises(DataError, match="empty"):
        nepenthe.score(network, found, [], NepentheConfig(), seed=0)


class Parallel(nn.Module):
    """Two branches past which a skip runs; the first is always ON."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.linear, self.lively, self.head = (nn.Linear(4, 4) for _ in range(4))
        nn.init.constant_(self.linear.bias, 100.0)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + F.relu(self.linear(x)) + F.relu(self.lively(x)))


@pytest.mark.parametrize(("method", "config", "left"), [(nepenthe, NepentheConfig, (8, 0)), (egp, EgpConfig, (16, 4))])
def test_a_layer_of_entropy_zero_is_pruned_last_where_egp_never_prunes_it(method, config, left) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    network, found = _captured(Parallel(), x[:2])
    config = config(rate=0.75, temperature=0.2)
    method.prepare(network, found, lambda _, *, keep_zeros: None, config, loader=[(x, x)], seed=0)
    contents = {layer.path: layer.content for layer in find_layers(network)}
    assert (contents["linear"], contents["lively"]) == left


def test_shrink_in_the_papers_form_takes_what_collapsed_by_the_mask(trained, blobs, quick) -> None:
    result = shrink(
        trained,
        blobs.train,
        blobs.val,
        method="nepenthe",
        cost="macs",
        heal=quick,
        max_drop=100.0,
        controls=False,
        rounds=1,
        reproduce=True,
        config=NepentheConfig(rounds=1, temperature=0.01),
    )
    collapsed = [row["name"] for row in result.ranking if row["score"] == 0]
    assert [edit.site for edit in result.plan] == collapsed
    assert {edit.fit for edit in result.plan} == {"mask"}
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in trained.parameters())


@pytest.mark.parametrize(("options", "rounds"), [({}, 1), ({"reproduce": True}, 4), ({"rounds": 2}, 2)])
def test_four_rounds_stand_for_the_threshold_that_the_paper_does_not_state(trained, blobs, options, rounds) -> None:
    network, found = _captured(trained, next(iter(blobs.val))[0][:2])
    trainings = []

    def train(_, *, keep_zeros):
        trainings.append(keep_zeros)

    get_method("nepenthe").prepare(network, found, train, NepentheConfig(**options), loader=blobs.val, seed=0)
    assert trainings == [True] * rounds
