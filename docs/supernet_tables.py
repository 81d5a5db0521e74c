"""The section "Supernets: search on measured networks" of the page of benchmarks, from supernet_imagenet.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layout import table

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "supernet_imagenet.json"
SPACES = ("OFA", "CompOFA", "MOOFA")

ABOUT = """
The measured sub-networks of OFA, CompOFA and MOOFA that MOOFA's authors published (ImageNet, about 60 % of them are
used here: {networks}). Palmette finds the best configuration within a budget exactly, for a
predictor that adds up. **Only what is called measured was measured**, on the whole validation set: of the {optima}
optima below, {hits} are among the measured networks; what is said of the others is a prediction. By
`benchmarks/supernet/imagenet.py`.
"""

PREDICTORS = """
Agreement with measured networks that were not learnt from, in points of top-1 and as Kendall's tau, with 95 % intervals
of a bootstrap. Near the optimum: the best predicted 5 % of the networks in each bin of peak memory between two budgets;
bias is predicted minus measured. On top-1 itself a sum of gains promises too much there.
"""

PAPER = """
The papers' metric (largest sum of a convolution's input, output and weights, in elements). Published: the network that
the authors' evolutionary search found, and its measured top-1. Measured: the best of the stored networks within the
budget, a lower bound of what the space holds.
"""

OPTIMA = """
The exact optima of a ridge regression on the log of the error, learnt from 80 % of the networks: predicted top-1, peak,
and the median time of a search in milliseconds ({hardware}, one thread). They lie at corners of the space where nothing
was measured: expect less. At an equal peak they promise up to {gap:.1f} points more than any network known there has.
"""

MCU = """
Bytes of an int8 microcontroller: weights in flash, activations, additions and depthwise convolutions in place, all
that is alive counted. Best measured top-1 (as trained, in floating point) and the predicted optimum, each with its
weights in MB of flash, which nothing bounds in the first table. A dash: nothing fits, or nothing that was measured.
"""

FLASH = "The same with 6 MiB of flash:"

REPLAY = """
A search whose truth is known: {splits} times, 200 random networks are learnt from, and the one that is predicted best
within the budget is chosen among the others. Measured top-1, averages. In brackets, where 90 % of the distances between
chosen and best lie. Against the best of the 200 that were measured anyway, MOOFA gains; OFA and CompOFA, whose networks
lie closer together, hardly do.
"""

BOUNDED = """
MOOFA with bounds on sums beside the peak, still exact: median time of a search in milliseconds.
"""


def supernet_section() -> str:
    """All tables; nothing where no results are stored."""
    if not FILE.exists():
        return ""
    found = json.loads(FILE.read_text())
    networks = ", ".join(f"{count:,} of {name}" for name, count in found["networks"].items())
    paper = {(row["space"], row["budget"]): row for row in found["searches"] if row["metric"] == "moofa"}
    device = {(row["space"], row["budget"]): row for row in found["searches"] if row["metric"].endswith("controller")}
    flash = {(row["space"], row["budget"]): row for row in found["searches"] if row["metric"].endswith("flash")}
    optima_found = [row["optimum"] for row in found["searches"] if "optimum" in row]
    hits = sum(optimum["measured"] is not None for optimum in optima_found)
    processor = found["environment"]["hardware"]["processor"]
    return "\n\n".join(
        [
            "## Supernets: search on measured networks",
            ABOUT.format(networks=networks, hits=hits, optima=len(optima_found)).strip(),
            f"### Predictors\n\n{PREDICTORS.strip()}",
            predictors(found["predictors"]),
            f"### Within the papers' budgets\n\n{PAPER.strip()}",
            measured(paper),
            OPTIMA.format(hardware=processor, gap=_gap(paper)).strip(),
            optima(paper),
            f"### Within the bytes of a microcontroller\n\n{MCU.strip()}",
            microcontroller(device),
            FLASH,
            microcontroller(flash),
            f"### Chosen and best, both measured\n\n{REPLAY.format(splits=found['replays'][0]['splits']).strip()}",
            replays(found["replays"]),
            f"### More than one bound\n\n{BOUNDED.strip()}",
            bounded(found["bounded"]),
        ]
    )


def predictors(rows: list[dict[str, Any]]) -> str:
    """Agreement by space, number of networks and predictor."""
    head = ("", "learnt from", "predictor", "RMSE", "tau", "RMSE near the optimum", "bias there")
    lines = []
    for row in rows:
        near = row["best of each bin"]
        cells = [_interval(row["all"], "rmse"), _interval(row["all"], "tau")]
        lines.append(
            (row["space"], f"{row['n']:,}", row["predictor"], *cells, _interval(near, "rmse"), _interval(near, "bias"))
        )
    return table(head, lines)


def _interval(found: dict[str, Any], name: str) -> str:
    low, high = found[f"{name}_interval"]
    if name == "tau":
        return f"{found[name]:.3f} [{low:.3f}, {high:.3f}]"
    sign = "+" if name == "bias" else ""
    return f"{100 * found[name]:{sign}.2f} [{100 * low:{sign}.2f}, {100 * high:{sign}.2f}]"


def measured(rows: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Published and best measured top-1 by budget."""
    head = ("budget", *(f"{space}, {what}" for space in SPACES for what in ("published", "measured")))
    lines = []
    for budget in _budgets(rows):
        cells = [f"{budget // 1000:,}k"]
        for space in SPACES:
            row = rows[space, budget]
            top1, peak, _ = row["published"]
            cells += [f"{top1:.2f} ({peak:,})", _best(row)]
        lines.append(cells)
    return table(head, lines)


