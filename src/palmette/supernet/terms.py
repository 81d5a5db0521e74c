"""What each layer of a staged network asks for: memory under a metric, multiply-adds, parameters.

Arrays broadcast to [R, K, E]: resolutions, kernels, expands of a space. Outer widths are fixed, so a layer's figures
depend on the resolution and on its own block's kernel and expand alone; palmette.supernet.exact rests on that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from palmette.device import DeviceProfile
from palmette.errors import InputError

if TYPE_CHECKING:
    from palmette.supernet.staged import StagedSpace

Ints = np.ndarray[Any, np.dtype[np.int64]]
Term = tuple[str, Ints]


def round8(width: float) -> int:
    """The nearest multiple of 8, at least 8 and never below 90 % of `width` (the rule of MobileNet)."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


@dataclass(frozen=True)
class Metric:
    """How memory is counted. A layer's figure is `unit` times its elements plus `reserve`.

    weights: the layer's own weights count. projection_keeps: the block's input is held through the projection too, if
    the block has a shortcut. operators: activations, squeeze-and-excitation, additions and the classifier are layers of
    their own. inplace_*: as in DeviceProfile.
    """

    weights: bool = False
    projection_keeps: bool = True
    operators: bool = False
    inplace_elementwise: bool = False
    inplace_depthwise: bool = False
    unit: int = 1
    reserve: int = 0


METRICS = {
    "moofa": Metric(weights=True, projection_keeps=False),
    "activations": Metric(),
    "activations+inplace": Metric(inplace_depthwise=True),
}
"""Metrics in elements. "moofa" is that of the papers' data, which forgets the shortcut during the projection; the
others leave the weights in flash and count it."""


def metric_of(metric: str | DeviceProfile) -> Metric:
    """The metric of that name, or that of a device in bytes. Raises InputError for an unknown name or dtype.

    On a device every tensor counts from the operation that makes it to the last that reads it. Weights that live in RAM
    are there all the time: they are no matter of one layer and are added by whoever asks for a sum.
    """
    if isinstance(metric, DeviceProfile):
        return Metric(
            operators=True,
            inplace_elementwise=metric.inplace_elementwise,
            inplace_depthwise=metric.inplace_depthwise,
            unit=metric.element_bytes,
            reserve=metric.reserve_bytes,
        )
    if metric not in METRICS:
        raise InputError(
            f"No metric of memory is called {metric!r}", fix=f"Known: {', '.join(METRICS)}; or pass a DeviceProfile."
        )
    return METRICS[metric]


@dataclass(frozen=True)
class Block:
    """One inverted residual: `inputs` channels on `area` positions to `outputs` channels on `out_area` positions.

    hidden [E]: channels between; kernel [1, K, 1]; areas [R, 1, 1]; squeezed [E]: channels inside
    squeeze-and-excitation, None without it. expands: there is a 1x1 convolution before the depthwise one.
    """

    inputs: int
    outputs: int
    hidden: Ints
    kernel: Ints
    area: Ints
    out_area: Ints
    shortcut: bool
    squeezed: Ints | None = None
    expands: bool = True

    def memory(self, metric: Metric) -> Iterator[Term]:
        """Elements alive during each operation, in order, broadcasting to [R, K, E]."""
        before, wide = self.inputs * self.area, self.hidden * self.area
        narrow, after = self.hidden * self.out_area, self.outputs * self.out_area
        kept = before if self.shortcut else 0 * before
        if self.expands:
            yield "expansion", before + wide + metric.weights * self.inputs * self.hidden
            if metric.operators and not metric.inplace_elementwise:
                yield "expansion activation", 2 * wide + kept
        if metric.inplace_depthwise:
            # Each channel is computed beside the tensor and copied over its input: a buffer of one channel.
            convolved = np.maximum(wide, narrow) + metric.operators * self.out_area
        else:
            convolved = wide + narrow
        yield "depthwise", convolved + kept + metric.weights * self.hidden * self.kernel**2
        if metric.operators:
            yield from self._after_depthwise(narrow, kept, metric.inplace_elementwise)
        held = kept if metric.projection_keeps else 0
        yield "projection", narrow + after + held + metric.weights * self.hidden * self.outputs
        if metric.operators and self.shortcut:
            yield "addition", (2 if metric.inplace_elementwise else 3) * after

    def _after_depthwise(self, narrow: Ints, kept: Ints, inplace: bool) -> Iterator[Term]:
        if not inplace:
            yield "depthwise activation", 2 * narrow + kept
        if self.squeezed is not None:
            # The pooled vector becomes the narrow one, and that the gate: at most one pair is alive beside the tensor.
            pair = self.hidden + self.squeezed if inplace else 2 * np.maximum(self.hidden, self.squeezed)
            yield "squeeze", narrow + pair + kept
            yield "excitation", (1 if inplace else 2) * narrow + self.hidden + kept

    def macs(self) -> Iterator[Term]:
        """Multiply-adds of each convolution, broadcasting to [R, K, E]."""
        if self.expands:
            yield "expansion", self.inputs * self.hidden * self.area
        yield "depthwise", self.hidden * self.kernel**2 * self.out_area
        if self.squeezed is not None:
            yield "squeeze", 2 * self.hidden * self.squeezed
        yield "projection", self.hidden * self.outputs * self.out_area

    def parameters(self) -> Iterator[Term]:
        """Weights, biases, and scale and offset of the batch norms, broadcasting to [1, K, E]."""
        if self.expands:
            yield "expansion", (self.inputs + 2) * self.hidden
        yield "depthwise", self.hidden * (self.kernel**2 + 2)
        if self.squeezed is not None:
            yield "squeeze", 2 * self.hidden * self.squeezed + self.hidden + self.squeezed
        yield "projection", (self.hidden + 2) * self.outputs


