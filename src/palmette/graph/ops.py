"""What a node of a captured graph is: names, aliasing, liveness, and the small modules that edits insert."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

WITH_IN_PLACE = frozenset(
    {
        "relu",
        "relu6",
        "hardtanh",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "clamp",
        "threshold",
    }
)
"""Activations that networks also call in place."""

ACTIVATIONS = WITH_IN_PLACE | frozenset(
    {
        "softplus",
        "log_sigmoid",
        "prelu",
        "rrelu",
        "hardshrink",
        "softshrink",
        "tanhshrink",
        "softsign",
        "clamp_min",
        "clamp_max",
    }
)
"""Elementwise nonlinearities of one tensor that stand alone as an activation."""

NONLINEAR_PARTS = ACTIVATIONS | frozenset(
    {
        "exp",
        "expm1",
        "log",
        "log1p",
        "sqrt",
        "rsqrt",
        "square",
        "abs",
        "sign",
        "erf",
        "sin",
        "cos",
        "pow",
        "reciprocal",
        "neg_exp",
    }
)
"""Elementwise operations that may take part in a composite activation such as x * sigmoid(x)."""

ARITHMETIC = frozenset({"mul", "add", "sub", "div", "rsub", "neg"})
"""Elementwise arithmetic: a composite activation may use it with numbers or between its own parts."""

IDEMPOTENT = frozenset({"relu", "relu6", "hardtanh"})
"""Activations f with f(f(x)) = f(x)."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class ChannelAffine(nn.Module):
    """Per-channel `slope * x + offset` along `axis`: what stands in place of a linearised activation until `collapse`.

    `trainable` slopes heal with the network; a mask or an identity stays as it is.
    """

    slope: Tensor
    offset: Tensor

    def __init__(self, slope: Tensor, offset: Tensor, axis: int, *, trainable: bool) -> None:
        super().__init__()
        self.axis = axis
        if trainable:
            self.slope, self.offset = nn.Parameter(slope.clone()), nn.Parameter(offset.clone())
        else:
            self.register_buffer("slope", slope.clone())
            self.register_buffer("offset", offset.clone())

    def forward(self, x: Tensor) -> Tensor:
        """The rescaled tensor, of the shape of `x`."""
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return x * self.slope.view(shape) + self.offset.view(shape)

    def extra_repr(self) -> str:
        """Channels and axis, for printing."""
        return f"channels={self.slope.numel()}, axis={self.axis}"


class Attention(nn.Module):
    """Scaled dot-product attention whose dropout acts in training only, as in the network it was captured from."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The attended values [..., queries, width]; further arguments are those of the aten operator."""
        rest = list(args) + [None, 0.0][len(args) :]
        rest[1] = self.dropout if self.training else 0.0
        attend = torch.ops.aten.scaled_dot_product_attention.default
        return attend(query, key, value, *rest, **kwargs)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """The dropout probability, for printing."""
        return f"dropout={self.dropout}"


def op_name(node: fx.Node) -> str:
    """Plain name of a call_function node's operation ("relu" for aten.relu_.default), "" for other nodes."""
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).split("::")[-1].rstrip("_")
    return str(getattr(node.target, "__name__", ""))


