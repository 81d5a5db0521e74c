"""Parity of a runtime with eager, without a file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from palmette.deploy import runtime_parity
from palmette.errors import ExportError, InputError

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10))


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "openvino"])
def test_a_runtime_in_float32_agrees(runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    model = convnet().train()
    batches = [(torch.randn(6, 3, 8, 8), torch.zeros(6)), torch.randn(2, 3, 8, 8)]
    parity = runtime_parity(model, torch.randn(4, 3, 8, 8), runtime, batches=batches, threads=1)
    assert parity.relative_error < 1e-5
    assert parity.snr_db > 100
    assert (parity.batches, parity.samples, parity.top1_agreement) == ((4,), 5 * 4, 1.0)
    assert model.training


def test_bfloat16_is_rougher_and_says_so() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    try:
        parity = runtime_parity(convnet(), torch.randn(8, 3, 8, 8), "openvino-bf16")
    except InputError as error:
        pytest.skip(f"openvino-bf16: {error}")
    assert 1e-4 < parity.relative_error < 0.1
    assert 20 < parity.snr_db < 80


def test_the_decisive_output_is_found_among_several() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": x.sum(1), "logits": self.head(x)}

    parity = runtime_parity(Two(), torch.randn(5, 4), "onnxruntime")
    assert parity.top1_agreement == 1.0  # by logits; the other output has one column


def test_a_comparison_that_tells_nothing_is_refused() -> None:
    with pytest.raises(ExportError, match="not informative"):
        runtime_parity(nn.Sequential(nn.Linear(4, 3), nn.Threshold(1e9, 1.0)), torch.randn(5, 4), "onnxruntime")
