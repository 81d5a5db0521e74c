"""torch.compile: what is timed is compiled, also for the tenth network of a class; a missing compiler is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from palmette.errors import ExportError, MissingDependency
from palmette.meter import measure_latency
from palmette.meter.runtime_compile import RUNTIME, need_compiler

try:
    need_compiler()
    COMPILER = True
except MissingDependency:
    COMPILER = False
with_compiler = pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler, and there is none")


class Tells(nn.Module):
    """Gives 2x when it is compiled, and 3x otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if torch.compiler.is_compiling() else 3.0)


@with_compiler
def test_all_of_many_networks_of_one_class_are_compiled() -> None:
    x = torch.randn(3)
    many = RUNTIME.load([Tells() for _ in range(10)], x, 1, False)
    for loaded in many:
        torch.testing.assert_close(loaded.outputs(x)[0], 2 * x)
        with torch.inference_mode():
            torch.testing.assert_close(loaded.bind(x)(), 2 * x)
    torch.testing.assert_close(Tells()(x), 3 * x)


@with_compiler
def test_compiled_networks_are_timed_and_agree() -> None:
    models = {"a": nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()), "b": nn.Linear(8, 2)}
    found = measure_latency(models, torch.randn(2, 8), runtime="compile", threads=1, runs=3, warmup=1)
    assert list(found) == ["a", "b"]
    assert {(entry.runtime, entry.threads, entry.dtype) for entry in found.values()} == {("compile", 1, "float32")}


def test_without_a_compiler_the_message_says_what_to_install() -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(MissingDependency, match=r"C\+\+ compiler.*Install g\+\+.*CXX"):
            measure_latency({"m": nn.Linear(2, 2)}, torch.randn(1, 2), runtime="compile")


@with_compiler
def test_what_does_not_compile_is_said_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(7, 7)

    with pytest.raises(ExportError, match=r"torch\.compile cannot compile this network") as caught:
        RUNTIME.load([Broken()], torch.randn(2, 3), 1, False)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
