"""What EGP and NEPENTHE share: rounds of an entropy pass, a budget per layer, magnitude pruning, and training.

The budget follows EGP (ICCV Workshops 2023), which NEPENTHE (arXiv 2404.16890) takes over: with I the importance of a
layer (entropy times mean magnitude of its surviving weights) and R = sum(I) / I, a round prunes the share softmax(R)
of all that it prunes from that layer. R differs by tens to hundreds, so that the softmax is one-hot in practice: the
layer of lowest importance is emptied, then the next. A temperature above 1 spreads the budget.
The weights of an activation are those of the convolution or linear layer that its input comes from; where paths meet
the one with most layers before it. Pruned weights are exact zeros in the weight itself; training keeps them by
`keep_zeros=True`. A layer without weights puts out a constant: its branch is dead and what runs past it survives.
Where nothing runs past it the network is cut, which the sound form prevents: a layer that every path crosses loses in
a round at most `rate` of its own weights, and the first and last layers with weights lose none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, fx, nn

from palmette.depth.budget import entropy_budget, prune_smallest
from palmette.depth.entropy import EntropyRule, mean_magnitude, site_entropies
from palmette.depth.prepared import findings
from palmette.errors import InputError, RefusedEdit
from palmette.graph import Candidate, Edit, drop, linearize
from palmette.graph.activations import Activation, find_activations
from palmette.graph.blocks import find_blocks
from palmette.graph.ops import get_tensor, is_state, module_of, op_name
from palmette.graph.paths import Reader
from palmette.graph.sites import site_axis
from palmette.registry import Bounds, MethodConfig

Train = Callable[..., None]

_SHAPE_ONLY = ("sym_", "ones_like", "zeros_like", "full_like", "empty_like", "new_")
"""Starts of the names of operations whose result tells nothing of their input but its shape."""


@dataclass(frozen=True, kw_only=True)
class PruningConfig(MethodConfig):
    """Rounds of pruning before anything is removed; each is an entropy pass and a whole healing schedule.

    rate: share of the surviving weights that a round prunes. rounds: None for 1, or the paper's number under
    `reproduce`. temperature: 1 as in the papers, which empties layer by layer; higher spreads the budget. sites:
    "activation" linearises what has collapsed, "block" drops the residual blocks whose branch is dead.
    """

    rate: Annotated[float, Bounds(low=0, high=1, low_open=True, high_open=True)] = 0.5
    rounds: Annotated[int | None, Bounds(low=1)] = None
    temperature: Annotated[float, Bounds(low=0, low_open=True)] = 1.0
    sites: Literal["activation", "block"] = "activation"
    fit: Literal["affine", "mask", "identity"] = "affine"
    reproduce: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A convolution or linear layer that may be pruned, and the activations that its weights belong to."""

    path: str
    node: fx.Node
    weight: Tensor
    activations: tuple[str, ...]

    @property
    def content(self) -> int:
        """How many of its weights are not zero."""
        return int(torch.count_nonzero(self.weight))

    @property
    def share(self) -> float:
        """Share of its weights that are not zero, 0 to 1."""
        return self.content / self.weight.numel()


def find_layers(network: fx.GraphModule) -> list[Layer]:
    """The layers with weights of their own from which some activation takes its input, in execution order."""
    reader = Reader(network)
    activations = find_activations(network)
    outputs = {activation.output for activation in activations}
    order, depth = {node: i for i, node in enumerate(network.graph.nodes)}, _depths(reader)
    belonging: dict[fx.Node, list[str]] = {}
    for activation in activations:
        met = _layers_before(reader, activation, outputs)
        if met:
            belonging.setdefault(max(met, key=lambda node: (depth[node], order[node])), []).append(activation.path)
    found = []
    for node in sorted(belonging, key=lambda node: order[node]):
        weight = _own_weight(reader, node)
        if weight is not None:
            paths = tuple(belonging[node])
            found.append(Layer(path=str(node.meta["path"]), node=node, weight=weight, activations=paths))
    return found


def _depths(reader: Reader) -> dict[fx.Node, int]:
    """Layers with weights on the longest path to each node, the node itself included."""
    depth: dict[fx.Node, int] = {}
    for node in reader.gm.graph.nodes:
        depth[node] = max((depth[n] for n in node.all_input_nodes), default=0) + reader.is_affine(node)
    return depth


