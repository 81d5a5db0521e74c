"""Any trained network as a supernet: one set of weights, and every network that is a part of it.

Widths, depth, kernels, heads and the bits of weights are found on the captured graph, by no name of a class or an
attribute. A sub-network runs on slices of the shared weights; `extract` makes the plain network of it, which computes
the same.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from palmette.errors import DataError, InputError
from palmette.graph.blocks import find_blocks
from palmette.graph.capture import capture, example_of
from palmette.graph.inputs import call, inputs_of, to_device
from palmette.graph.int8 import round_weights
from palmette.graph.ops import BATCH_NORMS, module_of
from palmette.graph.plan import Plan, drop
from palmette.graph.resize import resize
from palmette.graph.spans import name_of
from palmette.supernet.bits import checked_bits
from palmette.supernet.elastic import Cut, Runner
from palmette.supernet.options import check_model, check_options, check_protected
from palmette.supernet.resolution import RESOLUTION, Scaled, edge_of, resized, resolutions, set_edge
from palmette.supernet.sites import Sites
from palmette.supernet.space import Config, key_of
from palmette.supernet.transforms import KernelTransforms
from palmette.train.batches import check_iterable, drawn

CACHED = 64
"""Configurations whose instructions are kept at once."""


class Supernet(nn.Module):
    """A network that holds all its sub-networks. Make one with `Supernet.from_model`.

    `space`: what may be chosen. `static`: path -> why it was left as it is. `active`: the configuration that `forward`
    runs. Its parameters are those of the largest network, of which a sub-network reads slices, and the matrices of
    `transforms`, which smaller kernels go through, if there are any.
    """

    def __init__(self, network: fx.GraphModule, sites: Sites, *, transforms: bool = False) -> None:
        super().__init__()
        self.network, self.sites = network, sites
        kernels = dict(sites.kernels.values())
        self.transforms = KernelTransforms(network, kernels) if transforms and kernels else None
        self.space, self.static = sites.space(), sites.static
        self._runners: dict[str, Runner] = {}
        self._statistics: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self.active: Config = self.space.max()

    @staticmethod
    def from_model(
        model: nn.Module,
        example_inputs: Any,
        *,
        width: Sequence[float] = (0.5, 0.75, 1.0),
        depth: int = 2,
        kernel: Sequence[int] = (3, 5, 7),
        heads: Sequence[float] = (0.5, 0.75, 1.0),
        resolution: Sequence[int] = (),
        round_to: int = 8,
        bits: Sequence[int] = (),
        transforms: bool = False,
        protect: Iterable[str] = (),
    ) -> Supernet:
        """The supernet of which `model` is the largest network; `model` stays untouched.

        example_inputs: tensors [batch, ...]. width: shares of the channels of every group, rounded to multiples of
        `round_to`. depth: blocks that may be left out at the end of each chain of residual blocks of one shape (layers
        of a transformer count as one). kernel: edges to which larger kernels may be cropped. heads: shares of the
        attention heads. resolution: edges in pixels to which square images may be scaled before the network sees them.
        bits: (8, 32) lets the weight of each layer be stored in 8 bits, integers with a scale for each output channel.
        transforms: smaller kernels are learned from larger ones (Once-for-All), beginning with their centres.
        An empty sequence, or a depth of 0, leaves that side alone. protect: path prefixes of what stays whole. Raises
        CaptureError for a network that does not trace, InputError for options out of bounds, a path that is not there,
        or a network in double precision.
        """
        sides = {"width": width, "heads": heads, "kernel": kernel, "resolution": resolution, "bits": bits}
        check_options({**sides, "depth": depth, "round_to": round_to})
        check_model(model)
        stored, protect = checked_bits(bits), tuple(protect)
        gm = capture(model, example_inputs)
        edges, static = resolutions(model, gm, example_inputs, resolution)
        check_protected(gm, protect, [block.path for block in find_blocks(gm)])
        sites = Sites(gm, protect, width, depth, kernel, heads, round_to, edges, stored)
        sites.static |= static
        return Supernet(gm, sites, transforms=transforms)

    # -- what is active ------------------------------------------------------------------------------------------------

    def max(self) -> Config:
        """The largest configuration: the network that the supernet was made from."""
        return self.space.max()

    def min(self) -> Config:
        """The smallest configuration."""
        return self.space.min()

    def sample(self, rng: np.random.Generator) -> Config:
        """A configuration, every choice uniform and independent."""
        return self.space.sample(rng)

    def activate(self, config: Mapping[str, int]) -> None:
        """Let `forward` run that configuration. Raises InputError for one that the space has not."""
        self.active = self.space.canonical(config)

    @contextmanager
    def running(self, config: Mapping[str, int]) -> Iterator[Supernet]:
        """Within the block `forward` runs that configuration."""
        before = self.active
        self.activate(config)
        try:
            yield self
        finally:
            self.active = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the active configuration, for images scaled to its resolution where that is a choice."""
        key = key_of(self.active)
        args, kwargs = self.scaled((args, kwargs))
        if self.active == self.space.max() and (self.training or key not in self._statistics):
            return self.network(*args, **kwargs)
        runner = self._runners.pop(key, None) or Runner(self.network, self.cut(self.active), self.transforms)
        self._runners[key] = runner
        if len(self._runners) > CACHED:
            del self._runners[next(iter(self._runners))]
        return runner(tree_leaves((args, kwargs)), None if self.training else self._statistics.get(key))

    # -- what comes out of it ------------------------------------------------------------------------------------------

    def cut(self, config: Mapping[str, int]) -> Cut:
        """What a configuration leaves of the network."""
        return self.sites.cut(self.space.canonical(config))

    def scaled(self, inputs: Any, config: Mapping[str, int] | None = None) -> Any:
        """Inputs as the network of a configuration (if not given, of the active one) wants them: images of its size."""
        edge = (self.active if config is None else config).get(RESOLUTION)
        return inputs if edge is None else resized(inputs, edge)

    def extract(self, config: Mapping[str, int] | None = None) -> fx.GraphModule:
        """The plain network of a configuration (if not given, of the active one), with its own copies of the weights.

        It computes what `forward` computes with that configuration active, to rounding, from inputs as `scaled` gives
        them, and can be saved, loaded into the model that the supernet was made from, exported and healed. Batch norms
        have the statistics of `recalibrate`, if that was called for the configuration. Weights in 8 bits have values on
        their grids; `pm.save` and ONNX files store them as integers.
        """
        config = self.active if config is None else self.space.canonical(config)
        cut = self.cut(config)
        gm = copy.deepcopy(self.network)
        example = example_of(gm)
        if self.transforms is not None:
            self.transforms.write(gm, cut.decision["layers"])
        if cut.dropped:
            gm = Plan([drop(name_of(run)) for run in cut.dropped]).apply(gm, example)
        resize(gm, _present(gm, cut.decision))
        round_weights(gm, cut.int8)
        norms = _norms(gm)
        for path, (mean, variance) in self._statistics.get(key_of(config), {}).items():
            norms[path].running_mean.copy_(mean)
            norms[path].running_var.copy_(variance)
        if config.get(RESOLUTION, edge_of(example)) != edge_of(example):
            set_edge(gm, config[RESOLUTION])
        return gm

    @torch.no_grad()
    def recalibrate(
        self, config: Mapping[str, int], loader: Iterable[Any], batches: int = 10, *, seed: int = 0
    ) -> None:
        """Measure the statistics of the batch norms of a configuration on training inputs; no weight changes.

        Slices share one set of statistics, which is right for the largest network only. The mean and variance of
        `batches` batches are averaged, each batch with the same weight; from then on `forward` in eval mode and
        `extract` use them for that configuration, the largest included. seed: of the loader's draws, which are the same
        for every configuration and leave no trace. Source: Once-for-All, which takes 2,000 training images.

        Raises DataError for an empty loader, or batches of one sample, InputError for less than one batch.
        """
        edge, gm = config.get(RESOLUTION), self.extract(config)
        found = recalibrated(gm, loader if edge is None else Scaled(loader, edge), batches, seed)
        if found:
            self._statistics[key_of(self.space.canonical(config))] = found

    def forget_statistics(self) -> None:
        """Throw away what `recalibrate` measured: the weights have changed since."""
        self._statistics.clear()


