"""Capture: the same bits, the same state, the same behaviour in training, for every way of writing a network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palmette.errors import CaptureError
from palmette.graph import capture, find_sites
from palmette.graph.inputs import Example, call, main_output


class Plain(nn.Module):
    """Convolutions, batch norm, dropout, a shared ReLU and a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = F.gelu(x).mean((2, 3))
        return self.head(self.drop(x))


class Functional(nn.Module):
    """Activations and dropout as functions and methods only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.a(x)), p=0.4, training=self.training)
        x = self.b(x).relu()
        return self.c(F.silu(x))


class Attention(nn.Module):
    """Scaled dot-product attention with dropout inside, in the usual way of writing it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
        return x + self.out(y.transpose(1, 2).reshape(b, n, d))


class Path(nn.Module):
    """Stochastic depth, written as the model zoos write it."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(self.keep)
        return x * mask.div_(self.keep)


class Stochastic(nn.Module):
    """Residual layers with stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.paths = nn.ModuleList([Path(0.5) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer, path in zip(self.layers, self.paths, strict=True):
            x = x + path(layer(x).relu())
        return x


class Inline(nn.Module):
    """Noise in training, in the middle of the forward of a module with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.training:
            x = x + torch.randn_like(x)
        return self.b(x)


class Tied(nn.Module):
    """One weight used as embedding and as classifier; one Linear called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.mix(torch.relu(self.mix(self.embed(ids)))))


class Named(nn.Module):
    """Keyword inputs, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(6, 5)

    def forward(self, *, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        hidden = self.left(left).relu()
        return {"hidden": hidden, "logits": hidden + self.right(right)}


class Pair(nn.Module):
    """Two positional inputs, a tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(6, 5)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(left).tanh(), self.right(right)


def _image(n: int) -> Example:
    return torch.randn(n, 3, 9, 9)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Example]]] = {
    "plain": (Plain, _image),
    "functional": (Functional, lambda n: torch.randn(n, 6)),
    "attention": (Attention, lambda n: torch.randn(n, 7, 16)),
    "stochastic": (Stochastic, lambda n: torch.randn(n, 8)),
    "tied": (Tied, lambda n: torch.randint(0, 11, (n, 6))),
    "named": (Named, lambda n: {"left": torch.randn(n, 4), "right": torch.randn(n, 6)}),
    "pair": (Pair, lambda n: (torch.randn(n, 4), torch.randn(n, 6))),
}
RANDOM = ("plain", "functional", "attention", "stochastic")


def _made(name: str) -> tuple[nn.Module, nn.Module, Callable[[int], Any]]:
    torch.manual_seed(0)
    build, draw = CASES[name]
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model, capture(model, draw(2)), draw


def _activations(network: nn.Module, x: Any) -> list[str]:
    return [s.path for s in find_sites(network, x) if s.kind == "activation"]


