"""One training step of a captured network on tensors without data: every storage, who makes it, how long it lives."""

from __future__ import annotations

import copy
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._pytree import tree_leaves

from palmette.errors import InputError
from palmette.graph.capture import example_of
from palmette.graph.inputs import main_output, with_batch
from palmette.meter.memory import fake_inputs
from palmette.meter.training import Live, default_loss, measure_training, storages_of, tensors_of
from palmette.supernet.weights import parameters_of


@dataclass
class Birth:
    """A storage that appears in a training step, and with it a moment: the one right after it.

    place: the node that runs, or whose gradients are computed, by its position in the graph; -1 for inputs, targets and
    the loss. number: how many storages that node made before in that half of the step. death: the first moment at which
    the storage is gone; last: the node that ran when it went. parameter: which one's gradient it is at the end, by
    `parameters_in`; -1 for anything else.
    """

    place: int
    backward: bool
    number: int
    bytes: int
    floating: bool
    death: int = -1
    last: int = -1
    parameter: int = -1

    @property
    def key(self) -> tuple[int, bool, int]:
        """The same for the same storage of another width."""
        return self.place, self.backward, self.number


@dataclass(frozen=True)
class StepTrace:
    """A training step.

    births: the storages in the order in which they appear. made: the number of the storage of a node's result, by the
    node's position. item: bytes of an element of the network's weights.
    """

    births: tuple[Birth, ...]
    made: dict[int, int]
    peak_bytes: int
    item: int


def parameters_in(gm: fx.GraphModule) -> list[Tensor]:
    """The parameters that a graph reads, each once, in the order of its nodes."""
    return list({id(t): t for node in gm.graph.nodes for _, t in parameters_of(gm, node)}.values())


def target_of(output: Any) -> Tensor | None:
    """A target for the cross entropy of logits [batch, classes, ...]; None for outputs without classes."""
    logits = main_output(output)
    if logits.dim() < 2:
        return None
    return torch.zeros((logits.shape[0], *logits.shape[2:]), dtype=torch.long, device=logits.device)


def measured_step(captured: fx.GraphModule, batch: int) -> int:
    """Peak in bytes of the step of `trace_step` by `measure_training`, on a copy without data."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        shadow, x = copy.deepcopy((captured, with_batch(example_of(captured), batch)))
    shadow.train().requires_grad_(True)
    with fake:
        return measure_training(shadow, x, _target(shadow, batch)).peak_bytes


def trace_step(captured: fx.GraphModule, batch: int) -> StepTrace:
    """Follow forward in training mode, loss and backward at `batch`, all parameters trained; gradients start from none.

    The loss is the cross entropy, or the mean of an output without classes. Counted as `measure_training` counts.
    Raises InputError when the step cannot be followed without data.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        shadow = copy.deepcopy(captured)
    shadow.train().requires_grad_(True)
    with fake, torch.inference_mode(mode=False), torch.enable_grad():
        target = _target(shadow, batch)
        weights = {address for m in shadow.modules() for t in tensors_of(m) for address in storages_of(t)}
        recorder = _Recorder(weights)
        runner = _Runner(shadow, recorder)
        with recorder:
            inputs = fake_inputs(shadow, batch)
            recorder.see((inputs, target))
            try:
                output = shadow.graph.process_outputs(runner.run(*inputs, enable_io_processing=False))
                recorder.start(-1)
                value = default_loss(output, target)
                recorder.start_backward()
                torch.autograd.backward(value)
            except Exception as error:
                raise _explained(error, runner.where) from error
        return recorder.trace(parameters_in(shadow), runner.made)


def _target(shadow: fx.GraphModule, batch: int) -> Tensor | None:
    try:
        with torch.no_grad():
            output = fx.Interpreter(shadow).run(*fake_inputs(shadow, batch), enable_io_processing=False)
        return target_of(shadow.graph.process_outputs(output))
    except Exception as error:
        raise _explained(error, "") from error


def _explained(error: Exception, where: str) -> InputError:
    return InputError(
        "The memory of a training step cannot be computed",
        where=where,
        why=f"the network does not train on this batch ({type(error).__name__}: {str(error).splitlines()[0]})",
        fix="Give a larger batch: a batch norm cannot train on one value per channel.",
    )


class _Recorder(Live):
    """Numbers the storages as they appear."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__(weights, str)
        self.births: list[Birth] = []
        self.numbers: dict[int, int] = {}
        self._counts: dict[tuple[int, bool], int] = {}
        self._place, self._backward = -1, False
        self._starts: list[int] = []
        self._places: list[int] = []

    def start(self, place: int) -> None:
        """What follows is done by the node at `place`; autograd numbers its own nodes as it makes them."""
        self._place = place
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._places.append(place)

    def start_backward(self) -> None:
        """What follows is the backward pass."""
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._backward = True

    def trace(self, parameters: list[Tensor], made: dict[int, int]) -> StepTrace:
        """All that was seen; whose gradient is alive at the end is known by its storage."""
        for place, parameter in enumerate(parameters):
            for address, storage in ({} if parameter.grad is None else storages_of(parameter.grad)).items():
                if address in self.numbers and storage.nbytes() == parameter.numel() * parameter.element_size():
                    self.births[self.numbers[address]].parameter = place
        for number in self.numbers.values():
            self.births[number].death = len(self.births)
        item = min(p.element_size() for p in parameters)
        return StepTrace(tuple(self.births), made, self.peak, item)

    def _add(self, address: int, storage: torch.UntypedStorage, dtype: torch.dtype) -> None:
        place = self._context()
        seen = self._counts.get((place, self._backward), 0)
        self._counts[place, self._backward] = seen + 1
        self.numbers[address] = len(self.births)
        self.births.append(Birth(place, self._backward, seen, storage.nbytes(), dtype.is_floating_point))
        super()._add(address, storage, dtype)

    def _remove(self, address: int, size: int) -> None:
        super()._remove(address, size)
        birth = self.births[self.numbers.pop(address)]
        birth.death, birth.last = len(self.births), self._place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._context()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _context(self) -> int:
        """The node that runs, or the one whose gradients autograd computes."""
        node: Any = torch._C._current_autograd_node() if self._backward else None
        if node is not None and node._sequence_nr() < self._starts[-1]:  # the accumulation of gradients has no number
            self._place = self._places[bisect_right(self._starts, node._sequence_nr()) - 1]
        return self._place


class _Runner(fx.Interpreter):
    """Runs the graph, letting go of values as its code does, and tells the recorder which node runs."""

    def __init__(self, gm: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(gm)
        self.recorder = recorder
        self.where = ""
        self.made: dict[int, int] = {}
        self._positions = {node: position for position, node in enumerate(gm.graph.nodes)}

    def run_node(self, n: fx.Node) -> Any:
        self.where = str(n.meta.get("path", n.name))
        self.recorder.start(self._positions[n])
        result = super().run_node(n)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                for address in storages_of(tensor).keys() & self.recorder.numbers.keys():
                    self.made.setdefault(self._positions[n], self.recorder.numbers[address])
        return result
