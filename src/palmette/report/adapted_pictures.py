"""The pictures of an adapt: who holds what, what each layer keeps, and the epochs."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from palmette.report import words
from palmette.report.theme import COLOUR, bare, distinct, drawing, sheet, shorten, svg

MOST_HOLDERS = 7
MOST_NAMES = 36
SIDES = (("before", "dense", "without the plan"), ("after", "shrunk", "with the plan"))


def holders_picture(figures: dict[str, Any]) -> Markup:
    """Bars of the operations that hold something: both totals on one scale, then each side on its own."""
    sides = [(rows, colour, text) for key, colour, text in SIDES if (rows := _largest(figures["holders"][key]))]
    width, row = 720, 19
    height = 14 + sum(46 + row * len(rows) for rows, _, _ in sides)
    largest = max([sum(size for _, size in rows) for rows, _, _ in sides] + [1])
    with drawing():
        figure, axes = sheet(width, height, 0, 0, 0, 0)
        bare(axes, width, height)
        y = 10.0
        for rows, colour, text in sides:
            total = sum(size for _, size in rows)
            axes.text(0, y, f"{words.size(total)} {text}", va="center", fontsize=9.2, weight="bold")
            axes.barh(y + 15, width * total / largest, height=7, left=0, color=COLOUR[colour])
            y += 33
            for name, size in rows:
                _holder(axes, y, name, size, total, colour)
                y += row
            y += 13
        said = ". ".join(
            f"{text}: " + ", ".join(f"{name} {words.size(size)}" for name, size in rows) for rows, _, text in sides
        )
        return svg(figure, "holders", said)


def _holder(axes: Axes, y: float, name: str, size: int, total: int, colour: str) -> None:
    start, room = 214.0, 350.0
    axes.text(0, y, shorten(name, 36), va="center", fontsize=8.6)
    axes.barh(y, room, left=start, height=10, color=COLOUR["grid"], alpha=0.45)
    axes.barh(y, room * size / max(total, 1), left=start, height=10, color=COLOUR[colour])
    axes.text(start + room + 10, y, f"{words.size(size)}, {words.percent(size / max(total, 1), 1)}", va="center")


def _largest(rows: list[dict[str, Any]] | None) -> list[tuple[str, int]]:
    """The largest holders by name, and the others together."""
    found = [(row["operations"], int(row["bytes"])) for row in rows or () if row["bytes"]]
    if len(found) <= MOST_HOLDERS:
        return found
    rest = sum(size for _, size in found[MOST_HOLDERS - 1 :])
    return [*found[: MOST_HOLDERS - 1], (f"{len(found) - MOST_HOLDERS + 1} others", rest)]


def layers_picture(figures: dict[str, Any]) -> Markup | None:
    """What each module keeps, along the network, on a logarithmic scale: a line without the plan, bars with it."""
    rows = [row for row in figures["layers"] if row["before"] or row["after"]]
    if not rows:
        return None
    positions = list(range(len(rows)))
    sizes = [size for row in rows for size in (row["before"], row["after"]) if size]
    floor = min(sizes) / 2
    labels = distinct([row["layer"] for row in rows], 18) if len(rows) <= MOST_NAMES else {}
    foot = 26 + 4.6 * max(map(len, labels.values()), default=4)
    with drawing():
        figure, axes = sheet(1000, 270 + foot, left=80, right=12, top=34, bottom=foot)
        axes.set_yscale("log")
        axes.bar(
            positions, [max(row["after"], floor) - floor for row in rows], bottom=floor, width=0.62,
            color=COLOUR["shrunk"], label="with the plan", zorder=3,
        )  # fmt: skip
        if any(row["before"] is not None for row in rows):
            axes.bar(
                positions, [max(row["before"] or 0, floor) - floor for row in rows], bottom=floor, width=0.86,
                color=COLOUR["dense"], alpha=0.45, label="without the plan", zorder=2,
            )  # fmt: skip
        _frame(axes, rows, labels)
        axes.set_ylim(floor, 2 * max(sizes))
        said = ", ".join(f"{row['layer']} {words.size(row['before'])} to {words.size(row['after'])}" for row in rows)
        return svg(figure, "layers", f"Bytes kept by each layer: {said}")


def _frame(axes: Axes, rows: list[dict[str, Any]], labels: dict[str, str]) -> None:
    axes.yaxis.set_major_locator(LogLocator(base=4, numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.size(value)))
    axes.set_ylabel("kept for backward")
    axes.grid(axis="y", color=COLOUR["grid"], linewidth=0.7)
    axes.tick_params(length=0)
    axes.set_xlim(-0.7, len(rows) - 0.3)
    if labels:
        axes.set_xticks(range(len(rows)), [labels[row["layer"]] for row in rows], rotation=55, ha="right")
        axes.tick_params(axis="x", labelsize=7.6)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"{len(rows)} modules in the order of the network, from the input to the output")
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, fontsize=8.4, borderaxespad=0.2,
        labelcolor=COLOUR["ink"],
    )  # fmt: skip


def epochs_picture(figures: dict[str, Any]) -> Markup | None:
    """Training loss, and beside it validation accuracy with its interval, by epoch."""
    history = figures["history"]
    if not history:
        return None
    judged = "val_accuracy" in history[0]
    epochs = [entry["epoch"] + 1 for entry in history]
    with drawing():
        figure, axes = sheet(1000 if judged else 500, 250, left=58, right=542 if judged else 16, top=14, bottom=44)
        axes.plot(epochs, [e["loss"] for e in history], "o-", color=COLOUR["again"], markersize=4.5, linewidth=1.3)
        axes.set_ylabel("training loss")
        axes.set_ylim(0, 1.12 * max(e["loss"] for e in history) or 1)
        panels = [axes]
        if judged:
            right = figure.add_axes((560 / 1000, 44 / 250, 424 / 1000, 192 / 250))
            right.patch.set_alpha(0)
            heights = [100 * e["val_accuracy"] for e in history]
            low = [max(0.0, y - 100 * e["val_interval"][0]) for y, e in zip(heights, history, strict=True)]
            high = [max(0.0, 100 * e["val_interval"][1] - y) for y, e in zip(heights, history, strict=True)]
            right.errorbar(
                epochs, heights, yerr=[low, high], fmt="o-", color=COLOUR["shrunk"], markersize=4.5, linewidth=1.3,
                elinewidth=0.9,
            )  # fmt: skip
            right.set_ylabel("validation accuracy, %")
            panels.append(right)
        for panel in panels:
            panel.set_xlabel("epoch")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
            panel.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
            panel.grid(color=COLOUR["grid"], linewidth=0.7)
            panel.tick_params(length=0)
        said = ", ".join(f"epoch {e['epoch'] + 1} loss {e['loss']:.3f}" for e in history)
        return svg(figure, "epochs", said)
