"""Random small networks of images and tokens: every kind of layer, activation and branch, drawn by hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

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

    def chain(self) -> list[nn.Module]:
        """Residual blocks of one form and several widths, as they can stand in parallel."""
        c, kernel, act = self.channels, 3 if self.size > 5 else 1, self.act()
        bias, norm = self.pick(True, False), self.pick(True, False)
        blocks: list[nn.Module] = []
        for _ in range(self.pick(2, 3)):
            wide = self.pick(2, 4, 6)
            first = [
                nn.Conv2d(c, wide, kernel, padding=kernel // 2, bias=bias),
                *([nn.BatchNorm2d(wide)] if norm else []),
            ]
            act = nn.PReLU(wide, init=0.2) if isinstance(act, nn.PReLU) else act
            blocks.append(Residual(nn.Sequential(*first, act, nn.Conv2d(wide, c, kernel, padding=kernel // 2))))
        return blocks

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

    def stack(self) -> list[nn.Module]:
        """Transformer MLPs one after the other, norms in front or behind."""
        c, kind, place = self.channels, self.pick(*FUNCTIONS), self.pick("none", "before", "before", "behind")
        blocks: list[nn.Module] = [nn.LayerNorm(c)] if place == "behind" else []
        for _ in range(self.pick(2, 3)):
            wide = self.pick(4, 12)
            inner = [nn.LayerNorm(c)] if place == "before" else []
            inner += [nn.Linear(c, wide), Act(kind), nn.Dropout(0.2), nn.Linear(wide, c)]
            blocks += [Residual(nn.Sequential(*inner)), *([nn.LayerNorm(c)] if place == "behind" else [])]
        return blocks

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
    image = draw(st.sampled_from([True, True, False, False, False]))
    b = Builder(draw, channels=draw(st.sampled_from([3, 4])))
    x = torch.randn(2, b.channels, 12, 12) if image else torch.randn(2, *draw(st.sampled_from([(), (5,)])), b.channels)
    b.slopes = int(x.dim() == 3)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        if image:
            step = b.pick(b.conv, b.conv, b.conv, b.residual, b.chain, b.chain, b.inverted, b.branches, b.other)
        else:
            step = b.pick(b.linear, b.linear, b.mlp, b.stack, b.stack, b.stack, b.tied, b.twice, b.split)
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
