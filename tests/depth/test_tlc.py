"""TLC: states against samples, masks of every kind of channel, scores by hand, and the paper's rule for sets."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from palmette.depth import tlc
from palmette.depth.shrink import shrink
from palmette.depth.tlc import Gaussian, InputMoments, TlcConfig, bounds, fit, gaussians, masked
from palmette.errors import DataError, PlanError, RefusedEdit
from palmette.graph import Candidate, Plan, capture, find_sites, linearize
from palmette.graph.activations import find_activations
from palmette.registry import check_method, get_method


def _candidate(*sites) -> Candidate:
    name = " + ".join(site.path for site in sites)
    return Candidate(name=name, sites=sites, macs_saved=0, ms_saved=None, pays=True, reason="")


def _captured(model, example):
    network = capture(model.eval(), example)
    return network, [_candidate(s) for s in find_sites(network, example) if s.kind == "activation"]


@pytest.mark.slow
def test_it_behaves_as_every_method_must() -> None:
    assert len(check_method("tlc")) >= 13


# ---- states ----------------------------------------------------------------------------------------------------------


@given(
    mean=st.floats(-4, 4),
    std=st.one_of(st.just(0.0), st.floats(0.01, 4)),
    level=st.sampled_from([0.0, 1.0, 6.0]),
    seed=st.integers(0, 2**31),
)
def test_states_agree_with_samples(mean, std, level, seed) -> None:
    sample = mean + std * torch.randn(20_000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model = Gaussian(mean=torch.tensor([mean], dtype=torch.float64), std=torch.tensor([std], dtype=torch.float64))
    share = float((sample <= level).double().mean())
    assert float(model.below(level)) == pytest.approx(share, abs=0.02)


@functools.cache
def _normed():
    network, found = _captured(nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU()), torch.randn(2, 2))
    return network, found[0].name


@given(
    beta=st.lists(st.floats(-3, 3), min_size=6, max_size=6),
    gamma=st.lists(st.one_of(st.just(0.0), st.floats(-2, -0.01), st.floats(0.01, 2)), min_size=6, max_size=6),
)
def test_behind_a_batch_norm_the_sign_of_beta_decides_whatever_gamma_is(beta, gamma) -> None:
    network, path = _normed()
    with torch.no_grad():
        network.get_parameter("1.bias").copy_(torch.tensor(beta))
        network.get_parameter("1.weight").copy_(torch.tensor(gamma))
    model = gaussians(network, [path], [])[path]  # no data is needed
    assert torch.equal(model.mean, torch.tensor(beta).double())
    assert torch.equal(model.std, torch.tensor(gamma).abs().double())
    slope, offset = model.mask()
    far = model.mean.abs() > 1e-12
    assert torch.equal(slope[far] > 0, (model.mean > 0)[far])
    assert not offset.any()


def test_a_steady_channel_is_off_up_to_zero() -> None:
    model = Gaussian(mean=torch.tensor([-1.0, 0.0, 1e-30, 1.0]).double(), std=torch.zeros(4).double())
    assert model.below().tolist() == [1.0, 1.0, 0.0, 0.0]
    assert model.mask()[0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_channels_beyond_a_bound_are_that_bound() -> None:
    model = Gaussian(mean=torch.tensor([-2.0, 3.0, 7.0, 0.5]).double(), std=torch.ones(4).double())
    assert [t.tolist() for t in model.mask(0.0, 6.0)] == [[0, 1, 0, 1], [0, 0, 6, 0]]
    assert [t.tolist() for t in model.mask(-1.0, 1.0)] == [[0, 0, 0, 1], [-1, 1, 1, 0]]
    assert [t.tolist() for t in model.mask(-math.inf, 1.0)] == [[1, 0, 0, 1], [0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (nn.ReLU(), (0, math.inf)),
        (nn.ReLU6(), (0, 6)),
        (nn.Hardtanh(-2.0, 3.0), (-2, 3)),
        (nn.Hardtanh(), (-1, 1)),
        (nn.GELU(), (0, math.inf)),
    ],
    ids=str,
)
def test_bounds_of_activations(act, expected) -> None:
    network, _ = _captured(nn.Sequential(nn.Linear(2, 3), act), torch.randn(2, 2))
    assert bounds(find_activations(network)[0]) == expected


class Clamped(nn.Module):
    """Clamps with one and with two ends."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        x = self.layers[0](x).clamp(min=0.0, max=2.0)
        x = torch.clamp(self.layers[1](x), max=1.5)
        return self.layers[2](x).clamp(0.5)


def test_bounds_of_clamps() -> None:
    network, _ = _captured(Clamped(), torch.randn(2, 3))
    assert [bounds(found) for found in find_activations(network)] == [(0, 2), (-math.inf, 1.5), (0.5, math.inf)]


