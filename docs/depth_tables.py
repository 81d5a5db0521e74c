"""Tables of the depth benchmarks (benchmarks/results/depth_*.json); one without results is left out."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from layout import escape, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"

NETWORKS = {
    "resnet20": "ResNet-20 on CIFAR-10",
    "resnet56": "ResNet-56 on CIFAR-10",
    "mobilenetv2": "MobileNetV2 on CIFAR-10 at 96 pixels",
    "vit": "ViT on CIFAR-10",
}
"""What benchmarks/depth/compare.py knows, in the order of the page."""
TITLES = {"onnxruntime": "ONNX Runtime", "eager": "eager"}
HEADLINE = {
    "dense": "dense",
    "auto": "auto",
    "dense + same training": "dense + same training",
    "random blocks": "random removal",
    "torch-pruning": "Torch-Pruning",
}
"""The rows of the README's table, and what they are called there."""
CONTROLS = ("random", "torch-pruning", "distiller", "dense +")
SEARCHES = """
`auto`, and EASIER in the paper's form (one activation a round, each round a training), on `{network}` and the digits;
every training is as long as that of the dense network, {epochs} epochs. The steps that `auto` heals each option by are
counted. Seconds include timing, searching and export.
"""
ENTROPY = """
Entropy passes over all {activations} activations of {network}, {images} images, against a forward pass of the same
graph, timed in turn in processor time: median and quartiles of {repeats} repeats. A second forward pass shows the
noise.
"""
SCORES = """
One scoring of all sites of a ResNet-50 on 1,000 images of 64 pixels, in batches of 50. Scores that read what a training
found need no pass of their own; those that try every candidate are left out.
"""
CAPTION = """
*The front that `palmette curve` finds, with width and 8 bits beside depth: 1 thread, ONNX Runtime, one seed. A dark
edge marks the network that is taken: the fastest within the bound on validation data.*
""".strip()
NONE_YET = "No results are stored yet: `python benchmarks/depth/compare.py NETWORK` measures them."


def stored(name: str) -> dict[str, Any] | None:
    """The content of benchmarks/results/depth_NAME.json, None where there is no such file."""
    path = RESULTS / f"depth_{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def which_tables() -> str:
    """Table and figure of every network that was compared, for the page that helps to choose."""
    parts = []
    for name, title in NETWORKS.items():
        figure, result = ASSETS / f"front-{name}.svg", stored(name)
        if figure.exists() or result:
            parts.append(f"### {title}")
        if result:
            parts += [brief(result), compared(result), left_out(result)]
        if figure.exists():
            parts += [f"![The front: accuracy against latency of {title}](assets/{figure.name})", CAPTION]
    return "\n\n".join(part for part in parts if part) or NONE_YET


def brief(result: dict[str, Any]) -> str:
    """Target, seeds and threads of a comparison, in one line."""
    seeds = max(row["seeds"] for row in result["rows"])
    return f"Target {result['target']:g}x, {seeds} seed{'s' * (seeds > 1)}, {result['threads']} threads."


def headline_table(network: str = "resnet56") -> str:
    """What `auto` makes of one network beside both controls and the peer, for the README; empty without results."""
    result = stored(network)
    if not result:
        return ""
    by_name = {row["name"]: row for row in result["rows"] if "latency" in row}
    rows = [by_name[name] for name in HEADLINE if name in by_name]
    n = f"top-1, %, n = {max(row['n'] for row in rows):,}"
    lines = [
        ("depth", [f"{statistics.median(row['depth']):g}" for row in rows]),
        ("MACs, M", [f"{statistics.median(row['macs']) / 1e6:.1f}" for row in rows]),
        ("parameters, k", [f"{statistics.median(row['params']) / 1e3:.0f}" for row in rows]),
        ("peak memory, KiB", [f"{statistics.median(row['peak_bytes']) / 1024:.0f}" for row in rows]),
        *[(f"{TITLES[r]}, ms", [pace(row, rows[0], r) for row in rows]) for r in rows[0]["latency"]],
        (n, [f"{100 * row['accuracy']:.2f}" for row in rows]),
        ("difference, points", [interval(row["difference"]) for row in rows]),
    ]
    head = ("", *(HEADLINE[row["name"]] for row in rows))
    what = f"{NETWORKS[network]}: `auto` asked for {result['target']:g}x of the dense latency in ONNX Runtime."
    return f"{what}\n\n{table(head, [[label, *cells] for label, cells in lines])}\n\n{setting(result)}"


