"""ExecuTorch: the network, lowered once, with the threads that were asked for, and errors that say what is missing."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palmette.errors import ExportError, InputError
from palmette.graph.inputs import call, tensors
from palmette.meter import PteModel, measure_latency
from palmette.meter.runtime_executorch import Program, executorch_parts, to_executorch, use_threads
from palmette.meter.runtimes import load

pytest.importorskip("executorch", reason="executorch is not installed")


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()


@pytest.fixture(scope="module")
def program() -> bytes:
    """`convnet` for one sample."""
    return to_executorch(convnet(), torch.randn(1, 3, 8, 8))


def test_what_executorch_times_is_the_network(capfd: pytest.CaptureFixture[str]) -> None:
    model, x = convnet(), torch.randn(1, 3, 8, 8)
    found = measure_latency({"m": model}, x, runtime="executorch", threads=1, runs=3, warmup=1)["m"]
    assert (found.runtime, found.threads, found.dtype) == ("executorch", 1, "float32")
    assert "executorch 1" in found.hardware
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "transformer", "attention", "branches", "recurrent", "keywords"])
def test_networks_of_every_kind_agree(name: str, build: Callable[[str], Any]) -> None:
    model, inputs, _ = build(name)
    with torch.no_grad():
        expected = tensors(call(model, inputs))
    found = load({"m": model}, inputs, "executorch", 1)["m"].outputs(inputs)
    for ours, reference in zip(found, expected, strict=True):
        spread = float(reference.std())
        assert spread > 1e-3
        assert float((ours - reference).abs().max()) < 1e-4 * spread + 1e-5


@pytest.mark.slow
def test_threads_are_those_asked_for(program: bytes) -> None:
    count = executorch_parts()["bindings"]._threadpool_get_thread_count
    for threads in (2, 1):
        measure_latency(
            {"m": PteModel(program)}, torch.randn(1, 3, 8, 8), runtime="executorch", threads=threads, runs=1
        )
        assert count() == threads
        use_threads(3)
        measure_latency({"m": PteModel(program)}, torch.randn(1, 3, 8, 8), runtime="eager", threads=threads, runs=1)
        assert count() == threads


def test_a_program_outlives_changes_of_the_number_of_threads(program: bytes) -> None:
    model, x = convnet(), torch.randn(1, 3, 8, 8)
    use_threads(1)
    first = Program(program)
    run = first.bind(x)
    for threads in (2, 1, 3, 1):
        use_threads(threads)
        other = Program(program)
        for found in (first.outputs(x), run(), other.outputs(x)):
            torch.testing.assert_close(found[0], model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_program_is_called_like_its_network_sample_by_sample(program: bytes) -> None:
    model, packed = convnet(), PteModel(program)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 8, 8)
        for called in (packed, copy.deepcopy(packed)):
            torch.testing.assert_close(called(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    kept = packed(torch.ones(1, 3, 8, 8)).clone()
    first = packed(torch.ones(1, 3, 8, 8))
    packed(torch.zeros(1, 3, 8, 8))
    assert torch.equal(first, kept)  # outputs are copies, and live on


def test_other_shapes_are_refused(program: bytes) -> None:
    with pytest.raises(InputError, match=r"written for inputs \[\(1, 3, 8, 8\)\], not for \[\(1, 3, 9, 9\)\]"):
        PteModel(program)(torch.randn(1, 3, 9, 9))
    with pytest.raises(InputError, match="written for inputs"):
        measure_latency({"m": PteModel(program)}, torch.randn(1, 3, 8, 8), runtime="executorch", batch=2, runs=1)


def test_damaged_programs_are_refused_in_one_line(program: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"no program", program[: len(program) // 2]):
        with pytest.raises(ExportError, match="ExecuTorch does not load the program: ") as caught:
            Program(content)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


class Chance(nn.Module):
    """Random numbers have no kernel in ExecuTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_a_missing_operator_is_named() -> None:
    content = to_executorch(Chance(), torch.randn(2, 2))
    with pytest.raises(ExportError, match=r"Missing operator: .*randn_like"):
        Program(content)


def test_what_does_not_lower_is_said_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="cannot be lowered for ExecuTorch") as caught:
        to_executorch(Branching(), torch.randn(2, 2))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_first_use_in_a_process_is_silent() -> None:
    script = (
        "import torch\n"
        "from palmette.meter import measure_latency\n"
        "measure_latency({'m': torch.nn.Linear(2, 2)}, torch.randn(1, 2), runtime='executorch', runs=1)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_strides_of_axes_of_length_one_do_not_matter() -> None:
    """A batch of gray images that were permuted has the strides of another layout (pytorch/executorch issue 19153)."""
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(180, 3)).eval()
    x = torch.randn(1, 8, 8, 1).permute(0, 3, 1, 2)
    assert x.is_contiguous()
    assert x.stride() != torch.empty(1, 1, 8, 8).stride()
    found = load({"m": model}, x, "executorch", 1)["m"].outputs(x)[0]
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-4, atol=1e-5)