def _layers_before(reader: Reader, activation: Activation, outputs: Collection[fx.Node]) -> list[fx.Node]:
    """The layers with weights that are met first on the way back from an activation's input."""
    met, seen, stack = list[fx.Node](), set[fx.Node](), [activation.source]
    while stack:
        node = stack.pop()
        if node in seen or node in outputs:
            continue
        seen.add(node)
        if reader.is_affine(node):
            met.append(node)
        elif not _has_matrix(reader, node):
            stack.extend(node.all_input_nodes)
    return met


def _has_matrix(reader: Reader, node: fx.Node) -> bool:
    """Whether the node holds or reads a parameter of two axes or more (embeddings, recurrent cells)."""
    module = module_of(reader.gm, node)
    held: list[Tensor] = [] if module is None else list(module.parameters())
    held += [get_tensor(reader.gm, str(n.target)) for n in node.all_input_nodes if is_state(n)]
    return any(tensor.dim() >= 2 for tensor in held)


def _own_weight(reader: Reader, node: fx.Node) -> Tensor | None:
    """The weight of a layer, None where it is computed or used elsewhere too."""
    source: Any = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
    if source is not None and (source.op != "get_attr" or len(source.users) > 1):
        return None
    if reader.calls[str(node.target if source is None else source.target)] > 1:
        return None
    weight = reader.parameters(node)[0]
    return weight if isinstance(weight, nn.Parameter) and id(weight) not in reader.shared else None


class Cuts:
    """Whether a network without some of its layers still carries every input that it carried to its output."""

    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.whole = self._carried(frozenset())

    def cut(self, empty: Iterable[fx.Node]) -> bool:
        """Whether the output no longer depends on some input when these layers put out a constant."""
        return self.whole == 0 or self._carried(frozenset(empty)) != self.whole

    def _carried(self, empty: frozenset[fx.Node]) -> int:
        """A bit for every input that reaches the output."""
        carried: dict[fx.Node, int] = {}
        inputs = 0
        for node in self.network.graph.nodes:
            bits = 0
            if node.op == "placeholder":
                bits, inputs = 1 << inputs, inputs + 1
            elif node not in empty and not is_state(node) and not op_name(node).startswith(_SHAPE_ONLY):
                for source in node.all_input_nodes:
                    bits |= carried[source]
            carried[node] = bits
        return next(carried[node] for node in self.network.graph.nodes if node.op == "output")


def share_out(
    network: fx.GraphModule, layers: Sequence[Layer], scores: Mapping[str, float], config: PruningConfig
) -> dict[str, int]:
    """The budget of one round over the layers that have a score: no cut in the sound form.

    Raises RefusedEdit where the paper's form would cut the network.
    """
    held = [layer for layer in layers if layer.path in scores]
    contents = {layer.path: layer.content for layer in held}
    cuts, limits = Cuts(network), dict[str, int]()
    already = [layer.node for layer in find_layers(network) if layer.content == 0]
    limit = {path: math.floor(config.rate * size) for path, size in contents.items()}
    if not config.reproduce:
        limits = {layer.path: limit[layer.path] for layer in held if cuts.cut([layer.node])}
    while True:
        budget = entropy_budget(scores, contents, config.rate, config.temperature, limits)
        bad = _first_cut(cuts, already, [layer for layer in held if 0 < contents[layer.path] == budget[layer.path]])
        if bad is None:
            return budget
        if config.reproduce:
            raise RefusedEdit(
                f"the budget of the paper's form would empty '{bad.path}'",
                why="every path from the input to the output crosses it; MobileNetV2 fails in the papers like this",
                fix="Use the sound form (reproduce=False), or a temperature above 1.",
            )
        limits[bad.path] = limit[bad.path]


def _first_cut(cuts: Cuts, already: Sequence[fx.Node], emptied: Sequence[Layer]) -> Layer | None:
    """The first of the layers whose loss cuts the network, those before it and those empty already gone too."""
    gone = list(already)
    for layer in emptied:
        gone.append(layer.node)
        if cuts.cut(gone):
            return layer
    return None


def prune_in_rounds(
    network: fx.GraphModule,
    candidates: Sequence[Candidate],
    train: Train,
    loader: Iterable[Any],
    config: PruningConfig,
    *,
    rule: EntropyRule,
    rounds: int,
    drops_zero: bool,
) -> dict[str, float]:
    """Prune the layers of the candidates' sites in place, round by round; what `look` finds at the end.

    drops_zero: layers of entropy 0 are left alone (EGP) instead of pruned last (NEPENTHE). A round that would cut the
    network ends the rounds; validation data is not at hand here, so that only `rounds` bounds them otherwise.
    Raises RefusedEdit when not even one round can be done, DataError for an empty loader.
    """
    ends = set() if config.reproduce else _ends(network)
    chosen = {layer.path for layers in _belonging(network, candidates).values() for layer in layers} - ends
    layers = [layer for layer in find_layers(network) if layer.path in chosen]
    for number in range(rounds):
        scores = _importance(layers, _entropies(network, loader, rule), drops_zero)
        try:
            budget = share_out(network, layers, scores, config)
        except RefusedEdit:
            if number == 0:
                raise
            break
        if not any(budget.values()):
            break
        for layer in layers:
            prune_smallest(layer.weight, budget.get(layer.path, 0))
        train(network, keep_zeros=True)
    return look(network, candidates, loader, rule)


