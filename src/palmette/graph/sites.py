"""Find what can be changed in a network: activations, residual blocks and spans, from its graph alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from palmette.errors import PlanError
from palmette.graph.activations import Activation, find_activations
from palmette.graph.affine import merged_map
from palmette.graph.blocks import Block, find_blocks, find_spans
from palmette.graph.capture import capture
from palmette.graph.ops import is_state, module_of, op_name, skip_transparent
from palmette.graph.paths import Element, Path, Reader, channel_axis, conv_settings
from palmette.graph.spans import Run, closed_reason, name_of

if TYPE_CHECKING:
    from palmette.meter.table import CostTable

POLICIES = ("repad", "exact", "bias_map")
"""What may be done about zero padding between merged convolutions."""


@dataclass(frozen=True)
class Site:
    """A place of a network that can be changed.

    kind: "activation" (one call of a nonlinearity), "block" (residual, one input and one output), "span" (consecutive
    blocks, listed in `members`) or "convolution" (or linear, that keeps the shape of its input). `producer` and
    `consumers`: paths of the affine operations around an activation. `exactness`: "exact", or the padding policy that
    makes its merge exact. `partners`: activations that pay only together, this one included. `macs_saved` per sample
    (negative when the merge costs more), `ms_saved` when a cost table measured it.
    """

    kind: str
    path: str
    op: str = ""
    producer: str | None = None
    consumers: tuple[str, ...] = ()
    channel_axis: int | None = None
    shape: tuple[int, ...] = ()
    removable: bool = False
    reason: str = ""
    exactness: str = ""
    partners: tuple[str, ...] = ()
    macs_saved: int = 0
    ms_saved: float | None = None
    members: tuple[str, ...] = ()

    def __str__(self) -> str:
        state = (
            f"saves {self.macs_saved / 1e6:.2f} M MACs, {self.exactness or 'exact'}"
            if self.removable
            else f"fixed: {self.reason}"
        )
        return f"{self.kind:<10} {self.path:<40} {self.op:<10} {state}"


def find_sites(
    model: nn.Module, example_inputs: Any, *, cost: CostTable | None = None, pad: str = "repad"
) -> list[Site]:
    """Every site of `model` in execution order: activations, then blocks, spans, and convolutions that keep a shape.

    With a cost table the removable ones also carry measured `ms_saved`.
    Raises CaptureError if the model does not trace.
    """
    gm = capture(model, example_inputs)
    sites = activation_sites(gm, pad) + block_sites(gm) + convolution_sites(gm)
    if cost is None:
        return sites
    from palmette.graph.candidates import with_measured_gain

    return with_measured_gain(gm, sites, cost, pad)


def activation_sites(gm: fx.GraphModule, pad: str = "repad") -> list[Site]:
    """The activations of a captured graph as sites."""
    if pad not in POLICIES:
        raise PlanError(f"Unknown padding policy '{pad}'", fix=f"Use one of {', '.join(POLICIES)}.")
    activations = find_activations(gm)
    reader = Reader(gm, activations)
    paths = reader.paths()
    around: dict[Activation | fx.Node, tuple[Element, Element | None]] = {
        a: (path[i], path[i + 1] if i + 1 < len(path) else None)
        for path in paths
        for i, e in enumerate(path)
        for a in e.links
    }
    windows = paying_windows(reader, paths, pad)
    sites = []
    for activation in activations:
        before, after = around.get(activation, (None, None))
        sites.append(_activation_site(reader, activation, before, after, windows.get(activation), pad))
    return sites


def _activation_site(
    reader: Reader,
    activation: Activation,
    before: Element | None,
    after: Element | None,
    window: Window | None,
    pad: str,
) -> Site:
    before = before if before is not None and before.nodes else None
    exactness = ""
    if before is not None and after is not None:
        exactness, reason = exactness_of(reader, [before, after], pad)
    else:
        reason = _barrier(reader, activation, before)
    saved = (
        window.macs_saved
        if window
        else macs_saved(reader, [before, after], pad)
        if before and after and not reason
        else 0
    )
    return Site(
        "activation",
        activation.path,
        activation.op,
        before.path if before else None,
        (after.path,) if after else (),
        site_axis(reader.gm, activation),
        tuple(activation.output.meta["shape"][1:]),
        not reason,
        reason,
        exactness,
        tuple(a.path for a in window.activations) if window else (activation.path,),
        saved,
    )


@dataclass(frozen=True)
class Window:
    """Neighbouring elements that can become one, with the activations between them and the MACs that this saves."""

    elements: tuple[Element, ...]
    activations: tuple[Activation, ...]
    macs_saved: int


def paying_windows(reader: Reader, paths: list[Path], pad: str) -> dict[Activation, Window]:
    """For each activation the cheapest-to-reach window whose merge saves MACs: the shortest, then what saves most."""
    best: dict[Activation, Window] = {}
    for path in paths:
        for length in range(2, len(path) + 1):
            for i in range(len(path) - length + 1):
                window = window_of(reader, path[i : i + length], pad)
                for a in window.activations if window and window.macs_saved > 0 else ():
                    old = best.get(a)
                    if window and (old is None or (len(old.elements) == length and old.macs_saved < window.macs_saved)):
                        best[a] = window
    return {a: w for a, w in best.items() if all(best.get(b) is w for b in w.activations)}


def window_of(reader: Reader, elements: Path, pad: str) -> Window | None:
    """The window of these elements, None where a merge would not be exact or passes something that is no activation."""
    inner = [link for e in elements[:-1] for link in e.links]
    if not all(e.linear_link and e.nodes for e in elements[:-1]) or not all(isinstance(a, Activation) for a in inner):
        return None
    if exactness_of(reader, elements, pad)[1]:
        return None
    activations = tuple(a for a in inner if isinstance(a, Activation))
    return Window(tuple(elements), activations, macs_saved(reader, elements, pad))


def macs_saved(reader: Reader, elements: Path, pad: str = "repad") -> int:
    """MACs per sample that one merged operation saves over `elements` (negative: it costs more)."""
    before = sum(element_macs(reader, e) for e in elements)
    merged = merged_map([reader.shape_of(e) for e in elements], pad)
    return before - merged.weight.numel() * positions(elements[-1])


def element_macs(reader: Reader, element: Element) -> int:
    """MACs per sample of an element; a norm or a per-channel map counts none."""
    if not reader.is_affine(element.main):
        return 0
    return math.prod(reader.weight_shape(element.main)) * positions(element)


def positions(element: Element) -> int:
    """Output positions per sample: pixels of a convolution, tokens of a linear layer."""
    shape = element.main.meta["shape"]
    return math.prod(shape[2:] if element.rank else shape[1:-1])


def block_sites(gm: fx.GraphModule) -> list[Site]:
    """The residual blocks of a captured graph as sites, and their longest runs as spans."""
    blocks = find_blocks(gm)
    macs = {b.path: block_macs(gm, b) for b in blocks}
    return [run_site((b,), macs) for b in blocks] + [run_site(span, macs) for span in find_spans(gm, blocks)]


def run_site(run: Run, macs: Mapping[str, int]) -> Site:
    """A block, or a run of several as a span; `macs`: MACs per sample of each block by its path."""
    path, shape = name_of(run), tuple(run[0].source.meta["shape"][1:])
    saved = sum(macs[b.path] for b in run)
    kind, reason = ("block", run[0].reason) if len(run) == 1 else ("span", closed_reason(run))
    members = () if len(run) == 1 else tuple(b.path for b in run)
    return Site(
        kind,
        path,
        "",
        None,
        (),
        None,
        shape,
        not reason,
        reason,
        "exact",
        (path,),
        saved,
        ms_saved=None,
        members=members,
    )


def convolution_sites(gm: fx.GraphModule) -> list[Site]:
    """Every convolution and linear that keeps the shape of its input, the network's first and last left out."""
    reader = Reader(gm)
    affine = [n for n in gm.graph.nodes if reader.is_affine(n)]
    sites = []
    for node in affine[1:-1]:
        source, rank = node.all_input_nodes[0], _rank(reader, node)
        if node.op != "call_module" and not is_state(node.all_input_nodes[1]):
            continue  # its weights are computed
        if source.meta["shape"] != node.meta["shape"] or (
            rank and any(s != 1 for s in conv_settings(gm, node, rank)[0])
        ):
            continue
        path, axis = str(node.meta["path"]), channel_axis(gm, node)
        op, saved = "conv" if rank else "linear", element_macs(reader, Element(node, rank))
        shape = tuple(node.meta["shape"][1:])
        sites.append(Site("convolution", path, op, None, (), axis, shape, True, "", "exact", (path,), saved))
    return sites


