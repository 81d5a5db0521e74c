"""How near each codec's weight gradients are to the true ones, at equal bytes, on MCUNet with real pictures.

Usage: PALMETTE_DATA=DIR python benchmarks/adapt/gradients.py [--batch 32] [--again]

MCUNet with stored ImageNet weights and a fresh head, CIFAR-10 at 96 px, all parameters trainable; once as it is, and
once after 150 steps of training. Every method plans on one batch for a twentieth and a fiftieth of what the stock
network keeps (or the least that it can do with), sees four more batches, as bases that are carried on want it, and is
then compared on a batch that it has not seen: over all weights of convolutions and linear layers as one vector (cosine
and relative error), and layer by layer (median and worst cosine). A layer that the plan freezes has the gradient zero.
Rows go to benchmarks/results/adapt_gradients.json.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
from typing import Any

import torch
from setups import Rows, network
from stored import folder
from torch import Tensor, nn
from torch.nn import functional as F

from palmette.errors import BudgetError
from palmette.meter.training import default_loss
from palmette.ondevice.adapt import adapt
from palmette.ondevice.adaptation import Adaptation
from palmette.ondevice.trace import trace
from palmette.resolve import resolve_data

METHODS = ("auto", "asi", "hosvd", "svd", "low_bit", "fixed_projection", "gradient_filter")
SHARES = (20, 50)
STEPS = 150
Batches = list[tuple[Tensor, Tensor]]


def main() -> None:
    """Make the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows("gradients", "weight gradients under each codec against the true ones; MCUNet, CIFAR-10 at 96 px")
    data = resolve_data(f"cifar10:{folder() / 'cifar10'}?size=96&norm=half&train=6000&batch={given.batch}")
    batches: Batches = [batch for batch, _ in zip(data.train, range(STEPS), strict=False)]
    torch.manual_seed(0)
    model = headed(network("mcunet"))
    for state in ("fresh head", f"after {STEPS} steps"):
        if state != "fresh head":
            train(model, batches)
        for share in SHARES:
            for method in METHODS:
                key = f"{state}, 1/{share}, {method}"
                row = lambda m=method, s=share: compared(model, batches[:6], m, s)  # noqa: E731
                rows.once(key, row, again=given.again)
    report(rows)


def headed(model: Any) -> nn.Module:
    """With a last layer for ten classes."""
    old = model.classifier.conv
    model.classifier.conv = nn.Conv2d(old.in_channels, 10, 1)
    model.skip_first = False
    return model  # type: ignore[no-any-return]


def train(model: nn.Module, batches: Batches) -> None:
    """A pass of plain SGD over the batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    print(f"trained: loss {losses[0]:.2f}, at the end {statistics.mean(losses[-20:]):.2f}", flush=True)


def compared(model: nn.Module, batches: Batches, method: str, share: int) -> dict[str, Any]:
    """One method at one budget."""
    *earlier, last = batches
    stock = trace(model, *last, default_loss).stock_bytes()
    true = gradients(model, last)
    nearly = copy.deepcopy(model)
    adaptation = adapted(nearly, earlier[0], method, stock // share)
    for batch in earlier[1:]:
        gradients(nearly, batch)
    found = gradients(nearly, last)
    whole = [torch.cat([part[name].flatten() for name in true]) for part in (true, found)]
    cosines = {name: cosine(true[name], found[name]) for name in true}
    return {
        "budget_bytes": adaptation.plan.budget,
        "saved_bytes": adaptation.measure().saved_bytes,
        "stock_saved_bytes": stock,
        "cosine": cosine(*whole),
        "relative_error": float((whole[0] - whole[1]).norm() / whole[0].norm()),
        "median_cosine": statistics.median(cosines.values()),
        "worst_cosine": min(cosines.values()),
        "frozen": sum(name in set(adaptation.plan.frozen) for name in true),
        "layers": len(true),
        "expected_error": _expected(adaptation, true),
        "cosines": cosines,
    }


def _expected(adaptation: Adaptation, true: dict[str, Tensor]) -> float:
    """The relative error that the plan's figures per layer amount to, frozen layers included."""
    lost = whole = 0.0
    for name, grad in true.items():
        energy = float(grad.square().sum())
        share = 1.0 if name in adaptation.plan.frozen else adaptation.plan.errors.get(name.removesuffix(".weight"), 0.0)
        whole += energy
        lost += share**2 * energy
    return (lost / whole) ** 0.5


def adapted(model: nn.Module, data: tuple[Tensor, Tensor], method: str, budget: int) -> Adaptation:
    """With the least budget where the one given is too small."""
    try:
        return adapt(model, data, None, budget=budget, method=method)
    except BudgetError as error:
        least = re.search(r"is ([\d,]+) bytes", str(error))
        if least is None:
            raise
        return adapt(model, data, None, budget=int(least[1].replace(",", "")), method=method)


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Weight gradients of convolutions and linear layers by name; zero where there is none."""
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in weights.items()}
    model.zero_grad(set_to_none=True)
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two gradients; 0 where one is zero."""
    lengths = float(a.norm() * b.norm())
    return float((a * b).sum()) / lengths if lengths else 0.0


def report(rows: Rows) -> None:
    """Print what there is."""
    print(f"{'':<42} {'bytes':>10} {'cosine':>7} {'error':>6} {'expected':>8} {'median':>7} {'worst':>6} frozen")
    for key, row in rows.content["rows"].items():
        if "error" in row:
            print(f"{key:<42} {row['error'][:90]}")
            continue
        errors = f"{row['relative_error']:>6.3f} {row['expected_error']:>8.3f}"
        layers = f"{row['median_cosine']:>7.3f} {row['worst_cosine']:>6.3f} {row['frozen']}/{row['layers']}"
        print(f"{key:<42} {row['saved_bytes']:>10,} {row['cosine']:>7.4f} {errors} {layers}")


if __name__ == "__main__":
    main()
