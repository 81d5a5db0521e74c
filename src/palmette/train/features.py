"""Distillation inside the network: the student's tensors at a few places are drawn towards the teacher's.

Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, https://arxiv.org/abs/1412.6550. An edited network keeps
the places and shapes of the dense one, so that no regressor is needed in between; the error is taken relative to the
teacher's tensor, so that one weight serves every network and depth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from palmette.errors import InputError
from palmette.graph.activations import find_activations
from palmette.graph.blocks import find_blocks
from palmette.graph.capture import is_captured
from palmette.graph.ops import alias_base, is_mutable
from palmette.graph.paths import Reader

PLACES = 6
"""At most so many places are compared; more of them add cost and say little new."""

_TAP = "palmette_tap"


class NoCommonPlace(InputError):
    """Two networks share no tensor of one path and shape, so that their features cannot be compared."""


@dataclass(frozen=True)
class Place:
    """The same place in two networks: its stable path and the node that gives its tensor in each of them."""

    path: str
    student: fx.Node
    teacher: fx.Node


def matched_places(student: nn.Module, teacher: nn.Module, limit: int = PLACES) -> list[Place]:
    """Places that two captured networks have in common, evenly spaced in depth, the deepest one always among them.

    These are outputs of residual blocks of the same path and shape; where no block is in both, outputs of convolutions
    and linears, the last one left out. Behind each of them, what normalises or activates it is taken in as far as both
    networks have it: a linearised activation is held against the activation.
    Raises InputError for a network that is not captured, NoCommonPlace for two that have no place in common.
    """
    for network, name in ((student, "model"), (teacher, "teacher")):
        if not is_captured(network):
            raise InputError(
                f"Feature distillation cannot look into the {name}",
                where=f"a plain {type(network).__name__}",
                why="places are matched in captured networks",
                fix="Pass palmette.capture(network, example_inputs), or set features=0.",
            )
    first, second = _Map(student), _Map(teacher)  # type: ignore[arg-type]
    common = _common(first, first.blocks(), second, second.blocks())
    if not common:
        common = _common(first, first.operations(), second, second.operations())
    if not common:
        raise NoCommonPlace(
            "The model and its teacher have no place in common",
            where="HealConfig.features",
            why="no residual block and no operation with weights has the same path and shape in both",
            fix="Use the network from before the edit as the teacher, or set features=0.",
        )
    count = min(limit, len(common))
    return [common[(i + 1) * len(common) // count - 1] for i in range(count)]


class _Map:
    """The tensors of one captured graph that could be compared, by stable path in execution order."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.reader = Reader(gm, find_activations(gm))
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.last_write: dict[fx.Node, int] = {}
        for node, i in self.order.items():
            if is_mutable(node):
                self.last_write[alias_base(node)] = i

    def blocks(self) -> dict[str, list[fx.Node]]:
        """From the sum on: whether the activation behind it belongs to the block depends on its neighbours."""
        found = {}
        for block in find_blocks(self.gm):
            total = next(n for n in block.region if n.meta.get("block") == block.path)
            found[block.path] = self._chain(total)
        return found

    def operations(self) -> dict[str, list[fx.Node]]:
        found = [node for node in self.order if self.reader.is_affine(node)]
        return {str(node.meta["path"]): self._chain(node) for node in found[:-1]}

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """The node and the norms and activations, linearised ones included, that alone read one another behind it."""
        chain = [node]
        while True:
            following, activation = self.reader.follower(chain[-1])
            if following is None or (activation is None and self.reader.kind(following) not in ("norm", "affine")):
                return chain
            chain.append(following)

    def lasts(self, node: fx.Node) -> bool:
        """Whether nothing writes into the node's tensor afterwards."""
        return self.last_write.get(alias_base(node), -1) <= self.order[node]


def _common(first: _Map, ours: dict[str, list[fx.Node]], second: _Map, theirs: dict[str, list[fx.Node]]) -> list[Place]:
    found: dict[fx.Node, Place] = {}
    for path, chain in ours.items():
        pairs = list(zip(chain, theirs.get(path, ()), strict=False))
        for a, b in reversed(pairs):
            if a.meta["shape"][1:] == b.meta["shape"][1:] and first.lasts(a) and second.lasts(b):
                found.setdefault(a, Place(path, a, b))
                break
    return sorted(found.values(), key=lambda place: first.order[place.student])


class _Tap(nn.Module):
    """Keeps the tensor that it is called with until it is taken; without parameters or buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.held: Tensor | None = None

    def forward(self, x: Tensor) -> None:
        self.held = x


class FeatureTaps:
    """Taps at the matched places of two networks, which are to run once each before `loss` is asked for."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the places; raises what `matched_places` raises."""
        self.places = matched_places(student, teacher)
        self.student: fx.GraphModule = student  # type: ignore[assignment]
        self.teacher: fx.GraphModule = teacher  # type: ignore[assignment]
        self._pairs: list[tuple[_Tap, _Tap]] = []

    @contextmanager
    def inserted(self) -> Iterator[None]:
        """Within it the networks have taps in their graphs; afterwards code and state are as before."""
        ours = _insert(self.student, [place.student for place in self.places])
        theirs = _insert(self.teacher, [place.teacher for place in self.places])
        self._pairs = [(ours[place.student], theirs[place.teacher]) for place in self.places]
        try:
            yield
        finally:
            self._pairs = []
            for network in (self.student, self.teacher):
                _remove(network)

    def loss(self) -> Tensor:
        """Mean over the places of ||s - t||^2 / ||t||^2 of the tensors of the last pass; the teacher gets no gradient.

        s, t: [batch, ...] of one place, taken over the whole batch, in float32 at least.
        """
        errors = []
        for ours, theirs in self._pairs:
            if ours.held is None or theirs.held is None:
                raise InputError("A network has not run since its features were read", where="FeatureTaps.loss")
            s, t = (x if x.dtype == torch.float64 else x.float() for x in (ours.held, theirs.held.detach()))
            errors.append((s - t).square().sum() / t.square().sum().clamp_min(torch.finfo(t.dtype).tiny))
            ours.held = theirs.held = None
        return torch.stack(errors).mean()


def _insert(gm: fx.GraphModule, nodes: list[fx.Node]) -> dict[fx.Node, _Tap]:
    """A tap behind each node. Nothing reads it, so the graph's own wiring stays untouched."""
    taps: dict[fx.Node, _Tap] = {}
    for node in nodes:
        if node not in taps:
            name = f"{_TAP}_{len(taps)}"
            taps[node] = _Tap()
            gm.add_module(name, taps[node])
            with gm.graph.inserting_after(node):
                tap = gm.graph.call_module(name, (node,))
            tap.meta.update(path=name, shape=None, dtype=None)
    gm.recompile()
    return taps


def _remove(gm: fx.GraphModule) -> None:
    for node in [node for node in gm.graph.nodes if node.op == "call_module" and str(node.target).startswith(_TAP)]:
        gm.graph.erase_node(node)
        delattr(gm, str(node.target))
    gm.recompile()
