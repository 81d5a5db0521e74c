"""The picture of the page "How memory really goes": who holds what of a MobileNetV2's training step.

    python benchmarks/adapt/picture.py     # writes docs/assets/memory_mobilenetv2.png and the figures beside it

Everything in it is the meter's: one real step each of the network as it is, with the exact forms, and within 1/50 of
the bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import setups
import torch
from torch.nn import functional as F

from palmette.files import write_json
from palmette.meter.training import TrainingMemory, measure_training

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
BATCH, PIXELS = 8, 160
GROUPS = {
    "conv2d": "inputs of convolutions",
    "batch_norm": "inputs of batch norms",
    "hardtanh": "activations (ReLU6)",
    "linear": "the classifier and the loss",
}
COLOURS = ("#2f6f4f", "#7fb069", "#e6aa68", "#8d8d92")


def grouped(memory: TrainingMemory) -> dict[str, int]:
    """Bytes by kind of holder; what two operations keep belongs to the first of the list."""
    sizes: Counter[str] = Counter()
    for names, size, _ in memory.by_operation():
        name = next((text for key, text in GROUPS.items() if key in names), GROUPS["linear"])
        sizes[name] += size
    return dict(sizes)


def along(memory: TrainingMemory) -> dict[str, int]:
    """Bytes by block of the network."""
    sizes: Counter[str] = Counter()
    for holder in memory.holders:
        parts = holder.holders[0].module.split(".")
        sizes[".".join(parts[:2]) if parts[0] == "features" else "head"] += holder.bytes
    return dict(sizes)


def measured() -> dict[str, Any]:
    """The three steps."""
    from palmette.ondevice.adapt import adapt

    model = setups.network("mobilenet_v2", PIXELS)
    x, y = setups.sample(BATCH, PIXELS)
    stock = measure_training(model, x, y, F.cross_entropy)
    found = {"as it is": stock}
    for name, budget in (("exact forms", None), ("1/50 of the bytes", stock.saved_bytes // 50)):
        adaptation = adapt(model, (x, y), F.cross_entropy, budget=budget)
        found[name] = adaptation.measure()
        adaptation.undo()
    return {
        name: {"saved_bytes": m.saved_bytes, "peak_bytes": m.peak_bytes, "groups": grouped(m), "along": along(m)}
        for name, m in found.items()
    }


def draw(rows: dict[str, Any], file: Path) -> None:
    """Two panels: who holds what, and where in the network."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1.15, 1))
    for place, row in enumerate(rows.values()):
        start = 0.0
        for text, colour in zip(GROUPS.values(), COLOURS, strict=True):
            size = row["groups"].get(text, 0) / 2**20
            left.barh(place, size, left=start, color=colour, label=text if place == 0 else None)
            start += size
        left.text(start + 4, place, f"{row['saved_bytes'] / 2**20:.3g} MiB", va="center")
    left.set_yticks(range(len(rows)), list(rows))
    left.invert_yaxis()
    left.set_xlim(0, 1.22 * max(row["saved_bytes"] for row in rows.values()) / 2**20)
    left.set_xlabel("kept for backward, MiB")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    blocks = list(next(iter(rows.values()))["along"])
    blocks.sort(key=lambda name: int(name.split(".")[1]) if "." in name else 99)
    for (name, row), colour in zip(rows.items(), ("#8d8d92", "#7fb069", "#2f6f4f"), strict=True):
        right.step(
            range(len(blocks)), [row["along"].get(b, 0) / 2**10 for b in blocks], where="mid", color=colour, label=name
        )
    right.set_yscale("log")
    right.set_xticks(range(0, len(blocks), 3))
    right.set_ylabel("KiB")
    right.set_xlabel("block of the network, from the first to the head")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"MobileNetV2, batch {BATCH}, {PIXELS} px: what autograd keeps", fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    """Measure, unless the figures are there, and draw."""
    torch.set_num_threads(1)
    file = setups.RESULTS / "adapt_memory.json"
    if not file.exists():
        rows = measured()
        write_json(file, {"schema": 1, "about": __doc__, "environment": setups.environment(), "rows": rows})
    draw(json.loads(file.read_text())["rows"], ROOT / "docs" / "assets" / "memory_mobilenetv2.png")


if __name__ == "__main__":
    main()