def module_of(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a call_module node calls, None for other nodes."""
    return gm.get_submodule(str(node.target)) if node.op == "call_module" else None


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Input nodes that carry tensors."""
    return [n for n in node.all_input_nodes if n.meta.get("shape") is not None]


def is_state(node: fx.Node) -> bool:
    """Whether the node reads a parameter, buffer or constant."""
    return node.op == "get_attr"


def is_transparent(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node returns its only input unchanged in eval mode (dropout, stochastic depth, identity, copies).

    A cast to the type that its input has is one of these.
    """
    if node.op == "call_module":
        return bool(node.meta.get("transparent")) or isinstance(module_of(gm, node), (nn.Identity, *DROPOUTS))
    if op_name(node) == "to":
        dtype = node.meta.get("dtype")
        return dtype is not None and dtype == node.all_input_nodes[0].meta.get("dtype")
    return op_name(node) in {"contiguous", "clone", "alias", "detach"} and len(node.args) == 1 and not node.kwargs


def skip_transparent(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node itself, or what a run of transparent nodes before it reads."""
    while is_transparent(gm, node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def is_mutable(node: fx.Node) -> bool:
    """Whether the operation writes into one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and bool(getattr(schema, "is_mutable", False))


def alias_base(node: fx.Node) -> fx.Node:
    """The node whose storage this node's output shares (itself when it owns its storage), by the operators' schemas."""
    while node.op == "call_function":
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is None or not any(r.alias_info is not None for r in schema.returns):
            break
        source = _aliased_argument(node, schema)
        if source is None:
            break
        node = source
    return node


def _aliased_argument(node: fx.Node, schema: Any) -> fx.Node | None:
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            return value if isinstance(value, fx.Node) else None
    return None


def remove_dead(gm: fx.GraphModule) -> None:
    """Erase nodes that do not reach the output; a write counts only if what it writes into is read."""
    nodes = list(gm.graph.nodes)
    live: set[fx.Node] = set()

    def mark(node: fx.Node) -> None:
        stack = [node]
        while stack:
            n = stack.pop()
            if n not in live:
                live.add(n)
                stack.extend(n.all_input_nodes)

    for n in nodes:
        if n.op in ("output", "placeholder"):
            mark(n)
    writes = [n for n in nodes if is_mutable(n)]
    grew = True
    while grew:
        bases = {alias_base(n) for n in live}
        pending = [n for n in writes if n not in live and alias_base(n) in bases]
        for n in pending:
            mark(n)
        grew = bool(pending)
    for n in reversed(nodes):
        if n not in live:
            gm.graph.erase_node(n)
    prune_modules(gm)


def prune_modules(gm: fx.GraphModule) -> None:
    """Delete parameters, buffers and modules that no node uses, and recompile."""
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("call_module", "get_attr")}
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}

    tensors = dict(gm.named_parameters(remove_duplicate=False))
    read = {id(p) for name, p in tensors.items() if name in used or any(name.startswith(c + ".") for c in called)}

    def belongs(name: str) -> bool:
        tied = name in tensors and id(tensors[name]) in read
        return tied or name in used or any(name.startswith(c + ".") for c in called)

    state = [n for n, _ in gm.named_parameters(remove_duplicate=False)] + [
        n for n, _ in gm.named_buffers(remove_duplicate=False)
    ]
    for name in state:
        if not belongs(name):
            path, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(path), leaf)
    keep: set[str] = set()
    for name in used | {n for n in state if belongs(n)}:
        parts = name.split(".")
        keep.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))
    for name in sorted((n for n, _ in gm.named_modules(remove_duplicate=False) if n), key=len, reverse=True):
        if name not in keep and not any(name.startswith(c + ".") for c in called):
            path, _, leaf = name.rpartition(".")
            parent = gm.get_submodule(path)
            parent._modules.pop(leaf, None)
    gm.recompile()


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, creating plain containers on the way; children of a replaced module stay."""
    parent_path, _, leaf = path.rpartition(".")
    parent = ensure_container(root, parent_path)
    old = parent._modules.get(leaf)
    if old is not None:
        for name, child in old._modules.items():
            if name not in module._modules:
                module._modules[name] = child
    parent._modules[leaf] = module


def ensure_container(root: nn.Module, path: str) -> nn.Module:
    """The module at `path`, made of plain containers where absent."""
    for name in path.split(".") if path else ():
        child = root._modules.get(name)
        if child is None:
            child = nn.Module()
            root._modules[name] = child
        root = child
    return root


def get_tensor(root: nn.Module, path: str) -> Tensor:
    """The parameter, buffer or constant at `path`."""
    parent, _, leaf = path.rpartition(".")
    return getattr(root.get_submodule(parent), leaf)  # type: ignore[no-any-return]