@pytest.mark.parametrize("axis", [1, 2])
def test_moments_are_those_of_all_samples_and_positions(axis) -> None:
    z = torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5
    moments = InputMoments(axis)
    for part in z.split(17):
        moments.add(part)
    rows = z.movedim(axis, -1).reshape(-1, 4).double()
    model = moments.gaussian()
    torch.testing.assert_close(model.mean, rows.mean(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.std, rows.std(0, correction=0), rtol=1e-8, atol=1e-8)


def test_moments_add_up_and_leave_padding_out() -> None:
    z = torch.randn(6, 5, 3)
    mask = torch.arange(5)[None] < torch.tensor([5, 3, 1, 5, 2, 4])[:, None]
    whole, halves = InputMoments(2), [InputMoments(2), InputMoments(2)]
    whole.add(z[mask][:, None])
    for part, half in zip((slice(0, 3), slice(3, 6)), halves, strict=True):
        half.add(z[part], mask[part].long())
    parts = [half.totals() for half in halves]
    halves[0].take({name: parts[0][name] + parts[1][name] for name in parts[0]})
    for mine, theirs in zip(vars(halves[0].gaussian()).values(), vars(whole.gaussian()).values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_moments_of_nothing_and_of_what_is_not_finite_are_errors() -> None:
    with pytest.raises(DataError, match="no batch"):
        InputMoments(1).gaussian()
    moments = InputMoments(1)
    moments.add(torch.tensor([[math.inf]]))
    with pytest.raises(DataError, match="not finite"):
        moments.gaussian()


def test_a_constant_channel_has_no_spread() -> None:
    moments = InputMoments(1)
    moments.add(torch.full((1000, 1), 0.1))
    assert moments.gaussian().std.tolist() == [0.0]


class PostAdd(nn.Module):
    """A block whose last batch norm is followed by the addition of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(x + self.norm2(self.conv2(y)))
        return self.head(x.mean((2, 3)))


def test_behind_a_residual_addition_the_mean_is_measured() -> None:
    torch.manual_seed(0)
    model = PostAdd()
    with torch.no_grad():
        model.norm1.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
        model.norm2.bias.fill_(-1.0)
    x = 5 + torch.randn(8, 3, 6, 6)
    network, found = _captured(model, x[:2])
    inner, outer = (c.name for c in found)
    models = gaussians(network, [inner, outer], [(x, torch.zeros(8))])
    assert models[inner].mean.tolist() == [-1.0, 0.0, 1.0]
    assert bool((models[outer].mean > 0).all())
    with pytest.raises(PlanError, match="No activation"):
        gaussians(network, ["absent"], [])
    with pytest.raises(DataError, match="empty"):
        gaussians(network, [outer], [])


# ---- edits and scores ------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """A linear layer without a norm: OFF with a bias below zero, ON, and (with ReLU6) saturated units."""

    def __init__(self, act) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(2, 3), act, nn.Linear(3, 2)
        with torch.no_grad():
            self.up.weight.mul_(0.1)
            self.up.bias.copy_(torch.tensor([-3.0, 3.0, 9.0]))

    def forward(self, x):
        return self.down(self.act(self.up(x)))


@pytest.mark.parametrize("reproduce", [False, True])
def test_an_off_unit_puts_out_nothing_not_its_bias(reproduce) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 2)
    network, found = _captured(Wide(nn.ReLU()), x[:2])
    config, data = TlcConfig(reproduce=reproduce), [(x, torch.zeros(32, dtype=torch.long))]
    plan = fit(Plan(tlc.edits(found[0], config)), network, config, loader=data)
    assert [(e.slope, e.offset, e.force) for e in plan] == [((0.0, 1.0, 1.0), (0.0, 0.0, 0.0), reproduce)]
    for edited in (plan.apply(network, x[:2]), masked(network, plan)):
        torch.testing.assert_close(edited.eval()(x), network(x))
    assert list(tlc.score(network, found, data, config, seed=0).values()) == [pytest.approx(0.0, abs=1e-6)]


def test_a_saturated_unit_is_a_constant_in_the_sound_form_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 2)
    network, found = _captured(Wide(nn.ReLU6()), x[:2])
    data = [(x, torch.arange(32) % 2)]
    sound, paper = (
        fit(Plan(tlc.edits(found[0], config)), network, config, loader=data)
        for config in (TlcConfig(), TlcConfig(reproduce=True))
    )
    assert [(e.slope, e.offset) for e in sound] == [((0.0, 1.0, 0.0), (0.0, 0.0, 6.0))]
    assert [(e.slope, e.offset) for e in paper] == [((0.0, 1.0, 1.0), (0.0, 0.0, 0.0))]
    torch.testing.assert_close(masked(network, sound)(x), network(x))
    assert not torch.allclose(masked(network, paper)(x), network(x))


def test_edits_of_other_kinds_are_left_to_the_general_fit() -> None:
    network, found = _captured(Wide(nn.ReLU()), torch.randn(2, 2))
    plan = Plan([linearize(found[0].sites[0], fit="affine")])
    assert fit(plan, network, TlcConfig(), loader=[]) is plan


def test_a_score_is_the_loss_with_the_mask_minus_the_loss_without() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        model[1].bias.copy_(torch.linspace(-1, 1, 6))
    x, target = torch.randn(40, 4), torch.randint(3, (40,))
    network, found = _captured(model, x[:2])
    data = [(x[:25], target[:25]), (x[25:], target[25:])]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pair = _candidate(found[0].sites[0], found[1].sites[0])
    scores = tlc.score(network, [*found, pair], data, TlcConfig(), seed=0)
    with torch.no_grad():
        z = model[1](model[0](x))
        first, dense = z * (model[1].bias > 0), F.relu(z)
        second = [model[3](h) * (model[3](dense).mean(0) > 0) for h in (dense, first)]
        by_hand = [model[5](torch.tanh(model[3](first))), model[5](second[0]), model[5](second[1])]
        base = F.cross_entropy(model(x), target)
        expected = [float(F.cross_entropy(y, target) - base) for y in by_hand]
    assert list(scores.values()) == pytest.approx(expected, abs=1e-5)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    with pytest.raises(DataError, match="empty"):
        tlc.score(network, found, [], TlcConfig(), seed=0)


# ---- which go together -----------------------------------------------------------------------------------------------


def _select(gaps, config, losses=None, step=1, first=-0.5):
    """The rule on candidates a, b, c, d; `gaps` are those of the best 2, 3 and 4 together."""
    names = "abcd"
    found = [Candidate(name=n, sites=(), macs_saved=0, ms_saved=None, pays=True, reason="") for n in names]
    scores = {name: first + i for i, name in enumerate(names)}

    def loss(chosen):
        return 1.0 if not chosen else 1.0 + gaps[len(chosen) - 2]

    return "".join(tlc.select(found, scores, config, losses=losses or loss, step=step))


@pytest.mark.parametrize(
    ("gaps", "paper", "sound"),
    [
        ((-0.1, 0.2, 9.0), "abc", "ab"),  # the third makes it worse
        ((0.1, 0.0, 0.0), "ab", "a"),
        ((-0.1, -0.2, -0.3), "abc", "abcd"),  # one activation stays in the paper's form
        ((0.0, 0.0, 0.1), "abc", "abc"),  # 0 is not worse
        ((math.nan, 0.0, 0.0), "ab", "a"),
    ],
)
def test_the_best_go_together_until_the_loss_rises(gaps, paper, sound) -> None:
    assert _select(gaps, TlcConfig(reproduce=True)) == paper
    assert _select(gaps, TlcConfig()) == sound


def test_without_a_negative_gap_the_best_goes_alone() -> None:
    assert _select((), TlcConfig(reproduce=True), first=0.0, step=2) == "a"
    assert _select((), TlcConfig(), first=0.0, step=2) == "ab"


def test_a_set_that_cannot_be_made_goes_without_that_member() -> None:
    def losses(chosen):
        if "b" in chosen:
            raise RefusedEdit("b cannot go with a")
        return 1.0 - len(chosen)

    assert _select((), TlcConfig(), losses=losses) == "acd"


def test_the_last_activation_stays_in_the_papers_form() -> None:
    only = [Candidate(name="a", sites=(), macs_saved=0, ms_saved=None, pays=True, reason="")]
    assert tlc.select(only, {"a": -1.0}, TlcConfig(reproduce=True), losses=lambda _: 1.0, step=1) == []
    assert tlc.select(only, {"a": -1.0}, TlcConfig(), losses=lambda _: 1.0, step=1) == ["a"]


@pytest.mark.parametrize("reproduce", [False, True])
def test_shrink_by_it(trained, blobs, quick, reproduce) -> None:
    result = shrink(
        trained,
        blobs.train,
        blobs.val,
        method="tlc",
        cost="macs",
        heal=quick,
        max_drop=100.0,
        controls=False,
        rounds=1,
        reproduce=reproduce,
    )
    assert len(result.plan) >= 1
    assert all(edit.fit == "mask" and set(edit.slope) <= {0.0, 1.0} for edit in result.plan)
    assert result.plan.edits[0].site == result.ranking[0]["name"]
    assert result.verification.max_relative_error < 1e-4
    assert get_method("tlc").fit is fit
