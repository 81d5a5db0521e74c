"""How wrong a layer's weight gradient becomes under each codec, measured on the sample, a few layers at a time.

The input gradient is exact under nearly every codec, so the gradient that reaches a layer does not depend on how the
others keep their inputs: each layer can be probed with the rest keeping nothing. Memory stays within a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from palmette.errors import InputError
from palmette.graph.inputs import call
from palmette.meter.training import left_as_found
from palmette.ondevice.codec import Codec, Payload, State
from palmette.ondevice.layer import Layer
from palmette.ondevice.mode import AdaptMode, Engine
from palmette.ondevice.plan import Fold, MemoryPlan
from palmette.ondevice.trace import Call, Trace
from palmette.train.progress import progress

Options = Callable[[Tensor, Layer], Sequence[Codec]]


@dataclass(frozen=True)
class Findings:
    """Of one layer: the squared norm of its weight gradient, and each codec with the squared error it makes."""

    energy: float
    choices: tuple[tuple[Codec, float], ...]


@dataclass(frozen=True, kw_only=True)
class _Nothing(Codec):
    """For a layer that is not probed now."""

    name: ClassVar[str] = ""

    def encode(self, x: Tensor, state: State) -> Payload:  # noqa: ARG002
        return (x.new_zeros(()),)

    def decode(self, payload: Payload, layer: Layer) -> Tensor:
        return payload[0].expand(layer.x_shape)  # a norm asks for it

    def weight_gradient(self, payload: Payload, layer: Layer, grad: Tensor) -> Tensor:  # noqa: ARG002
        return grad.new_zeros(layer.weight_shape)  # autograd asks for it, and drops it


@dataclass(frozen=True, kw_only=True, eq=False)
class _Probe(Codec):
    """Keeps all, and tries each codec against it."""

    name: ClassVar[str] = ""
    options: Any = None
    found: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Nothing to check: no user makes one."""

    def encode(self, x: Tensor, state: State) -> Payload:  # noqa: ARG002
        return (x,)

    def weight_gradient(self, payload: Payload, layer: Layer, grad: Tensor) -> Tensor:
        (x,) = payload
        true = layer.weight_gradient(x, grad)
        rows = [_by_row(true)]
        codecs = [codec for codec in self.options(x, layer) if codec.can_encode(x.shape)]
        for codec in codecs:
            nearly = codec.weight_gradient(codec.encode(x, {}), layer, grad)
            rows.append(_by_row(nearly.to(true.dtype) - true))
        self.found.append((codecs, torch.stack(rows)))
        return true


def _by_row(weight: Tensor) -> Tensor:
    return weight.flatten(1).square().sum(1)


def probe(
    model: nn.Module,
    found: Trace,
    x: Any,
    y: Any,
    loss: Callable[[Any, Any], Tensor],
    options: Options,
    *,
    limit: int,
) -> dict[str, Findings]:
    """Findings for every trainable convolution and linear layer.

    limit: bytes of inputs that may be kept at a time; one layer is always probed, however large its input.
    """
    layers = [entry for entry in found.layers() if entry.layer is not None]
    results: dict[str, Findings] = {}
    with progress("probe layers", len(layers)) as report:
        for group in _groups(layers, limit):
            results |= _probe_group(model, found, {entry.key for entry in group}, x, y, loss, options)
            report(len(results), group[-1].key)
    return results


def channel_norms(
    model: nn.Module,
    found: Trace,
    x: Any,
    y: Any,
    loss: Callable[[Any, Any], Tensor],
    keys: set[str],
    axis: str,
    *,
    limit: int,
) -> dict[str, Tensor]:
    """The norm of the weight gradient of each channel, for these layers; axis: "inputs" or "outputs"."""
    results: dict[str, Tensor] = {}
    layers = [entry for entry in found.layers() if entry.key in keys and entry.layer is not None]
    with progress("gradient norms", len(layers)) as report:
        for group in _groups(layers, limit):
            probes = {entry.key: _Norms(axis=axis) for entry in group}
            _run_probes(model, found, probes, x, y, loss)
            for key, entry in probes.items():
                if entry.found:
                    results[key] = entry.found[0](_row_scale(model, found.folds.get(key)))
            report(len(results), group[-1].key)
    return results


