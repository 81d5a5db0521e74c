"""The list of runtimes: what each needs, and that another network's time is never taken for this one's."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palmette.cli.options import RUNTIME_NAMES
from palmette.errors import ExportError, InputError, MissingDependency
from palmette.meter import RUNTIMES, OnnxModel, PteModel, measure_latency, runtimes
from palmette.meter.running import Loaded
from palmette.meter.runtimes import check_runtime, load, runtime_named
from palmette.report.words import RUNTIMES as CALLED


def test_every_runtime_is_named_in_the_help_and_the_report() -> None:
    assert RUNTIME_NAMES.split(", ") == list(RUNTIMES)
    assert {name: runtime_named(name).title for name in RUNTIMES}.items() <= CALLED.items()


def test_an_unknown_runtime_is_refused_with_those_known() -> None:
    with pytest.raises(InputError, match=r"No runtime is called 'abacus'\. Known: eager, compile, onnxruntime"):
        check_runtime("abacus")


@pytest.mark.parametrize(
    ("name", "extra"),
    [("onnxruntime", "onnx"), ("openvino", "openvino"), ("openvino-bf16", "openvino"), ("executorch", "executorch")],
)
def test_a_missing_package_is_named_with_its_extra(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match=rf"pip install palmette\[{extra}\]"):
        check_runtime(name)


def test_looking_at_the_list_imports_no_runtime() -> None:
    script = (
        "import sys, palmette.meter, palmette.deploy\n"
        "heavy = ('openvino', 'executorch', 'onnxruntime', 'torchao', 'torch._dynamo', 'torch._inductor')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_packed_network_runs_where_its_format_is_read() -> None:
    x = torch.randn(1, 2)
    with pytest.raises(InputError, match=r"'q' is a OnnxModel, which ExecuTorch \(XNNPACK\) does not run"):
        measure_latency({"q": OnnxModel(b"")}, x, runtime="executorch")
    with pytest.raises(InputError, match="Use one of eager, executorch"):
        measure_latency({"q": PteModel(b"")}, x, runtime="onnxruntime")


def replaced(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """A runtime "compile" that runs `change(model)` eagerly in place of the model."""

    def loaded(models: list[nn.Module], inputs: Any, threads: int, fast: bool) -> list[Loaded]:
        return runtime_named("eager").load([change(model) for model in models], inputs, threads, fast)

    faulty = dataclasses.replace(runtime_named("compile"), load=loaded, check=None)
    monkeypatch.setitem(runtimes._KNOWN, "compile", faulty)


def test_a_runtime_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)

    def off(scale: float) -> Any:
        def change(model: nn.Module) -> nn.Module:
            wrong = nn.Linear(4, 3)
            with torch.no_grad():
                wrong.weight.copy_(model.weight * scale)
                wrong.bias.copy_(model.bias * scale)
            return wrong

        return change

    replaced(monkeypatch, off(1.001))
    assert load({"m": model}, x, "compile", 1)["m"].bind(x)().shape == (2, 3)
    for wrong in (off(1.05), off(float("nan")), lambda _: nn.Linear(4, 2)):
        replaced(monkeypatch, wrong)
        with pytest.raises(ExportError, match=r"torch\.compile does not compute what the network computes"):
            load({"m": model}, x, "compile", 1)


def test_networks_of_chance_or_without_a_finite_output_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.randn_like(x)

    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            return x * 0 + self.value

    replaced(monkeypatch, lambda model: model)
    models = {"noise": Noise(), "infinite": Constant(float("inf")), "zero": Constant(0.0)}
    assert set(load(models, torch.randn(2, 2), "compile", 1)) == set(models)
