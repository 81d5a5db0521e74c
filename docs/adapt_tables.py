"""The section "Training in kilobytes" of the page of benchmarks, from benchmarks/results/adapt_*.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from layout import table

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
NAMES = {
    "mcunet": "MCUNet-5fps, 96 px",
    "resnet18": "ResNet-18",
    "mobilenet_v2": "MobileNetV2",
    "vit_b_32": "ViT-B/32",
    "swin_t": "Swin-T",
}
COLUMNS = ("stock", "checkpoint", "lora", "lossless", "auto 1/10", "auto 1/50", "auto 1/100")
CODECS = ("asi", "hosvd", "svd", "low_bit", "fixed_projection", "gradient_filter")


def adapt_section() -> str:
    """The tables of what is measured so far."""
    parts = [bytes_table(), codec_table(), paper_table(), gradient_table(), speed_table(), *accuracy_tables()]
    made = [part for part in parts if part]
    return "\n\n".join(["## Training in kilobytes", *made]) if made else ""


def rows_of(name: str) -> dict[str, Any]:
    """The rows of a results file; none where it is not there."""
    file = RESULTS / f"adapt_{name}.json"
    return dict(json.loads(file.read_text())["rows"]) if file.exists() else {}


def mebibytes(size: float) -> str:
    """Bytes as MiB with three digits."""
    return f"{size / 2**20:.3g}"


def bytes_table() -> str:
    """Saved and peak by network and way to train."""
    found = rows_of("bytes")
    lines = []
    for key in found:
        match = re.fullmatch(r"(\w+) b(\d+) stock", key)
        if match is None:
            continue
        start = f"{match[1]} b{match[2]} "
        cells = [_pair(found.get(start + column, {})) for column in COLUMNS]
        lines.append((f"{NAMES[match[1]]}, batch {match[2]}", *cells))
    if not lines:
        return ""
    head = ("MiB kept / at the peak", "stock", "checkpoint", "LoRA, rank 8", *COLUMNS[3:])
    text = (
        "Everything trainable but batch norms' statistics, 224 px where nothing else is said. Stock is torch alone, "
        "checkpoint its own "
        "`checkpoint` around each block, LoRA that of PEFT. Every adapted step kept exactly the bytes that were "
        "predicted. A dash was "
        "not run. By `benchmarks/adapt/bytes.py`."
    )
    return f"### Bytes\n\n{text}\n\n{table(head, lines)}"


def _pair(row: dict[str, Any]) -> str:
    if "saved_bytes" not in row:
        return "-"
    return f"{mebibytes(row['saved_bytes'])} / {mebibytes(row['peak_bytes'])}"


def codec_table() -> str:
    """Each codec alone within 1/20."""
    found = rows_of("bytes")
    lines = []
    for network, name in NAMES.items():
        cells = [found.get(f"{network} b8 {codec} 1/20", {}) for codec in CODECS]
        stock = found.get(f"{network} b8 stock", {}).get("saved_bytes", 0)
        if any("saved_bytes" in cell for cell in cells):
            shown = [f"1/{stock / cell['saved_bytes']:.3g}" if "saved_bytes" in cell else "-" for cell in cells]
            lines.append((name, *shown))
    if not lines:
        return ""
    text = "Each codec alone, every layer trained, asked for 1/20 of the bytes: what was reached."
    return f"{text}\n\n{table(('share of stock', *CODECS), lines)}"


def paper_table() -> str:
    """The settings of the papers: their count, ours, and the floor."""
    lines = []
    for key, row in rows_of("bytes").items():
        if "floor_bytes" not in row or "measured_bytes" not in row:
            continue
        vanilla, floor, ours = row["vanilla_bytes"], row["floor_bytes"], row["measured_bytes"]
        reach = floor + row["factor_bytes"]
        network, _, setting = key.partition(" ")
        lines.append(
            (
                f"{NAMES[network].split(',')[0]}, {setting.replace('b128', 'batch 128')}",
                mebibytes(vanilla),
                f"{row['input_bytes'] / row['factor_bytes']:.3g}x",
                f"{vanilla / ours:.3g}x",
                f"{vanilla / floor:.3g}x",
                f"{100 * floor / ours:.0f} %",
                f"{100 * reach / ours:.0f} %",
                f"{vanilla / row['swapped_bytes']:.3g}x" if "swapped_bytes" in row else "-",
            )
        )
    if not lines:
        return ""
    text = (
        "The papers' settings at their published sizes of the factors. They count the inputs of the chosen layers "
        "alone; ours is all that "
        "autograd keeps, measured on tensors without data. The floor is what exact input gradients ask for when "
        "layer inputs cost nothing. "
        "In ResNet-18 the published factors are larger than the floor itself, so that no method could come nearer to "
        "it than half; the "
        "last but one column counts floor and factors together. The last column leaves the other operations as torch "
        "has them."
    )
    head = (
        "",
        "stock, MiB",
        "papers' count",
        "measured",
        "floor",
        "share of the floor",
        "of floor + factors",
        "released way",
    )
    return f"### The papers' settings\n\n{text}\n\n{table(head, lines)}"


def gradient_table() -> str:
    """Cosine to the true gradient at equal bytes."""
    found = rows_of("gradients")
    columns = ("fresh head, 1/20", "fresh head, 1/50", "after 150 steps, 1/20", "after 150 steps, 1/50")
    methods = ("auto", *CODECS)
    lines = []
    for method in methods:
        cells = [found.get(f"{column}, {method}", {}) for column in columns]
        if any("cosine" in cell for cell in cells):
            lines.append((f"`{method}`", *(_gradient(cell) for cell in cells)))
    if not lines:
        return ""
    text = (
        "Gradients of MCUNet-5fps on CIFAR-10 at 96 px, batch 32, on images that the plan has not seen: cosine to "
        "the true gradient of "
        "all weights, and relative error. In brackets the share that was reached where 1/50 was not feasible. By "
        "`gradients.py`."
    )
    return f"### Gradients\n\n{text}\n\n{table(('', *columns), lines)}"


def _gradient(row: dict[str, Any]) -> str:
    if "cosine" not in row:
        return "-"
    share = row["stock_saved_bytes"] / row["saved_bytes"]
    asked = row["stock_saved_bytes"] / row["budget_bytes"] if row.get("budget_bytes") else share
    note = f" (1/{share:.0f})" if share < 0.8 * asked or (asked < 45 and asked > 22) else ""
    return f"{row['cosine']:.3f} / {row['relative_error']:.2f}{note}"


def speed_table() -> str:
    """Time of a step against stock."""
    lines, arms = [], ("stock again", "lossless", "auto 1/50", "asi")
    for key, row in rows_of("speed").items():
        if "arms" not in row:
            continue
        network, _, setting = key.partition(" ")
        found = {name.split(",")[0]: arm for name, arm in row["arms"].items()}
        cells = [_ratio(found.get(arm, {})) for arm in arms]
        lines.append((f"{NAMES[network].split(',')[0]}, {setting}", *cells))
    if not lines:
        return ""
    text = (
        "Time of a training step divided by stock's, forward, backward and SGD, batch 16, one thread: medians of "
        "interleaved runs with "
        "their quartiles. Stock again is the noise of the comparison. By `speed.py`."
    )
    return f"### Time\n\n{text}\n\n{table(('', *arms), lines)}"


def _ratio(arm: dict[str, Any]) -> str:
    return f"{arm['ratio']:.2f} [{arm['low']:.2f}, {arm['high']:.2f}]" if "ratio" in arm else "-"


def accuracy_tables() -> list[str]:
    """Transfer learning: one table per network and data set."""
    made = []
    for file in sorted(RESULTS.glob("adapt_accuracy_*.json")):
        rows = {k: r for k, r in json.loads(file.read_text())["rows"].items() if "test" in r}
        for recipe in dict.fromkeys(_recipe(key) for key in rows):
            own = {k: r for k, r in rows.items() if _recipe(k) == recipe}
            made.append(accuracy_table(file.stem.removeprefix("adapt_accuracy_"), recipe, own))
    return [f"### Accuracy\n\n{ACCURACY}", *made] if made else []


ACCURACY = (
    "The papers' networks with ImageNet weights and a new head, fine-tuned for a few epochs at 96 px, batch 32, SGD "
    "without momentum, "
    "the rate chosen per method on validation images; every method sees the same images. Test: 4,000 images, looked "
    "at once. The difference is paired per image against full fine-tuning, pooled over seeds, with its 95 % interval. "
    "WASI puts linear layers into factors; these networks are convolutions throughout, and it refuses them."
)


def _recipe(key: str) -> str:
    """Images and epochs of a row's key, method/budget/recipe/seed."""
    return key.split("/")[2]


