"""EGP in its sound and its paper form: what it counts, what it prunes, what goes, and that zeros stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from palmette.depth import egp
from palmette.depth.egp import EgpConfig
from palmette.depth.prepared import keep
from palmette.depth.pruning import look
from palmette.depth.shrink import shrink
from palmette.errors import DataError, RefusedEdit
from palmette.graph import Candidate, capture, find_sites
from palmette.registry import check_method, get_method
from palmette.train.constraints import zeros_kept
from palmette.train.loop import HealConfig, heal


def _candidate(site) -> Candidate:
    return Candidate(name=site.path, sites=(site,), macs_saved=0, ms_saved=None, pays=True, reason="")


def _candidates(network, example, kind="activation"):
    return [_candidate(site) for site in find_sites(network, example) if site.kind == kind and site.removable]


def _run(model, blobs, quick, **options):
    settings = {"cost": "macs", "heal": quick, "max_drop": 100.0, "controls": False} | options
    return shrink(model, blobs.train, blobs.val, method="egp", **settings)


@pytest.mark.slow
def test_it_behaves_as_every_method_must() -> None:
    assert len(check_method("egp")) >= 13


def test_the_paper_leaves_constant_neurons_out_and_the_sound_form_does_not() -> None:
    model = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0], model[0].bias[:] = 1.0, -1.0
        model[0].bias[0] = 0.0
    x = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])
    network = capture(model.eval(), x[:2])
    found = _candidates(network, x[:2])
    values = [egp.score(network, found, [(x, x)], EgpConfig(reproduce=paper), seed=0) for paper in (True, False)]
    assert [list(v.values()) for v in values] == [[1.0], [1.0 / 64]]


def test_the_papers_entropy_is_the_mean_over_batches_with_zero_as_off() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    network = capture(model.eval(), torch.zeros(2, 1))
    data = [(torch.tensor([[1.0], [0.0]]), None), (torch.tensor([[1.0], [2.0]]), None)]
    found = _candidates(network, torch.zeros(2, 1))
    assert list(egp.score(network, found, data, EgpConfig(reproduce=True), seed=0).values()) == [0.5]
    with pytest.raises(DataError, match="empty"):
        egp.score(network, found, [], EgpConfig(), seed=0)


def test_edits_are_affine_by_default_masks_in_the_papers_form_and_drops_for_blocks(trained, blobs) -> None:
    example = next(iter(blobs.val))[0][:2]
    network = capture(trained, example)
    activation, block = (_candidates(network, example, kind)[0] for kind in ("activation", "block"))
    method = get_method("egp")
    assert [(e.fit, e.force) for e in method.edits(activation, EgpConfig())] == [("affine", False)]
    assert [(e.fit, e.force) for e in method.edits(activation, EgpConfig(reproduce=True, fit="identity"))] == [
        ("mask", True)
    ]
    assert [e.kind for e in method.edits(block, EgpConfig(sites="block"))] == ["drop"]


def test_the_paper_takes_all_that_collapsed_together_and_nothing_else(trained, blobs) -> None:
    example = next(iter(blobs.val))[0][:2]
    found = _candidates(capture(trained, example), example)
    method = get_method("egp")
    scores = dict(zip([c.name for c in found], (0.0, 0.0, 0.2), strict=True))
    chosen = [method.select(found, scores, EgpConfig(reproduce=paper), losses=None, step=1) for paper in (True, False)]
    assert chosen == [[found[0].name, found[1].name], [found[0].name]]
    assert method.select(found, dict.fromkeys(scores, 0.1), EgpConfig(reproduce=True), losses=None, step=1) == []


def _prepared(model, blobs, quick, config):
    """The network after the ingredient, its candidates, and how often it was trained."""
    example, calls = next(iter(blobs.val))[0][:2], []
    network = capture(model, example)
    found = _candidates(network, example)

    def train(network, *, keep_zeros=False):
        calls.append(keep_zeros)
        heal(network, blobs.train, quick, constraints=[zeros_kept(network)] if keep_zeros else ())

    result = get_method("egp").prepare(network, found, train, config, loader=blobs.train, seed=0)
    keep(network, "egp", result)
    return network.eval(), found, calls


def _inner(network):
    return {name: w for name, w in network.named_parameters() if w.dim() == 2 and w.shape[0] == 48}


def test_an_emptied_layer_has_collapsed_and_its_zeros_stay_in_healing(trained, blobs, quick) -> None:
    network, found, calls = _prepared(trained, blobs, quick, EgpConfig(temperature=0.01))
    assert calls == [True]
    inner = _inner(network)
    assert sum(int((w == 0).sum()) for w in inner.values()) == round(0.5 * 3 * 8 * 48)
    empty = [name for name, w in inner.items() if not w.any()]
    assert len(empty) == 1
    scores = egp.score(network, found, [], EgpConfig(), seed=0)
    assert [name for name, value in scores.items() if value == 0] == [empty[0].replace("0.weight", "1")]
    zeros = {name: w == 0 for name, w in network.named_parameters() if w.dim() == 2}
    heal(network, blobs.train, quick, constraints=[zeros_kept(network)])
    assert all(not w[zeros[name]].any() for name, w in network.named_parameters() if name in zeros)
    assert get_method("egp").keeps_zeros


def test_the_papers_form_prunes_for_nine_rounds(trained, blobs) -> None:
    none = HealConfig(epochs=0)
    network, _, calls = _prepared(trained, blobs, none, EgpConfig(reproduce=True, rate=0.1))
    assert calls == [True] * 9
    left = 3 * 8 * 48
    for _ in range(9):
        left -= round(0.1 * left)
    assert sum(int((w != 0).sum()) for w in _inner(network).values()) == left
    assert _prepared(trained, blobs, none, EgpConfig(reproduce=True, rounds=2))[2] == [True] * 2


@pytest.mark.parametrize("reproduce", [False, True])
def test_shrink_takes_out_what_collapsed(trained, blobs, quick, reproduce) -> None:
    config = EgpConfig(temperature=0.01, rounds=2)
    result = _run(trained, blobs, quick, rounds=1, reproduce=reproduce, config=config)
    collapsed = [row["name"] for row in result.ranking if row["score"] == 0]
    assert len(collapsed) >= 1
    assert [edit.site for edit in result.plan] == (collapsed if reproduce else collapsed[:1])
    assert {edit.fit for edit in result.plan} == {"mask" if reproduce else "affine"}
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in trained.parameters())
    assert result.verification.max_relative_error < 1e-4


def test_a_network_that_would_be_cut_is_an_error_in_the_papers_form_and_none_in_the_sound_one(blobs, quick) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 4)).eval()
    with pytest.raises(RefusedEdit, match="MobileNetV2"):
        _run(chain, blobs, quick, rounds=1, reproduce=True, config=EgpConfig(temperature=0.01))
    network, _, calls = _prepared(chain, blobs, quick, EgpConfig(temperature=0.01, rounds=3))
    assert calls == [True] * 3
    assert network(next(iter(blobs.val))[0]).std(0).max() > 0


class Images(nn.Module):
    """Two residual blocks whose convolutions cannot be merged at a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)) for _ in range(3)
        )

    def forward(self, x):
        x = self.stem(x)[:, :, None, None].expand(-1, -1, 3, 3)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