def block_macs(gm: fx.GraphModule, block: Block) -> int:
    """MACs per sample of the convolutions and linears inside a block."""
    reader = Reader(gm)
    return sum(element_macs(reader, Element(n, _rank(reader, n))) for n in block.region if reader.is_affine(n))


def _rank(reader: Reader, node: fx.Node) -> int:
    linear = op_name(node) == "linear" or isinstance(module_of(reader.gm, node), nn.Linear)
    return 0 if linear else len(node.meta["shape"]) - 2


def _barrier(reader: Reader, activation: Activation, before: Element | None) -> str:
    """In words, why nothing can be merged across the activation."""
    source = skip_transparent(reader.gm, activation.source)
    if before is None:
        if any(u not in activation.region for u in activation.source.users):
            return "nothing mergeable: its input is also read elsewhere"
        why = reader.weight_reason(source) if reader.is_affine(source) else ""
        return "nothing mergeable: " + (
            why or f"its input comes from '{_describe(source)}', not from a convolution, linear or norm"
        )
    users = [u for u in _readers(reader, activation.output) if u.op != "output"]
    if len(users) != 1:
        return (
            f"nothing mergeable: {len(users)} operations read it"
            if users
            else "nothing mergeable: it is the network's output"
        )
    why = reader.weight_reason(users[0]) if reader.is_affine(users[0]) else ""
    return "nothing mergeable: " + (
        why or f"'{_describe(users[0])}' reads it, not a convolution or linear of the same kind"
    )


