"""ExecuTorch programs: one file that computes what the network computes, or an error and none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from palmette.deploy import export, export_executorch
from palmette.errors import ExportError
from palmette.meter.runtime_executorch import executorch_parts

pytest.importorskip("executorch", reason="executorch is not installed")


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5)]
    return nn.Sequential(*body)


@pytest.mark.slow
def test_one_file_for_one_sample(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loader = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)), torch.randn(20, 3, 8, 8)]
    parity = export(convnet(), torch.randn(2, 3, 8, 8), tmp_path / "m.pte", batches=loader)
    assert capfd.readouterr() == ("", "")
    assert parity.relative_error < 1e-5
    assert parity.top1_agreement == 1.0
    assert (parity.batches, parity.samples) == ((1,), 2 + 4 + 8 + 8)
    assert "batch size 1)" in str(parity)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pte"]
    assert str(tmp_path).encode() not in (tmp_path / "m.pte").read_bytes()
    loaded = executorch_parts()["runtime"].load_program(tmp_path / "m.pte")
    x = torch.randn(1, 3, 8, 8)
    (found,) = loaded.load_method("forward").execute([x])
    torch.testing.assert_close(found, convnet().eval()(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_fails_keeps_the_old_file_and_leaves_no_new_one(tmp_path: Path) -> None:
    class Constant(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0 + 1

    with pytest.raises(ExportError, match="not informative"):
        export_executorch(Constant(6, 3), torch.randn(2, 6), tmp_path / "m.pte")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "m.pte").write_bytes(b"old")
    with pytest.raises(ExportError, match="not informative"):
        export_executorch(Constant(6, 3), torch.randn(2, 6), tmp_path / "m.pte")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]
