"""Speed of the compressors behind the Tucker codecs, with what each loses, and of gradients from their factors.

Usage: python benchmarks/adapt/compressor.py [--runs 7] [--budget 20] [--again]

Inputs of layers of known networks: random tensors after a ReLU whose modes keep their subspaces from batch to batch,
with spectra like 1/n. Compressors that carry bases have seen three batches before. Every compressor gets the same ranks
and the same batch; they are timed in turn, medians in milliseconds. Goal: 20 times faster than the full SVD of every
unfolding (AMC's code) at the same lost energy. Gradients: the weight gradient of a layer from the factors against the
one from the input itself, with the same output gradient.
Rows go to benchmarks/results/adapt_compressor.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from setups import Rows
from torch import Tensor

from palmette.meter.latency import interleave
from palmette.ondevice.factor_gradients import conv_weight_gradient, linear_weight_gradient
from palmette.ondevice.layer import Layer, conv_layer, linear_layer
from palmette.ondevice.tucker import Bases, Tucker, dense, hosvd, mode_product, subspace_iteration, svd_hosvd

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "digits CNN conv": ((64, 64, 16, 16), (8, 8, 4, 4)),
    "MCUNet pointwise": ((128, 192, 6, 6), (16, 16, 3, 3)),
    "MobileNetV2 projection": ((128, 960, 7, 7), (16, 32, 3, 3)),
    "MobileNetV2 last": ((128, 320, 7, 7), (16, 32, 3, 3)),
    "ResNet-18 layer4": ((128, 512, 7, 7), (16, 32, 4, 4)),
    "ResNet-18 layer3": ((32, 256, 14, 14), (8, 24, 5, 5)),
    "ViT-B/32 fc1": ((64, 50, 768), (16, 10, 60)),
    "ViT-B/32 fc2": ((32, 50, 3072), (12, 10, 60)),
    "Swin-T stage 3 fc1": ((16, 14, 14, 384), (8, 6, 6, 40)),
    "tests, warm": ((16, 80, 9, 9), (6, 8, 4, 4)),
}
LAYERS: dict[str, Layer] = {
    "ResNet-18 layer4, 3x3 512": conv_layer((128, 512, 7, 7), (512, 512, 3, 3), 1, 1),
    "MobileNetV2 projection, 1x1 160": conv_layer((128, 960, 7, 7), (160, 960, 1, 1)),
    "ResNet-18 layer3, 3x3 256": conv_layer((32, 256, 14, 14), (256, 256, 3, 3), 1, 1),
    "MCUNet depthwise 5x5": conv_layer((128, 192, 6, 6), (192, 1, 5, 5), 1, 2, 1, 192),
    "ViT-B/32 fc1, 3072": linear_layer((64, 50, 768), (3072, 768)),
    "Swin-T stage 3 fc1, 1536": linear_layer((16, 14, 14, 384), (1536, 384)),
}


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a row")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows("compressor", "milliseconds of one compression, and the share of energy that it loses")
    for name, (shape, ranks) in SHAPES.items():
        row = lambda s=shape, r=ranks: compressors(s, r, given.runs, given.budget)  # noqa: E731
        rows.once(name, row, again=given.again)
    for name, layer in LAYERS.items():
        row = lambda of=layer: gradients(of, given.runs, given.budget)  # noqa: E731
        rows.once(f"gradient: {name}", row, again=given.again)


def activation(shape: tuple[int, ...], seed: int) -> Tensor:
    """A layer's input: subspaces of all modes but the batch are those of every seed."""
    numbers, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    x = torch.randn(shape, generator=numbers)
    for mode, size in enumerate(shape):
        if size > 1024:
            continue
        basis = torch.linalg.qr(torch.randn(size, size, generator=shared if mode else numbers))[0]
        x = mode_product(x, basis * (torch.arange(size) + 1.0) ** -1.0 @ basis.T, mode)
    return torch.relu(x).contiguous()


