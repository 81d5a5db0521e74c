"""Blends: the mix is the stated one, sites inside sites nest, and nothing is left once they are out."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from palmette.errors import PlanError
from palmette.graph import Plan, capture, drop, find_sites, linearize
from palmette.graph.blend import Blend, Share, blends, insert_blends, remove_blends


class _Post(nn.Module):
    """Two residual blocks that end in a ReLU: the output of an activation is also that of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6, 3)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for i in (0, 2):
            x = F.relu(x + self.convs[i + 1](F.silu(self.convs[i](x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return capture(_Post().eval(), torch.randn(2, 2, 6, 6))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(3))


def paths(network, kind: str) -> list[str]:
    return [site.path for site in find_sites(network, torch.zeros(2, 2, 6, 6)) if site.kind == kind]


def test_at_share_zero_the_network_is_as_it_was_and_without_them_it_is_the_same_code(network, x):
    before, code, names = network(x), network.code, list(network.state_dict())
    sites = paths(network, "activation") + paths(network, "block")
    insert_blends(network, {path: Blend() for path in sites})
    assert set(blends(network)) == set(sites)
    assert network.code != code
    assert torch.equal(network(x), before)
    remove_blends(network)
    assert network.code == code
    assert list(network.state_dict()) == names
    assert torch.equal(network(x), before)
    assert blends(network) == {}


@settings(max_examples=20, deadline=None)
@given(shares=st.lists(st.floats(0, 1), min_size=7, max_size=7))
def test_the_mix_is_the_one_written_by_hand(shares):
    torch.manual_seed(0)
    model = _Post().eval()
    network, x = capture(model, torch.randn(2, 2, 6, 6)), torch.randn(3, 2, 6, 6)
    stem, first, first_out, second, second_out = paths(network, "activation")
    blocks = paths(network, "block")
    sites = [stem, first, first_out, blocks[0], second, second_out, blocks[1]]
    insert_blends(network, {path: Blend(Share(s)) for path, s in zip(reversed(sites), reversed(shares), strict=True)})

    def mix(share: float, z: Tensor, y: Tensor) -> Tensor:
        return share * z + (1 - share) * y

    with torch.no_grad():
        z = model.stem(x)
        h = mix(shares[0], z, F.relu(z))
        for i, (inner, outer, block) in ((0, shares[1:4]), (2, shares[4:7])):
            z = model.convs[i](h)
            total = h + model.convs[i + 1](mix(inner, z, F.silu(z)))
            h = mix(block, h, mix(outer, total, F.relu(total)))
        torch.testing.assert_close(network(x), model.head(h.mean((2, 3))), atol=1e-5, rtol=1e-5)


def test_at_share_one_it_is_the_edited_network(network, x):
    inner, block = paths(network, "activation")[1], paths(network, "block")[1]
    plan = Plan([linearize(inner, fit="identity", force=True), drop(block)])
    edited = plan.apply(network, x[:2], pad="exact")
    insert_blends(network, {edit.site: Blend(Share(1.0)) for edit in plan})
    torch.testing.assert_close(network(x), edited(x))


def test_unknown_sites_are_refused_and_the_graph_is_untouched(network):
    code = network.code
    with pytest.raises(PlanError, match="No site is called 'nothing'"):
        insert_blends(network, {paths(network, "activation")[1]: Blend(), "nothing": Blend()})
    assert network.code == code


def test_some_blends_may_be_taken_out_and_others_stay(network, x):
    inner, block = paths(network, "activation")[1], paths(network, "block")[0]
    insert_blends(network, {inner: Blend(Share(0.5))})
    expected, code = network(x), network.code
    insert_blends(network, {block: Blend(Share(0.5))})
    remove_blends(network, [block, "nothing"])
    assert set(blends(network)) == {inner}
    assert network.code == code
    assert torch.equal(network(x), expected)


def test_a_site_is_blended_once_and_further_ones_may_follow(network, x):
    inner, block = paths(network, "activation")[1], paths(network, "block")[0]
    code = network.code
    insert_blends(network, {block: Blend(Share(0.5))})
    insert_blends(network, {inner: Blend(Share(0.5))})
    with pytest.raises(PlanError, match="blended already"):
        insert_blends(network, {inner: Blend()})
    after = network(x)
    remove_blends(network)
    assert network.code == code
    insert_blends(network, {inner: Blend(Share(0.5)), block: Blend(Share(0.5))})
    assert torch.equal(network(x), after)


def test_shares_train_survive_a_copy_and_do_not_fall_below_zero(network, x):
    inner = paths(network, "activation")[1]
    insert_blends(network, {inner: Blend()})
    twin = copy.deepcopy(network).train()
    (blend,) = blends(twin).values()
    twin(x).square().sum().backward()
    assert bool(blend.share.parameter.grad != 0)
    for sign in (-1.0, 1.0):
        blend.zero_grad()
        with torch.no_grad():
            blend.share.parameter.fill_(-1.0)
        (sign * blend(x, x.relu()).sum()).backward()
        assert float(blend.share().detach()) == 0.0
        assert float(blend.share.parameter.grad) == pytest.approx(sign * float((x - x.relu()).sum()), rel=1e-5)
    assert float(blends(network)[inner].share().detach()) == 0.0


@pytest.mark.parametrize("gain", [1.0, 3.0])
@pytest.mark.parametrize(("most", "held"), [(1.0, 1.0), (float("inf"), 2.5)])
def test_a_share_is_held_at_its_upper_bound(gain, most, held):
    share = Share(2.5, gain=gain, most=most)
    value = share()
    value.backward()
    assert float(value.detach()) == pytest.approx(held)
    assert float(share.parameter.grad) == pytest.approx(gain)
    assert str(share) == f"Share({held:.3g})"


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_a_share_learns_faster_by_the_square_of_its_gain(gain):
    share = Share(0.5, gain=gain)
    optimizer = torch.optim.SGD(share.parameters(), lr=0.01)
    share().backward()
    optimizer.step()
    assert float(share().detach()) == pytest.approx(0.5 - 0.01 * gain**2)


def test_sites_may_have_one_share_between_them(network, x):
    first, _, second = paths(network, "activation")[:3]
    share, known = Share(0.3), len(list(network.parameters()))
    insert_blends(network, {first: Blend(share), second: Blend(share)})
    assert len(list(network.parameters())) == known + 1
    network(x).square().sum().backward()
    whole = float(share.parameter.grad)
    parts = []
    for path in (first, second):
        remove_blends(network)
        apart = {p: Blend(Share(0.3)) for p in (first, second)}
        insert_blends(network, apart)
        network(x).square().sum().backward()
        parts.append(float(apart[path].share.parameter.grad))
    assert whole == pytest.approx(sum(parts), rel=1e-4)


def test_modules_take_on_mode_and_dtype(network):
    inner = paths(network, "activation")[1]
    network.double().train()
    insert_blends(network, {inner: Blend()})
    (blend,) = blends(network).values()
    assert blend.training
    assert blend.share.parameter.dtype == torch.float64
    assert network(torch.randn(2, 2, 6, 6, dtype=torch.float64)).dtype == torch.float64
