"""One-hot codes of configurations, and vectors over them whose product with a code is a number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from palmette.supernet.sites import Sites
from palmette.supernet.space import Choice

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


class Codes:
    """The code of a configuration: a one, then for each choice zeros and a one at its value. Its length is `width`."""

    def __init__(self, sites: Sites, choices: Sequence[Choice]) -> None:
        self.sites, self.choices = sites, list(choices)
        self.first: dict[str, int] = {}
        self.width = 1
        for choice in choices:
            self.first[choice.name] = self.width
            self.width += len(choice.values)
        total = len(sites.channels.classes)
        self._owner, self._rank = torch.full((total,), -1), torch.zeros(total, dtype=torch.long)
        self._widths = [(name, values) for name, (_, values) in sites.widths.items()]
        for index, (site, _) in enumerate(sites.widths.values()):
            self._owner[site.classes], self._rank[site.classes] = index, torch.arange(len(site.classes))

    @property
    def spans(self) -> list[range]:
        """The columns of each choice, of which a code has a one in exactly one."""
        return [range(self.first[c.name], self.first[c.name] + len(c.values)) for c in self.choices]

    def encode(self, configs: Iterable[Mapping[str, int]]) -> Ints:
        """Configurations as numbers of values [n, choices]."""
        place = [{v: i for i, v in enumerate(c.values)} for c in self.choices]
        rows = [[p[config[c.name]] for p, c in zip(place, self.choices, strict=True)] for config in configs]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.choices))

    def decode(self, code: Ints) -> dict[str, int]:
        """The configuration of numbers of values [choices]."""
        return {c.name: int(c.values[i]) for c, i in zip(self.choices, code, strict=True)}

    def onehot(self, codes: Ints) -> Floats:
        """[n, width] of codes [n, choices]."""
        out = np.zeros((len(codes), self.width))
        out[:, 0] = 1.0
        for j, choice in enumerate(self.choices):
            out[np.arange(len(codes)), self.first[choice.name] + codes[:, j]] = 1.0
        return out

    def places(self, name: str, codes: Ints) -> Ints:
        """The number of the value [n] of a choice in codes [n, choices]; zeros where there is no such choice."""
        names = [choice.name for choice in self.choices]
        return codes[:, names.index(name)] if name in names else np.zeros(len(codes), dtype=np.int64)

    def mattering(self, codes: Ints) -> Floats:
        """[n, width] as `onehot`, with zeros for a choice whose block is not there."""
        out = self.onehot(codes)
        place = {choice.name: j for j, choice in enumerate(self.choices)}
        for choice in self.choices:
            if choice.owner is not None:
                depth = place[choice.owner[0]]
                blocks = np.array(self.choices[depth].values)[codes[:, depth]]
                first = self.first[choice.name]
                out[blocks < choice.owner[1], first : first + len(choice.values)] = 0.0
        return out

    def of(self, name: str, values: Sequence[float]) -> Floats:
        """The vector that gives one number for each value of a choice."""
        vector = np.zeros(self.width)
        vector[self.first[name] : self.first[name] + len(values)] = values
        return vector

    def constant(self, value: float) -> Floats:
        """The vector that gives the same number for every code."""
        vector = np.zeros(self.width)
        vector[0] = value
        return vector

    def kept(self, classes: Tensor) -> Floats:
        """The vector that gives how many of some channels, by their classes, a code keeps."""
        vector = self.constant(len(classes))
        owner, rank = self._owner[classes], self._rank[classes]
        for index in owner.unique().tolist():
            if index >= 0:
                name, values = self._widths[index]
                ranks = rank[owner == index]
                vector -= self.of(name, [float((ranks >= kept).sum()) for kept in values])
        return vector

    def gone(self) -> tuple[dict[fx.Node, Floats], dict[fx.Node, Floats]]:
        """For each node that may be left out the vector that is 1 where it is: those of blocks, and those read by them.

        The first are the nodes of blocks that may go; the second those whose results nothing else reads. The input of a
        block is none of these: it takes the place of the block's output.
        """
        stages = [(name, stage, values) for name, (stage, values) in self.sites.stages.items()]
        inside = {
            node: self.of(name, [float(kept * stage.period <= index) for kept in values])
            for name, stage, values in stages
            for index, block in enumerate(stage.blocks)
            for node in block.region
        }
        sources = {block.source for _, stage, _ in stages for block in stage.blocks}
        beside: dict[fx.Node, Floats] = {}
        ends: set[fx.Node] = set()  # such as an operation that writes into what others read
        for node in reversed(self.sites.gm.graph.nodes):
            if node in inside or node in sources or node.op in ("placeholder", "output"):
                continue
            if ends.issuperset(node.users):
                ends.add(node)
                continue
            reads = [inside.get(user, beside.get(user)) for user in node.users if user not in ends]
            known = [vector for vector in reads if vector is not None]
            if len(known) == len(reads):
                beside[node] = np.minimum.reduce(known)
        return inside, beside
