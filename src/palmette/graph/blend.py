"""Blend sites of a captured graph during training: what goes on is a mix of a site's input and output.

The modules sit in the graph itself, so that they train, checkpoint and move with the network, and leave no trace once
they are taken out. A learnt mix is Layer Folding (Ben Dror et al., BMVC 2022); a mix that moves by a schedule is a
gradual edit.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, fx, nn

from palmette.errors import PlanError
from palmette.graph.activations import find_activations
from palmette.graph.blocks import find_blocks
from palmette.graph.ops import module_of
from palmette.graph.spans import run_at

_MARK = "blend"  # node metadata: the path of the site that the node blends


class Share(nn.Module):
    """A learnt number in [0, `most`], held there by projection; several blends may have one between them.

    It is `gain` times a parameter, so that it learns gain^2 times faster than the weights under gradient descent, and
    gain times faster under Adam. Being a scalar it has no weight decay.
    """

    def __init__(self, start: float = 0.0, *, gain: float = 1.0, most: float = 1.0) -> None:
        super().__init__()
        self.gain, self.most = gain, most
        self.parameter = nn.Parameter(torch.tensor(start / gain))

    def forward(self) -> Tensor:
        """The share, a scalar."""
        bounds = (0.0, self.most / self.gain)
        if self.training:
            # A projection, so that a share that left the interval still feels its gradient. Not seen by autograd: a
            # second call in the same pass changes nothing.
            self.parameter.data.clamp_(*bounds)
        return self.gain * self.parameter.clamp(*bounds)

    def extra_repr(self) -> str:
        """The present share, for printing."""
        return f"{float(self().detach()):.3g}"


class Blend(nn.Module):
    """`share * z + (1 - share) * y` of a site's input z and output y.

    At share 0 the network is as it was, at 1 as if the activation were the identity, or the block dropped.
    """

    def __init__(self, share: Share | None = None) -> None:
        super().__init__()
        self.share = share or Share()

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """The mix of the site's input and output, of their shape."""
        share = self.share().to(after.dtype)
        return share * before + (1 - share) * after  # type: ignore[no-any-return]


def insert_blends(gm: fx.GraphModule, targets: Mapping[str, nn.Module]) -> None:
    """Put a module behind each named activation, block or span of a captured graph, in place.

    It receives (input, output) of the site, both [batch, ...], as they are in the blended network, and returns what
    goes on instead of the output, of its shape. Modules take on the mode, device and floating dtype of the network.
    Raises PlanError for a path that is no site, or one that is blended already; the graph is then untouched.
    """
    activations = {a.path: (a.source, a.output) for a in find_activations(gm)}
    found = find_blocks(gm)
    blocks = {b.path: (b.source, b.output) for b in found}
    present = _blended(gm)
    for path in targets:
        if path in present:
            raise PlanError(f"'{path}' is blended already", fix="Call remove_blends first.")
        if path not in activations and path not in blocks:
            if ".." not in path:
                raise _no_site(path)
            run = run_at(gm, path, found)
            blocks[path] = run[0].source, run[-1].output
    latest: dict[fx.Node, fx.Node] = {node.args[1]: node for node in present.values()}  # type: ignore[misc]
    # Activations first: where a block ends in an activation, the block's blend has to see what that one gives.
    for path in sorted(targets, key=lambda path: path not in activations):
        source, output = activations[path] if path in activations else blocks[path]
        _insert(gm, path, targets[path], _newest(latest, source), _newest(latest, output), latest)
    gm.recompile()


def _insert(
    gm: fx.GraphModule, path: str, module: nn.Module, source: fx.Node, output: fx.Node, latest: dict[fx.Node, fx.Node]
) -> None:
    like = next((p for p in gm.parameters() if p.is_floating_point()), None)
    name = next(n for i in range(len(gm._modules) + 1) if (n := f"palmette_blend_{i}") not in gm._modules)
    gm.add_module(name, (module if like is None else module.to(like)).train(gm.training))
    with gm.graph.inserting_after(output):
        node = gm.graph.call_module(name, (source, output))
    node.meta.update({key: output.meta[key] for key in ("shape", "dtype")}, path=name)
    node.meta[_MARK] = path
    output.replace_all_uses_with(node, delete_user_cb=partial(operator.is_not, node))
    latest[output] = node


def _newest(latest: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    """What the network now reads where it read `node`."""
    while node in latest:
        node = latest[node]
    return node


def blends(gm: fx.GraphModule) -> dict[str, nn.Module]:
    """The modules that `insert_blends` has put in, by the path of their site, in execution order."""
    return {path: module for path, node in _blended(gm).items() if (module := module_of(gm, node)) is not None}


def _blended(gm: fx.GraphModule) -> dict[str, fx.Node]:
    return {str(node.meta[_MARK]): node for node in gm.graph.nodes if _MARK in node.meta}


def remove_blends(gm: fx.GraphModule, sites: Iterable[str] | None = None) -> None:
    """Take out what `insert_blends` has put in (at these sites; default all), in place.

    Code and names of the state are as before it. Sites that are not blended are passed over.
    """
    chosen = None if sites is None else set(sites)
    for path, node in reversed(_blended(gm).items()):
        if chosen is not None and path not in chosen:
            continue
        node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
        gm.graph.erase_node(node)
        delattr(gm, str(node.target))
    gm.recompile()


def _no_site(path: str) -> PlanError:
    return PlanError(f"No site is called '{path}'", fix="List the sites with `palmette sites` or pm.find_sites.")