def accuracy_table(name: str, recipe: str, rows: dict[str, Any]) -> str:
    """Methods by budget, with bytes and the difference to full fine-tuning; recipe: "images x epochs"."""
    groups: dict[str, dict[int, Any]] = {}
    for key, row in rows.items():
        setting, _, seed = key.rpartition("/seed")
        groups.setdefault(setting, {})[int(seed)] = row
    full = next((found for setting, found in groups.items() if setting.startswith("full/")), {})
    lines = []
    for setting, found in groups.items():
        method = setting.split("/")[0]
        saved = mean(row.get("measured_saved_bytes", row.get("saved_bytes", 0)) for row in found.values())
        vanilla = next(iter(found.values()))["vanilla"]
        lines.append(
            (
                f"`{method}`",
                f"{saved / 1024:,.0f}",
                f"1/{vanilla / saved:.3g}" if saved < vanilla else f"{saved / vanilla:.2f}x",
                f"{100 * mean(row['test'] for row in found.values()):.2f}",
                f"{sum(row['n'] for row in found.values()):,} ({len(found)})",
                "" if method == "full" else _difference(full, found),
            )
        )
    network, _, data = name.partition("_")
    head = ("method", "kept, KiB", "share of stock", "top-1, %", "n (seeds)", "against full, points")
    images, epochs = recipe.split("x")
    return f"{network} on {data}, {images} images for {epochs} epochs:\n\n{table(head, lines)}"


def _difference(full: dict[int, Any], found: dict[int, Any]) -> str:
    import numpy as np

    from palmette.stats import paired_difference

    seeds = sorted(set(full) & set(found))
    if not seeds:
        return "-"

    def right(row: dict[str, Any]) -> Any:
        flags = np.ones(row["n"], dtype=bool)
        flags[row["wrong"]] = False
        return flags

    gap, low, high = paired_difference([right(found[s]) for s in seeds], [right(full[s]) for s in seeds])
    return f"{gap:+.2f} [{low:+.2f}, {high:+.2f}]"
