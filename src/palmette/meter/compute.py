"""Parameters, multiply-adds and depth.

Multiply-adds are counted twice, independently: `macs` runs a network under torch's operator counter (which counts 2 per
multiply-add, and misses products with vectors, and attention and recurrent layers on a CPU: added here), `node_macs`
computes them from the shapes in a captured graph. A test holds one against the other. Only contractions count:
convolutions, matrix products, attention, recurrent layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

from palmette.graph.inputs import call, with_batch
from palmette.graph.ops import Attention

_aten = torch.ops.aten
_CONVS = {_aten.conv1d, _aten.conv2d, _aten.conv3d, _aten.convolution}
_TRANSPOSED = {_aten.conv_transpose1d, _aten.conv_transpose2d, _aten.conv_transpose3d}
# value: position of the first of the two factors
_PRODUCTS = {
    **dict.fromkeys((_aten.linear, _aten.matmul, _aten.mm, _aten.bmm, _aten.mv, _aten.dot), 0),
    **dict.fromkeys((_aten.addmm, _aten.baddbmm, _aten.addmv), 1),
}
_RECURRENT = {_aten.lstm, _aten.gru, _aten.rnn_tanh, _aten.rnn_relu}
_ATTENTION = _aten.scaled_dot_product_attention


def params(model: nn.Module) -> int:
    """Number of parameter values; a shared parameter counts once."""
    return sum(p.numel() for p in model.parameters())


def param_bytes(model: nn.Module) -> int:
    """Bytes of the parameters in their own dtypes; a shared parameter counts once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in eval mode and without gradients inside the block; every module's own mode is restored after it."""
    modes = {m: m.training for model in models for m in model.modules()}
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def macs(model: nn.Module, example_inputs: Any, *, batch: int | None = 1) -> int:
    """Multiply-adds of one eval forward pass at `batch` (None: the batch of `example_inputs`).

    The pass is run once. Attention is counted in full, masked or not.
    """
    inputs = example_inputs if batch is None else with_batch(example_inputs, batch)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused encoder layers hide their products from the counter
    fused: Any = {
        _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        _aten._scaled_dot_product_fused_attention_overrideable: _attention_flops,
        _aten.mkldnn_rnn_layer: _recurrent_flops,
        _aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
        _aten.addmv: lambda _, matrix, *__, **___: 2 * math.prod(matrix),
        _aten.dot: lambda vector, *_, **__: 2 * math.prod(vector),
    }
    try:
        with evaluating(model), FlopCounterMode(display=False, custom_mapping=fused) as counter:
            call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return int(counter.get_total_flops()) // 2


def _attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _attention_macs(q, k, v)


def _recurrent_flops(x: Sequence[int], first: Sequence[int], second: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:2]) * (math.prod(first) + math.prod(second))


