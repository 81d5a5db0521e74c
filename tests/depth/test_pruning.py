"""Entropy-guided pruning: the budget against a twin in exact arithmetic, layers found by the graph, cuts refused."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from palmette.depth.entropy import EntropyRule
from palmette.depth.pruning import (
    Cuts,
    PruningConfig,
    entropy_budget,
    find_layers,
    look,
    prune_in_rounds,
    prune_smallest,
    share_out,
)
from palmette.errors import InputError, RefusedEdit
from palmette.graph import Candidate, capture, find_sites

RULE = EntropyRule(zeros="off")


# ---- the budget ------------------------------------------------------------------------------------------------------

LAYERS = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.floats(1e-6, 2.0)), st.integers(0, 300), st.integers(0, 300)),
    min_size=1,
    max_size=6,
)


def _named(layers):
    names = [f"layer{i}" for i in range(len(layers))]
    scores, contents, limits = ([layer[i] for layer in layers] for i in range(3))
    return tuple(dict(zip(names, values, strict=True)) for values in (scores, contents, limits))


def _twin(scores, caps, wanted, temperature):
    """The real-valued budget by the words of the paper, in 60 digits; None where a share all but equals its cap."""
    with localcontext(prec=60, Emin=-(10**15), Emax=10**15):
        importance = {name: Decimal(value) for name, value in scores.items()}
        budget, fixed, open_ = Decimal(wanted), {}, set(caps)
        while open_:
            total = sum(importance[name] for name in open_)
            relevance = {n: total / importance[n] if importance[n] else Decimal(0) for n in open_}
            power = {n: ((relevance[n] - max(relevance.values())) / Decimal(temperature)).exp() for n in open_}
            share = {n: budget * power[n] / sum(power.values()) for n in open_}
            if any(abs(share[n] - caps[n]) < Decimal("1e-6") and caps[n] for n in open_):
                return None
            full = {n for n in open_ if share[n] >= caps[n]}
            if not full:
                return fixed | share
            fixed |= {n: Decimal(caps[n]) for n in full}
            budget -= sum(caps[n] for n in full)
            open_ -= full
        return fixed


@given(layers=LAYERS, rate=st.floats(0.01, 0.99), temperature=st.sampled_from([0.1, 1.0, 7.0, 1000.0]))
def test_budgets_are_those_of_the_paper_in_whole_numbers(layers, rate, temperature) -> None:
    scores, contents, limits = _named(layers)
    caps = {name: min(contents[name], limits[name]) for name in contents}
    wanted = min(round(rate * sum(contents.values())), sum(caps.values()))
    budget = entropy_budget(scores, contents, rate, temperature, limits)
    assert list(budget) == list(contents)
    assert sum(budget.values()) == wanted
    assert all(0 <= budget[name] <= caps[name] for name in budget)
    exact = _twin(scores, caps, wanted, temperature)
    assume(exact is not None)
    assert all(abs(budget[name] - exact[name]) < 1 + 1e-6 for name in budget)


@given(layers=LAYERS, rate=st.floats(0.01, 0.99))
def test_without_limits_all_that_is_asked_for_goes(layers, rate) -> None:
    scores, contents, _ = _named(layers)
    assert sum(entropy_budget(scores, contents, rate).values()) == round(rate * sum(contents.values()))


def test_one_layer_after_another_is_emptied_at_temperature_one() -> None:
    scores = {f"l{i}": i / 10 for i in range(1, 9)}
    budget = entropy_budget(scores, dict.fromkeys(scores, 100), 0.3)
    assert [budget["l1"], budget["l2"], sum(budget.values())] == [100, 100, 240]
    assert budget["l3"] > 35


def test_a_high_temperature_spreads_the_budget() -> None:
    scores = {f"l{i}": i / 10 for i in range(1, 9)}
    budget = entropy_budget(scores, dict.fromkeys(scores, 100), 0.5, temperature=1e9)
    assert set(budget.values()) == {50}


def test_a_layer_without_importance_comes_last() -> None:
    contents = {"alive": 100, "linear": 100}
    assert entropy_budget({"alive": 0.3, "linear": 0.0}, contents, 0.5, temperature=0.05) == {"alive": 100, "linear": 0}


def test_tiny_importances_do_not_overflow() -> None:
    contents = dict.fromkeys("abc", 10)
    budget = entropy_budget({"a": 5e-324, "b": 1e-300, "c": 1.0}, contents, 0.5, temperature=1e-3)
    assert sum(budget.values()) == 15
    assert budget["c"] == 0


@given(
    values=st.lists(st.sampled_from([0.0, -0.5, 0.5, 1.0, -2.0, 3.0]) | st.floats(-4, 4, width=32), min_size=1),
    share=st.floats(0, 1),
)
def test_the_smallest_surviving_weights_become_zero(values, share) -> None:
    weight = nn.Parameter(torch.tensor([values]))
    alive = sorted(abs(v) for v in weight.flatten().tolist() if v)
    count = int(share * len(alive))
    before = weight.detach().clone()
    prune_smallest(weight, count)
    kept = sorted(abs(v) for v in weight.flatten().tolist() if v)
    assert kept == alive[count:]
    assert torch.equal(weight[weight != 0], before[weight != 0])


def test_weights_of_other_layouts_are_pruned_where_they_lie() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    expected = weight.detach().clone()
    expected[expected.abs() <= expected.abs().flatten().sort().values[53]] = 0
    prune_smallest(weight, 54)
    assert torch.equal(weight, expected)


# ---- layers and cuts -------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A convolution, a basic block with a projection, a plain one, a gate, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.project = nn.Conv2d(4, 8, 1)
        self.conv3, self.conv4 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + self.project(x))
        x = F.relu(x + self.conv4(F.relu(self.conv3(x))))
        h = x.mean((2, 3))
        return self.head(h * torch.sigmoid(self.excite(F.relu(self.squeeze(h)))))


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _captured(model, example=IMAGES):
    torch.manual_seed(0)
    network = capture(model.eval(), example[:2])
    sites = [site for site in find_sites(network, example[:2]) if site.kind == "activation"]
    found = [Candidate(name=s.path, sites=(s,), macs_saved=0, ms_saved=None, pays=True, reason="") for s in sites]
    return network, found


def _data(x=IMAGES):
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(4)]


def test_layers_are_those_that_feed_an_activation() -> None:
    network, found = _captured(Residual())
    layers = find_layers(network)
    assert [layer.path for layer in layers] == ["stem", "conv1", "conv2", "conv3", "conv4", "squeeze", "excite"]
    assert [path for layer in layers for path in layer.activations] == [c.name for c in found]
    assert [layer.weight is network.get_parameter(f"{layer.path}.weight") for layer in layers] == [True] * 7
    assert layers[0].content == layers[0].weight.numel()


class Unclear(nn.Module):
    """Weights used twice, weights that are computed, and an activation on top of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.twice, self.own = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.factor = nn.Parameter(torch.randn(4, 4))

    def forward(self, tokens):
        x = F.relu(self.words(tokens))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return F.relu(self.own(F.relu(F.linear(x, self.factor * 2))))


