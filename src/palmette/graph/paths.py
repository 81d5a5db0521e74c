"""Paths of affine operations in a captured graph: what follows without a branch, and each piece as float64 algebra."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.graph.activations import Activation
from palmette.graph.affine import Affine, compose, diagonal, padded_before
from palmette.graph.ops import BATCH_NORMS, CONVOLUTIONS, ChannelAffine, get_tensor, is_transparent, module_of, op_name


@dataclass
class Element:
    """One convolution, linear or leading norm with what only rescales its output.

    `nodes`: all nodes in order; `main`: the convolution or linear; `pads`: zero-padding nodes before it; `tail`: batch
    norms and linearised activations behind it. `linear_link`: whether an activation behind it was (or is assumed) made
    linear.
    """

    main: fx.Node
    rank: int
    nodes: list[fx.Node] = field(default_factory=list)
    pads: list[fx.Node] = field(default_factory=list)
    tail: list[fx.Node] = field(default_factory=list)
    links: list[Activation | fx.Node] = field(default_factory=list)

    @property
    def linear_link(self) -> bool:
        """Whether what follows it comes through a former activation."""
        return bool(self.links)

    @property
    def path(self) -> str:
        """Stable name of the main node."""
        return str(self.main.meta["path"])


Path = list[Element]


class Reader:
    """Reads one graph: which nodes are affine, which state is shared, and where paths run."""

    def __init__(self, gm: fx.GraphModule, assume: Collection[Activation] = ()) -> None:
        self.gm = gm
        self.by_source: dict[fx.Node, Activation] = {
            a.source: a for a in assume if set(a.source.users) <= set(a.region)
        }
        self.calls = Counter(str(n.target) for n in gm.graph.nodes if n.op in ("call_module", "get_attr"))
        self.called = {
            f"{n.target}.{leaf}" for n in gm.graph.nodes if n.op == "call_module" for leaf in ("weight", "bias")
        }
        owners = Counter(id(p) for _, p in gm.named_parameters(remove_duplicate=False))
        self.shared = {i for i, k in owners.items() if k > 1}
        self.by_output = {a.output: a for a in self.by_source.values()}
        self._kinds: dict[fx.Node, str] = {}
        self._shapes: dict[tuple[fx.Node, int, int], Affine] = {}

    # -- what a node is ------------------------------------------------------------------------------------------------

    def kind(self, node: fx.Node) -> str:
        """What the node is: "conv", "linear", "norm", "affine", "pad", "through" or "" for anything else."""
        if node not in self._kinds:
            self._kinds[node] = self._kind(node)
        return self._kinds[node]

    def _kind(self, node: fx.Node) -> str:
        if is_transparent(self.gm, node):
            return "through"
        module = module_of(self.gm, node)
        if isinstance(module, ChannelAffine):
            return "affine"
        if isinstance(module, BATCH_NORMS):
            return "norm" if module.running_mean is not None and node.meta["shape"] is not None else ""
        if self.weight_reason(node) == "" and self.is_affine(node):
            return "linear" if op_name(node) == "linear" or isinstance(module, nn.Linear) else "conv"
        return "pad" if self.zero_pad(node) is not None else ""

    def is_affine(self, node: fx.Node) -> bool:
        """Whether the node is a convolution or a linear layer."""
        module = module_of(self.gm, node)
        return isinstance(module, (*CONVOLUTIONS, nn.Linear)) or op_name(node) in (
            "conv1d",
            "conv2d",
            "conv3d",
            "linear",
        )

    def read_twice(self, state: fx.Node) -> bool:
        """Whether a parameter or buffer that a node reads is read again, or belongs to a module that is called."""
        target = str(state.target)
        return self.calls[target] > 1 or target in self.called

    def weight_reason(self, node: fx.Node) -> str:
        """Why the weights of an affine node cannot be rewritten, "" if they can."""
        if node.op == "call_module":
            module = module_of(self.gm, node)
            if self.calls[str(node.target)] > 1:
                return f"'{node.target}' is called several times"
            if any(self.calls[f"{node.target}.{leaf}"] for leaf in ("weight", "bias")):
                return f"a weight of '{node.target}' is read beside it"
            if module is not None and any(id(p) in self.shared for p in module._parameters.values() if p is not None):
                return f"'{node.target}' has tied weights"
            if isinstance(module, CONVOLUTIONS) and (module.padding_mode != "zeros" or _int_padding(module) is None):
                return f"'{node.target}' pads in mode '{module.padding_mode}'"
            return ""
        for n in node.all_input_nodes[1:]:
            if n.op != "get_attr":
                return f"the weight of '{node.meta['path']}' is computed"
            if len(n.users) > 1 or self.read_twice(n):
                return f"'{n.target}' has tied weights"
            if id(get_tensor(self.gm, str(n.target))) in self.shared:
                return f"'{n.target}' has tied weights"
        return ""

    def zero_pad(self, node: fx.Node) -> tuple[list[int], list[int]] | None:
        """Zero padding (before, after) of the last axes in axis order, None if the node is no constant zero padding."""
        if op_name(node) not in ("pad", "constant_pad_nd"):
            return None
        mode = node.args[2] if len(node.args) > 2 and op_name(node) == "pad" else node.kwargs.get("mode", "constant")
        value = (
            node.args[-1]
            if op_name(node) == "constant_pad_nd" and len(node.args) > 2
            else (node.args[3] if len(node.args) > 3 else node.kwargs.get("value"))
        )
        sizes: Any = node.args[1]
        if (
            mode != "constant"
            or value not in (None, 0, 0.0, False)
            or not all(isinstance(s, int) and s >= 0 for s in sizes)
        ):
            return None
        return list(sizes[0::2])[::-1], list(sizes[1::2])[::-1]

    # -- paths ---------------------------------------------------------------------------------------------------------

    def follower(self, node: fx.Node) -> tuple[fx.Node | None, Activation | None]:
        """The only reader of a node's output, with the activation in between that is assumed linear."""
        activation = self.by_source.get(node)
        if activation is not None:
            node = activation.output
            return node, activation
        users = list(node.users)
        if len(users) != 1 or not users[0].args or users[0].args[0] is not node or users[0].op == "output":
            return None, None
        return (users[0], None) if len([n for n in users[0].all_input_nodes if n is node]) == 1 else (None, None)

    def paths(self) -> list[Path]:
        """Maximal runs of elements; an element ends at a branch, a nonlinearity or a shared weight."""
        reached: set[fx.Node] = set()
        result = []
        for node in self.gm.graph.nodes:
            if node in reached or self.kind(node) not in ("conv", "linear", "norm", "affine", "pad"):
                continue
            path = self._walk(node, reached)
            if path:
                result.append(path)
        return result

    def _walk(self, start: fx.Node, reached: set[fx.Node]) -> Path:
        path: Path = []
        pending: list[fx.Node] = []
        pads: list[fx.Node] = []
        node: fx.Node | None = start
        while node is not None and node not in reached:
            kind = self.kind(node)
            link = self.by_output.get(node)
            if link is not None:
                kind = "activation"
            elif kind == "":
                break
            if kind in ("conv", "linear"):
                rank = 0 if kind == "linear" else len(node.meta["shape"]) - 2
                too_wide = any(len((self.zero_pad(p) or ([], []))[0]) > rank for p in pads)
                if (path and path[-1].rank != rank) or (pads and rank == 0) or too_wide:
                    break
                path.append(Element(node, rank, [*pending, node], pads))
                pending, pads = [], []
            elif kind == "pad":
                pads = [*pads, node]
                pending.append(node)
            elif kind == "through":
                pending.append(node)
            elif pads or (path and not self._same_axis(path[-1], node, kind)):
                break  # a norm or a former activation between padding and convolution is left alone
            elif not path:
                path.append(self._leading(node, kind, link))
            else:
                self._append(path[-1], [*pending, node], kind, link, node)
                pending = []
            reached.add(node)
            node, _ = self.follower(node)
        return [e for e in path if e.nodes]

    def _leading(self, node: fx.Node, kind: str, link: Activation | None) -> Element:
        rank = max(len(node.meta["shape"]) - 2, 0)
        if kind == "affine" and channel_axis(self.gm, node) == len(node.meta["shape"]) - 1:
            rank = 0
        element = Element(node, rank, [node])
        if kind == "affine":
            element.links.append(node)
        elif link is not None:
            element.nodes = []
        return element

    def _same_axis(self, element: Element, node: fx.Node, kind: str) -> bool:
        """Whether a norm or ChannelAffine rescales the channels that the element puts out."""
        if kind == "activation":
            return True
        last = len(node.meta["shape"]) - 1
        return channel_axis(self.gm, node) == (last if element.rank == 0 else 1)

    def same_axis(self, source: fx.Node, node: fx.Node) -> bool:
        """Whether two nodes rescale the same axis."""
        return channel_axis(self.gm, source) == channel_axis(self.gm, node)

    def _append(
        self, element: Element, nodes: list[fx.Node], kind: str, link: Activation | None, node: fx.Node
    ) -> None:
        element.nodes.extend(nodes)
        if kind == "norm":
            element.tail.append(node)
        elif kind == "affine":
            element.tail.append(node)
            element.links.append(node)
        elif link is not None:
            element.links.append(link)

    # -- algebra -------------------------------------------------------------------------------------------------------

    def shape_of(self, element: Element) -> Affine:
        """The element as one map without weights (on the meta device): geometry and size only."""
        key = (element.main, len(element.tail), len(element.pads))
        if key not in self._shapes:
            self._shapes[key] = self.affine(element, "meta")
        return self._shapes[key]

    def forget(self, element: Element) -> None:
        """Read the element anew next time: its padding has changed."""
        self._kinds.pop(element.main, None)
        self._shapes = {k: v for k, v in self._shapes.items() if k[0] is not element.main}

    def affine(self, element: Element, device: str | None = None) -> Affine:
        """The element as one map, in float64 on its own device or on `device`."""
        a = self._main_affine(element, device)
        for pad in element.pads:
            before, after = self.zero_pad(pad) or ([], [])
            missing = [0] * (a.rank - len(before))
            a = padded_before(a, tuple(missing + before), tuple(missing + after))
        for node in element.tail:
            a = compose(a, self._diagonal(node, a.rank, device))
        return a

    def _main_affine(self, element: Element, device: str | None) -> Affine:
        node = element.main
        if not self.is_affine(node):
            return self._diagonal(node, element.rank, device)
        weight, bias = self.parameters(node)
        w = weight.detach().to(device or weight.device, torch.float64)
        b = w.new_zeros(w.shape[0]) if bias is None else bias.detach().to(w)
        if element.rank == 0:
            return Affine(w, b)
        stride, before, after, dilation, groups = conv_settings(self.gm, node, element.rank)
        return Affine(w, b, stride, before, after, dilation, groups)

    def parameters(self, node: fx.Node) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a convolution or linear node."""
        module = module_of(self.gm, node)
        if module is not None:
            return module.weight, module.bias  # type: ignore[return-value]
        values = [get_tensor(self.gm, str(n.target)) for n in node.all_input_nodes[1:]]
        return values[0], values[1] if len(values) > 1 else None

    def weight_shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of the weight of a convolution or linear node, computed weights included."""
        module = module_of(self.gm, node)
        if module is not None:
            return tuple(module.weight.shape)  # type: ignore[arg-type]
        weight: Any = node.args[1]
        return (
            tuple(get_tensor(self.gm, str(weight.target)).shape)
            if weight.op == "get_attr"
            else tuple(weight.meta["shape"])
        )

    def _diagonal(self, node: fx.Node, rank: int, device: str | None) -> Affine:
        module = module_of(self.gm, node)
        slope, offset = (
            (module.slope.detach(), module.offset.detach()) if isinstance(module, ChannelAffine) else norm_map(module)
        )
        if device is not None:
            slope, offset = slope.to(device), offset.to(device)
        return diagonal(slope, offset, rank)