def look(
    network: fx.GraphModule, candidates: Sequence[Candidate], loader: Iterable[Any], rule: EntropyRule
) -> dict[str, float]:
    """By path: the entropy in bits of every activation, and of every block ranked the share of weights left.

    That share is the least over the layers of its branch that feed an activation: 0 where the branch is dead, 1 for a
    block without such a layer. One pass over `loader`; raises DataError when it is empty.
    """
    found = _entropies(network, loader, rule)
    for path, layers in _belonging(network, candidates).items():
        if path not in found:
            found[path] = min((layer.share for layer in layers), default=1.0)
    return found


def _entropies(network: fx.GraphModule, loader: Iterable[Any], rule: EntropyRule) -> dict[str, float]:
    axes = {activation.path: site_axis(network, activation) for activation in find_activations(network)}
    return site_entropies(network, axes, loader, rule)


def _importance(layers: Sequence[Layer], entropies: Mapping[str, float], drops_zero: bool) -> dict[str, float]:
    """I = entropy * mean magnitude of the surviving weights, of the layers that may be pruned."""
    scores = {}
    for layer in layers:
        entropy = sum(entropies[path] for path in layer.activations) / len(layer.activations)
        score = entropy * mean_magnitude(layer.weight)
        if layer.content and (score > 0 or not drops_zero):
            scores[layer.path] = score
    return scores


def _belonging(network: fx.GraphModule, candidates: Sequence[Candidate]) -> dict[str, list[Layer]]:
    """The layers of each site of the candidates: those of its activation, or all inside its block."""
    layers, blocks = find_layers(network), {block.path: block.region for block in find_blocks(network)}
    sources = {activation.path: activation.source for activation in find_activations(network)}
    found = {}
    for site in (site for candidate in candidates for site in candidate.sites):
        if site.kind == "activation":
            found[site.path] = [layer for layer in layers if site.path in layer.activations]
        else:
            inside = blocks[site.path]
            found[site.path] = [
                la for la in layers if la.node in inside and any(sources[path] in inside for path in la.activations)
            ]
    return found


def _ends(network: fx.GraphModule) -> set[str]:
    reader = Reader(network)
    paths = [str(node.meta["path"]) for node in network.graph.nodes if reader.is_affine(node)]
    return {paths[0], paths[-1]} if paths else set()


def found_scores(
    network: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    method: str,
    rule: EntropyRule,
) -> dict[str, float]:
    """Mean finding over the sites of each candidate: what pruning left, or a look now where nothing was pruned yet.

    A site of which nothing was found counts 1, the most.
    """
    try:
        found = findings(network, method)
    except InputError:
        found = look(network, candidates, loader, rule)
    return {c.name: sum(found.get(site.path, 1.0) for site in c.sites) / len(c.sites) for c in candidates}


def edits(candidate: Candidate, config: PruningConfig) -> list[Edit]:
    """Drop blocks; linearise activations, under `reproduce` by the mask that deletes what is OFF.

    Affine and mask agree where the entropy is 0 (ON: slope 1, OFF: 0), and the affine fit errs least where it is not,
    or where ON does not mean linear (GELU, ReLU6).
    """
    fit = "mask" if config.reproduce else config.fit
    return [
        linearize(site, fit=fit, force=config.reproduce) if site.kind == "activation" else drop(site)
        for site in candidate.sites
    ]


def select(
    candidates: Sequence[Candidate],
    scores: Mapping[str, float],
    config: PruningConfig,
    *,
    losses: Callable[[Sequence[str]], float],  # noqa: ARG001 - the interface of selections
    step: int,
) -> list[str]:
    """Under `reproduce` every candidate whose finding is exactly 0, which may be none; else the `step` lowest."""
    if config.reproduce:
        return [candidate.name for candidate in candidates if scores[candidate.name] == 0]
    return [candidate.name for candidate in candidates[:step]]