def test_blocks_with_a_dead_branch_are_dropped(blobs) -> None:
    torch.manual_seed(0)
    result = _run(
        Images().eval(),
        blobs,
        HealConfig(epochs=1, lr=1e-3),
        rounds=1,
        config=EgpConfig(sites="block", rate=0.4, temperature=0.01),
    )
    assert [edit.kind for edit in result.plan] == ["drop"]
    assert result.ranking[0]["score"] == 0.0
    assert result.ranking[-1]["score"] > 0.5


def test_padding_changes_no_entropy() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, input_ids, attention_mask):
            h = torch.relu(self.up(self.words(input_ids)))
            return self.down((h * attention_mask[..., None]).sum(1))

    torch.manual_seed(0)
    ids = torch.randint(1, 9, (6, 5))
    wide = torch.cat([ids, torch.zeros(6, 4, dtype=torch.long)], 1)
    short, padded = (
        {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": torch.zeros(6)} for tokens in (ids, wide)
    )
    network = capture(Encoder().eval(), {k: v[:2] for k, v in short.items() if k != "labels"})
    found = [_candidate(site) for site in find_sites(network, None) if site.kind == "activation"]
    for config in (EgpConfig(), EgpConfig(reproduce=True)):
        first, second = (look(network, found, [batch], config.rule) for batch in (short, padded))
        assert first == second
