"""Parity: does the exported file compute what the network computes, and would the comparison notice if it did not?

The reference must have spread: its outputs must differ from sample to sample, and must not vanish. An untrained
network whose batch norms were never calibrated outputs 1e-10, and any difference below 1e-3 "passes" there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from palmette.errors import DataError, ExportError
from palmette.graph.inputs import Example, batch_size, map_tensors, one_sample, split_batch, tensors, with_batch

BATCHES = (1, 2, 5)
"""Batch sizes at which a file is run."""
MAX_RELATIVE_ERROR = 1e-4
MIN_SNR_DB = 40.0
MIN_SPREAD = 1e-3
MIN_MAGNITUDE = 1e-6
_REAL_BATCHES = 4
_SINGLES = 8

Runner = Callable[[Any], list[Tensor]]
"""Inputs to every tensor of the output, in order."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a file may differ by: the largest relative error (None: not asked), and the least signal-to-noise ratio.

    advice: what to do where it differs by more.
    """

    max_relative_error: float | None = MAX_RELATIVE_ERROR
    min_snr_db: float = MIN_SNR_DB
    advice: str = "Look for operations whose result depends on the batch, the precision or chance."


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How closely a file follows the network.

    relative_error: largest max|file - network| / max|network| over batches and outputs. snr_db: 10 log10 of the
    variance of the network's main output over samples by the mean squared difference; infinite when equal bit for bit.
    top1_agreement: share of equal decisions (0..1), None for outputs with one column. spread: root of that variance
    by the root mean square output.
    """

    relative_error: float
    snr_db: float
    top1_agreement: float | None
    samples: int
    spread: float
    runtime: str
    batches: tuple[int, ...] = BATCHES

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite `snr_db` is None."""
        snr_db = self.snr_db if math.isfinite(self.snr_db) else None
        return {**asdict(self), "batches": list(self.batches), "snr_db": snr_db}

    def __str__(self) -> str:
        top1 = "" if self.top1_agreement is None else f", top-1 agreement {100 * self.top1_agreement:.2f} %"
        snr = f", SNR {self.snr_db:.1f} dB" if math.isfinite(self.snr_db) else ""
        error = f"max relative error {self.relative_error:.1e}{snr}" if self.relative_error else "no difference"
        sizes = f"batch size{'s' if len(self.batches) > 1 else ''} {', '.join(map(str, self.batches))}"
        return f"{self.runtime}: {error}{top1} ({self.samples} samples, {sizes})"


def random_like(inputs: Example, seed: int) -> Any:
    """Random inputs of the shapes and dtypes of `inputs`.

    Floating tensors: noise with the mean and deviation of the given one. Integer tensors with more than two values:
    drawn between their smallest and largest; masks stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(x: Tensor) -> Tensor:
        if x.is_floating_point():
            scale = x.float().std(correction=0).item() or 1.0
            return (torch.randn(x.shape, generator=generator) * scale + x.float().mean().item()).to(x.dtype)
        if x.dtype == torch.bool or x.unique().numel() <= 2:
            return x
        return torch.randint(int(x.min()), int(x.max()) + 1, x.shape, generator=generator).to(x.dtype)

    return map_tensors(draw, inputs)


def inputs_of(batch: Any, example_inputs: Example) -> Any:
    """The inputs in what a loader yields, in the form of `example_inputs`. Raises DataError when the form differs."""
    if isinstance(example_inputs, Tensor):
        inputs = batch if isinstance(batch, Tensor) else split_batch(batch)[0]
    elif isinstance(example_inputs, dict):
        found = batch if isinstance(batch, dict) else split_batch(batch)[0]
        inputs = {key: found[key] for key in example_inputs if key in found} if isinstance(found, dict) else found
    else:
        nested = isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[0], list | tuple)
        inputs = tuple(batch[0] if nested else batch)
    if len(tensors(inputs)) != len(tensors(example_inputs)):
        raise DataError(
            "A batch for the parity check does not look like the example inputs",
            why=f"it holds {len(tensors(inputs))} tensors, and the example {len(tensors(example_inputs))}",
        )
    return inputs


def trials(example_inputs: Example, batches: Iterable[Any] | None) -> Iterator[Any]:
    """Inputs at every batch size: the example, up to four real batches, and random ones."""
    real = [example_inputs, *(inputs_of(b, example_inputs) for b in islice(batches or (), _REAL_BATCHES))]
    real = [map_tensors(lambda t: t.detach().cpu(), inputs) for inputs in real]
    largest = max(real, key=batch_size)
    for size in BATCHES:
        for inputs in real:
            yield with_batch(inputs, size)
        for seed in range(2):
            yield random_like(with_batch(largest, size), seed=1000 * size + seed)


