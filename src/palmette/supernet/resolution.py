"""Resolution as a choice: at which edges of its images a captured network is the same graph, and images of an edge."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from palmette.errors import CaptureError, InputError
from palmette.graph.capture import capture, describe, example_of, is_captured, set_shapes
from palmette.graph.inputs import LABELS, batch_size, call, tensors

RESOLUTION = "resolution"
"""Name and kind of the choice."""


def edge_of(inputs: Any) -> int:
    """Edge in pixels of the largest square image [batch, channels, edge, edge] among some inputs, 0 without one."""
    return max((int(t.shape[-1]) for t in tensors(inputs) if _is_image(t)), default=0)


def resized(inputs: Any, edge: int) -> Any:
    """Inputs with their largest square images [batch, channels, h, h] scaled to `edge`.

    Bilinear, without aliasing. Everything else stays, and so do images that have that edge.
    """
    largest = edge_of(inputs)

    def scale(value: Any) -> Any:
        if not isinstance(value, Tensor) or not _is_image(value) or value.shape[-1] != largest:
            return value
        return functional.interpolate(value, size=(edge, edge), mode="bilinear", antialias=True)

    return inputs if largest in (0, edge) else tree_map(scale, inputs)


@dataclass(frozen=True)
class Scaled:
    """A loader whose images are scaled as `resized` does; targets of pairs, and labels of dicts, stay."""

    loader: Iterable[Any]
    edge: int

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if isinstance(batch, Mapping):
                yield {key: value if key in LABELS else resized(value, self.edge) for key, value in batch.items()}
            elif isinstance(batch, list | tuple) and len(batch) == 2:
                yield resized(batch[0], self.edge), batch[1]
            else:
                yield resized(batch, self.edge)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


def resolutions(
    model: nn.Module, gm: fx.GraphModule, example: Any, edges: Sequence[int]
) -> tuple[tuple[int, ...], dict[str, str]]:
    """The edges, ascending, at which `model` is the captured graph `gm`, its own among them; why others are not.

    Empty if there is no other. Raises InputError for an edge that is not between 1 and that of the example.
    """
    largest = edge_of(example)
    if not edges:
        return (), {}
    if not largest:
        return (), {RESOLUTION: "no input is a square image"}
    if not all(0 < edge <= largest for edge in edges):
        raise InputError(
            f"resolution = {tuple(edges)} is out of bounds",
            why=f"the example has images of {largest} pixels",
            fix=f"Give edges from 1 to {largest}, or a larger example.",
        )
    why = {edge: _difference(model, gm, resized(example, edge)) for edge in sorted({*edges} - {largest})}
    fits = (*(edge for edge, reason in why.items() if not reason), largest)
    static = {f"{RESOLUTION}:{edge}": reason for edge, reason in why.items() if reason}
    return (fits if len(fits) > 1 else ()), static


def at_edge(gm: fx.GraphModule, edge: int) -> fx.GraphModule:
    """A copy of a captured network that shares its weights, with the shapes that it has at images of that edge."""
    shared = {id(tensor): tensor for tensor in (*gm.parameters(), *gm.buffers())}
    twin = copy.deepcopy(gm, shared)
    set_edge(twin, edge)
    return twin


def set_edge(gm: fx.GraphModule, edge: int) -> None:
    """Describe inputs and shapes of a captured network, in place, as for images of that edge."""
    example = resized(example_of(gm), edge)
    gm.meta["palmette"] = {**gm.meta["palmette"], "inputs": describe(example)}
    set_shapes(gm, example)


def _is_image(value: Tensor) -> bool:
    return value.dim() == 4 and value.is_floating_point() and value.shape[-1] == value.shape[-2]


def _difference(model: nn.Module, gm: fx.GraphModule, example: Any) -> str:
    """Why the network is another graph for these inputs, "" if it is the same."""
    try:
        other = capture(model, example)
        set_shapes(other, example)
        answers = {int(t.shape[0]) for t in tensors(call(other, example)) if t.dim()}
    except (CaptureError, InputError) as error:
        return f"the network does not run at this size ({error.what})"
    except (
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        AssertionError,
    ) as error:  # operations that take no such shape
        return f"the network does not run at this size ({str(error).splitlines()[0]})"
    if answers == {batch_size(example)} and (is_captured(model) or _signature(other) == _signature(gm)):
        return ""
    return "the network has sizes of its images written into it"


def _signature(gm: fx.GraphModule) -> list[tuple[str, ...]]:
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in gm.graph.nodes]