class Layer(NamedTuple):
    """One operation and its figures: [R, K, E] at a place (stage, block), [R] outside the elastic blocks (None)."""

    name: str
    place: tuple[int, int] | None
    values: Ints


def memory_layers(space: StagedSpace, metric: Metric, resolutions: Ints) -> list[Layer]:
    """Every operation with its memory, from the image to the last layer that the metric counts."""
    walk = list(blocks_of(space, resolutions))
    stem = space.stem * walk[0].block.area
    layers = [Layer("stem", None, 3 * resolutions.reshape(-1, 1, 1) ** 2 + stem + metric.weights * 27 * space.stem)]
    if metric.operators and not metric.inplace_elementwise:
        layers.append(Layer("stem activation", None, 2 * stem))
    layers += [place.layer(*term) for place in walk for term in place.block.memory(metric)]
    layers += [Layer(name, None, values) for name, values in _head_memory(space, metric, walk[-1].block.out_area)]
    layers = [layer._replace(values=metric.unit * layer.values + metric.reserve) for layer in layers]
    return _broadcast(space, layers, len(resolutions))


def _head_memory(space: StagedSpace, metric: Metric, area: Ints) -> Iterator[Term]:
    inputs, final, last = space.widths[-1], space.final, space.last
    yield "final expansion", (inputs + final) * area + metric.weights * inputs * final
    if not metric.operators:
        return
    if not metric.inplace_elementwise:
        yield "final activation", 2 * final * area
        yield "feature mix activation", np.array(2 * last)
    yield "pool", final * area + final
    yield "feature mix", np.array(final + last)
    yield "classifier", np.array(last + space.classes)


def cost_layers(space: StagedSpace, cost: str, resolutions: Ints) -> list[Layer]:
    """Every layer with its cost: "macs" or "params". Raises InputError for another name."""
    if cost not in ("macs", "params"):
        raise InputError(f"No cost is called {cost!r}", fix="Known: macs, params.")
    macs, walk = cost == "macs", list(blocks_of(space, resolutions))
    inputs, final, last, classes = space.widths[-1], space.final, space.last, space.classes
    layers = [Layer("stem", None, space.stem * (27 * walk[0].block.area if macs else np.array(29)))]
    for place in walk:
        layers += [place.layer(*term) for term in (place.block.macs() if macs else place.block.parameters())]
    layers += [
        Layer("final expansion", None, final * (inputs * walk[-1].block.out_area if macs else np.array(inputs + 2))),
        Layer("feature mix", None, np.array(final * last)),
        Layer("classifier", None, np.array(last * classes + (0 if macs else classes))),
    ]
    return _broadcast(space, layers, len(resolutions))


class _Place(NamedTuple):
    name: str
    place: tuple[int, int] | None
    block: Block

    def layer(self, operation: str, values: Ints) -> Layer:
        return Layer(f"{self.name} {operation}", self.place, values)


def blocks_of(space: StagedSpace, resolutions: Ints) -> Iterator[_Place]:
    """The block behind the stem, then every place of the space, in order."""
    side = halved(resolutions.reshape(-1, 1, 1))
    stem, three, shortcut = np.array(space.stem), np.array(3), space.stem == space.first
    fixed = Block(space.stem, space.first, stem, three, side**2, side**2, shortcut, expands=False)
    yield _Place("first block", None, fixed)
    kernel = np.array(space.kernels, dtype=np.int64).reshape(1, -1, 1)
    inputs = space.first
    for stage, (outputs, stride) in enumerate(zip(space.widths, space.strides, strict=True)):
        for number in range(space.blocks):
            strided = stride == 2 and number == 0
            after = halved(side) if strided else side
            hidden = np.array([round8(inputs * e) for e in space.expands], dtype=np.int64)
            gate = np.array([round8(h // 4) for h in hidden], dtype=np.int64) if space.se[stage] else None
            shortcut = not strided and inputs == outputs
            block = Block(inputs, outputs, hidden, kernel, side**2, after**2, shortcut, gate)
            yield _Place(f"stage {stage} block {number}", (stage, number), block)
            inputs, side = outputs, after


def halved(side: Ints) -> Ints:
    """The side behind a convolution of stride 2 that pads by half its kernel."""
    return -(-side // 2)


def _broadcast(space: StagedSpace, layers: list[Layer], resolutions: int) -> list[Layer]:
    made = []
    for name, place, values in layers:
        if place is None:
            values = np.broadcast_to(values, (resolutions, 1, 1)).reshape(-1)
        else:
            values = np.broadcast_to(values, (resolutions, len(space.kernels), len(space.expands)))
        made.append(Layer(name, place, values))
    return made
