"""Elements that a training step of a staged network needs at batch 1, in closed form.

Counted is what PyTorch's autograd keeps: of each convolution its input, of each batch norm its input and its mean and
deviation, of a ReLU its output, of a hard swish its input, of squeeze-and-excitation what its small layers read, the
gate and the scaled tensor. Backward lets go of these in turn, needs the gradients of an operation's output and input at
once, and leaves the gradients of all parameters until the step. Image, logits, label and loss are there all the time.

Arrays of one block broadcast to [R, K, E] as in palmette.supernet.terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from palmette.supernet.terms import Block, Ints, blocks_of

if TYPE_CHECKING:
    from palmette.supernet.staged import Places, StagedSpace

_ENDS = 4
"""Elements of 4 bytes: the label takes two, the loss and its gradient one each."""


class _Part(NamedTuple):
    """What a part of the network keeps for backward, its parameters, and the most that is alive in its own backward.

    The last leaves out what earlier parts keep and the gradients of later ones.
    """

    saved: Ints
    parameters: Ints
    most: Ints


def training_peak(space: StagedSpace, at: Places) -> Ints:
    """The largest number of elements alive at once in a training step of each configuration; int64 [N]."""
    sides, walk = at.resolutions, list(blocks_of(space, at.resolutions))
    shape = (len(sides), len(space.kernels), len(space.expands))
    rows = [_row(at, _stem(space, walk[0].block.area), (len(sides), 1, 1), None)]
    for _, place, block in walk:
        swish = place is not None and space.activations[place[0]] == "hard_swish"
        rows.append(_row(at, _part(block, swish), shape, place))
    rows.append(_row(at, _tail(space, walk[-1].block.out_area), (len(sides), 1, 1), None))
    saved, parameters, most = (np.stack([row[i] for row in rows], axis=1) for i in range(3))
    before = saved.cumsum(1) - saved
    after = parameters.sum(1, keepdims=True) - parameters.cumsum(1)
    always = 3 * sides[at.resolution] ** 2 + space.classes + _ENDS
    peak: Ints = always + np.where(most > 0, before + after + most, 0).max(1)
    return peak


def _row(at: Places, part: _Part, shape: tuple[int, ...], place: tuple[int, int] | None) -> list[Ints]:
    """The figures of a part for each network, [N] each; zeros where its block is not there."""
    tables = [np.broadcast_to(values, shape) for values in part]
    if place is None:
        return [table[at.resolution, 0, 0] for table in tables]
    here = (slice(None), *place)
    return [np.where(at.active[here], t[at.resolution, at.kernel[here], at.expand[here]], 0) for t in tables]


def _part(block: Block, swish: bool) -> _Part:
    moments = list(_backward(block, swish))
    parameters = sum((values for _, values in block.parameters()), np.zeros(1, dtype=np.int64))
    return _Part(_saved(block, swish), parameters, reduce(np.maximum, moments))


def _saved(block: Block, swish: bool) -> Ints:
    before, wide = block.inputs * block.area, block.hidden * block.area
    narrow, after = block.hidden * block.out_area, block.outputs * block.out_area
    around = 3 if swish else 2  # of an activation: a ReLU's output is what the next layer reads anyway
    saved = before + around * narrow + 2 * block.hidden + after + 2 * block.outputs
    if block.expands:
        saved = saved + around * wide + 2 * block.hidden
    if block.squeezed is not None:
        saved = saved + narrow + 3 * block.hidden + block.squeezed
    return saved


def _backward(block: Block, swish: bool) -> Iterator[Ints]:
    """Elements alive at each operation of the block's backward, broadcasting to [R, K, E]."""
    hidden, outputs = block.hidden, block.outputs
    before, wide = block.inputs * block.area, hidden * block.area
    narrow, after = hidden * block.out_area, outputs * block.out_area
    held, kept, own = _saved(block, swish), after * block.shortcut, np.array(2 * outputs, dtype=np.int64)
    yield held + 2 * after + own  # the norm behind the projection
    held, own = held - after - 2 * outputs, own + hidden * outputs
    yield held + after + kept + narrow + own  # the projection
    if block.squeezed is not None:
        held = held - narrow
        yield held + kept + 3 * narrow + hidden + own  # the gate's product
        held = held - 3 * hidden - block.squeezed - swish * narrow
        own = own + 2 * hidden * block.squeezed + hidden + block.squeezed
        yield held + kept + 3 * narrow + own  # the mean, and the sum of both gradients
    else:
        held = held - swish * narrow
    yield held + kept + 2 * narrow + own  # the activation behind the depthwise convolution
    held, own = held - narrow, own + 2 * hidden
    yield held + kept + 2 * narrow + own  # its norm
    held, own = held - narrow - 2 * hidden, own + hidden * block.kernel**2
    yield held + kept + narrow + wide + own  # the convolution
    if block.expands:
        held = held - swish * wide
        yield held + kept + 2 * wide + own
        held, own = held - wide, own + 2 * hidden
        yield held + kept + 2 * wide + own
        held, own = held - wide - 2 * hidden, own + block.inputs * hidden
        yield held + kept + wide + before + own  # the expansion
    if block.shortcut:
        yield 3 * before + own


def _stem(space: StagedSpace, area: Ints) -> _Part:
    one = space.stem * area
    saved = 2 * (one + space.stem)
    return _Part(saved, np.array(29 * space.stem), np.maximum(saved + 2 * one, one + 29 * space.stem))


def _tail(space: StagedSpace, area: Ints) -> _Part:
    """Final expansion, feature mix, classifier and loss."""
    inputs, final, last, classes = space.widths[-1], space.final, space.last, space.classes
    wide, ends = final * area, inputs * area
    linear = final * last + classes * (last + 1)
    held = ends + 2 * wide + 2 * final
    saved = held + final + 2 * last + classes + 1
    moments = [
        saved + 2 * classes,
        saved + last + classes * (last + 1),
        held + final + 2 * last + final + linear,
        held + final + wide + linear,
        held + 2 * wide + linear,
        held - wide + 2 * wide + linear + 2 * final,
        ends + wide + ends + linear + (2 + inputs) * final,
    ]
    return _Part(saved, np.array(linear + (2 + inputs) * final), reduce(np.maximum, moments))