def _attention_macs(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """Queries [..., L, E] with keys [..., S, E] and values [..., S, V]."""
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def graph_macs(captured: fx.GraphModule) -> int:
    """Multiply-adds of a captured graph at the batch it was captured with, from its shapes alone."""
    return sum(node_macs(node) for node in captured.graph.nodes)


def node_macs(node: fx.Node) -> int:
    """Multiply-adds of one node of a captured graph at the batch it was captured with; 0 for what is no contraction."""
    if node.op == "call_module":
        return _module_macs(_module(node), node)
    op = _packet(node)
    if op in _CONVS or op in _TRANSPOSED:
        transposed = op in _TRANSPOSED or (op is _aten.convolution and bool(node.args[6]))
        return _conv_macs(node, _shape(node.args[1]), transposed)
    if op in _PRODUCTS:
        return math.prod(_shape(node)) * _shape(node.args[_PRODUCTS[op]])[-1]
    if op is _ATTENTION:
        return _attention_macs(_shape(node.args[0]), _shape(node.args[1]), _shape(node.args[2]))
    if op is _aten.einsum:
        return _einsum_macs(str(node.args[0]), [_shape(a) for a in _nodes(node.args[1])])
    if op in _RECURRENT:
        return _recurrent_macs(node)
    return 0


def _module_macs(module: nn.Module, node: fx.Node) -> int:
    if isinstance(module, _ConvNd):
        return _conv_macs(node, tuple(module.weight.shape), isinstance(module, _ConvTransposeNd))
    if isinstance(module, nn.Linear):
        return math.prod(_shape(node)) * module.in_features
    if isinstance(module, Attention):
        return _attention_macs(*map(_shape, node.args[:3]))
    return 0


def _conv_macs(node: fx.Node, weight: tuple[int, ...], transposed: bool) -> int:
    """Each value of the output meets weight[1:], [in/groups, ...]; transposed: of the input, [out/groups, ...]."""
    return math.prod(_shape(node.args[0] if transposed else node)) * math.prod(weight[1:])


def _einsum_macs(equation: str, shapes: list[tuple[int, ...]]) -> int:
    """Factors are contracted from the left, pair by pair; an index that nothing else needs is summed beforehand."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [_indices(term, len(shape)) for term, shape in zip(left.split(","), shapes, strict=True)]
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for index, size in zip(term, shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    counts = Counter(index for term in terms for index in term)
    out = set(_indices(right, len(sizes))) if arrow else {i for i, n in counts.items() if n == 1 or i.startswith(".")}
    total, current = 0, set(terms[0])
    for position, term in enumerate(terms[1:], start=1):
        needed = out.union(*terms[position + 1 :])
        factor = (current & (set(term) | needed)) | (set(term) & (current | needed))
        total += math.prod(sizes[index] for index in factor)
        current = factor & needed
    return total


def _indices(term: str, ndim: int) -> list[str]:
    """The index of every axis; those under an ellipsis are named from the right, as broadcasting aligns them."""
    head, dots, tail = term.partition("...")
    hidden = ndim - len(head) - len(tail) if dots else 0
    return [*head, *(f".{i}" for i in reversed(range(hidden))), *tail]


def _recurrent_macs(node: fx.Node) -> int:
    """Every weight matrix meets every step of every sequence once."""
    tokens = math.prod(_shape(node.args[0])[:2])
    return tokens * sum(math.prod(s) for s in map(_shape, _nodes(node.args[2])) if len(s) == 2)


def depth(captured: fx.GraphModule) -> int:
    """Parametric operations on the longest path from an input to an output.

    Those are convolutions, linear layers, matrix products with a parameter, and each layer of a recurrent stack. Norms,
    embeddings and element-wise scales are not; nor is what is computed from parameters alone.
    """
    level: dict[fx.Node, int] = {}  # of nodes that an input reaches
    weights: set[fx.Node] = set()  # parameters, and what is computed from parameters alone
    longest = 0
    for node in captured.graph.nodes:
        sources = node.all_input_nodes
        below = [level[s] for s in sources if s in level]
        if node.op == "placeholder":
            level[node] = 0
        elif below and node.op == "output":
            longest = max(below)
        elif below:
            level[node] = max(below) + _parametric_operations(node, weights)
        elif any(s in weights for s in sources) or _is_parameter(node):
            weights.add(node)
    return longest


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(_attribute(node), nn.Parameter)


def _parametric_operations(node: fx.Node, weights: set[fx.Node]) -> int:
    if node.op == "call_module":
        return int(isinstance(_module(node), _ConvNd | nn.Linear))
    op = _packet(node)
    if op in _RECURRENT:
        return cast(int, node.args[4])
    if op in _CONVS or op in _TRANSPOSED:
        return int(node.args[1] in weights)
    if op in _PRODUCTS:
        first = _PRODUCTS[op]
        return int(any(factor in weights for factor in node.args[first : first + 2]))
    if op is _aten.einsum:
        return int(any(factor in weights for factor in _nodes(node.args[1])))
    return 0


def _packet(node: fx.Node) -> Any:
    """The operator without its overload, such as `aten.linear`; None for what is no torch operator."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else None


def _attribute(node: fx.Node) -> Any:
    return attrgetter(str(node.target))(node.graph.owning_module)


def _module(node: fx.Node) -> nn.Module:
    return cast(nn.Module, _attribute(node))


def _nodes(argument: Any) -> list[fx.Node]:
    return [a for a in argument if isinstance(a, fx.Node)]


def _shape(argument: Any) -> tuple[int, ...]:
    return cast("tuple[int, ...]", argument.meta["shape"])