def singles(example_inputs: Example, batches: Iterable[Any] | None) -> Iterator[Any]:
    """Inputs of one sample each, for files that take no other batch: up to eight of the example, of each of up to four
    real batches, and random ones.
    """
    real = [example_inputs, *(inputs_of(b, example_inputs) for b in islice(batches or (), _REAL_BATCHES))]
    real = [map_tensors(lambda t: t.detach().cpu(), inputs) for inputs in real]
    for inputs in (*real, random_like(with_batch(max(real, key=batch_size), _SINGLES), seed=0)):
        yield from (one_sample(inputs, index) for index in range(min(batch_size(inputs), _SINGLES)))


def measure_parity(
    reference: Runner,
    candidate: Runner,
    example_inputs: Example,
    batches: Iterable[Any] | None,
    *,
    main: int,
    runtime: str,
    cases: Iterable[Any] | None = None,
    sizes: tuple[int, ...] = BATCHES,
    bounds: Bounds | None = None,
) -> Parity:
    """Run both on the same inputs and compare. `main`: index of the decisive output (the logits).

    cases: the inputs, in place of `trials(example_inputs, batches)`; sizes: the batch sizes among them, for the record.
    Raises ExportError when the comparison is not informative or when the file differs by more than `bounds`.
    """
    worst, ours, theirs = 0.0, [], []
    for inputs in trials(example_inputs, batches) if cases is None else cases:
        want, got = reference(inputs), candidate(inputs)
        worst = max(worst, _worst_error(want, got, runtime))
        ours.append(want[main].double().flatten(1) if want[main].dim() > 1 else want[main].double().reshape(-1, 1))
        theirs.append(got[main].double().reshape(ours[-1].shape))
    columns = _class_count(want[main])
    parity = replace(_summary(torch.cat(ours), torch.cat(theirs), worst, runtime), batches=sizes)
    if columns > 1:
        parity = _with_top1(parity, torch.cat(ours), torch.cat(theirs), want[main])
    _gate(parity, bounds or Bounds())
    return parity


def _worst_error(want: list[Tensor], got: list[Tensor], runtime: str) -> float:
    """Largest relative error over the floating outputs of one batch; the shapes must agree."""
    if [tuple(t.shape) for t in want] != [tuple(t.shape) for t in got]:
        raise ExportError(
            f"The exported file returns other shapes in {runtime} than the network",
            why=f"{[tuple(t.shape) for t in got]} instead of {[tuple(t.shape) for t in want]}",
            fix="Make the forward independent of the batch size, or write integers in it as x.shape[0].",
        )
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        if not bool(torch.isfinite(a).all()):
            raise ExportError("The network's own output is not finite", fix="Check its weights and the inputs.")
        difference = (a.double() - b.double()).abs().max().item()
        worst = max(worst, difference / max(a.double().abs().max().item(), torch.finfo(torch.float32).tiny))
        if not math.isfinite(difference):
            return math.inf
    return worst


def _summary(ours: Tensor, theirs: Tensor, worst: float, runtime: str) -> Parity:
    """Signal and noise of the main output over all samples, [samples, values]."""
    signal = (ours - ours.mean(dim=0)).square().mean().item()
    power, noise = ours.square().mean().item(), (theirs - ours).square().mean().item()
    if math.sqrt(power) < MIN_MAGNITUDE or signal < MIN_SPREAD**2 * power:
        raise ExportError(
            f"The parity in {runtime} is not informative",
            why=f"the network's output hardly depends on its input (deviation over samples {math.sqrt(signal):.1e}, "
            f"root mean square {math.sqrt(power):.1e})",
            fix="Load trained weights, or calibrate its batch norms, and pass real inputs.",
        )
    snr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if math.isfinite(noise) else -math.inf
    spread = math.sqrt(signal / power)
    return Parity(
        relative_error=worst, snr_db=snr, top1_agreement=None, samples=len(ours), spread=spread, runtime=runtime
    )


def _class_axis(output: Tensor) -> int:
    return 1 if output.dim() in (2, 4, 5) else output.dim() - 1


def _class_count(output: Tensor) -> int:
    return 1 if output.dim() < 2 else int(output.shape[_class_axis(output)])


def _with_top1(parity: Parity, ours: Tensor, theirs: Tensor, like: Tensor) -> Parity:
    """`parity` with the share of equal decisions; `like` gives the shape of the output behind the flattened rows."""
    shape, axis = (-1, *like.shape[1:]), _class_axis(like)
    same = ours.reshape(shape).argmax(axis) == theirs.reshape(shape).argmax(axis)
    return replace(parity, top1_agreement=same.double().mean().item())


def _gate(parity: Parity, bounds: Bounds) -> None:
    """Refuse a file whose error is out of bounds."""
    largest = bounds.max_relative_error
    if (largest is None or parity.relative_error <= largest) and parity.snr_db >= bounds.min_snr_db:
        return
    error = "" if largest is None else f"a relative error of at most {largest:g} and "
    raise ExportError(
        "The exported file does not compute what the network computes",
        where=str(parity),
        why=f"{error}{bounds.min_snr_db:g} dB or more are asked for",
        fix=f"Nothing was written. {bounds.advice}",
    )
