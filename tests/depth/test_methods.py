"""What the scores of EASIER, block influence and random removal are, on networks whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from palmette.depth import block_influence, easier, random_removal
from palmette.depth.easier import EasierConfig, EntropyWatch
from palmette.depth.entropy import EntropyRule, count_states, layer_entropy
from palmette.errors import DataError
from palmette.graph import Candidate, candidates, capture, find_sites
from palmette.graph.inputs import call


class Known(nn.Module):
    """Two ReLUs: the first sees the input itself, the second is always ON."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(4))
            self.first.bias.zero_()
            self.second.weight.abs_()
            self.second.bias.fill_(1.0)

    def forward(self, x):
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def _loader(*batches: torch.Tensor):
    return [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches]


def _all(model, example, kind="activation"):
    captured = capture(model.eval(), example)
    sites = [s for s in find_sites(captured, example) if s.kind == kind]
    made = [Candidate(name=s.path, sites=(s,), macs_saved=0, ms_saved=None, pays=True, reason="") for s in sites]
    return captured, made


def test_easier_counts_over_the_whole_set() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(9, 4), torch.randn(5, 4)]
    captured, found = _all(Known(), batches[0][:2])
    scores = easier.score(captured, found, _loader(*batches), EasierConfig(), seed=0)
    expected = layer_entropy([count_states(torch.cat(batches), 1)], EntropyRule())
    assert list(scores.values()) == [expected, 0.0]


def test_easier_in_the_papers_form_averages_batches() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(9, 4), torch.randn(5, 4)]
    captured, found = _all(Known(), batches[0][:2])
    scores = easier.score(captured, found, _loader(*batches), EasierConfig(reproduce=True), seed=0)
    per_batch = [layer_entropy([count_states(x, 1)], EntropyRule()) for x in batches]
    assert scores[found[0].name] == pytest.approx(sum(per_batch) / 2)
    assert scores[found[1].name] == 0.0


def test_easier_weighted_by_the_producers_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 4)
    model = Known()
    model.first.weight.data.mul_(2.5)
    captured, found = _all(model, x[:2])
    plain = easier.score(captured, found, _loader(x), EasierConfig(), seed=0)
    weighted = easier.score(captured, found, _loader(x), EasierConfig(weighting="weight"), seed=0)
    assert weighted[found[0].name] == pytest.approx(plain[found[0].name] * 2.5)


def test_a_candidate_of_two_activations_has_their_mean_entropy() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 4)
    captured, found = _all(Known(), x[:2])
    pair = Candidate(
        name="pair", sites=(found[0].sites[0], found[1].sites[0]), macs_saved=0, ms_saved=None, pays=True, reason=""
    )
    scores = easier.score(captured, [*found, pair], _loader(x), EasierConfig(), seed=0)
    assert scores["pair"] == pytest.approx((scores[found[0].name] + scores[found[1].name]) / 2)


def test_watches_see_training_and_leave_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 2))
    x = [torch.randn(8, 4) for _ in range(3)]
    captured, found = _all(model, x[0][:2])
    before, names = captured(x[0]), list(captured.state_dict())
    easier.watch(captured, found, EasierConfig(reproduce=True), steps=3)
    captured.train()
    for batch in [torch.full((8, 4), 9.0)] * 3 + x:  # the first epoch is forgotten
        call(captured, batch)
    seen = easier.score(captured, found, [], EasierConfig(reproduce=True), seed=0)
    easier.unwatch(captured)
    captured.eval()
    assert list(captured.state_dict()) == names
    assert torch.equal(captured(x[0]), before)
    expected = sum(layer_entropy([count_states(model[0](b), 1)], EntropyRule()) for b in x) / 3
    assert seen[found[0].name] == pytest.approx(expected)


def test_a_watch_counts_in_train_mode_only_and_carries_its_state() -> None:
    watch = EntropyWatch(1, EntropyRule(), steps=2)
    z = torch.tensor([[1.0], [-1.0]])
    assert watch.eval()(z) is z
    with pytest.raises(DataError, match="no batch"):
        watch.entropy()
    watch.train()(z)
    twin = EntropyWatch(1, EntropyRule(), steps=2)
    twin.load_state_dict(watch.state_dict())
    assert twin.entropy() == watch.entropy() == 1.0


