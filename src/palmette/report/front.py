"""The page and the picture of a `curve`: accuracy against latency of every network that was healed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes

from palmette.errors import RunError
from palmette.files import write_atomic
from palmette.report import words
from palmette.report.page import figures_of
from palmette.report.theme import COLOUR, drawing, sheet, svg

LIGHT = {
    "ink": "#1c2420",
    "muted": "#5c6861",
    "grid": "#dde1dc",
    "paper": "#ffffff",
    "dense": "#7b8894",
    "shrunk": "#2c8055",
    "again": "#7360b4",
    "chance": "#c46f1f",
}
"""The colours of a picture that stands alone, outside a page."""


def render_front(run_folder: str | Path) -> Path:
    """Write report.html and front.svg into the folder of a curve, from figures.json there; returns the page's path.

    Raises RunError when figures.json is missing or is not that of a curve.
    """
    folder = Path(run_folder)
    figures = front_figures(folder)
    if figures is None:
        raise RunError("The folder holds no curve", where=str(folder), fix="Pass the run folder of `palmette curve`.")
    environment = Environment(
        loader=PackageLoader("palmette.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("front.html.j2").render(
        figures=figures,
        words=words,
        picture=front_picture(figures),
        runtimes=runtimes_of(figures),
        clock=clock,
        edits=words.edit_columns(figures["rows"]),
    )
    write_atomic(folder / "front.svg", standalone(figures))
    target = folder / "report.html"
    write_atomic(target, page)
    return target


def front_figures(folder: Path) -> dict[str, Any] | None:
    """The figures of a curve's run folder, None for another. Raises RunError when its figures.json cannot be read."""
    return figures_of(folder, "curve")


def runtimes_of(figures: dict[str, Any]) -> list[str]:
    """The runtimes that the rows were timed in."""
    return [str(entry["runtime"]) for entry in figures["rows"][0]["latency"]]


def clock(row: dict[str, Any], runtime: str) -> float | None:
    """Median milliseconds of a row in a runtime."""
    return next((float(e["median_ms"]) for e in row["latency"] if e["runtime"] == runtime), None)


def front_picture(figures: dict[str, Any]) -> Markup:
    """The front as inline SVG in the page's colours: x is the latency that decided, y accuracy with its interval."""
    name = _deciding(figures)
    with drawing():
        figure, axes = sheet(720, 420, left=58, right=24, top=64, bottom=48)
        for row in figures["rows"]:
            _mark(axes, row, clock(row, name) if name else row["macs"] / 1e6, row["name"] == figures["best"])
        axes.set_xlabel(f"latency in {words.runtime(name)}, ms" if name else "multiply-adds (millions)")
        axes.set_ylabel(f"accuracy, % ({'validation' if figures['split'] == 'val' else figures['split']} data)")
        axes.grid(color=COLOUR["grid"], linewidth=0.7)
        axes.tick_params(length=0)
        axes.margins(x=0.09, y=0.12)
        axes.plot(
            [], [], linestyle="", marker="o", markersize=8, markerfacecolor="none", markeredgewidth=1.4,
            markeredgecolor=COLOUR["ink"], label="taken",
        )  # fmt: skip
        axes.legend(
            *_unique(axes), loc="lower left", bbox_to_anchor=(-0.01, 1.01), ncols=6, frameon=False, fontsize=8.2,
            handletextpad=0.3, columnspacing=1.1, labelcolor=COLOUR["ink"], borderaxespad=0.2,
        )  # fmt: skip
        return svg(figure, "front", f"Accuracy against latency of {len(figures['rows'])} networks")


def standalone(figures: dict[str, Any]) -> str:
    """The picture as a file of its own: light colours, white ground."""
    text = str(front_picture(figures))
    for colour, value in LIGHT.items():
        text = text.replace(f"var(--{colour})", value)
    style = "background:#ffffff;font-family:'DejaVu Sans',Verdana,sans-serif"
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + text.replace('style="', f'style="{style};', 1)


def _deciding(figures: dict[str, Any]) -> str | None:
    names = runtimes_of(figures)
    wanted = str(figures.get("cost_runtime", ""))
    return wanted if wanted in names else (names[-1] if names else None)


def _kind(row: dict[str, Any]) -> tuple[str, str, str]:
    """Legend, marker and colour of a row."""
    if row["name"].startswith("dense + same"):
        return "dense + same training", "s", "again"
    if row["int8"]:
        return "8 bits", "v", "chance"
    if row["name"] == "dense":
        return "dense", "D", "dense"
    return ("depth and width", "^", "shrunk") if row["width"] else ("depth", "o", "shrunk")


def _mark(axes: Axes, row: dict[str, Any], x: float | None, best: bool) -> None:
    if x is None or row["accuracy"] is None:
        return
    label, marker, colour = _kind(row)
    y, (low, high) = 100 * row["accuracy"], (100 * v for v in row["interval"])
    axes.errorbar(
        [x], [y], yerr=[[max(y - low, 0)], [max(high - y, 0)]], fmt=marker, color=COLOUR[colour], label=label,
        markersize=8 if best else 6, elinewidth=0.9, capsize=2, markeredgecolor=COLOUR["ink" if best else colour],
        markeredgewidth=1.4 if best else 0.8,
    )  # fmt: skip


def _unique(axes: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    return list(found.values()), list(found)
