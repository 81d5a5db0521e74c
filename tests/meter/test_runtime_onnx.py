"""ONNX graphs as modules: called, copied, evaluated and timed like the network that they were made from."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from palmette.errors import ExportError, InputError
from palmette.meter import OnnxModel, measure_latency
from palmette.meter.runtime_onnx import to_onnx

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


class Named(nn.Module):
    """Takes its inputs by name, gives two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(a) + self.right(b), a.sum(1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Named, OnnxModel]:
    """A network, and its graph with a dynamic batch."""
    from palmette.deploy import export_onnx

    torch.manual_seed(0)
    model = Named().eval()
    file = Path(tmp_path_factory.mktemp("onnx"), "m.onnx")
    export_onnx(model, {"a": torch.randn(2, 6), "b": torch.randn(2, 4)}, file)
    return model, OnnxModel(file.read_bytes())


@pytest.mark.parametrize("batch", [1, 5])
def test_a_graph_is_called_like_its_network(exported: tuple[Named, OnnxModel], batch: int) -> None:
    model, packed = exported
    a, b = torch.randn(batch, 6), torch.randn(batch, 4)
    for found in (packed(a, b), packed(b=b, a=a), copy.deepcopy(packed)(a, b)):
        for ours, reference in zip(found, model(a, b), strict=True):
            torch.testing.assert_close(ours, reference.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"takes the inputs \['a', 'b'\], and 1 tensors were given"):
        packed(a)


def test_copies_share_no_session(exported: tuple[Named, OnnxModel]) -> None:
    _, packed = exported
    packed(torch.randn(1, 6), torch.randn(1, 4))
    assert packed._sessions
    assert not copy.deepcopy(packed)._sessions


def test_a_graph_is_timed_beside_its_network(exported: tuple[Named, OnnxModel]) -> None:
    model, packed = exported
    inputs = {"a": torch.randn(2, 6), "b": torch.randn(2, 4)}
    for runtime in ("eager", "onnxruntime"):
        found = measure_latency(
            {"network": model, "graph": packed}, inputs, runtime=runtime, batch=3, runs=3, fast=True
        )
        assert {(entry.batch, entry.runtime) for entry in found.values()} == {(3, runtime)}
    assert measure_latency({"q": OnnxModel(packed.content, "int8")}, inputs, runs=1, warmup=1)["q"].dtype == "int8"


def test_the_session_of_a_graph_has_torchs_threads(exported: tuple[Named, OnnxModel]) -> None:
    packed = copy.deepcopy(exported[1])
    measure_latency({"q": packed}, (torch.randn(2, 6), torch.randn(2, 4)), threads=2, runs=1, warmup=1)
    assert list(packed._sessions) == [2]
    assert packed._sessions[2].get_session_options().intra_op_num_threads == 2


def test_a_graph_without_a_dynamic_batch_runs_at_its_own() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    (graph,) = to_onnx([model], x, fast=True)
    torch.testing.assert_close(OnnxModel(graph)(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ExportError, match="ONNX Runtime does not run"):
        OnnxModel(b"no graph")(x)
