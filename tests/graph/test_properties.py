"""Random small networks and random legal plans: what is collapsed computes what was edited, and stays trainable."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from palmette.errors import PlanError, RefusedEdit
from palmette.graph import Plan, capture, collapse, drop, find_sites, linearize

FLOAT64_BOUND, FLOAT32_BOUND, HEALTH = 1e-10, 1e-4, list(HealthCheck)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "method": lambda x: x.relu(),
    "in-place": lambda x: F.relu(x, inplace=True),
    "relu6": F.relu6,
    "gelu": F.gelu,
    "tanh-gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "written-out silu": lambda x: x * torch.sigmoid(x),
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "hardswish": F.hardswish,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "mish": F.mish,
    "clamp": lambda x: x.clamp(-1.0, 2.0),
}


class Act(nn.Module):
    """One of the activations above, called as a function."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.kind](x)


class Pad(nn.Module):
    """Asymmetric padding as a function."""

    def __init__(self, sizes: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.sizes, self.mode = sizes, mode

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.sizes, mode=self.mode)


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Concat(nn.Module):
    """[f(x), g(x)] along the channels."""

    def __init__(self, left: nn.Module, right: nn.Module, axis: int) -> None:
        super().__init__()
        self.left, self.right, self.axis = left, right, axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], self.axis)


class Gate(nn.Module):
    """x * sigmoid(f(x))."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.inner(x))


class Mean(nn.Module):
    """Mean over space."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@dataclass
class Case:
    """A network in eval mode, an example of two, and the seed of the plan."""

    net: nn.Module
    x: Tensor
    seed: int


@dataclass
class Builder:
    """Draws the layers of one network; `channels` and `size` follow what has been drawn (`slopes`: of a PReLU)."""

    draw: Callable[..., Any]
    channels: int
    size: int = 12
    slopes: int = 0
    shared: nn.Module = field(default_factory=nn.ReLU)
    inplace: nn.Module = field(default_factory=lambda: nn.ReLU(inplace=True))

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def act(self) -> nn.Module:
        kind = self.pick("shared", "shared-inplace", "prelu", *FUNCTIONS)
        if kind == "shared":
            return self.shared
        if kind == "shared-inplace":
            return self.inplace
        return nn.PReLU(self.slopes or self.channels, init=0.2) if kind == "prelu" else Act(kind)

    def maybe_act(self) -> list[nn.Module]:
        return [self.act()] if self.pick(True, True, True, False) else []

    # convolutions

    def norm(self) -> list[nn.Module]:
        return [nn.BatchNorm2d(self.channels)] if self.pick(True, False) else []

    def conv(self, out: int | None = None, *, same: bool = False, kernel: int | None = None) -> list[nn.Module]:
        """A convolution with whatever fits, batch norm perhaps; `same` keeps the resolution."""
        kernel = kernel or self.pick(1, 3, 5) if self.size > 5 else 1
        dilation = self.pick(1, 1, 1, 2) if kernel == 3 and self.size > 6 else 1
        reach = dilation * (kernel - 1)
        padding = reach // 2 if same else self.pick(*range(min(reach, 2) + 1))
        stride = 1 if same else self.pick(1, 1, 2)
        out = out or self.pick(2, 4, 6)
        groups = self.pick(*(g for g in (1, 1, 2, self.channels) if self.channels % g == 0 and out % g == 0))
        mode = self.pick("zeros", "zeros", "zeros", "zeros", "reflect", "replicate", "circular")
        layers: list[nn.Module] = []
        if not same and kernel > 1 and self.pick(True, False, False, False):
            sizes = self.pick((0, 1, 0, 1), (1, 0, 0, 2))
            layers.append(Pad(sizes, self.pick("constant", "constant", "reflect")))
            self.size += 1  # the smaller of the two sides
        bias = self.pick(True, False)
        layers.append(nn.Conv2d(self.channels, out, kernel, stride, padding, dilation, groups, bias, mode))
        self.channels, self.size = out, (self.size + 2 * padding - reach - 1) // stride + 1
        return layers + self.norm()

    def residual(self) -> list[nn.Module]:
        c = self.channels
        inner = [*self.conv(same=True), *self.maybe_act(), *self.conv(c, same=True)]
        return [Residual(nn.Sequential(*inner)), *self.maybe_act()]

    def inverted(self) -> list[nn.Module]:
        c, wide = self.channels, 3 * self.channels
        kernel, stride, skip = 3 if self.size > 5 else 1, self.pick(1, 1, 2), self.pick(True, False)
        layers: list[nn.Module] = [nn.Conv2d(c, wide, 1, bias=False), nn.BatchNorm2d(wide)]
        self.channels = wide
        layers += [
            self.act(),
            nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide),
            *self.norm(),
            self.act(),
        ]
        self.channels, self.size = c, (self.size - 1) // stride + 1
        layers += [nn.Conv2d(wide, c, 1), *self.norm()]
        return [Residual(nn.Sequential(*layers))] if skip and stride == 1 else layers

    def branches(self) -> list[nn.Module]:
        c = self.channels
        left = [*self.conv(same=True), *self.maybe_act()]
        a, self.channels = self.channels, c
        right = [*self.conv(same=True), *self.maybe_act()]
        self.channels += a
        return [Concat(nn.Sequential(*left), nn.Sequential(*right), 1)]

    def other(self) -> list[nn.Module]:
        if self.size > 5 and self.pick(True, False):
            self.size = (self.size - 2) // 2 + 1
            return [self.pick(nn.MaxPool2d, nn.AvgPool2d)(2)]
        if self.pick(True, False):
            self.size += 1
            return [nn.ConvTranspose2d(self.channels, self.channels, 2)]
        if self.pick(True, False):
            return [Gate(nn.Conv2d(self.channels, self.channels, 1))]
        return [nn.Dropout2d(0.3), nn.Identity()]

    # tokens

    def linear(self, out: int | None = None) -> list[nn.Module]:
        out = out or self.pick(4, 6, 12)
        layer = nn.Linear(self.channels, out, bias=self.pick(True, True, False))
        self.channels = out
        return [layer]

    def mlp(self) -> list[nn.Module]:
        """LayerNorm - Linear - activation - dropout - Linear - dropout with a skip, as transformers have it."""
        c = self.channels
        layers: list[nn.Module] = [nn.LayerNorm(c)] if self.pick(True, False) else []
        layers += [*self.linear(4 * c), self.act(), nn.Dropout(0.2), *self.linear(c), nn.Dropout(0.2)]
        return [Residual(nn.Sequential(*layers))] if self.pick(True, False) else layers

    def tied(self) -> list[nn.Module]:
        """Two layers that own one weight."""
        first, second = nn.Linear(self.channels, self.channels), nn.Linear(self.channels, self.channels)
        second.weight = first.weight
        return [first, self.act(), second]

    def twice(self) -> list[nn.Module]:
        """One layer called twice."""
        layer = nn.Linear(self.channels, self.channels)
        return [layer, self.act(), layer]

    def split(self) -> list[nn.Module]:
        c = self.channels
        left = [*self.linear(), *self.maybe_act()]
        a, self.channels = self.channels, c
        right = [*self.linear(), *self.maybe_act()]
        self.channels += a
        return [Concat(nn.Sequential(*left), nn.Sequential(*right), -1)]