@dataclass(frozen=True, kw_only=True, eq=False)
class _Norms(Codec):
    """Keeps all, and measures the gradient of each channel."""

    name: ClassVar[str] = ""
    axis: str = "inputs"
    found: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Nothing to check: no user makes one."""

    def encode(self, x: Tensor, state: State) -> Payload:  # noqa: ARG002
        return (x,)

    def weight_gradient(self, payload: Payload, layer: Layer, grad: Tensor) -> Tensor:
        true = layer.weight_gradient(payload[0], grad)
        squares = true.flatten(2).square().sum(2) if true.dim() > 2 else true.square()  # [outputs, inputs per group]

        def norms(scale: Tensor | None) -> Tensor:
            rows = squares if scale is None else squares * scale.square()[:, None]
            if self.axis == "outputs":
                return rows.sum(1).sqrt()
            return rows.view(layer.groups, -1, rows.shape[1]).sum(1).flatten().sqrt()

        self.found.append(norms)
        return true


def _groups(layers: Iterable[Call], limit: int) -> list[list[Call]]:
    groups: list[list[Call]] = []
    room = -1
    for entry in layers:
        room -= entry.storage_bytes
        if room < 0:
            groups.append([])
            room = limit - entry.storage_bytes
        groups[-1].append(entry)
    return groups


def _probe_group(
    model: nn.Module,
    found: Trace,
    keys: set[str],
    x: Any,
    y: Any,
    loss: Callable[[Any, Any], Tensor],
    options: Options,
) -> dict[str, Findings]:
    probes = {key: _Probe(options=options) for key in sorted(keys)}
    _run_probes(model, found, probes, x, y, loss)
    return {key: _findings(entry.found, _row_scale(model, found.folds.get(key))) for key, entry in probes.items()}


def _run_probes(
    model: nn.Module,
    found: Trace,
    probes: Mapping[str, Codec],
    x: Any,
    y: Any,
    loss: Callable[[Any, Any], Tensor],
) -> None:
    """One forward and backward pass in which just the probed layers keep something."""
    codecs = {entry.key: probes.get(entry.key, _Nothing()) for entry in found.layers()}
    plan = MemoryPlan(method="probe", scope="saved", budget=None, inputs=(), codecs=codecs, folds=found.folds)
    weights = _weights(model, found, set(probes))
    with left_as_found(model.modules()), torch.enable_grad():
        with AdaptMode(model, Engine(plan)):
            output = call(model, x)
        try:
            torch.autograd.grad(loss(output, y), weights, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise InputError(
                "A part of the model is run again in the backward pass, outside of the plan",
                fix="Use checkpoint(..., use_reentrant=False) in the model, or no checkpoint.",
            ) from error


def _weights(model: nn.Module, found: Trace, keys: set[str]) -> list[nn.Parameter]:
    """The parameters whose gradients make the probed layers compute theirs."""
    known = dict(model.named_parameters())
    names = {name for entry in found.layers() if entry.key in keys for name in entry.weights}
    names |= {name for key in keys for name in found.folded_weights.get(key, ())}
    return [known[name] for name in sorted(names) if name in known and known[name].requires_grad]


def _row_scale(model: nn.Module, fold: Fold | None) -> Tensor | None:
    """What the batch norm after a layer multiplies its weight gradient with, per output channel."""
    if fold is None:
        return None
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    scale = (tensors[fold.var] + fold.eps).rsqrt()
    return (scale if fold.weight is None else scale * tensors[fold.weight]).detach()


def _findings(found: list[Any], scale: Tensor | None) -> Findings:
    if not found:
        return Findings(0.0, ())
    codecs, rows = found[0]
    errors = rows if scale is None else rows * scale.square()
    energy, *sums = errors.sum(1).tolist()
    return Findings(energy, tuple(zip(codecs, sums, strict=True)))
