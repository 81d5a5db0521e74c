"""What commands print: rich tables with units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

console = Console(soft_wrap=False, highlight=False)


def say(text: str) -> None:
    """Print one line as it is: no markup, no breaks that the terminal does not make."""
    console.print(text, markup=False, soft_wrap=True)


def accounting(rows: list[dict[str, Any]], split: str) -> Table:
    """The accounting table: one column per network, one line per quantity, units in the first column.

    Counts have three digits, so that four networks fit on 80 columns; figures.json has all of them.
    """
    table = _table(f"What it costs and what it keeps ({split} data)")
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row["name"], justify="right")
    for label, cell in _lines(rows[0]):
        table.add_row(label, *(cell(row) for row in rows))
    return table


def front(rows: list[dict[str, Any]], split: str, best: str) -> Table:
    """The networks of a curve, one per line because there may be many; a star marks the best."""
    table = _table(f"The front ({split} data, {rows[0]['n']:,} samples)")
    table.add_column("")
    for entry in rows[0]["latency"]:
        table.add_column(f"{entry['runtime']}, ms", justify="right")
    table.add_column("top-1, %", justify="right")
    table.add_column("points against dense", justify="right", no_wrap=True)
    for row in rows:
        found = {entry["runtime"]: f"{entry['median_ms']:.3f}" for entry in row["latency"]}
        times = [found.get(entry["runtime"], "") for entry in rows[0]["latency"]]
        points = f"{row['difference'][0]:+.2f} {_difference_interval(row)}" if row["difference"] else ""
        table.add_row(f"{row['name']}{' *' * (row['name'] == best)}", *times, f"{100 * row['accuracy']:.2f}", points)
    return table


def _lines(first: dict[str, Any]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    from palmette.report.words import count, size

    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("linearised", lambda row: str(row["linearized"])),
        ("dropped", lambda row: str(row["dropped"])),
        ("replaced", lambda row: str(row["replaced"])),
        ("depth", lambda row: str(row["depth"])),
        ("MACs", lambda row: count(row["macs"])),
        ("parameters", lambda row: count(row["params"])),
        ("peak memory", lambda row: size(row["peak_bytes"])),
    ]
    for index, latency in enumerate(first["latency"]):
        label = f"{latency['runtime']}, ms"
        lines.append((label, lambda row, i=index: f"{row['latency'][i]['median_ms']:.3f}"))  # type: ignore[misc]
    lines.append(("top-1, %", lambda row: f"{100 * row['accuracy']:.2f}"))
    lines.append(("  95 % interval", lambda row: f"[{100 * row['interval'][0]:.1f}, {100 * row['interval'][1]:.1f}]"))
    lines.append(("  samples", lambda row: str(row["n"])))
    lines.append(("points against dense", lambda row: f"{row['difference'][0]:+.2f}" if row["difference"] else ""))
    lines.append(("  95 % interval", _difference_interval))
    return lines


def _difference_interval(row: dict[str, Any]) -> str:
    return f"[{row['difference'][1]:+.1f}, {row['difference'][2]:+.1f}]" if row["difference"] else ""


def measured_on(rows: list[dict[str, Any]]) -> list[str]:
    """A line per runtime that names batch, threads, dtype and hardware of the latencies."""
    return [
        f"{lat['runtime']}: interleaved medians of {lat['runs']} samples, batch {lat['batch']}, "
        f"{lat['threads']} thread{'s' if lat['threads'] > 1 else ''}, {lat['dtype']}, {lat['hardware']}"
        for lat in rows[0]["latency"]
    ]


def ranking(rows: Sequence[dict[str, Any]], unit: str) -> Table:
    """The ranking of candidates, lowest score on top."""
    table = _table("Candidates, lowest score on top")
    table.add_column("candidate", overflow="fold")
    table.add_column(f"score, {unit}", justify="right")
    table.add_column("MACs saved", justify="right")
    table.add_column("ms saved", justify="right")
    for row in rows:
        saved = "" if row["ms_saved"] is None else f"{row['ms_saved']:.3f}"
        table.add_row(row["name"], f"{row['score']:.4f}", f"{row['macs_saved']:,}", saved)
    return table


def plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> Table:
    """A table of text, left-aligned except for the columns named in `right`."""
    table = _table(title)
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index == 0, justify="right" if column in right else "left")
    for row in rows:
        table.add_row(*row)
    return table


def parity(seen: dict[str, Any]) -> str:
    """One line on how closely a runtime follows the network."""
    where = f"{seen['runtime']} agrees on {seen['samples']} samples"
    if seen["relative_error"] == 0:
        return f"{where}, bit for bit"
    snr = "" if seen["snr_db"] is None else f", SNR {seen['snr_db']:.1f} dB"
    return f"{where}: largest relative error {seen['relative_error']:.1e}{snr}"


def _table(title: str) -> Table:
    """A table without a frame; long words are broken only where nothing else fits."""
    return Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