def compressors(shape: tuple[int, ...], ranks: tuple[int, ...], runs: int, budget: float) -> dict[str, Any]:
    """Milliseconds and lost energy of each compressor."""
    warm = {published: _warm(shape, ranks, published) for published in (False, True)}
    x = activation(shape, 7)

    def iterated(published: bool) -> Callable[[], Tucker]:
        bases, generator = warm[published], torch.Generator().manual_seed(0)
        return lambda: subspace_iteration(x, ranks, bases, generator=generator, published=published)[0]

    passes: dict[str, Callable[[], Any]] = {
        "subspace iteration": iterated(False),
        "subspace iteration, published": iterated(True),
        "hosvd": lambda: hosvd(x, ranks),
        "hosvd, published order": lambda: hosvd(x, ranks, sequential=False),
        "svd of every unfolding": lambda: svd_hosvd(x, ranks),
    }
    samples = interleave(passes, runs=runs, warmup=1, budget_s=budget)
    found = {name: _summary(times) | {"lost": lost(x, passes[name]())} for name, times in samples.items()}
    slow = found["svd of every unfolding"]["ms"]
    for row in found.values():
        row["times_faster"] = round(slow / row["ms"], 1)
    return {"shape": shape, "ranks": ranks, "compressors": found}


def _warm(shape: tuple[int, ...], ranks: tuple[int, ...], published: bool) -> Bases | None:
    bases, generator = None, torch.Generator().manual_seed(0)
    for seed in range(3):
        x = activation(shape, seed)
        bases = subspace_iteration(x, ranks, bases, generator=generator, published=published)[1]
    return bases


def _summary(times: list[float]) -> dict[str, Any]:
    if len(times) < 2:
        return {"ms": times[0], "low": times[0], "high": times[0], "samples": 1}
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"ms": round(middle, 3), "low": round(low, 3), "high": round(high, 3), "samples": len(times)}


def lost(x: Tensor, form: Tucker) -> float:
    """Share of the energy that the form leaves out."""
    return float((x - dense(form)).square().sum() / x.square().sum())


def gradients(layer: Layer, runs: int, budget: float) -> dict[str, Any]:
    """Milliseconds of the weight gradient from factors and from the input, and how far the former is off.

    off: from the gradient that the rebuilt input gives, where nothing but rounding may differ.
    """
    shape = tuple(layer.x_shape)
    ranks = next((r for s, r in SHAPES.values() if s == shape), tuple(max(1, size // 8) for size in shape))
    x = activation(shape, 7)
    grad = torch.randn(layer.out_shape, generator=torch.Generator().manual_seed(3))
    form = hosvd(x, ranks)
    passes: dict[str, Callable[[], Any]] = {
        "from the input": lambda: layer.weight_gradient(x, grad),
        "from the factors": lambda: _from_factors(form, layer, grad),
        "rebuilt, then from that": lambda: layer.weight_gradient(dense(form), grad),
        "input gradient": lambda: layer.input_gradient(grad, torch.zeros(layer.weight_shape)),
    }
    samples = interleave(passes, runs=runs, warmup=1, budget_s=budget)
    found = {name: _summary(times) for name, times in samples.items()}
    thin, rebuilt = passes["from the factors"](), passes["rebuilt, then from that"]()
    return {
        "shape": shape,
        "weight": tuple(layer.weight_shape),
        "groups": layer.groups,
        "ranks": ranks,
        "passes": found,
        "times_faster": round(found["from the input"]["ms"] / found["from the factors"]["ms"], 2),
        "off": float((thin - rebuilt).norm() / rebuilt.norm()),
    }


def _from_factors(form: Tucker, layer: Layer, grad: Tensor) -> Tensor:
    if layer.kind == "linear":
        return linear_weight_gradient(form, grad)
    geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return conv_weight_gradient(form, grad, layer.weight_shape, groups=layer.groups, **geometry)


if __name__ == "__main__":
    main()