def _tree(output: Any) -> list[Tensor]:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    return list(values)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_eval_is_bit_equal_with_the_same_structure(name: str, batch: int) -> None:
    model, captured, draw = _made(name)
    x = draw(batch)
    with torch.no_grad():
        want, got = call(model, x), call(captured.eval(), x)
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert list(got) == list(want)
    assert all(torch.equal(a, b) for a, b in zip(_tree(want), _tree(got), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_state_dict_has_the_same_keys_and_loads_both_ways(name: str) -> None:
    model, captured, draw = _made(name)
    assert set(captured.state_dict()) == set(model.state_dict())
    other = CASES[name][0]().eval()
    other.load_state_dict(captured.state_dict())
    captured.load_state_dict(other.state_dict())
    x = draw(2)
    with torch.no_grad():
        assert torch.equal(main_output(call(other, x)), main_output(call(captured, x)))


@pytest.mark.parametrize("name", CASES)
def test_capture_leaves_the_model_alone(name: str) -> None:
    torch.manual_seed(0)
    build, draw = CASES[name]
    model = build().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    captured = capture(model, draw(2))
    assert model.training
    for p in captured.parameters():
        p.data.add_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", RANDOM)
def test_random_layers_draw_in_train_and_rest_in_eval(name: str) -> None:
    model, captured, draw = _made(name)
    x = draw(5)

    def outputs(network: nn.Module) -> list[Tensor]:
        found = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            with torch.no_grad():
                found.append(main_output(call(network, x)))
        return found

    first, second = outputs(captured.train())
    assert not torch.equal(first, second)
    first, second = outputs(captured.eval())
    assert torch.equal(first, second)
    assert not torch.equal(*outputs(model.train()))


@pytest.mark.parametrize("name", RANDOM)
def test_train_mode_has_the_distribution_of_the_original(name: str) -> None:
    model, captured, draw = _made(name)
    x = draw(2)

    def moments(network: nn.Module) -> tuple[Tensor, Tensor]:
        network.train()
        torch.manual_seed(5)
        with torch.no_grad():
            drawn = torch.stack([main_output(call(network, x)) for _ in range(600)])
        return drawn.mean(0), drawn.std(0)

    (mean, deviation), (our_mean, our_deviation) = moments(model), moments(captured)
    scale = deviation.max()
    assert scale > 0
    assert float((mean - our_mean).abs().max() / scale) < 0.3
    assert float((deviation - our_deviation).abs().max() / scale) < 0.3


def test_batch_norm_statistics_after_a_step_are_the_original_s() -> None:
    model, captured, draw = _made("plain")
    x = draw(4)
    for network in (model.train(), captured.train()):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        torch.manual_seed(1)
        network(x).square().sum().backward()
        optimizer.step()
    want = model.state_dict()
    for name, value in captured.state_dict().items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(value, want[name]), name
    assert int(want["bn1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("name", CASES)
def test_gradients_flow_to_every_parameter(name: str) -> None:
    model, captured, draw = _made(name)
    x = draw(3)
    want, got = call(model, x), call(captured.eval(), x)
    sum(t.square().sum() for t in _tree(want)).backward()
    sum(t.square().sum() for t in _tree(got)).backward()
    ours = dict(captured.named_parameters())
    for key, p in model.named_parameters():
        assert p.grad is not None
        assert torch.allclose(ours[key].grad, p.grad, rtol=1e-5, atol=1e-7), key  # type: ignore[arg-type]


def test_shared_parameters_stay_one_also_through_deepcopy() -> None:
    _, captured, draw = _made("tied")
    for network in (captured, copy.deepcopy(captured)):
        assert network.get_parameter("out.weight") is network.get_parameter("embed.weight")
        assert len(list(network.parameters())) == 3
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        network(draw(2)).square().sum().backward()
        optimizer.step()
        assert torch.equal(network.get_parameter("out.weight"), network.get_parameter("embed.weight"))


@pytest.mark.parametrize("name", CASES)
def test_deepcopy_is_independent_and_equal(name: str) -> None:
    _, captured, draw = _made(name)
    twin = copy.deepcopy(captured)
    x = draw(2)
    with torch.no_grad():
        want = main_output(call(captured, x)).clone()
        assert torch.equal(main_output(call(twin, x)), want)
        for p in twin.parameters():
            p.mul_(2.0).add_(0.1)
        assert torch.equal(main_output(call(captured, x)), want)


def test_capturing_a_captured_network_copies_it() -> None:
    _, captured, draw = _made("plain")
    again = capture(captured, draw(2))
    assert again is not captured
    assert next(again.parameters()) is not next(captured.parameters())
    x = draw(3)
    with torch.no_grad():
        assert torch.equal(again(x), captured(x))
    assert _activations(again, x) == _activations(captured, x)


def test_every_call_of_a_shared_or_functional_activation_has_its_own_name() -> None:
    _, captured, draw = _made("plain")
    found = _activations(captured, draw(2))
    assert len(found) == len(set(found)) == 3
    sites = [s for s in find_sites(captured, draw(2)) if s.kind == "activation"]
    assert [s.op for s in sites] == ["relu", "relu", "gelu"]
    _, functional, draw = _made("functional")
    assert [s.op for s in find_sites(functional, draw(2)) if s.kind == "activation"] == ["relu", "relu", "silu"]


def test_names_of_sites_are_stable_over_captures() -> None:
    paths = [[s.path for s in find_sites(CASES["plain"][0](), torch.randn(n, 3, 9, 9))] for n in (2, 4)]
    assert paths[0] == paths[1]


def test_channel_axis_comes_from_the_producer() -> None:
    _, captured, draw = _made("plain")
    assert all(s.channel_axis == 1 for s in find_sites(captured, draw(2)) if s.kind == "activation")
    tokens = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)).eval()
    (site,) = [s for s in find_sites(tokens, torch.randn(2, 5, 6)) if s.kind == "activation"]
    assert site.channel_axis in (2, -1)


def test_randomness_that_cannot_be_restored_is_listed() -> None:
    torch.manual_seed(0)
    assert capture(Inline().eval(), torch.randn(2, 6)).meta["palmette"]["lost"]
    for name in CASES:
        assert not _made(name)[1].meta["palmette"]["lost"]


def test_a_model_that_does_not_trace_is_refused_with_the_line() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            if float(x.sum()) > 0:
                return x
            return -x

    with pytest.raises(CaptureError, match=r"test_capture\.py"):
        capture(Branching(), torch.randn(2, 3))


def test_a_frozen_batch_norm_stays_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).train()
    model[1].eval()
    captured = capture(model, torch.randn(2, 3, 5, 5))
    assert captured.training
    assert not captured.get_submodule("1").training
    assert captured.get_submodule("2").training