@st.composite
def cases(draw: Any) -> Case:
    """A random network of images or tokens with random weights and lively batch norm statistics."""
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    image = draw(st.booleans())
    b = Builder(draw, channels=draw(st.sampled_from([3, 4])))
    x = torch.randn(2, b.channels, 12, 12) if image else torch.randn(2, *draw(st.sampled_from([(), (5,)])), b.channels)
    b.slopes = int(x.dim() == 3)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        if image:
            step = b.pick(b.conv, b.conv, b.conv, b.residual, b.inverted, b.branches, b.other)
        else:
            step = b.pick(b.linear, b.linear, b.mlp, b.mlp, b.tied, b.twice, b.split)
        layers += [*step(), *b.maybe_act()]
    if image:
        layers += [*b.conv(kernel=1), Mean()]
    layers += [*b.linear(), *b.maybe_act(), *b.linear(3)]
    net = nn.Sequential(*layers)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return Case(net.eval(), x, seed)


def random_plan(case: Case, captured: nn.Module) -> tuple[Plan, str, nn.Module] | None:
    """A random legal plan, fitted, and the network edited by it; None when nothing can be removed.

    Drops that overlap others are given up; a mask that cuts the network is rightly refused and becomes an affine fit.
    """
    rng = random.Random(case.seed)
    pad = rng.choice(["repad", "bias_map", "exact"])
    sites = [s for s in find_sites(captured, case.x, pad=pad) if s.removable]
    acts = [s for s in sites if s.kind == "activation" and rng.random() < 0.8]
    paths = sorted({p for s in acts for p in (s.partners or (s.path,))})
    blocks = [s for s in sites if s.kind == "block"]
    drops = [drop(s) for s in rng.sample(blocks, min(len(blocks), rng.choice([0, 0, 1, 2])))]
    edits = [linearize(path, fit=rng.choice(["affine", "mask", "identity"])) for path in paths]
    loader = [(torch.randn_like(case.x), torch.zeros(2, dtype=torch.long)) for _ in range(2)]
    while edits or drops:
        try:
            plan = Plan([*edits, *drops]).fit(captured, loader, case.x)
            return plan, pad, plan.apply(captured, case.x, pad=pad).eval()
        except (PlanError, RefusedEdit) as error:
            if "cut vertex" in str(error):
                edits = [replace(edit, fit="affine") if edit.fit == "mask" else edit for edit in edits]
            elif drops:
                drops.pop()
            else:
                raise
    return None


