"""OpenVINO IR: two files that compute what the network computes, or an error and neither."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from palmette.deploy import export, export_openvino
from palmette.errors import ExportError, MissingDependency

openvino = pytest.importorskip("openvino", reason="openvino is not installed")


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5)]
    return nn.Sequential(*body)


class Tokens(nn.Module):
    """Dict in, dict out; one input is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, kinds: Tensor, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(input_ids) * mask[..., None]
        return {"hidden": hidden, "logits": self.head(hidden.mean(1))}


def read(file: Path) -> tuple[object, object]:
    """The file as a stranger to palmette reads it: OpenVINO's model, and a compiled one in float32."""
    core = openvino.Core()
    model = core.read_model(str(file))
    return model, core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def test_two_files_with_a_dynamic_batch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loader = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]
    parity = export(convnet(), torch.randn(1, 3, 8, 8), tmp_path / "m.xml", batches=loader)
    assert capfd.readouterr() == ("", "")
    assert parity.relative_error < 1e-5
    assert parity.top1_agreement == 1.0
    assert (parity.batches, parity.samples, parity.runtime) == ((1, 2, 5), (1 + 2 + 5) * 4, "OpenVINO (float32)")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    assert str(tmp_path).encode() not in (tmp_path / "m.xml").read_bytes()
    assert b"site-packages" not in (tmp_path / "m.xml").read_bytes()
    _, compiled = read(tmp_path / "m.xml")
    for batch in (1, 7):
        x = torch.randn(batch, 3, 8, 8)
        found = torch.from_numpy(compiled({"input": x.numpy()})["output"].copy())  # type: ignore[operator]
        torch.testing.assert_close(found, convnet().eval()(x).detach(), rtol=1e-4, atol=1e-5)


def test_names_of_inputs_and_outputs_and_fixed_axes(tmp_path: Path) -> None:
    inputs = {
        "kinds": torch.zeros(2, 7, dtype=torch.long),
        "input_ids": torch.arange(14).reshape(2, 7),
        "mask": torch.ones(2, 7),
    }
    assert export_openvino(Tokens(), inputs, tmp_path / "m.xml").relative_error < 1e-5
    model, _ = read(tmp_path / "m.xml")
    assert [port.any_name for port in model.inputs] == ["input_ids", "mask"]  # type: ignore[attr-defined]
    assert [port.any_name for port in model.outputs] == ["hidden", "logits"]  # type: ignore[attr-defined]
    assert {str(port.partial_shape) for port in model.inputs} == {"[?,7]"}  # type: ignore[attr-defined]


def test_what_fails_keeps_the_old_files_and_leaves_no_new_ones(tmp_path: Path) -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.linalg.pinv(x)[:3].t()

    class Constant(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0 + 1

    for model, words in ((Noisy(6, 3), "cannot be written for OpenVINO"), (Constant(6, 3), "not informative")):
        with pytest.raises(ExportError, match=words) as caught:
            export(model, torch.randn(2, 6), tmp_path / "m.xml")
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []
    for name in ("m.xml", "m.bin"):
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(ExportError):
        export(Constant(6, 3), torch.randn(2, 6), tmp_path / "m.xml")
    assert {file.read_bytes() for file in tmp_path.iterdir()} == {b"old"}


def test_a_file_that_differs_from_the_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = openvino.save_model

    def coarser(model: object, file: str, compress_to_fp16: bool) -> None:
        write(model, file, compress_to_fp16=not compress_to_fp16)

    monkeypatch.setattr(openvino, "save_model", coarser)
    with pytest.raises(ExportError, match="does not compute what the network computes"):
        export(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "m.xml")
    assert list(tmp_path.iterdir()) == []


def test_without_openvino_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependency, match=r"palmette\[openvino\]"):
        export(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "m.xml")