def _readers(reader: Reader, node: fx.Node) -> list[fx.Node]:
    users = list(node.users)
    while len(users) == 1 and reader.kind(users[0]) in ("through", "pad"):
        users = list(users[0].users)
    return users


def _describe(node: fx.Node) -> str:
    target = getattr(node.target, "_schema", None)
    name = str(target.name).split("::")[-1] if target is not None else str(node.target)
    return f"{name}" if node.op == "call_function" else str(node.meta["path"])


def site_axis(gm: fx.GraphModule, activation: Activation) -> int:
    """Channel axis, inferred from what produced the input; 1 for maps [N,C,H,W] of unknown origin, else the last."""
    return axis_of(gm, activation.source)


def axis_of(gm: fx.GraphModule, node: fx.Node) -> int:
    """Channel axis of what a node puts out, from what produced it; 1 for maps of unknown origin, else the last."""
    dims = len(node.meta["shape"])
    moved = list(range(dims))  # axis i of the node found so far is axis moved[i] of the node asked for
    for _ in range(64):
        node = skip_transparent(gm, node)
        axis = channel_axis(gm, node)
        if axis is not None:
            return moved[axis]
        if op_name(node) in ("permute", "transpose"):
            order = _order(node)
            moved = [moved[order.index(i)] for i in range(dims)]
            node = node.all_input_nodes[0]
            continue
        inputs = [n for n in node.all_input_nodes if n.meta.get("shape") == node.meta.get("shape") and not is_state(n)]
        if not inputs:
            break
        node = inputs[0]
    return moved[1 if dims in (4, 5) else dims - 1]


def _order(node: fx.Node) -> list[int]:
    """Axis of the input that each axis of a permutation's or transposition's output is."""
    args: Any = node.args
    dims = len(node.meta["shape"])
    if op_name(node) == "permute":
        return [d % dims for d in args[1]]
    order = list(range(dims))
    a, b = args[1] % dims, args[2] % dims
    order[a], order[b] = order[b], order[a]
    return order


def exactness_of(reader: Reader, elements: Path, pad: str) -> tuple[str, str]:
    """(exactness class, reason against) of merging `elements` under a padding policy; judged without weights."""
    maps = [reader.shape_of(e) for e in elements]
    padded = [i for i, m in enumerate(maps) if i and m.padded]
    if not padded:
        return "exact", ""
    if pad == "repad":
        return "repad", ""
    pointwise = all(m.pointwise and not m.padded for m in maps[: padded[-1]])
    if pad == "bias_map" and pointwise:
        return "bias_map", ""
    fix = "use pad='bias_map' or 'repad'" if pointwise else "use pad='repad'"
    where = f"zero padding of '{elements[padded[0]].path}' sits between the two"
    return "", f"{where}, a merge would change border pixels ({fix})"