def pace(row: dict[str, Any], dense: dict[str, Any], runtime: str) -> str:
    """Milliseconds, and how many times faster than the dense network that is."""
    found = row["latency"][runtime]
    faster = "" if row is dense else f" ({found['speedup']:.2f}x)"
    return f"{statistics.median(found['median_ms']):.3g}{faster}"


def depth_sections() -> list[str]:
    """The parts of the benchmarks page that are about depth."""
    parts: list[str] = []
    for name, title in NETWORKS.items():
        result = stored(name)
        if result:
            parts += [f"## Depth: {title}", setting(result), compared(result), left_out(result), published(result)]
    for path in sorted(RESULTS.glob("depth_curve_*.json")):
        network = path.stem.removeprefix("depth_curve_")
        content = json.loads(path.read_text())
        for figures in content.get("runs", [content]):
            parts += [f"## Front: {NETWORKS.get(network, network)}", front(figures), escape(figures.get("message", ""))]
    parts += searches()
    text = stored("text")
    if text and text.get("rows"):
        parts += ["## Depth: text", plain(text["rows"]), said(text)]
    return parts + overhead()


# ---- every method at one latency -------------------------------------------------------------------------------------


def compared(result: dict[str, Any]) -> str:
    """The methods side by side: speed in each runtime, MACs, accuracy, paired difference."""
    measured = [row for row in result["rows"] if "latency" in row]
    runtimes = list(measured[0]["latency"])
    head = ("", *(TITLES.get(r, r) for r in runtimes), "MACs, M", "top-1, %", "difference, points", "against auto")
    return table(head, [cells(row, runtimes) for row in sorted(measured, key=place)])


def place(row: dict[str, Any]) -> tuple[int, str]:
    """Where a row stands: dense, auto, the other methods by name, controls and peers."""
    name = row["name"]
    if name in ("dense", "auto"):
        return (int(name == "auto"), name)
    return (3 if name.startswith(CONTROLS) else 2, name)


def cells(row: dict[str, Any], runtimes: list[str]) -> list[str]:
    """One row as text; the dense network's latencies in milliseconds, the others' as a ratio to them."""
    dense = row["name"] == "dense"
    clocks = [row["latency"][runtime] for runtime in runtimes]
    speeds = [f"{statistics.median(c['median_ms']):.3g} ms" if dense else f"{c['speedup']:.2f}x" for c in clocks]
    tried = len(row["facts"])
    some = f" ({row['seeds']} of {tried} seeds)" if tried > row["seeds"] else ""
    macs = f"{statistics.median(row['macs']) / 1e6:,.1f}"
    apart = [interval(row["difference"]), interval(row.get("against_auto"))]
    return [escape(row["name"]) + some, *speeds, macs, f"{100 * row['accuracy']:.2f}", *apart]


def interval(values: list[float] | None) -> str:
    """A difference with its interval, or nothing."""
    return "" if not values else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*values)


def left_out(result: dict[str, Any]) -> str:
    """Why methods have no network, or not at every seed, as a list."""
    names: dict[str, list[str]] = {}
    for row in sorted(result["rows"], key=place):
        why = sorted({str(f.get("nothing") or f["refused"]) for f in row["facts"] if {"nothing", "refused"} & {*f}})
        if why:
            names.setdefault("; ".join(why), []).append(escape(row["name"]))
    lines = [f"- {', '.join(named)}: {escape(why)}" for why, named in names.items()]
    return "Without a network at this latency:\n\n" + "\n".join(lines) if lines else ""


def setting(result: dict[str, Any]) -> str:
    """Target, hardware, samples, healing budget and the script."""
    heal, rows = result["healing"], [row for row in result["rows"] if "n" in row]
    seeds = max(row["seeds"] for row in rows)
    images = next(row["n"] for row in rows if row["name"] == "dense")
    helped = f", distillation {heal['distill']:g}" if heal.get("distill") else ""
    return (
        f"Target: {result['target']:g}x of the dense latency in ONNX Runtime. Latency: batch {result['batch']}, "
        f"{result['threads']} threads, {escape(result['hardware'])}; medians over seeds. Accuracy on {images:,} "
        f"{result['split']} images, pooled over {seeds} seed{'s' * (seeds > 1)}. Healing: {heal['epochs']} epochs "
        f"over {heal['images']:,} images, {heal['optimizer']} at {heal['lr']:g}{helped}, {heal['precision']}; methods "
        "with an ingredient spend half of it on that. Measured by "
        f"`python benchmarks/depth/compare.py {result['network']}`."
    )


def published(result: dict[str, Any]) -> str:
    """Figures of peers that were not run here."""
    lines = [f"- {escape(text)}" for text in result.get("published", [])]
    return "Published, on other hardware and by other recipes:\n\n" + "\n".join(lines) if lines else ""


