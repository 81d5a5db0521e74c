"""int8: a smaller file that decides as the network does, or an error and no file."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palmette.cli import main
from palmette.data import load_source
from palmette.deploy import quantize_int8
from palmette.errors import DataError, ExportError, InputError, MissingDependency
from palmette.meter import OnnxModel, PteModel, measure_latency
from palmette.train.evaluate import evaluate

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def digits() -> Any:
    """scikit-learn's digits."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    return load_source("digits")


@pytest.fixture(scope="module")
def trained(digits: Any) -> nn.Module:
    """A small convolutional network with batch norm, trained for a few epochs."""
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, stride=2)]
    model = nn.Sequential(*body, nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(), nn.LazyLinear(128), nn.ReLU())
    model.append(nn.Linear(128, 10))
    model(digits.example_inputs)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(6):
        for images, labels in digits.train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("calibration", ["minmax", *(pytest.param(c, marks=SLOW) for c in ("entropy", "percentile"))])
def test_int8_decides_as_the_network_and_is_smaller(
    calibration: str, digits: Any, trained: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = quantize_int8(
        trained, digits.example_inputs, digits.calibration, tmp_path / "q.onnx", calibration=calibration, samples=150
    )
    assert capfd.readouterr() == ("", "")
    assert (made.samples, made.parity.samples, made.calibration) == (150, 150, calibration)
    assert 15 < made.parity.snr_db < 60
    assert made.parity.top1_agreement is not None
    assert made.parity.top1_agreement > 0.95
    assert made.parity.spread > 0.1
    assert made.share > 0.99
    assert [file.name for file in tmp_path.iterdir()] == ["q.onnx"]
    assert made.size == (tmp_path / "q.onnx").stat().st_size < sum(p.numel() for p in trained.parameters()) * 4 * 0.5
    assert json.loads(json.dumps(made.to_dict()))["parity"]["samples"] == 150
    dense, small = evaluate(trained, digits.val), evaluate(made.model, digits.val)
    assert dense.accuracy > 0.9
    assert abs(dense.accuracy - small.accuracy) < 0.03


def test_int8_is_timed_beside_the_network(digits: Any, trained: nn.Module, tmp_path: Path) -> None:
    made = quantize_int8(trained, digits.example_inputs, digits.calibration, tmp_path / "q.onnx", samples=32)
    assert isinstance(made.model, OnnxModel)
    for runtime in ("eager", "onnxruntime"):
        models = {"float": trained, "int8": copy.deepcopy(made.model)}
        found = measure_latency(models, digits.example_inputs, runtime=runtime, threads=1, runs=3, fast=True)
        assert [entry.dtype for entry in found.values()] == ["float32", "int8"]


@SLOW
def test_executorch_quantises_too(digits: Any, trained: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="executorch is not installed")
    file = tmp_path / "q.pte"
    made = quantize_int8(
        trained, digits.example_inputs, digits.calibration, file, backend="executorch", batches=digits.val, samples=64
    )
    assert isinstance(made.model, PteModel)
    assert made.parity.snr_db > 15
    assert made.share > 0.98  # biases stay in floating point
    assert made.size < sum(p.numel() for p in trained.parameters()) * 4 * 0.5
    assert abs(evaluate(trained, digits.val).accuracy - evaluate(made.model, digits.val).accuracy) < 0.03
    found = measure_latency({"q": made.model}, digits.example_inputs, runtime="executorch", threads=1, runs=3)["q"]
    assert found.dtype == "int8"


class Recurrent(nn.Module):
    """Two GRUs, which no backend quantises, and perhaps a linear layer behind them."""

    def __init__(self, head: bool = False) -> None:
        super().__init__()
        self.body, self.last = nn.GRU(6, 16, batch_first=True), nn.GRU(16, 4, batch_first=True)
        self.head = nn.Linear(4, 3) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.body(x)[0])[0][:, -1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("executorch", marks=SLOW)])
