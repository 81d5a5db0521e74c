"""Post-norm blocks and whole layers: what goes, what it leaves, and that nothing else is called a layer."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from palmette.depth.block_influence import BlockInfluenceConfig, score
from palmette.graph import Plan, candidates, capture, drop
from palmette.graph.blocks import find_blocks, find_spans
from palmette.graph.layers import layers

WIDTH, TOKENS = 12, 5


class Layer(nn.Module):
    """A mixing block and an MLP, with norms before them or behind their sums."""

    def __init__(self, post: bool, cast: bool) -> None:
        super().__init__()
        self.post, self.cast = post, cast
        self.mix, self.up, self.down = nn.Linear(TOKENS, TOKENS), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.1)

    def mixed(self, x: Tensor) -> Tensor:
        return self.dropout(self.mix(x.transpose(1, 2)).transpose(1, 2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(nn.functional.gelu(self.up(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32) if self.cast else x
        if self.post:
            x = self.norm_1(x + self.mixed(x))
            return self.norm_2(x + self.mlp(x))
        x = x + self.mixed(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Net(nn.Module):
    """A stem with a norm, numbered layers, a head."""

    def __init__(self, post: bool, *, cast: bool = False, extra: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Linear(4, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Layer(post, cast) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)
        if extra:  # weights of a layer that lie in none of its blocks
            self.layers[1].gate = nn.Linear(WIDTH, WIDTH)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        for layer in self.layers:
            x = layer(x)
            x = layer.gate(x) if hasattr(layer, "gate") else x
        return self.head(x.mean(1))


def inputs(batch: int = 3) -> Tensor:
    return torch.randn(batch, TOKENS, 4, generator=torch.Generator().manual_seed(batch))


def without(net: Net, index: int) -> Net:
    smaller = copy.deepcopy(net)
    del smaller.layers[index]
    return smaller


FORMS = [(post, cast) for post in (True, False) for cast in (False, True)]


@pytest.mark.parametrize(("post", "cast"), FORMS)
@pytest.mark.parametrize("index", range(3))
def test_dropping_a_layer_is_leaving_it_out_of_the_list(post: bool, cast: bool, index: int) -> None:
    net = Net(post, cast=cast).eval()
    captured = capture(net, inputs())
    found = candidates(captured, inputs(), kind="layer")
    assert [c.name for c in found] == [f"layers.{i}" for i in range(3)]
    assert all(c.pays and c.edit == "drop" and c.macs_saved > 0 for c in found)
    assert all(a.reach[1] <= b.reach[0] for a, b in itertools.pairwise(found))
    edited = Plan([drop(site) for site in found[index].sites]).apply(captured, inputs())
    with torch.no_grad():
        assert torch.equal(edited(inputs()), without(net, index)(inputs()))
    assert not any(name.startswith(f"layers.{index}.") for name, _ in edited.named_parameters())
    assert list(layers(edited)) == [f"layers.{i}" for i in range(3) if i != index]


@pytest.mark.parametrize("part", ["mix", "mlp"])
def test_dropping_a_post_norm_block_hands_its_input_on(part: str) -> None:
    net = Net(post=True).eval()
    captured = capture(net, inputs())
    blocks = [b for b in find_blocks(captured) if not b.reason]
    assert len(blocks) == 6
    assert [len(span) for span in find_spans(captured, blocks)] == [6]
    edited = Plan([drop(blocks[2 if part == "mix" else 3].path)]).apply(captured, inputs())
    twin = copy.deepcopy(net)
    layer = twin.layers[1]
    if part == "mix":
        layer.forward = lambda x: layer.norm_2(x + layer.mlp(x))
    else:
        layer.forward = lambda x: layer.norm_1(x + layer.mixed(x))
    with torch.no_grad():
        assert torch.equal(edited(inputs()), twin(inputs()))


def test_a_norm_behind_a_sum_stays_where_the_input_is_not_normalised() -> None:
    net = Net(post=True).eval()
    net.norm = nn.Identity()
    captured = capture(net, inputs())
    first = find_blocks(captured)[0]
    edited = Plan([drop(first.path)]).apply(captured, inputs())
    assert "layers.0.norm_1.weight" in dict(edited.named_parameters())
    assert "layers.0.mix.weight" not in dict(edited.named_parameters())


def test_a_layer_with_other_weights_is_none() -> None:
    captured = capture(Net(post=False, extra=True).eval(), inputs())
    assert list(layers(captured)) == ["layers.0", "layers.2"]


def test_influence_of_a_layer_is_between_its_ends() -> None:
    net = Net(post=True).eval()
    captured = capture(net, inputs())
    found = candidates(captured, inputs(), kind="layer")
    batches = [(inputs(n), torch.zeros(n)) for n in (2, 4)]
    scores = score(captured, found, batches, BlockInfluenceConfig(sites="layer"), seed=0)
    cosines: dict[int, list[Tensor]] = {i: [] for i in range(3)}
    with torch.no_grad():
        for x, _ in batches:
            x = net.norm(net.stem(x))
            for i, layer in enumerate(net.layers):
                y = layer(x)
                cosines[i].append(nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).flatten())
                x = y
    for i, name in enumerate(scores):
        assert scores[name] == pytest.approx(1 - float(torch.cat(cosines[i]).mean()), abs=1e-6)
