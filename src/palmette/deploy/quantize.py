"""8-bit networks after training: weights and activations are quantised by a library, ranges come from real batches.

ONNX Runtime: static QDQ, int8 weights per channel, uint8 activations per tensor. ExecuTorch: torchao's pt2e flow with
the quantizer of XNNPACK, int8 both, weights per channel. Parity is statistical: single values move by a step.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from palmette.compat import optional
from palmette.deploy.onnx import export_onnx
from palmette.deploy.parity import Bounds, Parity, inputs_of, measure_parity
from palmette.deploy.plain import Prepared
from palmette.errors import DataError, ExportError, InputError
from palmette.files import atomic_path
from palmette.graph.inputs import Example, batch_size, map_tensors, one_sample, tensors, with_batch
from palmette.graph.int8 import without_integers
from palmette.graph.ops import get_tensor, op_name
from palmette.meter.running import Flat, Packed, quiet, reason
from palmette.meter.runtime_executorch import PteModel, executorch_parts, in_order, lowered, use_threads
from palmette.meter.runtime_onnx import OnnxModel, feeds_by_order, onnx_session

_METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
_ADVICE = (
    "Calibrate on more batches, try calibration='percentile', or accept less with min_snr_db; "
    "networks of depthwise convolutions may need training with quantisation."
)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What `quantize_int8` made.

    model: to be called, evaluated and timed like any module. file: where it lies, of `size` bytes. parity: against the
    network in floating point, on the calibration samples or those given. samples: how many set the ranges. share: of
    the weights, by number, that the file holds quantised; the others stay in floating point.
    """

    model: Packed
    file: Path
    size: int
    parity: Parity
    backend: str
    calibration: str
    samples: int
    share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the model."""
        kept = {key: value for key, value in vars(self).items() if key != "model"}
        return {**kept, "file": self.file.name, "parity": self.parity.to_dict()}

    def __str__(self) -> str:
        weights = f"{100 * self.share:.0f} % of the weights quantised"
        return f"{self.file.name}: {self.size:,} bytes, {weights}, {self.samples} calibration samples; {self.parity}"


def quantize_int8(
    model: nn.Module,
    example_inputs: Example,
    calibration_loader: Iterable[Any],
    file: str | Path,
    *,
    backend: str = "onnxruntime",
    calibration: str = "minmax",
    samples: int = 256,
    batches: Iterable[Any] | None = None,
    min_snr_db: float = 10.0,
) -> Quantized:
    """Write an int8 version of `model` to `file` and return it with its parity.

    calibration_loader: batches of real inputs, or (inputs, target) pairs; up to `samples` of them set the ranges of
    activations, and measure the parity unless `batches` gives others. backend: "onnxruntime" (a file with a dynamic
    batch) or "executorch" (a .pte for one sample at a time). calibration: "minmax", "entropy" or "percentile", for ONNX
    Runtime. min_snr_db: least ratio of the output's variance to the mean squared error of quantisation.

    Raises ExportError (nothing is written then) when the network cannot be exported, when nothing in it can be
    quantised or it loses more, InputError for an unknown option, DataError without calibration data, MissingDependency
    without the packages of the backend.
    """
    if backend not in _BACKENDS:
        raise InputError(f"No backend is called {backend!r}", fix=f"Known: {', '.join(_BACKENDS)}.")
    if calibration not in _METHODS or samples < 1:
        raise InputError(
            f"calibration={calibration!r}, samples={samples} is not possible",
            fix=f"calibration is one of {', '.join(_METHODS)}, and samples at least 1.",
        )
    real = _collect(calibration_loader, example_inputs, samples)
    compared = real if batches is None else _collect(batches, example_inputs, samples)
    prepared = Prepared(model, example_inputs)
    target = Path(file)
    made, share = _BACKENDS[backend](model, example_inputs, real, calibration)
    if share is None:
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        raise ExportError(
            "Nothing in this network can be quantised",
            where=f"{backend}, weights in {' and '.join(dtypes) or 'no format'}",
            why="none of its operations has an 8-bit form there",
            fix="Quantise a float32 network with convolutions or linears, and keep this one in floating point.",
        )
    with atomic_path(target) as temporary:
        temporary.write_bytes(made.content)
        made = type(made)(temporary.read_bytes(), made.precision)
        parity = measure_parity(
            prepared.reference,
            lambda inputs: tensors(made(*_as_arguments(inputs))),
            example_inputs,
            None,
            main=prepared.main,
            runtime=f"{backend}, int8",
            cases=compared,
            sizes=tuple(sorted({batch_size(inputs) for inputs in compared})),
            bounds=Bounds(max_relative_error=None, min_snr_db=min_snr_db, advice=_ADVICE),
        )
    return Quantized(
        model=made,
        file=target,
        size=len(made.content),
        parity=parity,
        backend=backend,
        calibration=calibration if backend == "onnxruntime" else "observers of XNNPACKQuantizer",
        samples=sum(batch_size(inputs) for inputs in real),
        share=share,
    )


def _as_arguments(inputs: Any) -> tuple[Any, ...]:
    return tuple(tensors(inputs))


def _collect(loader: Iterable[Any], example_inputs: Example, samples: int) -> list[Any]:
    """Batches on the CPU, `samples` samples in all at most. Raises DataError when there are none."""
    found: list[Any] = []
    left = samples
    for batch in loader:
        inputs = map_tensors(lambda t: t.detach().cpu(), inputs_of(batch, example_inputs))
        found.append(with_batch(inputs, min(left, batch_size(inputs))))
        left -= batch_size(found[-1])
        if left <= 0:
            break
    if not found:
        raise DataError("There is no calibration data", fix="Pass a loader that yields at least one batch.")
    return found


def _samples(real: list[Any]) -> Iterator[Any]:
    for inputs in real:
        yield from (one_sample(inputs, index) for index in range(batch_size(inputs)))


class _Reader:
    """Calibration batches as ONNX Runtime's quantiser reads them."""

    def __init__(self, feeds: Iterator[dict[str, Any]]) -> None:
        self.feeds = feeds

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, None at the end."""
        return next(self.feeds, None)


_Made = tuple[Packed, float | None]
"""A network in 8 bits, and the share of its weights that are quantised; None where nothing in it is."""


def _by_onnxruntime(model: nn.Module, example_inputs: Example, real: list[Any], calibration: str) -> _Made:
    """The network as a QDQ graph; the float32 graph before it had its parity checked, so the rest is quantisation."""
    onnx = optional("onnx", package="palmette[onnx]")
    quantization = optional("onnxruntime.quantization", package="palmette[onnx]")
    shapes = optional("onnxruntime.quantization.shape_inference", package="palmette[onnx]")
    with tempfile.TemporaryDirectory() as folder:
        plain, ready, done = (Path(folder, f"{name}.onnx") for name in ("plain", "ready", "done"))
        export_onnx(without_integers(model), example_inputs, plain, batches=real)
        session = onnx_session(plain.read_bytes(), torch.get_num_threads())
        feeds = (feeds_by_order(session, one) for one in _samples(real))  # its histograms want batches of one size
        try:
            with quiet():
                shapes.quant_pre_process(str(plain), str(ready))
                quantization.quantize_static(
                    str(ready),
                    str(done),
                    _Reader(feeds),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=quantization.QuantType.QUInt8,  # with int8 weights: what x86 and ARM kernels take
                    weight_type=quantization.QuantType.QInt8,
                    calibrate_method=getattr(quantization.CalibrationMethod, _METHODS[calibration]),
                )
        except Exception as error:  # the quantiser raises ValueError, RuntimeError and onnx's own
            raise ExportError("ONNX Runtime cannot quantise this network", why=reason(error)) from error
        return OnnxModel(done.read_bytes(), "int8"), _share_of_onnx(onnx, onnx.load(str(done)).graph)


def _share_of_onnx(onnx: Any, graph: Any) -> float | None:
    """The share of the weights in a QDQ graph that are quantised, None where nothing is."""
    marks = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    stored = {node.input[0] for node in marks if node.op_type == "DequantizeLinear"}
    scales = {name for node in marks for name in node.input[1:]}
    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
    weights = [t for t in graph.initializer if t.name in stored or (t.name not in scales and t.data_type in floating)]
    return _share({t.name: math.prod(t.dims) for t in weights}, stored) if marks else None


def _share_of_graph(gm: fx.GraphModule) -> float | None:
    """The same of a graph that torchao has quantised."""
    marks = [node for node in gm.graph.nodes if "quantize_per_" in op_name(node)]
    stored = {str(node.args[0]) for node in marks if op_name(node).startswith("dequantize")}
    scales = {argument for node in marks for argument in node.all_input_nodes[1:]}
    held = [node for node in gm.graph.nodes if node.op == "get_attr" and node not in scales]
    weights = {node.name: get_tensor(gm, str(node.target)) for node in held}
    sizes = {name: t.numel() for name, t in weights.items() if name in stored or t.is_floating_point()}
    return _share(sizes, stored) if marks else None


def _share(sizes: dict[str, int], stored: set[str]) -> float:
    return sum(size for name, size in sizes.items() if name in stored) / max(sum(sizes.values()), 1)


def _by_executorch(model: nn.Module, example_inputs: Example, real: list[Any], calibration: str) -> _Made:
    """The network as a .pte for one sample, what XNNPACK can do in int8 delegated to it."""
    del calibration
    parts = executorch_parts()
    quantizers = optional("executorch.backends.xnnpack.quantizer.xnnpack_quantizer", package="palmette[executorch]")
    flow = optional("torchao.quantization.pt2e.quantize_pt2e", package="palmette[executorch]")
    prepared = Prepared(model, example_inputs)
    one = with_batch(prepared.inputs, 1)
    arguments = tuple(map(in_order, tensors(one)))
    settings = quantizers.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = quantizers.XNNPACKQuantizer().set_global(settings)
    use_threads(torch.get_num_threads())
    try:
        with quiet(), torch.no_grad():
            graph = torch.export.export(Flat(prepared.model, one).eval(), arguments).module()
            observed = flow.prepare_pt2e(graph, quantizer)
            for inputs in _samples(real):
                observed(*tensors(inputs))
            converted = flow.convert_pt2e(observed)
            program = lowered(parts, torch.export.export(converted, arguments))
    except Exception as error:  # torch.export, torchao and ExecuTorch raise whatever they like
        raise ExportError("ExecuTorch cannot quantise this network", why=reason(error)) from error
    return PteModel(program, "int8"), _share_of_graph(converted)


_BACKENDS: dict[str, Callable[[nn.Module, Example, list[Any], str], _Made]] = {
    "onnxruntime": _by_onnxruntime,
    "executorch": _by_executorch,
}