def test_weights_that_are_shared_computed_or_no_layer_are_left_alone() -> None:
    tokens = torch.randint(7, (3, 5))
    assert [layer.path for layer in find_layers(capture(Unclear().eval(), tokens))] == ["own"]


def test_the_network_is_cut_where_nothing_runs_past() -> None:
    network, _ = _captured(Residual())
    cuts, node = Cuts(network), {str(n.meta["path"]): n for n in network.graph.nodes if n.op == "call_module"}
    alone = {name: cuts.cut([node[name]]) for name in ("stem", "conv1", "conv2", "project", "conv4", "excite", "head")}
    assert [name for name, is_cut in alone.items() if is_cut] == ["stem", "head"]
    assert cuts.cut([node["conv1"], node["project"]])
    assert not cuts.cut([node["conv1"], node["conv3"], node["excite"]])


class Tokens(nn.Module):
    """Reads the size of its input, joins two inputs, and has a branch that depends on shapes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.join, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.token = nn.Parameter(torch.randn(1, 4))

    def forward(self, x, y):
        token = self.token.expand(x.shape[0], -1) + torch.ones_like(y)
        return self.head(F.relu(self.join(F.relu(self.first(x)) + F.relu(self.second(y)))) + token)


def test_sizes_of_the_input_are_no_way_past_and_every_input_counts() -> None:
    network = capture(Tokens().eval(), (torch.randn(2, 4), torch.randn(2, 4)))
    cuts, node = Cuts(network), {str(n.meta["path"]): n for n in network.graph.nodes if n.op == "call_module"}
    assert all(cuts.cut([node[name]]) for name in ("first", "second", "join"))


def _chain() -> nn.Module:
    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(6, 6), nn.ReLU())], nn.Linear(6, 2))


@pytest.fixture(scope="module")
def chain():
    network, _ = _captured(_chain(), ROWS)
    return network, find_layers(network)


ROWS = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


@given(scores=st.lists(st.floats(0.01, 1), min_size=4, max_size=4), rate=st.floats(0.05, 0.95))
def test_a_layer_that_every_path_crosses_loses_its_share_at_most(chain, scores, rate) -> None:
    network, layers = chain
    budget = share_out(
        network,
        layers,
        {layer.path: s for layer, s in zip(layers, scores, strict=True)},
        PruningConfig(rate=rate),
    )
    assert set(budget.values()) == {math.floor(rate * 36)}


def test_the_papers_form_says_that_it_would_cut_the_network() -> None:
    network, _ = _captured(_chain(), ROWS)
    layers = find_layers(network)
    scores = {layer.path: 0.1 * i for i, layer in enumerate(layers, 1)}
    with pytest.raises(RefusedEdit, match="would empty '0'"):
        share_out(network, layers, scores, PruningConfig(reproduce=True))


class TwoWays(nn.Module):
    """Two parallel branches without a skip: one may die, not both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.left(x)) + F.relu(self.right(x)))


