"""LaCoOT: what is trained, what ranks the blocks, and that blocks trained with it can be dropped."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from palmette.depth import lacoot
from palmette.depth.change import Change, changes
from palmette.depth.lacoot import LacootConfig
from palmette.errors import DataError
from palmette.graph import Candidate, Plan, capture, drop, find_sites
from palmette.registry import get_method
from palmette.train.evaluate import evaluate
from palmette.train.loop import HealConfig, heal
from palmette.train.trainer import Trainer
from palmette.train.wasserstein import max_sliced_wasserstein


class Moving(nn.Module):
    """Three blocks: one swaps the two samples x and -x, one adds a tenth of x, one adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            for block, factor in zip(self.blocks, (-2.0, 0.1, 0.0), strict=True):
                block.weight.copy_(factor * torch.eye(4))
                block.bias.zero_()

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def blocks_of(captured, example) -> list[Candidate]:
    sites = [s for s in find_sites(captured, example) if s.kind == "block"]
    return [Candidate(name=s.path, sites=(s,), macs_saved=1, ms_saved=None, pays=True, reason="") for s in sites]


@pytest.fixture(scope="module")
def moving():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, -x])
    captured = capture(Moving().eval(), x[:2])
    return captured, blocks_of(captured, x[:2]), [(x, torch.zeros(12))]


def test_blocks_are_ranked_sample_by_sample(moving) -> None:
    captured, found, loader = moving
    scores = lacoot.score(captured, found, loader, LacootConfig(), seed=0)
    assert list(scores.values()) == pytest.approx([2.0, 0.1, 0.0], rel=1e-5)


def test_equal_distributions_do_not_make_a_block_the_identity(moving) -> None:
    captured, found, loader = moving
    for config in (LacootConfig(rank="msw"), LacootConfig(reproduce=True)):
        swapped, moved, still = lacoot.score(captured, found, loader, config, seed=0).values()
        assert swapped == pytest.approx(0.0, abs=1e-6), "the distance cannot see a swap; the default can"
        assert moved > 0.01
        assert still == 0.0


def test_the_papers_distance_is_the_mean_over_batches_by_the_blocks_own_directions(moving) -> None:
    captured, found, loader = moving
    x = loader[0][0]
    batches = [(x[:5], None), (x[5:], None)]
    first, second = found[0].name, found[1].name
    both = lacoot.score(captured, found, batches, LacootConfig(reproduce=True), seed=3)
    alone = lacoot.score(captured, found[1:2], batches, LacootConfig(reproduce=True), seed=3)
    assert alone == {second: both[second]}
    assert both != lacoot.score(captured, found, batches, LacootConfig(reproduce=True), seed=4)
    watcher = lacoot.Distance(partial(max_sliced_wasserstein, projections=50), first, 3)
    for batch, _ in batches:
        watcher(batch, -batch)
    assert both[first] == pytest.approx(watcher.value(), rel=1e-6)


def test_changes_are_those_of_the_whole_set_and_add_up_over_shares(moving) -> None:
    captured, found, loader = moving
    x = loader[0][0] * torch.linspace(0.1, 3, 12)[:, None]
    paths = [c.name for c in found]
    whole = changes(captured, paths, [(x, None)])
    assert changes(captured, paths, [(x[:3], None), (x[3:], None)]) == pytest.approx(whole)
    parts = []
    for rows in (x[:3], x[3:]):
        part = Change()
        part(rows, 1.1 * rows)
        parts.append(part)
    totals = {name: parts[0].totals()[name] + parts[1].totals()[name] for name in parts[0].totals()}
    parts[0].take(totals)
    assert parts[0].value() == pytest.approx(0.1, rel=1e-5)


def test_features_that_are_not_finite_and_empty_loaders_are_refused(moving) -> None:
    captured, found, loader = moving
    for config in (LacootConfig(), LacootConfig(reproduce=True)):
        with pytest.raises(DataError, match="not finite"):
            lacoot.score(captured, found, [(loader[0][0] * float("nan"), None)], config, seed=0)
        with pytest.raises(DataError, match="empty"):
            lacoot.score(captured, found, [], config, seed=0)


def test_the_forms_differ_as_stated() -> None:
    sound, paper = LacootConfig(), LacootConfig(reproduce=True, relative=True, p=3.0, optimise=4)
    assert (sound.strength, paper.strength) == (1.0, 5.0)
    assert LacootConfig(reproduce=True, weight=9.0).strength == 9.0
    assert sound.distance["relative"]
    assert paper.distance == {"projections": 50, "p": 2.0, "relative": False, "optimise": 0}
    method = get_method("lacoot")
    assert method.heals(sound)
    assert not method.heals(paper)


def test_blocks_trained_with_it_can_be_dropped(trained, blobs) -> None:
    example = blobs.parts[0].tensors[0][:2]
    dense = capture(trained, example)
    found = blocks_of(dense, example)
    moved, losses = {}, {}
    for weight in (0.0, 1.0):
        network, config = copy.deepcopy(dense), LacootConfig(weight=weight)

        def train(network, *, loss_terms) -> None:
            heal(network, blobs.train, HealConfig(epochs=12, lr=0.05), seed=2, loss_terms=loss_terms)

        distances = lacoot.prepare(network, found, train, config, loader=blobs.val, seed=0)
        assert set(distances) == {c.name for c in found}
        assert network.code == dense.code
        moved[weight] = sum(lacoot.score(network, found, blobs.val, config, seed=0).values())
        edited = Plan([drop(c.name) for c in found]).apply(network, example)
        losses[weight] = evaluate(edited, blobs.val).loss - evaluate(network, blobs.val).loss
    assert moved[1.0] < 0.3 * moved[0.0]
    assert losses[1.0] < 0.5 * losses[0.0]


@pytest.mark.parametrize("reproduce", [False, True])
def test_blocks_go_one_by_one_and_are_healed_in_the_sound_form_only(searched, quick, reproduce) -> None:
    found, stages = searched("lacoot", heal=quick, rounds=2, reproduce=reproduce)
    assert [edit.kind for edit in found.branch.plan] == ["drop", "drop"]
    assert [entry.removed for entry in found.rounds] == [1, 1]
    assert set(stages["shrink-prepared"]["found"]) == {"1", "2", "3"}
    assert ("shrink-001-heal" in stages) is not reproduce
    assert found.branch.trainings == (1 if reproduce else 3)


@pytest.mark.parametrize("method", ["lacoot", "layer_folding", "depthshrinker"])
def test_a_run_cut_off_in_its_ingredient_goes_on_to_the_same_weights(searched, monkeypatch, method) -> None:
    heal = HealConfig(epochs=2, lr=0.05, checkpoint_every_steps=1)
    whole, stages = searched(method, heal=heal, rounds=1, name="whole")
    plain, done = Trainer._train_step, []

    def counted(self, batch) -> None:
        if len(done) == 7:  # in the middle of the second epoch
            raise KeyboardInterrupt
        done.append(1)
        plain(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", counted)
        with pytest.raises(KeyboardInterrupt):
            searched(method, heal=heal, rounds=1, name="cut")
    resumed, again = searched(method, heal=heal, rounds=1, name="cut")
    assert again["shrink-prepared"] == stages["shrink-prepared"]
    ours, theirs = resumed.branch.network.state_dict(), whole.branch.network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
