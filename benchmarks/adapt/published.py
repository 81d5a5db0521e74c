"""The settings of the papers on activation compression: what they count, what is measured, and what bounds it.

Usage: PALMETTE_DATA=DIR python benchmarks/adapt/published.py [--batch 128] [--real]

Trained are the last two or four convolutions with all that follows (batch norms on their running statistics with
trainable affine part, and the head) of ResNet-18 and MobileNetV2 at 224 px, and all MLP layers of Swin-T; everything
else is frozen. Side by side, as ratios of before to after:
  counted   the papers' figure: inputs of the chosen layers alone, at ASI's published memory budgets (for CIFAR-10;
            Swin-T: Pets), whose ranks give core and factor elements times four bytes;
  measured  everything that autograd keeps, with the inputs of all trained layers as Tucker forms in the same bytes;
  floor     the same with nothing kept of these inputs: what exact input gradients need in any case;
  swapped   the released code's way: only the chosen layers' inputs compressed, everything between them stock.
The bytes come from fake tensors, at ranks that fill the budget; --real plans and runs the convolutional settings with
random images. Rows go to benchmarks/results/adapt_bytes.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from bytes import fake
from setups import MIB, Rows, layers, network, sample
from torch import nn
from torch._subclasses import FakeTensorMode

from palmette.meter.training import default_loss
from palmette.ondevice.adapt import adapt
from palmette.ondevice.asi import Asi
from palmette.ondevice.codec import Codec, Keep, Recompute
from palmette.ondevice.plan import MemoryPlan
from palmette.ondevice.planner import lossless, stock_of
from palmette.ondevice.trace import Call, Trace, saved_bytes, trace
from palmette.ondevice.tucker import elements

BUDGETS = {("resnet18", 2): 1.51, ("resnet18", 4): 1.92, ("mobilenet_v2", 2): 0.259, ("mobilenet_v2", 4): 0.678}
SWIN_BUDGET = 311.0
"""MiB of factors for the inputs of the chosen layers at a batch of 128."""


def main() -> None:
    """Make the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--real", action="store_true", help="also plan with data, and run")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows("bytes", "bytes of one training step; saved: held by autograd at most, peak: alive at most")
    for (name, last), budget in BUDGETS.items():
        key = f"{name} last {last} b{given.batch}"
        rows.once(key, lambda n=name, k=last, b=budget: setting(n, k, b, given.batch), again=given.again)
        if given.real:
            factors = int(budget * MIB)
            rows.once(f"{key} run", lambda n=name, k=last, f=factors: planned(n, k, f, given.batch), again=given.again)
    rows.once(
        f"swin_t MLP b{given.batch}", lambda: setting("swin_t", None, SWIN_BUDGET, given.batch), again=given.again
    )
    report(rows)


def choose(model: nn.Module, last: int | None) -> list[str]:
    """Freeze what the setting does not train; paths of the chosen layers."""
    found = layers(model)
    if last is None:
        chosen = [path for path, layer in found.items() if isinstance(layer, nn.Linear) and ".mlp." in path]
        model.requires_grad_(False)
        for path in [*chosen, list(found)[-1]]:
            found[path].requires_grad_(True)
        return chosen
    chosen = [path for path, layer in found.items() if isinstance(layer, nn.Conv2d)][-last:]
    reached = False
    for path, module in model.named_modules():
        reached |= path == chosen[0]
        if not list(module.children()):
            module.requires_grad_(reached)
    return chosen


