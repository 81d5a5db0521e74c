"""Turn an exported graph of tensor operations into one of ordinary modules that train, at the original's paths."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.graph.ops import (
    BATCH_NORMS,
    CONVOLUTIONS,
    DROPOUTS,
    WITH_IN_PLACE,
    Attention,
    alias_base,
    ensure_container,
    get_tensor,
    is_mutable,
    op_name,
    set_module,
)

_FUNCTIONAL = WITH_IN_PLACE | {"add", "sub", "mul", "div", "dropout"}
_DROPOUT_MODULES: dict[str, type[nn.Module]] = {
    "dropout": nn.Dropout,
    "alpha_dropout": nn.AlphaDropout,
    "feature_dropout": nn.Dropout2d,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}
_GUARDS = ("_assert", "sym_constrain", "_guards")


def owner_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward made this node ("" for the network itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    return re.sub(r"@\d+", "", str(list(stack.values())[-1][0]))


def owner_module(source: nn.Module, node: fx.Node) -> tuple[str, nn.Module]:
    """Path and module of the innermost module of `source` around the node."""
    path = owner_path(node)
    while path:
        try:
            return path, source.get_submodule(path)
        except AttributeError:
            path = path.rpartition(".")[0]
    return "", source


@dataclass
class Raiser:
    """Rewrites one exported graph in place; `source` is the network that was exported, `root` receives the modules."""

    source: nn.Module
    graph: fx.Graph
    state: nn.Module
    attention_dropout: list[float]
    root: nn.Module = field(default_factory=nn.Module)
    names: Counter[str] = field(default_factory=Counter)
    taken: dict[str, nn.Module] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def run(self) -> fx.GraphModule:
        """The captured network."""
        self._drop_guards()
        self._make_functional()
        for node in list(self.graph.nodes):
            self._raise(node)
        self._move_state()
        self._keep_names()
        gm = fx.GraphModule(self.root, self.graph)
        for alias, name in self.aliases.items():
            parent, _, leaf = alias.rpartition(".")
            ensure_container(gm, parent).register_parameter(leaf, gm.get_parameter(name))
        _order_like(gm, self.source)
        for name, _ in list(gm.named_buffers(remove_duplicate=False)):
            parent, _, leaf = name.rpartition(".")
            if not self._persistent(name):
                gm.get_submodule(parent)._non_persistent_buffers_set.add(leaf)
        _name_paths(gm, self.source)
        return gm

    def _drop_guards(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            name = op_name(node) if node.op == "call_function" else str(node.target)
            if node.op in ("call_function", "call_module") and name.startswith(_GUARDS) and not node.users:
                self.graph.erase_node(node)

    def _make_functional(self) -> None:
        """Replace in-place arithmetic on tensors that nothing else aliases, so that pre-activations can be seen."""
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        bases = {n: alias_base(n) for n in self.graph.nodes}
        in_place = {
            n for n in self.graph.nodes if n.op == "call_function" and is_mutable(n) and op_name(n) in _FUNCTIONAL
        }
        aliases: dict[fx.Node, list[fx.Node]] = {}
        for n, base in bases.items():
            aliases.setdefault(base, []).append(n)
        for node in list(self.graph.nodes):
            source = node.args[0] if node in in_place else None
            if not isinstance(source, fx.Node) or source.op in ("placeholder", "get_attr"):
                continue
            earlier = (n for n in aliases[bases[source]] if order[n] < order[node] and n not in in_place)
            if any(n is not bases[source] for n in earlier):
                continue  # a view made before would see the write: leave the operation as it is
            packet = getattr(torch.ops.aten, op_name(node), None)
            overload = str(node.target._schema.overload_name or "default")
            if packet is None or overload not in packet.overloads():
                continue
            node.target = getattr(packet, overload)
            source.replace_all_uses_with(node, delete_user_cb=_later_than(node, order))

    def _raise(self, node: fx.Node) -> None:
        name = op_name(node)
        if name in ("conv1d", "conv2d", "conv3d"):
            self._convolution(node, int(name[4]) - 1)
        elif name == "linear":
            self._linear(node)
        elif name == "batch_norm":
            self._batch_norm(node)
        elif name == "layer_norm":
            self._layer_norm(node)
        elif name in _DROPOUT_MODULES:
            self._dropout(node, name)
        elif name == "mark":
            self._mark(node)
        elif name == "scaled_dot_product_attention" and self.attention_dropout:
            probability = self.attention_dropout.pop(0)
            if probability > 0:
                self._call(
                    node,
                    self._free_path(owner_module(self.source, node)[0], "attention"),
                    Attention(probability),
                    keep_kwargs=True,
                )

    def _tensor(self, node: object) -> Tensor | None:
        return get_tensor(self.state, str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def _home(self, node: fx.Node, weight: object, bias: object) -> str | None:
        """Path of the module whose `weight` and `bias` these are, None if there is none."""
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        if bias is not None and (not isinstance(bias, fx.Node) or bias.op != "get_attr"):
            return None
        w, b = self._tensor(weight), self._tensor(bias)
        for path in (owner_module(self.source, node)[0], str(weight.target).rpartition(".")[0]):
            try:
                module = self.source.get_submodule(path)
            except AttributeError:
                continue
            own = dict(module._parameters)
            if path and own.get("weight") is w and own.get("bias") is b and w is not None:
                return path
        return None

    def _call(self, node: fx.Node, path: str, module: nn.Module, inputs: int = 1, *, keep_kwargs: bool = False) -> None:
        if path in self.taken:
            if type(self.taken[path]) is not type(module):
                return
        else:
            module.train(self.source.training)
            set_module(self.root, path, module)
            self.taken[path] = module
        node.op, node.target = "call_module", path
        if not keep_kwargs:
            node.args, node.kwargs = tuple(node.args[:inputs]), {}

    def _convolution(self, node: fx.Node, rank: int) -> None:
        _, weight, bias, stride, padding, dilation, groups = _arguments(node, (None, None, None, 1, 0, 1, 1))
        path, w = self._home(node, weight, bias), self._tensor(weight)
        if path is None or w is None:
            return
        sizes = [_ntuple(v, rank + 1) if not isinstance(v, str) else v for v in (stride, padding, dilation)]
        module = _bare(
            CONVOLUTIONS[rank],
            w.shape[1] * groups,
            w.shape[0],
            tuple(w.shape[2:]),
            sizes[0],
            sizes[1],
            sizes[2],
            groups,
            bias is not None,
        )
        _adopt(module, weight=w, bias=self._tensor(bias))
        self._call(node, path, module)

    def _linear(self, node: fx.Node) -> None:
        _, weight, bias = _arguments(node, (None, None, None))
        path, w = self._home(node, weight, bias), self._tensor(weight)
        if path is not None and w is not None and w.dim() == 2:
            module = _bare(nn.Linear, w.shape[1], w.shape[0], bias is not None)
            _adopt(module, weight=w, bias=self._tensor(bias))
            self._call(node, path, module)

    def _batch_norm(self, node: fx.Node) -> None:
        x, weight, bias, mean, _, training, momentum, eps, _ = _arguments(
            node, (None, None, None, None, None, False, 0.1, 1e-5, False)
        )
        running, path = self._tensor(mean), ""
        if running is None or training or not isinstance(mean, fx.Node):
            return
        path = str(mean.target).rpartition(".")[0]
        old = self.source.get_submodule(path)
        if old._buffers.get("running_mean") is not running or old._parameters.get("weight") is not self._tensor(weight):
            return
        rank = max(len(x.meta["val"].shape) - 3, 0)
        if hasattr(old, "momentum"):
            momentum = old.momentum
        module = BATCH_NORMS[rank](running.numel(), eps=eps, momentum=momentum, affine=weight is not None)
        _adopt(module, weight=self._tensor(weight), bias=self._tensor(bias))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            module._buffers[name] = old._buffers.get(name)
        self._call(node, path, module)

    def _layer_norm(self, node: fx.Node) -> None:
        _, shape, weight, bias, eps, _ = _arguments(node, (None, None, None, None, 1e-5, True))
        path, w = self._home(node, weight, bias), self._tensor(weight)
        if path is not None and w is not None:
            module = nn.LayerNorm(list(shape), eps=eps, bias=bias is not None)
            _adopt(module, weight=w, bias=self._tensor(bias))
            self._call(node, path, module)

    def _dropout(self, node: fx.Node, name: str) -> None:
        x, probability, training = _arguments(node, (None, 0.5, False))
        if training:
            return  # dropout that acts in eval mode too is part of the function
        if probability == 0.0 and isinstance(x, fx.Node):
            node.replace_all_uses_with(x)
            self.graph.erase_node(node)
            return
        path, module = owner_module(self.source, node)
        leaf = path and not module._modules and not module._parameters and not module._buffers
        if not leaf or (path in self.taken and not isinstance(self.taken[path], DROPOUTS)):
            path = self._free_path(path, name)
        self._call(node, path, _DROPOUT_MODULES[name](probability))

    def _mark(self, node: fx.Node) -> None:
        path = str(node.args[1])
        self._call(node, path, copy.deepcopy(self.source.get_submodule(path)))
        node.meta["transparent"] = True

    def _free_path(self, owner: str, name: str) -> str:
        base = f"{owner}.{name}" if owner else name
        while True:
            k = self.names[base]
            self.names[base] += 1
            path = f"{base}_{k}"
            try:
                self.source.get_submodule(path)
            except AttributeError:
                return path

    def _move_state(self) -> None:
        """Register what functional nodes still read, under its original name."""
        for node in list(self.graph.nodes):
            if node.op != "get_attr":
                continue
            if not node.users:
                self.graph.erase_node(node)
                continue
            value, (parent, _, leaf) = self._tensor(node), str(node.target).rpartition(".")
            container = ensure_container(self.root, parent)
            if isinstance(value, nn.Parameter):
                container.register_parameter(leaf, value)
            elif value is not None and leaf not in container._buffers:
                container.register_buffer(leaf, value)

    def _keep_names(self) -> None:
        """Note the further names of parameters that the network ties, so that they stay in its state."""
        kept = {id(p): name for name, p in self.root.named_parameters(remove_duplicate=False)}
        present = {name for name, _ in self.root.named_parameters(remove_duplicate=False)}
        for name, p in self.source.named_parameters(remove_duplicate=False):
            if name not in present and id(p) in kept:
                self.aliases[name] = kept[id(p)]

    def _persistent(self, name: str) -> bool:
        parent, _, leaf = name.rpartition(".")
        try:
            module = self.source.get_submodule(parent)
        except AttributeError:
            return False
        return leaf in module._buffers and leaf not in module._non_persistent_buffers_set


def _arguments(node: fx.Node, defaults: tuple[object, ...]) -> list[Any]:
    """Positional arguments of a node, filled up from its keywords and from `defaults`."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    values: list[Any] = [*node.args, *defaults[len(node.args) :]]
    for i, name in enumerate(names[: len(values)]):
        if name in node.kwargs:
            values[i] = node.kwargs[name]
    return values


