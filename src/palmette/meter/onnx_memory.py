"""The last few ONNX exports, so that a network that was exported a moment ago is not exported again.

An export takes seconds, and one search times the same dense network again and again, as copies of one another. Networks
count as the same when graph, tensors and everything else that their modules hold are equal; where that cannot be seen,
nothing is kept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from palmette.graph.inputs import tensors
from palmette.graph.io import weights_hash

KEPT = 4
LARGEST = 64 * 2**20
"""Bytes of a graph that is still kept."""

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_OWN = frozenset({*vars(nn.Module()), "meta"})
_kept: OrderedDict[str, bytes] = OrderedDict()


def remembered(model: nn.Module, inputs: Any, export: Callable[[], bytes]) -> bytes:
    """What `export` made of an equal network and inputs of equal shapes, or makes now."""
    name = _name(model, inputs)
    if name is None:
        return export()
    graph = _kept.pop(name, None) or export()
    if len(graph) <= LARGEST:
        _kept[name] = graph
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    return graph


def _name(model: nn.Module, inputs: Any) -> str | None:
    """A digest of all that an export depends on; None where a module holds something that has no exact text."""
    if not isinstance(model, fx.GraphModule):
        return None
    shapes = [(tuple(t.shape), t.dtype, t.device) for t in tensors(inputs)]
    form = sorted(inputs) if isinstance(inputs, dict) else type(inputs)
    lines = [model.code, repr(shapes), repr(form)]
    for path, module in model.named_modules(remove_duplicate=False):
        plain = {k: v for k, v in vars(module).items() if k not in _OWN}
        if isinstance(module, fx.GraphModule) and module is not model:
            return None
        if module is not model and not all(map(_exact, plain.values())):
            return None
        lines.append(f"{path} {type(module)} {'' if module is model else plain}")
    tensors_held = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return hashlib.sha256("\n".join([*lines, weights_hash(tensors_held)]).encode()).hexdigest()


def _exact(value: Any) -> bool:
    """Whether repr says everything about a value."""
    if isinstance(value, (tuple, list)):
        return all(map(_exact, value))
    return isinstance(value, _PLAIN)