# ---- fronts ----------------------------------------------------------------------------------------------------------


def front(figures: dict[str, Any]) -> str:
    """The networks of a curve, one per row, the best in bold."""
    rows = figures["rows"]
    names = [entry["runtime"] for entry in rows[0]["latency"]]
    n = f"top-1, %, n = {rows[0]['n']:,}"
    head = ("", "depth", "MACs, M", *(f"{TITLES.get(name, name)}, ms" for name in names), n, "difference", "trainings")
    lines = []
    for row in rows:
        label = escape(row["name"])
        clocks = [clock(row, rows[0], name) for name in names]
        lines.append(
            [
                f"**{label}**" if row["name"] == figures["best"] else label,
                str(row["depth"]),
                f"{row['macs'] / 1e6:,.1f}",
                *clocks,
                f"{100 * row['accuracy']:.2f}",
                interval(row["difference"]),
                str(row["trainings"]),
            ]
        )
    return table(head, lines)


def clock(row: dict[str, Any], dense: dict[str, Any], runtime: str) -> str:
    """Milliseconds in one runtime, and how many times faster than dense that is."""
    ours, theirs = (next((e for e in r["latency"] if e["runtime"] == runtime), None) for r in (row, dense))
    if ours is None or theirs is None:
        return ""
    faster = "" if row is dense else f" ({theirs['median_ms'] / ours['median_ms']:.2f}x)"
    return f"{ours['median_ms']:.3g}{faster}"


# ---- looking, and plain rows -----------------------------------------------------------------------------------------


def searches() -> list[str]:
    """What `auto` costs in trainings and seconds beside a method that trains for every removal, and its exactness."""
    result = stored("search")
    if not result:
        return []
    rows = [
        (
            f"`{row['method']}`",
            f"{row['trainings']:.3g}",
            f"{row['seconds']:.0f}",
            f"{row['dense_trainings']:.1f}",
            f"{row['macs']:,}",
            f"{100 * row['accuracy']:.2f}",
        )
        for row in result["rows"]
    ]
    tried = result["knapsack"]
    verdict = "agrees" if tried["agree"] else "does not agree"
    n = f"top-1, %, n = {result['rows'][0]['n']:,}"
    return [
        "## Depth: what the search costs",
        SEARCHES.format(**result),
        table(("", "trainings", "seconds", "in trainings of the dense network", "MACs left", n), rows),
        f"The knapsack {verdict} with brute force, for every saving, on {tried['instances']} random small instances: "
        f"{tried['seconds']:.2f} s against {tried['brute_force_seconds']:.2f} s. 1 thread, "
        + escape(result["hardware"])
        + ". Measured by `python benchmarks/depth/search.py`.",
    ]


def overhead() -> list[str]:
    """What an entropy pass costs, and how often a score reads the data."""
    result = stored("overhead")
    if not result:
        return []
    passes = result["entropy"]
    looked = [(r["pass"], f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]") for r in passes["rows"]]
    scored = [
        (f"`{r['method']}`", str(r["sites"]), f"{r['passes']:g}", f"{r['seconds']:.1f}") for r in result["scores"]
    ]
    return [
        "## Depth: what looking costs",
        ENTROPY.format(**passes),
        table(("pass", "times a forward pass"), looked),
        SCORES,
        table(("method", "sites", "passes over the data", "seconds"), scored),
        "Measured by `python benchmarks/depth/overhead.py`.",
    ]


def plain(rows: list[dict[str, Any]]) -> str:
    """Rows of plain values as they are, one column per name."""
    names = [name for name, value in rows[0].items() if shown(value) is not None]
    head = tuple(escape(name.replace("_", " ")) for name in names)
    return table(head, [[cell(row.get(name)) for name in names] for row in rows])


def cell(value: Any) -> str:
    """One value of such a row."""
    return escape(shown(value) or "")


def shown(value: Any) -> str | None:
    """A value as text; None for what is no cell: dicts, and lists that are no middle with an interval."""
    if isinstance(value, list):
        numbers = len(value) == 3 and all(isinstance(v, int | float) for v in value)
        return "{:.3g} [{:.3g}, {:.3g}]".format(*value) if numbers else None
    if isinstance(value, dict):
        return None
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def said(result: dict[str, Any]) -> str:
    """The single values beside the rows, as a line."""
    facts = {k: shown(v) for k, v in result.items() if k not in ("rows", "schema", "environment")}
    line = "; ".join(f"{name.replace('_', ' ')}: {text}" for name, text in facts.items() if text)
    return f"{escape(line)}." if line else ""
