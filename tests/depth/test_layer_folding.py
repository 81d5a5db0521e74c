"""Layer Folding: what the shares learn, what goes together, and that the fold is what was trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from palmette.depth import layer_folding
from palmette.depth.change import changes
from palmette.depth.layer_folding import LayerFoldingConfig
from palmette.depth.prepared import keep
from palmette.errors import DataError
from palmette.graph import Candidate, Plan, capture, find_sites
from palmette.graph.blend import blends
from palmette.train.evaluate import evaluate
from palmette.train.loop import HealConfig, heal


def alone(captured, example) -> list[Candidate]:
    sites = [s for s in find_sites(captured, example) if s.kind == "activation"]
    return [Candidate(name=s.path, sites=(s,), macs_saved=1, ms_saved=None, pays=True, reason="") for s in sites]


@pytest.fixture
def dense(trained, blobs):
    return capture(trained, blobs.parts[0].tensors[0][:2])


@pytest.fixture
def found(dense, blobs):
    return alone(dense, blobs.parts[0].tensors[0][:2])


def learning(blobs, epochs: int = 6, lr: float = 0.05, **options):
    def train(network, *, loss_terms=()) -> None:
        heal(network, blobs.train, HealConfig(epochs=epochs, lr=lr, **options), seed=2, loss_terms=loss_terms)

    return train


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("paper", [False, True])
def test_the_pull_is_the_one_of_the_paper(dense, found, power, paper) -> None:
    config = LayerFoldingConfig(weight=0.7, power=power, start=0.4, reproduce=paper)
    seen = []

    def train(network, *, loss_terms) -> None:
        (term,) = loss_terms
        seen.append(term(network, None, None))
        seen[0].backward()
        slopes = [blend.share.parameter.grad for blend in blends(network).values()]
        assert all(bool(slope != 0) is not paper for slope in slopes), "at 0 the slope of a^2 is 0"

    shares = layer_folding.prepare(dense, found, train, config, loader=[], seed=0)
    start, p = (0.0, 2.0) if paper else (0.4, power)
    assert list(shares.values()) == pytest.approx([start] * 3)
    assert float(seen[0].detach()) == pytest.approx(0.7 * 3 * (1 - start**p))


@pytest.mark.parametrize("optimizer", [{"lr": 0.05}, {"lr": 0.01, "optimizer": "adamw"}])
def test_shares_arrive_and_the_fold_is_the_network_that_was_trained(dense, found, blobs, optimizer) -> None:
    example, trained = blobs.parts[0].tensors[0][:2], []

    def train(network, *, loss_terms) -> None:
        learning(blobs, epochs=12, **optimizer)(network, loss_terms=loss_terms)
        trained.append(copy.deepcopy(network).eval())

    config = LayerFoldingConfig(weight=1.0)
    code, names = dense.code, list(dense.state_dict())
    shares = layer_folding.prepare(dense, found, train, config, loader=[], seed=0)
    assert dense.code == code
    assert list(dense.state_dict()) == names
    assert all(share > 0.9 for share in shares.values()), "on blobs nothing speaks against a linear network"
    plan = Plan(e for c in found for e in layer_folding.edits(c, config))
    assert {edit.fit for edit in plan} == {"identity"}
    folded = plan.apply(dense, example)
    x = blobs.parts[1].tensors[0]
    with torch.no_grad():
        before, after = trained[0](x), folded(x)
    assert float((after - before).norm() / before.norm()) < 0.1
    assert evaluate(folded, blobs.val).accuracy > 0.8


def test_without_a_pull_shares_go_where_the_loss_wants_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
    with torch.no_grad():
        for layer, sign in ((model[0], 1.0), (model[2], -1.0)):
            layer.weight.copy_(sign * torch.eye(3))
            layer.bias.zero_()
    captured = capture(model, x[:2])
    with torch.no_grad():
        target = model[4](model[2](x).relu())  # needs the last ReLU alone
    first, second = alone(captured, x[:2])

    def train(network, *, loss_terms) -> None:
        shares = [blend.share.parameter for blend in blends(network).values()]
        optimizer = torch.optim.SGD(shares, lr=0.3)
        network.train()
        for _ in range(200):
            optimizer.zero_grad()
            loss = (network(x) - target).square().mean() + sum(term(network, x, None) for term in loss_terms)
            loss.backward()
            optimizer.step()

    config = LayerFoldingConfig(weight=0.0, start=0.5, rate=1.0)
    shares = layer_folding.prepare(captured, [first, second], train, config, loader=[], seed=0)
    keep(captured, "layer_folding", shares)
    scores = layer_folding.score(captured, [first, second], [], config, seed=0)
    assert scores[first.name] == pytest.approx(0.0, abs=0.05)
    assert scores[second.name] == pytest.approx(1.0, abs=0.05)


def test_activations_of_one_candidate_have_one_share(dense, found) -> None:
    pair = Candidate("pair", (*found[0].sites, *found[1].sites), 1, None, True, "")

    def train(network, *, loss_terms) -> None:
        inside = blends(network)
        assert inside[found[0].name].share is inside[found[1].name].share
        assert inside[found[2].name].share is not inside[found[0].name].share
        assert float(loss_terms[0](network, None, None).detach()) == pytest.approx(0.25 * 2 * (1 - 0.1**2))

    shares = layer_folding.prepare(dense, [pair, found[2]], train, LayerFoldingConfig(), loader=[], seed=0)
    keep(dense, "layer_folding", {**shares, found[0].name: 0.7, found[1].name: 0.4})
    assert layer_folding.score(dense, [pair], [], LayerFoldingConfig(), seed=0) == {"pair": pytest.approx(0.6)}


def test_those_over_the_threshold_go_together() -> None:
    candidates = [Candidate(name, (), 1, None, True, "") for name in "abcd"]
    scores = {"a": -0.01, "b": 0.1, "c": 0.11, "d": 1.0}

    def select(names: str, step: int = 1, **options) -> list[str]:
        kept = [c for c in candidates if c.name in names]
        return layer_folding.select(kept, scores, LayerFoldingConfig(**options), losses=None, step=step)

    assert select("abcd") == select("abcd", reproduce=True) == ["a", "b"]
    assert select("abcd", threshold=0.5) == ["a", "b", "c"]
    assert select("cd") == ["c"]
    assert select("cd", step=2) == ["c", "d"]
    assert select("cd", reproduce=True) == []


def test_before_the_training_the_change_ranks_and_later_a_new_activation_counts_as_active(dense, found, blobs) -> None:
    before = layer_folding.score(dense, found, blobs.val, LayerFoldingConfig(), seed=0)
    assert before == changes(dense, [c.name for c in found], blobs.val)
    with pytest.raises(DataError, match="empty"):
        layer_folding.score(dense, found, [], LayerFoldingConfig(), seed=0)
    keep(dense, "layer_folding", {found[0].name: 0.8})
    scores = layer_folding.score(dense, found, [], LayerFoldingConfig(), seed=0)
    assert list(scores.values()) == pytest.approx([0.2, 1.0, 1.0])


@pytest.mark.parametrize("reproduce", [False, True])
def test_what_has_folded_goes_in_the_first_round(searched, reproduce) -> None:
    heal = HealConfig(epochs=6, lr=0.05)
    found, stages = searched("layer_folding", heal=heal, rounds=1, reproduce=reproduce, weight=1.0)
    folded = {path for path, share in stages["shrink-prepared"]["found"].items() if share >= 0.9}
    assert {edit.site for edit in found.branch.plan} == folded
    assert len(folded) == (0 if reproduce else 3), "from 0 the paper's shares take a long training to arrive"
    assert [entry.removed for entry in found.rounds] == ([] if reproduce else [3])
