"""Peak memory against two measurements: storages that are alive in a real run, and torch's own allocator."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palmette.errors import InputError
from palmette.graph.capture import capture
from palmette.graph.inputs import call, tensors, with_batch
from palmette.meter import live_bytes, peak_bytes

Network = tuple[nn.Module, Any, fx.GraphModule]


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages that operators returned and that are still alive, weights left out."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *tensors(inputs)]}
        self.references: list[Any] = []
        self.current = self.peak = input_bytes(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                self.references.append(weakref.ref(storage, self.release(storage._cdata, storage.nbytes())))
        return result

    def release(self, address: int, size: int) -> Callable[[Any], None]:
        def died(_: Any) -> None:
            self.known.remove(address)
            self.current -= size

        return died


def input_bytes(inputs: Any) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors(inputs))


def measured_storages(model: nn.Module, inputs: Any) -> int:
    with torch.no_grad(), Storages(model, inputs) as storages:
        call(model, inputs)
    return storages.peak


def measured_allocator(model: nn.Module, inputs: Any) -> int:
    """Highest sum of the CPU allocator's events, above the inputs; includes the scratch space of kernels."""
    with torch.no_grad():
        call(model, inputs)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call(model, inputs)
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak + input_bytes(inputs)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_peak_equals_the_storages_alive_in_a_real_run(network: Network, batch: int) -> None:
    _model, inputs, captured = network
    assert peak_bytes(captured, batch) == measured_storages(captured, with_batch(inputs, batch))


def test_peak_is_covered_by_the_allocator(network: Network) -> None:
    _model, inputs, captured = network
    assert input_bytes(inputs) < peak_bytes(captured, 2) <= measured_allocator(captured, inputs)


@pytest.mark.parametrize("name", ["transformer", "attention", "keywords"])
def test_peak_equals_the_allocator_without_scratch_space(
    captured_networks: Callable[[str], Network], name: str
) -> None:
    _, inputs, captured = captured_networks(name)
    assert peak_bytes(captured, 2) == measured_allocator(captured, inputs)


def test_the_original_needs_as_much_when_its_code_keeps_nothing_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.Flatten())
    x = torch.randn(2, 3, 10, 10)
    first = 3 * 100 + 2 * 8 * 100  # input, convolution, its rectified copy
    assert peak_bytes(capture(model, x).eval(), 2) == measured_storages(model.eval(), x) == 2 * 4 * first


def test_half_precision_halves_the_bytes(build: Callable[[str], Network]) -> None:
    model, inputs, captured = build("transformer")
    single = peak_bytes(captured)
    half = peak_bytes(capture(model.bfloat16(), inputs.bfloat16()).eval())
    assert half < 0.6 * single  # a little above one half: the statistics of norms and attention stay float32


class Columns(nn.Module):
    """A chain of three square layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between, self.layer = between, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.between(self.layer(x)))


TENSOR = 4 * 16 * 16  # bytes of [1, 16, 16]


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (lambda h: h, 3),  # input; a layer's argument and its result
        (lambda h: h.reshape(-1, 4, 64).view(-1, 16, 16), 3),  # views are free
        (lambda h: h[:, :8].repeat(1, 2, 1), 3),
        (torch.sigmoid, 3),
        (lambda h: h + h.sigmoid(), 4),  # both terms and the sum beside the input
        (lambda h: torch.cat([h, h], 1)[:, :16], 4),  # the part that is used keeps the whole alive
    ],
)
def test_liveness_by_hand(between: Callable[[Tensor], Tensor], expected: int) -> None:
    captured = capture(Columns(between), torch.randn(2, 16, 16)).eval()
    assert peak_bytes(captured) == measured_storages(captured, torch.randn(1, 16, 16)) == expected * TENSOR


def test_a_reshape_that_must_copy_is_a_copy() -> None:
    class Reshaped(nn.Module):
        def __init__(self, transposed: bool) -> None:
            super().__init__()
            self.layer, self.transposed = nn.Linear(16, 16), transposed

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            flat = (h.transpose(1, 2) if self.transposed else h).reshape(-1, 256)
            return flat.sigmoid() * flat + h.flatten(1)

    view, copy = (peak_bytes(capture(Reshaped(t), torch.randn(2, 16, 16)).eval()) for t in (False, True))
    assert copy - view == TENSOR


def test_inputs_may_be_freed_after_their_last_use() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), nn.Tanh())
    captured = capture(model, torch.randn(2, 16, 16)).eval()
    assert peak_bytes(captured) == 3 * TENSOR
    assert peak_bytes(captured, hold_inputs=False) == 2 * TENSOR


def test_live_bytes_name_every_node_and_find_the_widest(build: Callable[[str], Network]) -> None:
    _model, _inputs, captured = build("residual")
    live = live_bytes(captured)
    assert list(live) == [node.name for node in captured.graph.nodes]
    wide = 4 * 64 * 64  # 64 channels of 8 x 8
    assert max(live.values()) == 4 * 3 * 16 * 16 + 2 * wide + wide // 4  # input, two hidden tensors, the skip


def test_following_a_graph_changes_nothing(build: Callable[[str], Network]) -> None:
    model, inputs, captured = build("residual")
    captured = capture(model.train(), inputs)
    state = {k: v.clone() for k, v in captured.state_dict().items()}
    peak_bytes(captured, 3)
    assert captured.training
    assert all(torch.equal(v, state[k]) for k, v in captured.state_dict().items())


def test_a_graph_that_depends_on_data_is_refused_by_name() -> None:
    captured = capture(nn.Linear(4, 4), torch.randn(2, 4))
    output = next(n for n in captured.graph.nodes if n.op == "output")
    with captured.graph.inserting_before(output):
        chosen = captured.graph.call_function(torch.ops.aten.item.default, (output.args[0],))
    output.args = (chosen,)
    captured.recompile()
    with pytest.raises(InputError, match=r"Peak memory cannot be computed .*item"):
        peak_bytes(captured)