def test_layers_that_cut_the_network_together_are_not_emptied_together() -> None:
    network, _ = _captured(TwoWays(), ROWS)
    layers, config = find_layers(network), PruningConfig(rate=0.9)
    assert share_out(network, layers, {"left": 0.1, "right": 0.2, "stem": 5.0}, config) == {
        "stem": round(0.9 * 108) - 36 - 32,
        "left": 36,
        "right": math.floor(0.9 * 36),
    }
    with torch.no_grad():
        network.get_parameter("left.weight").zero_()
    assert share_out(network, layers, {"right": 0.2}, config) == {"right": math.floor(0.9 * 36)}


# ---- the rounds ------------------------------------------------------------------------------------------------------


def _trainer():
    calls = []

    def train(network, *, loss_terms=(), keep_zeros=False):
        calls.append((keep_zeros, {n: int((p == 0).sum()) for n, p in network.named_parameters() if p.dim() > 1}))

    return train, calls


def _prune(network, found, config, rounds, *, drops_zero=True, data=None):
    train, calls = _trainer()
    data = _data() if data is None else data
    found = prune_in_rounds(network, found, train, data, config, rule=RULE, rounds=rounds, drops_zero=drops_zero)
    return found, calls


def test_each_round_prunes_its_share_and_trains_with_the_zeros_kept() -> None:
    network, found = _captured(Residual())
    result, calls = _prune(network, found, PruningConfig(rate=0.25), 2, drops_zero=False)
    assert [keep for keep, _ in calls] == [True, True]
    sizes = {layer.path: layer.weight.numel() for layer in find_layers(network)}
    assert calls[0][1]["stem.weight"] == 0  # the first layer with weights is spared
    pruned = sum(calls[0][1].values())
    assert pruned == round(0.25 * (sum(sizes.values()) - sizes["stem"]))
    assert set(result) == {candidate.name for candidate in found}


def test_a_layer_without_weights_has_collapsed() -> None:
    network, found = _captured(Residual())
    with torch.no_grad():
        network.get_parameter("conv3.weight").mul_(0.01)
        network.get_parameter("conv3.bias").zero_()
    before = look(network, found, _data(), RULE)
    result, _ = _prune(network, found, PruningConfig(rate=0.3), 1)
    layer = next(layer for layer in find_layers(network) if layer.path == "conv3")
    assert (layer.content, layer.share) == (0, 0.0)
    assert [before[path] > 0 for path in layer.activations] == [True]
    assert [result[path] for path in layer.activations] == [0.0]
    assert network(IMAGES).std(0).max() > 0


def test_rounds_end_before_the_one_that_would_cut_the_network_unless_it_is_the_first() -> None:
    config = PruningConfig(rate=0.6, reproduce=True)
    network, found = _captured(TwoWays(), ROWS)
    with torch.no_grad():
        network.get_parameter("stem.weight").mul_(100)
    _, calls = _prune(network, found, config, 9, data=_data(ROWS))
    assert 1 <= len(calls) < 9
    assert network(ROWS).std(0).max() > 0
    chain, sites = _captured(_chain(), ROWS)
    before = chain.get_parameter("0.weight").clone()
    with pytest.raises(RefusedEdit, match="every path"):
        _prune(chain, sites, config, 9, data=_data(ROWS))
    assert torch.equal(chain.get_parameter("0.weight"), before)


def test_nothing_is_trained_where_nothing_can_be_pruned() -> None:
    network, found = _captured(Residual())
    _, calls = _prune(network, found[:1], PruningConfig(), 3)  # only the stem
    assert calls == []


def test_a_block_counts_by_the_emptiest_layer_of_its_branch() -> None:
    network, _ = _captured(Residual())
    blocks = [site for site in find_sites(network, IMAGES[:2]) if site.kind == "block" and site.removable]
    found = [Candidate(name=s.path, sites=(s,), macs_saved=0, ms_saved=None, pays=True, reason="") for s in blocks]
    with torch.no_grad():
        network.get_parameter("conv3.weight")[:4] = 0
    seen = look(network, found, _data(), RULE)
    assert [seen[site.path] for site in blocks] == [0.5]


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": 1.0}, {"rounds": 0}, {"temperature": 0.0}, {"fit": "x"}])
def test_settings_out_of_bounds_are_refused(wrong) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        PruningConfig(**wrong)