def _relative(reference: Tensor, value: Tensor) -> float:
    scale = reference.abs().max().clamp_min(1e-3)
    return float((reference - value).abs().max() / scale)


def _batch(case: Case, n: int) -> Tensor:
    return torch.randn(n, *case.x.shape[1:], generator=torch.Generator().manual_seed(n))


def check_equal(case: Case, planned: tuple[Plan, str], edited: nn.Module, small: nn.Module) -> None:
    """Edited and collapsed agree in both precisions, at every batch size."""
    plan, pad = planned
    twin = plan.apply(copy.deepcopy(case.net).double(), case.x.double(), pad=pad).eval()
    small_twin = collapse(twin, cost="macs", force=True)[0]
    with torch.no_grad():
        for n in (1, 2, 5):
            x = _batch(case, n)
            assert _relative(edited(x), small(x)) <= FLOAT32_BOUND
            assert _relative(twin(x.double()), small_twin(x.double())) <= FLOAT64_BOUND


def check_copies(
    case: Case, planned: tuple[Plan, str], captured: nn.Module, edited: nn.Module, small: nn.Module
) -> None:
    """Deepcopy, state_dict and the plan's JSON reproduce the network to the bit."""
    x = _batch(case, 3)
    plan, pad = planned
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    with torch.no_grad():
        assert torch.equal(again.apply(captured, case.x, pad=pad).eval()(x), edited(x))
        for network in (edited, small):
            want = network(x)
            twin = copy.deepcopy(network)
            assert torch.equal(twin(x), want)
            for tensor in twin.state_dict().values():
                tensor.zero_()
            twin.load_state_dict(network.state_dict())
            assert torch.equal(twin(x), want)


def check_training(case: Case, edited: nn.Module, small: nn.Module) -> None:
    """One step changes the weights, leaves them finite, and what was shared is shared still."""
    for network in (copy.deepcopy(edited), copy.deepcopy(small)):
        shared = _shared_names(network)
        optimizer = torch.optim.SGD(network.train().parameters(), lr=0.01)
        before = [p.detach().clone() for p in network.parameters()]
        torch.manual_seed(0)
        network(_batch(case, 4)).square().sum().backward()
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in network.parameters())
        assert any(not torch.equal(a, p) for a, p in zip(before, network.parameters(), strict=True))
        assert _shared_names(network) == shared


def _shared_names(network: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, p in network.named_parameters(remove_duplicate=False):
        groups.setdefault(p.data_ptr(), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def check(case: Case, counts: Counter[str]) -> None:
    """Every property of one network and one plan."""
    captured = capture(case.net, case.x)
    with torch.no_grad():
        for n in (1, 2, 5):
            assert torch.equal(case.net(_batch(case, n)), captured(_batch(case, n)))
    counts["networks"] += 1
    drawn = random_plan(case, captured)
    if drawn is None:
        return
    plan, pad, edited = drawn
    small, record = collapse(edited, cost="macs", force=True)
    counts["edited"] += 1
    counts["merged"] += any(m.done for m in record.merges)
    assert all(m.done or m.reason for m in record.merges)
    check_equal(case, (plan, pad), edited, small)
    check_copies(case, (plan, pad), captured, edited, small)
    check_training(case, edited, small)


def _run(examples: int) -> Counter[str]:
    counts: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=HEALTH)
    @given(cases())
    def run(case: Case) -> None:
        check(case, counts)

    run()
    return counts


def test_random_networks_and_plans() -> None:
    counts = _run(40)
    assert counts["merged"] > counts["networks"] / 2, counts


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_random_networks_and_plans() -> None:
    counts = _run(500)
    assert counts["networks"] >= 500 and counts["merged"] > counts["networks"] / 2, counts  # noqa: PT018