def setting(name: str, last: int | None, budget_mib: float, batch: int) -> dict[str, Any]:
    """The four figures of one setting."""
    mode = FakeTensorMode()
    model = network(name)
    chosen = choose(model, last)
    model = fake(mode, model)
    with mode:
        data = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
        found = trace(model, *data, default_loss)
        of_chosen = [entry for entry in found.layers() if entry.key in set(chosen)]
        others = [entry for entry in found.layers() if entry not in of_chosen]
        budget = int(budget_mib * MIB)
        codecs = filled(of_chosen, budget) | filled(others, sum(_bytes(e) for e in others) // 50)
        plan = MemoryPlan(
            method="asi",
            scope="saved",
            budget=None,
            inputs=(tuple(data[0].shape),),
            codecs=codecs,
            folds=found.folds,
            stock=stock_of(found, codecs),
            predicted_bytes=saved_bytes(found, codecs, stock_of(found, codecs)),
        )
        adaptation = adapt(model, data, plan=plan)
        measured = adaptation.measure()
        return figures(found, chosen, of_chosen, codecs) | {
            "trained_layers": len(found.layers()),
            "measured_bytes": measured.saved_bytes,
            "peak_bytes": measured.peak_bytes,
            "exact": measured.saved_bytes == plan.predicted_bytes,
        }


def figures(found: Trace, chosen: list[str], of_chosen: list[Call], codecs: dict[str, Codec]) -> dict[str, Any]:
    """What can be said without running."""
    inputs = sum(_bytes(entry) for entry in of_chosen)
    factors = sum(codecs[entry.key].nbytes(entry.shape, entry.itemsize) for entry in of_chosen)
    nothing: dict[str, Codec] = {entry.key: Recompute() for entry in found.layers()}
    exact = lossless(found)
    kept_by_others = {n for e in found.calls if e not in of_chosen for n in e.stock}
    alone = {n: size for e in of_chosen for n, size in e.stock.items() if n not in kept_by_others}
    vanilla = found.stock_bytes()
    return {
        "chosen": chosen,
        "input_bytes": inputs,
        "factor_bytes": factors,
        "vanilla_bytes": vanilla,
        "lossless_bytes": saved_bytes(found, exact, stock_of(found, exact)),
        "floor_bytes": saved_bytes(found, nothing),
        "swapped_bytes": vanilla - sum(alone.values()) + factors,
    }


def _bytes(entry: Call) -> int:
    return math.prod(entry.shape) * entry.itemsize


def filled(entries: Sequence[Call], budget: int) -> dict[str, Codec]:
    """Tucker forms with one share of every mode's size, the largest whose bytes fit; Keep where none is smaller."""
    low, high = 0.0, 1.0
    best: dict[str, Codec] = {}
    for _ in range(40):
        share = (low + high) / 2
        tried = {entry.key: _form(entry.shape, share) for entry in entries}
        if sum(tried[e.key].nbytes(e.shape, e.itemsize) for e in entries) <= budget:
            best, low = tried, share
        else:
            high = share
    return best or {entry.key: _form(entry.shape, 0.0) for entry in entries}


def _form(shape: Sequence[int], share: float) -> Codec:
    ranks = tuple(max(1, round(size * share)) for size in shape)
    return Asi(ranks=ranks) if elements(shape, ranks) < math.prod(shape) else Keep()


def planned(name: str, last: int, factors: int, batch: int) -> dict[str, Any]:
    """The method "asi" with the published budget and what the floor needs: planned on data, and run."""
    model, data = network(name, 64), sample(batch, 224)
    choose(model, last)
    found = trace(model, *data, default_loss)
    floor = saved_bytes(found, {entry.key: Recompute() for entry in found.layers()})
    adaptation = adapt(model, data, None, budget=floor + factors, method="asi")
    plan, measured = adaptation.plan, adaptation.measure()
    return {
        "vanilla_bytes": adaptation.vanilla_saved,
        "floor_bytes": floor,
        "budget_bytes": plan.budget,
        "measured_bytes": measured.saved_bytes,
        "peak_run_bytes": measured.peak_bytes,
        "exact": measured.saved_bytes == plan.predicted_bytes,
        "errors": dict(plan.errors),
        "codecs": {key: codec.to_dict() for key, codec in plan.codecs.items()},
    }


def report(rows: Rows) -> None:
    """Print what there is."""
    columns = ("vanilla", "exact", "factors", "counted", "measured", "floor", "swapped")
    print(f"{'':<28} " + " ".join(f"{column:>8}" for column in columns))
    for key, row in rows.content["rows"].items():
        if "factor_bytes" not in row:
            continue
        vanilla, measured = row["vanilla_bytes"], row["measured_bytes"]
        ratios = [row["input_bytes"] / row["factor_bytes"]]
        ratios += [vanilla / row[part] for part in ("measured_bytes", "floor_bytes", "swapped_bytes")]
        sizes = [row[part] / MIB for part in ("vanilla_bytes", "lossless_bytes", "factor_bytes")]
        shown = f"{sizes[0]:>8.2f} {sizes[1]:>8.2f} {sizes[2]:>8.3f} " + " ".join(f"{r:>8.2f}" for r in ratios)
        print(f"{key:<28} {shown}   {row['floor_bytes'] / measured:.0%} of the floor")


if __name__ == "__main__":
    main()