def test_a_network_in_which_nothing_is_quantised_is_refused(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    x = torch.randn(8, 5, 6)
    with pytest.raises(ExportError, match=r"Nothing in this network can be quantised.*weights in float32"):
        quantize_int8(Recurrent(), x[:2], [x], tmp_path / "q", backend=backend)
    assert list(tmp_path.iterdir()) == []
    made = quantize_int8(Recurrent(head=True), x[:2], [x], tmp_path / "q", backend=backend, min_snr_db=0)
    assert 0 < made.share < 0.02
    assert "1 % of the weights quantised" in str(made)


def test_a_network_in_float64_is_not_called_int8(tmp_path: Path) -> None:
    x = torch.randn(8, 6).double()
    with pytest.raises(ExportError, match="weights in float64"):
        quantize_int8(nn.Linear(6, 3).double(), x[:2], [x], tmp_path / "q.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_network_whose_output_tells_nothing_is_refused(tmp_path: Path) -> None:
    vanishing = nn.Linear(6, 3)
    with torch.no_grad():
        vanishing.weight.mul_(1e-9)
        vanishing.bias.zero_()
    with pytest.raises(ExportError, match=r"not informative.*calibrate its batch norms"):
        quantize_int8(vanishing, torch.randn(2, 6), [torch.randn(8, 6)], tmp_path / "q.onnx")
    assert list(tmp_path.iterdir()) == []


class Wide(nn.Module):
    """One of its activations has outliers that leave the other values a single step of eight bits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 64), nn.Linear(64, 3, bias=False)
        with torch.no_grad():
            self.body.weight[0] *= 1e5
            self.head.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def test_a_loss_beyond_the_bound_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    loader = [torch.randn(64, 6)]
    with pytest.raises(ExportError, match=r"10 dB or more are asked for.*Calibrate on more batches"):
        quantize_int8(Wide(), torch.randn(2, 6), loader, tmp_path / "q.onnx")
    assert list(tmp_path.iterdir()) == []
    made = quantize_int8(Wide(), torch.randn(2, 6), loader, tmp_path / "q.onnx", min_snr_db=-1000.0)
    assert made.parity.snr_db < 10


@pytest.mark.parametrize("wrong", [{"backend": "abacus"}, {"calibration": "guess"}, {"samples": 0}])
def test_unknown_options_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        quantize_int8(nn.Linear(2, 2), torch.randn(2, 2), [torch.randn(2, 2)], tmp_path / "q.onnx", **wrong)
    with pytest.raises(DataError, match="no calibration data"):
        quantize_int8(nn.Linear(2, 2), torch.randn(2, 2), [], tmp_path / "q.onnx")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(MissingDependency, match=r"palmette\[onnx\]"):
        quantize_int8(nn.Linear(2, 2), torch.randn(2, 2), [torch.randn(2, 2)], tmp_path / "q.onnx")


def code_of(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_export_in_8_bits_from_the_command_line(
    digits: Any, trained: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "q.onnx"
    assert code_of(["export", "-m", "palmette:mlp", "-d", "digits", "--int8", "-o", str(out)]) == 0
    assert "int8" in capsys.readouterr().out
    assert out.is_file()
    for arguments, words in ((["-d", "digits", "-o", str(tmp_path / "q.xml")], "'.xml'"), (["-o", str(out)], "--data")):
        command = ["export", "-m", "palmette:mlp", "--image-size", "8", "--classes", "10", "--int8", *arguments]
        assert code_of(command) == 2
        assert words in " ".join(capsys.readouterr().err.split())


@SLOW
def test_resnet20_keeps_its_accuracy_in_8_bits(palmette_data: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(palmette_data))
    try:
        model = importlib.import_module("networks").build("cifar10_resnet20_akamaster")[0]
    finally:
        sys.path.remove(str(palmette_data))
    data = load_source(f"cifar10:{palmette_data}/cifar10?norm=imagenet&train=600&val=500&test=100&batch=100")
    made = quantize_int8(model, data.example_inputs, data.calibration, tmp_path / "q.onnx", batches=data.val)
    assert made.parity.spread > 0.5  # the reference tells samples apart, so that the ratio below means something
    assert made.parity.snr_db > 20
    assert made.parity.top1_agreement is not None
    assert made.parity.top1_agreement > 0.97
    assert made.size < sum(p.numel() for p in model.parameters()) * 4 / 3
    dense, small = evaluate(model, data.val), evaluate(made.model, data.val)
    assert dense.accuracy > 0.9
    assert abs(dense.accuracy - small.accuracy) <= 0.02