def norm_map(norm: Any) -> tuple[Tensor, Tensor]:
    """Slope and offset [C] in float64 of a batch norm in eval mode."""
    mean, var = norm.running_mean.detach().double(), norm.running_var.detach().double()
    slope = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        slope = slope * norm.weight.detach().double()
    offset = -mean * slope
    if norm.bias is not None:
        offset = offset + norm.bias.detach().double()
    return slope, offset


def channel_axis(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """Channel axis of what a ChannelAffine or a parametric node puts out, None for other nodes."""
    module = module_of(gm, node)
    if isinstance(module, ChannelAffine):
        return module.axis % len(node.meta["shape"])
    if isinstance(module, nn.Linear | nn.LayerNorm) or op_name(node) in ("linear", "layer_norm", "embedding", "addmm"):
        return len(node.meta["shape"]) - 1
    if isinstance(module, (*CONVOLUTIONS, *BATCH_NORMS)) or op_name(node).startswith(
        ("conv", "batch_norm", "group_norm")
    ):
        return 1
    return None


def _int_padding(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Padding (before, after) of a convolution module in numbers, None if it cannot be told."""
    if not isinstance(module.padding, str):
        return tuple(module.padding), tuple(module.padding)
    if module.padding == "valid":
        zeros = (0,) * len(module.kernel_size)
        return zeros, zeros
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)


def conv_settings(
    gm: fx.GraphModule, node: fx.Node, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Stride, padding before and after, dilation and groups of a convolution node."""
    module: Any = module_of(gm, node)
    if module is not None:
        before, after = _int_padding(module) or ((), ())
        return tuple(module.stride), before, after, tuple(module.dilation), int(module.groups)
    values: list[Any] = [*node.args[3:], *[1, 0, 1, 1][max(len(node.args) - 3, 0) :]]

    def spread(v: Any) -> tuple[int, ...]:
        items = list(v) if isinstance(v, list | tuple) else [v]
        return tuple(items * rank if len(items) == 1 else items)

    stride, padding, dilation = (spread(v) for v in values[:3])
    return stride, padding, padding, dilation, int(values[3])
