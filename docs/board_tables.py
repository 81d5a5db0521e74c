"""The section "Supernets: boards for a trained network" of the page of benchmarks, from supernet_boards.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layout import table

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "supernet_boards.json"
SPACES = {
    "widths": "widths, depth",
    "resolution": "+ resolution",
    "bits": "+ bits",
    "both": "+ resolution, bits",
}

ABOUT = """
A trained ResNet-20 (CIFAR-10, {source} % on these test images) becomes a supernet over widths, depth, resolution and
the bits of weights, trained for three epochs on 12,000 images, and each board is met from within four of its spaces
with 40 measurements on 1,000 validation images, half of them drawn and half proposed. Top-1 in percent on 4,000 test
images, looked at once, with 95 % intervals, one seed, nothing trained afterwards; difference to widths and depth alone,
in points, paired. Random: the best of 40 networks that fit, drawn at random; uniform: the widest network of one share
of channels everywhere that fits, at full depth and resolution. float32 activations, weights in flash. By
`benchmarks/supernet/boards.py`. Rows with a * are of the search as it is now, which begins with the largest networks
that fit; this was added after the other rows, tests included, were seen, and the others were not measured again.
"""


def board_section() -> str:
    """One table; nothing where no results are stored."""
    if not FILE.exists():
        return ""
    content = json.loads(FILE.read_text())
    rows = content["rows"]
    lines = [_line(rows, key) for key in rows if ", " in key and not key.startswith("difference")]
    head = ("board", "choices", "RAM", "flash", "px", "8-bit layers", "top-1", "difference", "random", "uniform")
    about = ABOUT.format(source=f"{100 * rows['source']['test']['mean']:.1f}").strip()
    return f"## Supernets: boards for a trained network\n\n{about}\n\n{table(head, lines)}"


def _line(rows: dict[str, Any], key: str) -> tuple[str, ...]:
    row, (board, kind, *how) = rows[key], key.split(", ")
    if "error" in row:
        return (board, SPACES[kind], "none fits", *[""] * 7)
    gain = rows.get(f"difference {key}")
    return (
        f"{board}{' *' if how else ''}",
        SPACES[kind],
        f"{row['ram_bytes'] / 1024:.1f} KiB",
        f"{row['flash_bytes'] / 1024:.1f} KiB",
        str(row["resolution"]),
        str(row["layers_in_8_bits"]),
        _top1(row["test"]),
        "" if gain is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*gain["gain"]),
        _top1(row["random"]),
        _top1(row["uniform"]) if "uniform" in row else "none fits",
    )


def _top1(seen: dict[str, Any]) -> str:
    low, high = (100 * v for v in seen["interval"])
    return f"{100 * seen['mean']:.1f} [{low:.1f}, {high:.1f}]"
