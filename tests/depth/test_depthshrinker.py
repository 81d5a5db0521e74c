"""DepthShrinker: the mask is the top k, gradients pass it straight, and those off at the end go together."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palmette.depth import depthshrinker
from palmette.depth.change import changes
from palmette.depth.depthshrinker import DepthShrinkerConfig, Gated, Gates
from palmette.depth.prepared import keep
from palmette.errors import DataError
from palmette.graph import Candidate, Plan, capture, find_sites
from palmette.graph.blend import blends
from palmette.train.loop import HealConfig, heal

numbers = st.floats(-3, 3, allow_nan=False, width=32)


@pytest.fixture
def dense(trained, blobs):
    return capture(trained, blobs.parts[0].tensors[0][:2])


@pytest.fixture
def found(dense, blobs):
    sites = [s for s in find_sites(dense, blobs.parts[0].tensors[0][:2]) if s.kind == "activation"]
    return [Candidate(name=s.path, sites=(s,), macs_saved=1, ms_saved=None, pays=True, reason="") for s in sites]


def no_training(network) -> None:
    """Leaves gates and weights as they are."""


@settings(max_examples=50, deadline=None)
@given(values=st.lists(numbers, min_size=1, max_size=6), data=st.data(), gain=st.sampled_from([1.0, 4.0]))
def test_the_highest_are_on_and_margins_say_which(values, data, gain):
    kept = data.draw(st.integers(0, len(values) - 1))
    gates = Gates(torch.tensor(values), kept, gain=gain)
    mask = gates().detach()
    assert int(mask.sum()) == kept
    assert set(mask.tolist()) <= {0.0, 1.0}
    on = [v for v, m in zip(values, mask, strict=True) if m]
    off = [v for v, m in zip(values, mask, strict=True) if not m]
    assert not on or min(on) >= max(off) - 1e-6
    margins = gates.margins()
    assert [margin > 0 for margin in margins] == [bool(m) for m in mask]
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert all(margins[a] <= margins[b] + 1e-6 for a, b in itertools.pairwise(order))


def test_of_equal_gates_the_first_are_on():
    assert Gates(torch.ones(4), 3)().tolist() == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_gates_on_and_off_feel_what_the_activation_would_change(gain):
    gates = Gates(torch.tensor([0.9, 0.1]), 1, gain=gain)
    z, weight = torch.randn(5, 4), torch.randn(5, 4)
    for index, expected in ((0, z.relu()), (1, z)):
        gates.zero_grad()
        out = Gated(gates, index)(z, z.relu())
        assert torch.equal(out, expected)
        (out * weight).sum().backward()
        slope = torch.zeros(2)
        slope[index] = gain * ((z.relu() - z) * weight).sum()
        torch.testing.assert_close(gates.parameter.grad, slope)


@pytest.mark.parametrize(("ratio", "off"), [(0.0, 3), (0.34, 2), (0.7, 1), (1.0, 1)])
def test_the_share_kept_is_rounded_down_and_one_is_always_off(dense, found, blobs, ratio, off):
    config = DepthShrinkerConfig(keep_ratio=ratio)
    margins = depthshrinker.prepare(dense, found, no_training, config, loader=blobs.val, seed=0)
    assert sum(margin < 0 for margin in margins.values()) == off


def test_gates_start_at_the_change_that_the_activations_make(dense, found, blobs):
    sizes = changes(dense, [c.name for c in found], blobs.val)
    margins = depthshrinker.prepare(dense, found, no_training, DepthShrinkerConfig(), loader=blobs.val, seed=0)
    assert sorted(margins, key=margins.get) == sorted(sizes, key=sizes.get)
    pair = Candidate("pair", (*found[0].sites, *found[1].sites), 1, None, True, "")
    both = depthshrinker.prepare(dense, [pair, found[2]], no_training, DepthShrinkerConfig(), loader=blobs.val, seed=0)
    assert both[found[0].name] == both[found[1].name] == -both[found[2].name]
    mean = (sizes[found[0].name] + sizes[found[1].name]) / 2
    assert abs(2 * both[found[2].name]) == pytest.approx(abs(sizes[found[2].name] - mean), rel=1e-4)


def test_in_the_papers_form_gates_start_alike_and_need_no_data(dense, found):
    config = DepthShrinkerConfig(reproduce=True)
    first = depthshrinker.prepare(dense, found, no_training, config, loader=[], seed=0)
    assert max(abs(margin) for margin in first.values()) < 2e-3
    assert depthshrinker.prepare(dense, found[::-1], no_training, config, loader=[], seed=0) == first
    assert depthshrinker.prepare(dense, found, no_training, config, loader=[], seed=1) != first
    with pytest.raises(DataError, match="empty"):
        depthshrinker.prepare(dense, found, no_training, DepthShrinkerConfig(), loader=[], seed=0)


def test_the_network_with_those_off_is_the_one_that_was_trained(dense, found, blobs):
    example, trained = blobs.parts[0].tensors[0][:2], []

    def train(network) -> None:
        heal(network, blobs.train, HealConfig(epochs=3, lr=0.05), seed=2)
        trained.append(copy.deepcopy(network).eval())

    config = DepthShrinkerConfig(keep_ratio=0.5)
    code, names = dense.code, list(dense.state_dict())
    keep(dense, "depthshrinker", depthshrinker.prepare(dense, found, train, config, loader=blobs.val, seed=0))
    assert dense.code == code
    assert list(dense.state_dict()) == names
    scores = depthshrinker.score(dense, found, [], config, seed=0)
    chosen = depthshrinker.select(found, scores, config, losses=None, step=1)
    assert len(chosen) == 2
    plan = Plan(e for c in found if c.name in chosen for e in depthshrinker.edits(c, config))
    x = blobs.parts[1].tensors[0]
    torch.testing.assert_close(plan.apply(dense, example)(x), trained[0](x), atol=1e-5, rtol=1e-5)


def test_gates_learn_which_activation_matters() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 3)
    layers = [torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)]
    model = torch.nn.Sequential(*layers).eval()
    with torch.no_grad():
        for layer, sign in ((model[0], 1.0), (model[2], -1.0)):
            layer.weight.copy_(sign * torch.eye(3))
            layer.bias.zero_()
        target = model[4](model[2](x).relu())  # needs the last ReLU alone
    captured = capture(model, x[:2])
    sites = [s for s in find_sites(captured, x[:2]) if s.kind == "activation"]
    pool = [Candidate(name=s.path, sites=(s,), macs_saved=1, ms_saved=None, pays=True, reason="") for s in sites]

    def train(network) -> None:
        gates = next(iter(blends(network).values())).gates
        assert gates().tolist() == [1.0, 0.0], "the first choice is the wrong one"
        optimizer = torch.optim.SGD([gates.parameter], lr=0.1)
        network.train()
        for _ in range(100):
            optimizer.zero_grad()
            (network(x) - target).square().mean().backward()
            optimizer.step()

    config = DepthShrinkerConfig(keep_ratio=0.5, rate=1.0)
    data = [(-x.abs(), None)]  # all cut off by the first ReLU, so that nothing is left for the second
    keep(captured, "depthshrinker", depthshrinker.prepare(captured, pool, train, config, loader=data, seed=0))
    scores = depthshrinker.score(captured, pool, [], config, seed=0)
    assert depthshrinker.select(pool, scores, config, losses=None, step=1) == [pool[0].name]


def test_those_off_go_together_and_then_one_by_one() -> None:
    candidates = [Candidate(name, (), 1, None, True, "") for name in "abcd"]
    scores = {"a": -0.2, "b": -1e-308, "c": 1e-308, "d": 1.0}

    def select(names: str, step: int = 1, **options) -> list[str]:
        kept = [c for c in candidates if c.name in names]
        return depthshrinker.select(kept, scores, DepthShrinkerConfig(**options), losses=None, step=step)

    assert select("abcd") == select("abcd", reproduce=True) == ["a", "b"]
    assert select("cd") == ["c"]
    assert select("cd", step=2) == ["c", "d"]
    assert select("cd", reproduce=True) == []


def test_before_the_training_the_start_ranks_and_later_a_new_activation_counts_as_kept(dense, found, blobs) -> None:
    before = depthshrinker.score(dense, found, blobs.val, DepthShrinkerConfig(), seed=0)
    assert before == changes(dense, [c.name for c in found], blobs.val)
    with pytest.raises(DataError, match="empty"):
        depthshrinker.score(dense, found, [], DepthShrinkerConfig(), seed=0)
    keep(dense, "depthshrinker", {found[0].name: -0.5, found[1].name: 0.8})
    scores = depthshrinker.score(dense, found, [], DepthShrinkerConfig(), seed=0)
    assert list(scores.values()) == [-0.5, 0.8, 0.8]


@pytest.mark.parametrize("reproduce", [False, True])
def test_the_rounds_of_both_forms(searched, quick, reproduce) -> None:
    found, stages = searched("depthshrinker", heal=quick, rounds=2, reproduce=reproduce, keep_ratio=0.5)
    off = {path for path, margin in stages["shrink-prepared"]["found"].items() if margin < 0}
    assert len(off) == 2
    edited = {edit.site for edit in found.branch.plan}
    assert edited == off if reproduce else edited > off
    assert {edit.fit for edit in found.branch.plan} == {"identity"}
    assert [entry.removed for entry in found.rounds] == ([2] if reproduce else [2, 1])
