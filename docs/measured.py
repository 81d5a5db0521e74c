"""Pages and tables of measured results (benchmarks/results/*.json); a table without results is left out."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from adapt_tables import adapt_section
from board_tables import board_section
from depth_tables import depth_sections
from device_tables import device_section
from layout import NOTE, escape, page, table
from supernet_families import families_section
from supernet_tables import supernet_section, trained_section

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

COVERAGE = """
Which networks Palmette captures, edits and collapses, each built with random weights and calibrated batch norm. For
every family: the captured graph's output equals the model's bit for bit; dropout draws in training, and batch-norm
statistics after one step equal the original's; random legal plans are applied and collapsed by force, and the result
is held against the edited network in float64 (bound 1e-10) and float32 (bound 1e-4, relative); the collapsed network
trains one step. Random removals in a network of random weights can amplify rounding: `(rounding)` is the error of the
edited network in float32 against itself in float64, and `condition` how many times larger than a relative change of
all its weights that of its outputs is. Where four times the former exceeds 1e-4, or eight roundings of the weights
exceed a bound, these are the bound: no merge can be held to less. No family has a line of code of its own.

PyTorch's fused inference path of `nn.MultiheadAttention` is another function in float32 (about 3e-6 off). It is turned
off on both sides of the comparison, since it cannot be trained.
"""

BENCHMARKS = """
Every table comes from a script in `benchmarks/` and stands with its controls: the dense network with the same extra
training, and random removal of as many sites, or for `auto` of sites that save as much. Accuracy is top-1 on data that
chose nothing, with its 95 % interval;
differences are paired per image, in points against the dense network. 1 MAC is one multiply-add.
"""


def coverage_page() -> str:
    """The coverage table, as benchmarks/coverage.py lays it out."""
    parts = [
        NOTE,
        "# Coverage",
        COVERAGE,
    ]
    results = RESULTS / "coverage.json"
    if results.exists():
        stored = json.loads(results.read_text())
        rows = sorted(stored["rows"], key=lambda row: row["family"])
        passed = sum(bool(row["passed"]) for row in rows)
        parts.append(f"{passed} of {len(rows)} families hold, with torch {stored['torch']}.")
        parts.append(coverage_script().format_table(rows))
    parts.append("The table is printed by `python benchmarks/coverage.py`.")
    parts.append(families_section())
    return page(parts)


def coverage_script() -> Any:
    """benchmarks/coverage.py as a module, under a name that no package has."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location("palmette_benchmarks_coverage", ROOT / "benchmarks" / "coverage.py")
    if spec is None or spec.loader is None:
        raise SystemExit("benchmarks/coverage.py is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def benchmarks_page() -> str:
    """One accounting table per stored result of `shrink`, then the tables about depth."""
    parts = [
        NOTE,
        "# Benchmarks",
        BENCHMARKS,
    ]
    for path in sorted(RESULTS.glob("shrink_*.json")):
        for figures in runs_of(path):
            network, data = figures["model"].rpartition(":")[2], figures["data"].partition(":")[0]
            parts += [f"## {network} on {data}", accounting(figures), made_by(path, figures)]
    parts += [*depth_sections(), adapt_section(), supernet_section(), trained_section(), board_section()]
    parts += [device_section()]
    if len(parts) == 3:
        parts.append("No results are stored yet: `make bench` measures them.")
    return page(parts)


def runs_of(path: Path) -> list[dict[str, Any]]:
    """The runs in a result file: it holds one run's figures, or a list of them under `runs`."""
    stored = json.loads(path.read_text())
    return list(stored.get("runs", [stored]))


def made_by(path: Path, figures: dict[str, Any]) -> str:
    """The message of a run and the script that made it: one of its own name, or that of its data with its name."""
    script = f"benchmarks/{path.stem}.py"
    if not (ROOT / script).exists():
        script = f"benchmarks/shrink_{figures['data'].partition(':')[0]}.py {path.stem.removeprefix('shrink_')}"
    said = escape(figures.get("message") or "")
    how = f"method {figures['method']}, data `{figures['data']}`, seed {figures.get('seed', 0)}"
    return f"{said} Measured by `python {script}` ({how}).".strip()


def accounting(figures: dict[str, Any]) -> str:
    """What stands side by side whenever a reduction is reported: one column per network."""
    rows = figures["rows"]
    lines = [(label, [f"{row.get(key, 0):,}" for row in rows]) for label, key in COUNTS]
    lines.append(("peak memory", [kibibytes(row["peak_bytes"]) for row in rows]))
    lines += [(f"{name}, ms", [latency_cell(row, name) for row in rows]) for name in latency_names(rows)]
    lines.append((f"top-1, %, n = {rows[0]['n']:,}", [accuracy_cell(row) for row in rows]))
    lines.append(("difference, points", [difference_cell(row) for row in rows]))
    head = ("", *(row["name"] for row in rows))
    return f"{table(head, [[label, *cells] for label, cells in lines])}\n\n{BRACKETS} {clocks(rows)}"


COUNTS = (
    ("activations linearised", "linearized"),
    ("blocks dropped", "dropped"),
    ("sites replaced", "replaced"),
    ("depth", "depth"),
    ("MACs", "macs"),
    ("parameters", "params"),
)
BRACKETS = "In brackets: quartiles of the latencies, 95 % intervals of accuracy and difference."


def latency_names(rows: list[dict[str, Any]]) -> list[str]:
    """The runtimes that were timed, in order."""
    return list(dict.fromkeys(entry["runtime"] for row in rows for entry in row.get("latency") or []))


def clocks(rows: list[dict[str, Any]]) -> str:
    """What the latencies depend on: batch, threads, dtype and hardware of each runtime."""
    said = {}
    for entry in (entry for row in rows for entry in row.get("latency") or []):
        threads = f"{entry['threads']} thread{'s' if entry['threads'] != 1 else ''}"
        said[entry["runtime"]] = f"batch {entry['batch']}, {threads}, {entry['dtype']}, {entry['hardware']}"
    return " ".join(f"{name}: {escape(text)}." for name, text in said.items())


def latency_cell(row: dict[str, Any], name: str) -> str:
    """The median in milliseconds, with its quartiles."""
    for entry in row.get("latency") or []:
        if entry["runtime"] == name:
            return f"{entry['median_ms']:.3g} [{entry['q25_ms']:.3g}, {entry['q75_ms']:.3g}]"
    return ""


def accuracy_cell(row: dict[str, Any]) -> str:
    """Top-1 in percent with its interval."""
    if row.get("accuracy") is None:
        return ""
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def difference_cell(row: dict[str, Any]) -> str:
    """The paired difference in points, with its interval."""
    if not row.get("difference"):
        return ""
    difference, low, high = row["difference"]
    return f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"


def kibibytes(count: int) -> str:
    """Bytes in KiB."""
    return f"{count / 1024:,.1f} KiB"