class Turning(nn.Module):
    """Three residual blocks: adding nothing, turning by 90 degrees, and doubling."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.head = nn.Linear(2, 2)
        turn = torch.tensor([[-1.0, -1.0], [1.0, -1.0]])
        with torch.no_grad():
            for block, weight in zip(self.blocks, (torch.zeros(2, 2), turn, torch.eye(2)), strict=True):
                block.weight.copy_(weight)
                block.bias.zero_()

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize("shape", [(6, 2), (3, 5, 2)])
def test_block_influence_is_one_minus_cosine(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape)
    captured, found = _all(Turning(), x[:2], kind="block")
    loader = [(x, torch.zeros(len(x)))]
    scores = block_influence.score(captured, found, loader, block_influence.BlockInfluenceConfig(), seed=0)
    assert list(scores.values()) == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)


class Waves(nn.Module):
    """One residual convolution over sequences [batch, channels, length]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv1d(3, 5, 1), nn.Conv1d(5, 5, 3, padding=1), nn.Linear(5, 2)

    def forward(self, x, attention_mask):
        x = self.stem(x) + 0.0 * attention_mask.sum()
        return self.head((x + self.block(x)).mean(-1))


def test_block_influence_takes_a_map_of_one_dimension_as_one_vector_per_sample() -> None:
    torch.manual_seed(0)
    net, x = Waves().eval(), torch.randn(6, 3, 7)
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 6)  # as long as there are channels, and no mask of theirs
    captured, found = _all(net, {"x": x[:2], "attention_mask": mask[:2]}, kind="block")
    with torch.no_grad():
        entering = net.stem(x)
        cosine = torch.cosine_similarity(entering.flatten(1), (entering + net.block(entering)).flatten(1))
    loader = [({"x": x, "attention_mask": mask}, torch.zeros(6))]
    scores = block_influence.score(captured, found, loader, block_influence.BlockInfluenceConfig(), seed=0)
    assert list(scores.values()) == pytest.approx([1 - float(cosine.mean())], abs=1e-6)


def test_block_influence_leaves_padded_tokens_out() -> None:
    mean = block_influence.CosineMean()
    x = torch.randn(2, 4, 3)
    y = x.clone()
    y[:, 2:] = -y[:, 2:]
    mean.add(x, y, torch.tensor([[1, 1, 0, 0]] * 2))
    assert mean.influence() == pytest.approx(0.0)
    mean.add(x, y)
    assert mean.influence() == pytest.approx(2 * 4 / 12)


def test_zero_features_do_not_divide_by_zero() -> None:
    mean = block_influence.CosineMean()
    mean.add(torch.zeros(2, 3), torch.zeros(2, 3))
    assert mean.influence() == 0.0
    mean.add(torch.zeros(2, 3), torch.ones(2, 3))
    assert mean.influence() == 0.5
    with pytest.raises(DataError, match="not finite"):
        mean.add(torch.full((2, 3), float("inf")), torch.ones(2, 3))


def test_random_scores_depend_on_seed_and_name_only() -> None:
    x = torch.randn(2, 4)
    captured, found = _all(Known(), x)
    config = random_removal.RandomConfig()
    first = random_removal.score(captured, found, [], config, seed=0)
    assert random_removal.score(captured, found[1:], [], config, seed=0) == {found[1].name: first[found[1].name]}
    assert random_removal.score(captured, found, [], config, seed=1) != first
    draws = [random_removal._uniform(seed, "x") for seed in range(2000)]
    assert 0 <= min(draws) < 0.01
    assert 0.99 < max(draws) < 1
    assert abs(sum(draws) / 2000 - 0.5) < 0.03


def test_candidates_of_the_graph_are_what_methods_rank() -> None:
    x = torch.randn(2, 4)
    captured = capture(Known().eval(), x)
    found = candidates(captured, x, kind="activation")
    assert {site.kind for c in found for site in c.sites} == {"activation"}


def test_block_influence_ranks_runs_of_blocks_as_a_whole() -> None:
    x = torch.randn(6, 2)
    captured = capture(Turning().eval(), x[:2])
    config = block_influence.BlockInfluenceConfig(sites="span")
    found = candidates(captured, x[:2], kind="span", longest=config.longest)
    scores = block_influence.score(captured, found, [(x, torch.zeros(6))], config, seed=0)
    assert [len(c.sites[0].members) for c in found] == [2]  # the first block reads the input of the network
    assert list(scores.values()) == pytest.approx([1.0], abs=1e-6)