def _best(row: dict[str, Any]) -> str:
    best = row.get("best_measured")
    return f"{100 * best['measured']:.2f} ({best['peak']:,})" if best else "-"


def optima(rows: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Predicted top-1, peak and time by budget."""
    head = ("budget", *(f"{space}, {what}" for space in SPACES for what in ("predicted", "ms")))
    lines = []
    for budget in _budgets(rows):
        cells = [f"{budget // 1000:,}k"]
        for space in SPACES:
            row = rows[space, budget]
            found = row["optimum"]
            cells += [f"{100 * found['predicted']:.2f} ({found['peak']:,})", f"{row['median_ms']:.1f}"]
        lines.append(cells)
    return table(head, lines)


def _gap(rows: dict[tuple[str, int], dict[str, Any]]) -> float:
    """The most, in points, by which a predicted optimum at a published peak exceeds the best top-1 known within it."""
    gaps = []
    for row in rows.values():
        (top1, peak, _), found, best = row["published"], row["optimum"], row["best_measured"]
        if found["peak"] == peak:
            gaps.append(100 * found["predicted"] - max(top1, 100 * best["measured"]))
    return max(gaps)


def microcontroller(rows: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Best measured and predicted optimum by budget in KiB."""
    head = ("RAM", *(f"{space}, {what}" for space in SPACES for what in ("measured", "predicted")))
    lines = []
    for budget in _budgets(rows):
        cells = [f"{budget // 1024} KiB"]
        for space in SPACES:
            row = rows[space, budget]
            for name, value in (("best_measured", "measured"), ("optimum", "predicted")):
                found = row.get(name)
                cells.append(f"{100 * found[value]:.1f} ({found['params'] / 1e6:.1f})" if found else "-")
        lines.append(cells)
    return table(head, lines)


def replays(rows: list[dict[str, Any]]) -> str:
    """Chosen against best, average, and the best that was learnt from."""
    head = ("", "budget", "chosen", "best", "average", "best of the 200", "best minus chosen")
    lines = []
    for row in rows:
        if row["budget"] in (350_000, 450_000, 600_000, 800_000):
            low, high = row["regret_5_95"]
            points = [f"{100 * row[name]:.2f}" for name in ("chosen", "best", "average", "learnt")]
            gap = f"{100 * (row['best'] - row['chosen']):.2f} [{100 * low:.2f}, {100 * high:.2f}]"
            lines.append((row["space"], f"{row['budget'] // 1000:,}k", *points, gap))
    return table(head, lines)


def bounded(rows: list[dict[str, Any]]) -> str:
    """Time, peak and sums of optima with further bounds."""
    head = ("budget", "bounds", "ms", "peak", "MACs, M", "parameters, M")
    lines = []
    for row in rows:
        said = ", ".join(f"{name} <= {bound // 10**6} M" for name, bound in row["bounds"].items())
        sums = [f"{row[name] / 1e6:.1f}" for name in ("macs", "params")]
        lines.append((f"{row['budget'] // 1000:,}k", said, f"{row['median_ms']:.0f}", f"{row['peak']:,}", *sums))
    return table(head, lines)


def _budgets(rows: dict[tuple[str, int], dict[str, Any]]) -> list[int]:
    return sorted({budget for _, budget in rows})


# ---- trained here ----------------------------------------------------------------------------------------------------

TRAINED = """
Two spaces on CIFAR-10 at 32 px, from random weights, on one core: the same stem, first stage and choices (kernels 3 and
5, expands 1 to 4, depths), so that the same layers near the input bound both. Behind them OFA's kind widens gently;
MOOFA's widths are those of `moofa_widths`. Both saw the same images in the same order: {images:,} training images, the
largest network alone for {alone} epochs (SGD, {alone_lr:g}), then {sandwich} epochs of the sandwich ({sandwich_lr:g};
largest, smallest, {sub_nets} at random), one seed. **The networks are not equal in MACs and parameters**: that is what
equal memory buys.
"""

SEARCHED = """
At each budget {samples} networks were drawn and measured on the 2,000 validation images; a ridge regression proposed
two more, three times over, the uniform networks joined before the last time, and the best measured is the answer
({counts} measured in all; random search had as many). That last round was added after the first two had been looked at
on the test images; it left the answers at 48 and 56 KiB as they were. Uniform: one share for all inner widths, all
blocks and kernels, from the same supernet, or trained without one for as many epochs. OFA's MACs: MOOFA's best measured
network with at most as many multiply-adds as OFA's answer, against that answer; a dash where none was measured. Top-1
on {n:,} test images that chose nothing, as the supernet has it and after one more epoch alone on the same training
images (tuned); MOOFA minus OFA, in points, paired per image, with its 95 % interval, which does not count the luck of
training (one seed). By `benchmarks/supernet/trained.py`.
"""

WAYS = {"searched": "search", "matched": "search, OFA's MACs", "random": "random search", "uniform": "uniform"}
WAYS["alone"] = "uniform, no supernet"
STATES = {"as it is": "test", "tuned": "tuned"}
PROFILE_TEXT = {
    "device": "Weights in flash, activations, additions and depthwise convolutions in place; float32 (int8: 1/4):",
    "plain": "Weights in flash, nothing in place:",
}

FIGURES = """
The searched networks: what they need within each budget. Peaks in KiB; that without anything in place was measured on
the extracted network and is what was predicted in {equal} of {all} networks.
"""


def trained_section() -> str:
    """The tables of the supernets that were trained here; nothing where no results are stored."""
    file = FILE.with_name("supernet_trained.json")
    if not file.exists():
        return ""
    rows = json.loads(file.read_text())["rows"]
    metrics = [m for m in PROFILE_TEXT if f"search MOOFA {m}" in rows and f"search OFA {m}" in rows]
    gaps = [row["n"] for key, row in rows.items() if key.startswith("difference")]
    if not metrics or not gaps:
        return ""
    recipe, known = rows["training MOOFA"], {name: rows[f"counts {name} device"] for name in ("MOOFA", "OFA")}
    counts = ", ".join(f"{row['measured']} of {name}" for name, row in known.items())
    parts = ["## Supernets: trained here", TRAINED.format(**recipe).strip(), trained_spaces(rows)]
    parts.append(SEARCHED.format(samples=recipe["samples"], counts=counts, n=gaps[0]).strip())
    for metric in metrics:
        parts += [PROFILE_TEXT[metric], trained_answers(rows, metric)]
    tests = [row for key, row in rows.items() if key.startswith("test ")]
    equal = sum(row["predicted"]["plain"] == row["peak_bytes"] for row in tests)
    return "\n\n".join([*parts, FIGURES.format(equal=equal, all=len(tests)).strip(), trained_figures(rows)])


def trained_spaces(rows: dict[str, Any]) -> str:
    """One line for each space: widths, size, and what training took."""
    head = (
        "",
        "stem, first, stages, final, last",
        "networks",
        "largest: MACs, M",
        "parameters, k",
        "training, CPU min",
    )
    lines = []
    for name in ("OFA", "MOOFA"):
        row = rows[f"training {name}"]
        minutes = (row["cpu_seconds_alone"] + row["cpu_seconds_sandwich"]) / 60
        figures = [f"{row['networks']:.1e}", f"{row['macs'] / 1e6:.2f}", f"{row['params'] / 1e3:.0f}", f"{minutes:.1f}"]
        lines.append((f"{name}'s kind", ", ".join(map(str, row["widths"])), *figures))
    return table(head, lines)


def trained_answers(rows: dict[str, Any], metric: str) -> str:
    """By budget and way of searching: test accuracy of both, and the difference, before and after fine-tuning."""
    tuned = any(key.startswith(f"difference {metric}") and "tuned" in row for key, row in rows.items())
    states = ("as it is", "tuned") if tuned else ("as it is",)
    head = ("RAM", "chosen by", *(f"{what}, {state}" for state in states for what in ("OFA", "MOOFA", "difference")))
    lines = []
    for budget in rows[f"search OFA {metric}"]["answers"]["searched"]:
        for way, said in WAYS.items():
            if way == "alone" and metric != "device":
                continue
            gap = rows.get(f"difference {metric} {way} {budget}", {})
            cells = [f"{budget} KiB", said]
            for state in states:
                kind = {"as it is": "alone"}.get(state, "") if way == "alone" else STATES[state]
                for name in ("OFA", "MOOFA"):
                    found = rows[f"search {name} {metric}"]["answers"]["uniform" if way == "alone" else way]
                    cells += [_top1(rows, f"{kind} {name} {found.get(budget)}")]
                cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*gap[state]) if state in gap else "-")
            if set(cells[2:]) != {"-"}:
                lines.append(cells)
    return table(head, lines)


def _top1(rows: dict[str, Any], key: str) -> str:
    return f"{100 * rows[key]['top1']['mean']:.2f}" if key in rows else "-"


def trained_figures(rows: dict[str, Any]) -> str:
    """Validation accuracy, compute, weights and peaks of the searched networks under the device's profile."""
    head = ("RAM", "", "validation", "MACs, M", "parameters, k", "peak, device", "peak, plain", "measured")
    lines = []
    for budget in rows["search OFA device"]["answers"]["searched"]:
        for name in ("OFA", "MOOFA"):
            code = rows[f"search {name} device"]["answers"]["searched"].get(budget)
            row = rows.get(f"test {name} {code}")
            if row:
                peaks = [row["predicted"]["device"], row["predicted"]["plain"], row["peak_bytes"]]
                size = [f"{100 * row['val']:.2f}", f"{row['macs'] / 1e6:.2f}", f"{row['params'] / 1e3:.0f}"]
                lines.append((f"{budget} KiB", name, *size, *(f"{peak / 1024:.1f}" for peak in peaks)))
    return table(head, lines)