@torch.no_grad()
def recalibrated(
    gm: fx.GraphModule, loader: Iterable[Any], batches: int = 10, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure the statistics of a captured network's batch norms in place; mean and variance of each by its path.

    As `Supernet.recalibrate`, which raises the same.
    """
    if batches < 1:
        raise InputError(f"batches = {batches} is out of bounds", fix="Give 1 or more.")
    norms = _norms(gm)
    momenta = {path: norm.momentum for path, norm in norms.items()}
    gm.eval()
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    device = next(gm.parameters()).device
    check_iterable(loader, once=True)
    with drawn(loader, seed) as epoch, contextlib.suppress(StopIteration):
        while norms and epoch.drawn < batches:
            _seen_by(gm, to_device(inputs_of(epoch.next()), device))
    if norms and not epoch.drawn:
        raise DataError("The loader is empty", fix="Give it at least one batch.")
    gm.eval()
    for path, norm in norms.items():
        norm.momentum = momenta[path]
    return {path: (own.running_mean.clone(), own.running_var.clone()) for path, own in norms.items()}


def check_elastic(net: Supernet) -> None:
    """Raise InputError for a supernet that holds one network alone."""
    if not len(net.space):
        raise InputError(
            "Nothing in the network is elastic",
            why="; ".join(f"{path}: {why}" for path, why in list(net.static.items())[:3])
            or "every side was left alone",
            fix="Offer more: width=(0.5, 1.0), depth=2, resolution=(...), bits=(8, 32).",
        )


def _seen_by(gm: fx.GraphModule, inputs: Any) -> None:
    try:
        call(gm, inputs)
    except ValueError as error:
        raise DataError(
            "Batch norms cannot be measured on a batch",
            why=str(error),
            fix="Give batches of two samples or more; drop_last leaves a smaller last one out.",
        ) from error


def _present(gm: fx.GraphModule, decision: dict[str, Any]) -> dict[str, Any]:
    """The decision without the layers of blocks that are gone."""
    paths = {str(n.meta["path"]) for n in gm.graph.nodes if n.op in ("call_module", "call_function")}
    states = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    return {
        **decision,
        "layers": [e for e in decision["layers"] if e["path"] in paths],
        "sizes": [e for e in decision["sizes"] if e["path"] in paths],
        "states": [e for e in decision["states"] if e["state"] in states],
    }


def _norms(gm: fx.GraphModule) -> dict[str, Any]:
    """The batch norms with statistics, by path."""
    modules = ((str(n.meta.get("path")), module_of(gm, n)) for n in gm.graph.nodes)
    return {path: m for path, m in modules if isinstance(m, BATCH_NORMS) and m.running_mean is not None}
