"""EASIER: linearise the activations whose neurons are nearly always ON or nearly always OFF, lowest mean entropy first.

Paper: Quétu, Liao, Tartaglione, "The Simpler The Better: An Entropy-Based Importance Metric to Reduce Neural Networks'
Depth", ECML-PKDD 2024 (arXiv 2404.18949). The paper's form, `reproduce=True`: entropy per mini-batch in train mode,
averaged over the last epoch of training, z >= 0 is ON, one activation per round replaced by the identity. Sound form,
the default: states counted over the whole calibration set in eval mode, and an affine fit, because low entropy does
not say whether a neuron is ON or OFF. Differs from the authors' code: call sites instead of modules (a shared ReLU is
split), exact 0 log 0, padded tokens not counted; and round 0 ranks a network that is trained already, by one pass in
train mode that moves no weight. Shapes: pre-activations [batch, channels, ...] or [batch, ..., channels]. Cost: one
forward pass over the set per round.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from palmette.depth.entropy import EntropyRule, count_states, layer_entropy, mean_abs_weight, site_entropies
from palmette.errors import DataError, InputError
from palmette.graph import Candidate, Site
from palmette.graph.activations import Activation, find_activations
from palmette.graph.inputs import call, split_batch, to_device
from palmette.graph.padding import mask_node
from palmette.registry import MethodConfig, method

_WATCH = "palmette_watch"


@dataclass(frozen=True, kw_only=True)
class EasierConfig(MethodConfig):
    """What EASIER counts; the defaults are the sound form, `reproduce=True` overrides them by the paper's."""

    zeros: Literal["on", "off", "exclude"] = "on"
    neurons: Literal["all", "lively"] = "all"
    aggregation: Literal["global", "batch"] = "global"
    weighting: Literal["none", "weight"] = "none"
    position_first: bool = True
    fit: Literal["affine", "mask", "identity"] = "affine"
    reproduce: bool = False

    @property
    def rule(self) -> EntropyRule:
        """The entropy switches in force."""
        if self.reproduce:
            return EntropyRule(zeros="on", neurons="all", aggregation="batch", weighting="none", position_first=True)
        return EntropyRule(
            zeros=self.zeros,
            neurons=self.neurons,
            aggregation=self.aggregation,
            weighting=self.weighting,
            position_first=self.position_first,
        )


class EntropyWatch(nn.Module):
    """Hands pre-activations through and, in train mode, keeps the sum of the batch entropies of the current epoch.

    `total` (bits) and `batches` are buffers, so that a checkpoint in mid-epoch carries them; they restart with each
    epoch of `steps`.
    """

    total: Tensor
    batches: Tensor

    def __init__(self, channel_axis: int, rule: EntropyRule, steps: int) -> None:
        super().__init__()
        self.channel_axis, self.rule, self.steps = channel_axis, rule, steps
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """`z` unchanged. `mask` [batch, tokens]: 0 where a token is padding, which is not counted."""
        if self.training:
            fresh = self.batches >= self.steps
            counts = count_states(z, self.channel_axis, mask, per_position=not self.rule.position_first)
            value = layer_entropy([counts], self.rule)
            self.total.copy_(torch.where(fresh, torch.zeros_like(self.total), self.total) + value)
            self.batches.copy_(torch.where(fresh, torch.zeros_like(self.batches), self.batches) + 1)
        return z

    def entropy(self) -> float:
        """Mean batch entropy of the last epoch in bits; raises DataError before the first batch."""
        if int(self.batches) == 0:
            raise DataError("no batch reached an activation", fix="Give a training loader that is not empty")
        return float(self.total) / int(self.batches)