def _later_than(node: fx.Node, order: dict[fx.Node, int]) -> Callable[[fx.Node], bool]:
    """Whether a reader comes behind `node` in execution order."""
    return lambda user: user is not node and order[user] > order[node]


def _ntuple(value: Any, n: int) -> tuple[int, ...]:
    items = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(int(v) for v in (items * n if len(items) == 1 else items))


def _order_like(gm: nn.Module, source: nn.Module) -> None:
    """Put submodules in the source's order, so that parameters come in the same order and under their first names."""
    order = {name: i for i, (name, _) in enumerate(source.named_modules(remove_duplicate=False))}
    for path, module in list(gm.named_modules()):
        prefix = f"{path}." if path else ""
        ranked = sorted(module._modules.items(), key=lambda item: order.get(prefix + item[0], len(order)))
        module._modules.clear()
        module._modules.update(ranked)


def _bare(cls: type[nn.Module], *args: Any) -> nn.Module:
    """A module without the cost of initialising weights that are replaced at once."""
    module: nn.Module = torch.nn.utils.skip_init(cls, *args)
    return module


def _adopt(module: nn.Module, **values: Tensor | None) -> None:
    for name, value in values.items():
        module._parameters[name] = value  # type: ignore[assignment]


def _name_paths(gm: fx.GraphModule, source: nn.Module) -> None:
    """Give every node a stable path: its module's, with the operation if that does several things, "#k" for repeats."""
    seen: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            node.meta["path"] = node.name if node.op != "get_attr" else str(node.target)
            continue
        if node.op == "call_module":
            base = str(node.target)
        else:
            owner, module = owner_module(source, node)
            leaf = bool(owner) and not module._modules and not list(module.parameters(recurse=False))
            base = owner if leaf else f"{owner}.{op_name(node)}" if owner else op_name(node)
        node.meta["path"] = base if not seen[base] else f"{base}#{seen[base]}"
        seen[base] += 1