def watch(captured: fx.GraphModule, candidates: Sequence[Candidate], config: EasierConfig, *, steps: int) -> None:
    """Put an EntropyWatch before each activation of the candidates, for epochs of `steps` batches; in place."""
    sites = {site.path: site for candidate in candidates for site in candidate.sites}
    for index, (path, found) in enumerate(_activations(captured, sites)):
        name = f"{_WATCH}_{index}"
        axis = _axis(sites[path])
        captured.add_submodule(name, EntropyWatch(axis, config.rule, steps))
        mask = mask_node(captured, found.source, axis)
        with captured.graph.inserting_after(found.source):
            seen = captured.graph.call_module(name, (found.source,) if mask is None else (found.source, mask))
        seen.meta = {**found.source.meta, "path": f"{_WATCH}.{path}", "watched": path}
        for node in found.region:
            node.replace_input_with(found.source, seen)
    captured.recompile()


def unwatch(captured: fx.GraphModule) -> None:
    """Take every EntropyWatch out again; in place."""
    for node in [node for node in captured.graph.nodes if "watched" in node.meta]:
        node.replace_all_uses_with(node.all_input_nodes[0])
        captured.graph.erase_node(node)
        captured.delete_submodule(str(node.target))
    captured.recompile()


@method(
    name="easier",
    title="EASIER: lowest mean neuron entropy first",
    paper="Quétu, Liao, Tartaglione. The Simpler The Better. ECML-PKDD 2024",
    unit="bits",
    sites="activation",
    edit="linearize",
    config=EasierConfig,
    watch=watch,
    unwatch=unwatch,
)
def score(
    captured: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    config: EasierConfig,
    *,
    seed: int,  # noqa: ARG001 - the interface of scores
) -> dict[str, float]:
    """Mean entropy in bits over the activations of each candidate; low = remove first.

    A layer of entropy 0 behaves linearly per neuron on the data seen (for piecewise-linear activations exactly).
    Raises DataError for an empty loader or pre-activations that are not finite.
    """
    sites = {site.path: site for candidate in candidates for site in candidate.sites}
    if config.reproduce:
        entropies = _watched(captured, candidates, loader, config)
    else:
        entropies = site_entropies(captured, {path: _axis(site) for path, site in sites.items()}, loader, config.rule)
    if config.rule.weighting == "weight":
        entropies = {path: value * _weight(captured, sites[path]) for path, value in entropies.items()}
    return {c.name: sum(entropies[site.path] for site in c.sites) / len(c.sites) for c in candidates}


def _watched(
    captured: fx.GraphModule, candidates: Sequence[Candidate], loader: Iterable[Any], config: EasierConfig
) -> dict[str, float]:
    """Entropies that the last training left in the watches; without any, those of a pass in train mode over a copy."""
    if any("watched" in node.meta for node in captured.graph.nodes):
        return _read(captured)
    twin = copy.deepcopy(captured)
    watch(twin, candidates, config, steps=_count(loader))
    twin.train()
    device = next((p.device for p in twin.parameters()), torch.device("cpu"))
    with torch.no_grad():
        for batch in loader:
            call(twin, to_device(split_batch(batch)[0], device))
    return _read(twin)


def _read(captured: fx.GraphModule) -> dict[str, float]:
    found: dict[str, float] = {}
    for node in captured.graph.nodes:
        if "watched" in node.meta:
            module = captured.get_submodule(str(node.target))
            if isinstance(module, EntropyWatch):
                found[node.meta["watched"]] = module.entropy()
    return found


def _activations(captured: fx.GraphModule, sites: dict[str, Site]) -> list[tuple[str, Activation]]:
    found = {activation.path: activation for activation in find_activations(captured) if activation.path in sites}
    missing = [path for path in sites if path not in found]
    if missing:
        raise InputError(f"the network has no activation {missing[0]!r}", fix="`palmette sites` lists them")
    return list(found.items())


def _axis(site: Site) -> int:
    return site.channel_axis if site.channel_axis is not None else 1


def _weight(captured: fx.GraphModule, site: Site) -> float:
    if site.producer is None:
        return 1.0
    return mean_abs_weight(captured.get_submodule(site.producer))


def _count(loader: Iterable[Any]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in loader)
