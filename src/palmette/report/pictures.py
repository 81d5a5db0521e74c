"""The pictures of cost and accuracy: the path of the rounds, and what the network costs before and after."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes

from palmette.report import words
from palmette.report.figures import Figures, Row
from palmette.report.theme import COLOUR, bare, drawing, sheet, svg

MOST_NUMBERS = 15
_MARKS = {
    "dense": ("D", "dense"),
    "shrunk": ("o", "shrunk"),
    "dense + same training": ("s", "again"),
    "random removal": ("^", "chance"),
}


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One quantity before and after, with its text; `spread`: quartiles of both where it was timed."""

    label: str
    before: float
    after: float
    text: tuple[str, str]
    spread: tuple[tuple[float, float], tuple[float, float]] | None = None


def path_picture(figures: Figures) -> Markup | None:
    """Accuracy against latency (multiply-adds where nothing was timed), per round, with dense and both controls."""
    timed = [r for r in figures.rounds if r.latency_ms is not None]
    clocked = bool(figures.runtimes) and (bool(timed) or not figures.rounds)
    name = figures.runtimes[0] if clocked else None
    shown = [row for row in figures.rows if row.accuracy is not None and _x(row, name) is not None]
    if figures.shrunk.removed == 0:
        shown = [row for row in shown if row.name != "shrunk"] if figures.rounds else []
    if not shown:
        return None
    with drawing():
        figure, axes = sheet(620, 380, left=58, right=24, top=64, bottom=48)
        drawn = _rounds(axes, figures, clocked)
        places = [(_x(row, name) or 0.0, 100 * float(row.accuracy or 0)) for row in shown]
        for row, x in zip(shown, side_by_side(places, drawn), strict=True):
            _mark(axes, row, x, figures.split)
        axes.set_xlabel(f"latency in {words.runtime(name)}, ms" if name else "multiply-adds (millions)")
        axes.set_ylabel("accuracy, %")
        axes.grid(color=COLOUR["grid"], linewidth=0.7)
        axes.tick_params(length=0)
        axes.margins(x=0.08, y=0.1)
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.01), ncols=3, frameon=False, fontsize=8.2, handletextpad=0.3,
            columnspacing=1.4, labelcolor=COLOUR["ink"], borderaxespad=0.2,
        )  # fmt: skip
        return svg(figure, "path", _path_words(figures))


def side_by_side(places: list[tuple[float, float]], taken: list[tuple[float, float]]) -> list[float]:
    """The x of every (x, y), moved right where it would cover one before it or one that is taken."""
    xs, ys = zip(*places, *taken, strict=True)
    gap, near = 0.022 * (max(xs) - min(xs)), 0.2 * (max(ys) - min(ys))
    placed: list[tuple[float, float]] = []
    for x, y in places:
        at = x
        while gap > 0 and any(abs(at - a) < 0.999 * gap and abs(y - b) <= near for a, b in (*placed, *taken)):
            at += gap
        placed.append((at, y))
    return [x for x, _ in placed]


def _x(row: Row, runtime: str | None) -> float | None:
    if runtime is None:
        return row.macs / 1e6
    clock = row.clock(runtime)
    return None if clock is None else clock.median_ms


def _rounds(axes: Axes, figures: Figures, clocked: bool) -> list[tuple[float, float]]:
    """Rounds in order: full circles led to the result, hollow ones were undone. Returns where they stand."""
    rounds = [r for r in figures.rounds if not clocked or r.latency_ms is not None]
    if not rounds:
        return []
    at = [(float(r.latency_ms or 0) if clocked else r.macs / 1e6, 100 * r.val_accuracy) for r in rounds]
    kept = {id(r) for r in figures.kept_rounds}
    axes.plot(*zip(*at, strict=True), color=COLOUR["shrunk"], linewidth=1, alpha=0.45, zorder=2)
    labelled: set[bool] = set()
    for r, (x, y) in zip(rounds, at, strict=True):
        full = id(r) in kept
        low, high = (100 * b for b in r.val_interval)
        axes.errorbar(
            x, y, yerr=[[max(0.0, y - low)], [max(0.0, high - y)]], fmt="o", markersize=5, linewidth=0.9, capsize=0,
            color=COLOUR["shrunk"], markerfacecolor=COLOUR["shrunk"] if full else COLOUR["paper"], alpha=0.85, zorder=3,
            label=None if full in labelled else f"round (validation), {'kept' if full else 'undone'}",
        )  # fmt: skip
        labelled.add(full)
        if len(rounds) > MOST_NUMBERS and (r.round + 1) % 5:
            continue
        axes.annotate(
            str(r.round + 1), (x, y), xytext=(-5, 4), textcoords="offset points", ha="right", fontsize=8,
            color=COLOUR["muted"],
        )  # fmt: skip
    return at


def _mark(axes: Axes, row: Row, x: float, split: str) -> None:
    marker, colour = _MARKS.get(row.name, ("v", "muted"))
    y = 100 * float(row.accuracy or 0)
    low, high = (100 * b for b in row.interval or (y / 100, y / 100))
    axes.errorbar(
        x, y, yerr=[[max(0.0, y - low)], [max(0.0, high - y)]], fmt=marker, markersize=9, capsize=3, linewidth=1.4,
        color=COLOUR[colour], markeredgecolor=COLOUR["paper"], markeredgewidth=1, zorder=4,
        label=row.name if split == "val" else f"{row.name} ({split})",
    )  # fmt: skip


def _path_words(figures: Figures) -> str:
    said = [f"{len(figures.rounds)} rounds, of which {len(figures.kept_rounds)} led to the result."]
    for row in figures.rows:
        clock = row.clock(figures.runtimes[0]) if figures.runtimes else None
        at = words.ms(clock.median_ms) if clock else f"{words.count(row.macs)} multiply-adds"
        said.append(f"{row.name}: {words.percent(row.accuracy)} at {at}.")
    return " ".join(said)


def cost_bars(figures: Figures) -> list[Bars]:
    """What is shown before and after: latency per runtime, multiply-adds, parameters, peak memory, depth."""
    dense, shrunk = figures.dense, figures.shrunk
    bars = []
    for name in figures.runtimes:
        a, b = dense.clock(name), shrunk.clock(name)
        if a is not None and b is not None:
            spread = ((a.q25_ms, a.q75_ms), (b.q25_ms, b.q75_ms))
            text = (words.ms(a.median_ms), words.ms(b.median_ms))
            label = f"Latency, {words.runtime(name)}"
            bars.append(Bars(label=label, before=a.median_ms, after=b.median_ms, text=text, spread=spread))
    for label, a_value, b_value, show in (
        ("Multiply-adds", dense.macs, shrunk.macs, words.count),
        ("Parameters", dense.params, shrunk.params, words.count),
        ("Peak memory", dense.peak_bytes, shrunk.peak_bytes, words.size),
        ("Operations on the longest path", dense.depth, shrunk.depth, words.count),
    ):
        bars.append(Bars(label=label, before=a_value, after=b_value, text=(show(a_value), show(b_value))))
    return bars


def cost_picture(figures: Figures) -> Markup:
    """Two thin bars per quantity: dense, and the result; each pair on its own scale."""
    bars = cost_bars(figures)
    width, step, top = 400, 52, 30
    height = top + step * len(bars) + 2
    with drawing():
        figure, axes = sheet(width, height, 0, 0, 0, 0)
        bare(axes, width, height)
        for x, colour, text in ((0, "dense", "dense"), (64, "shrunk", "shrunk")):
            axes.barh(10, 10, left=x, height=10, color=COLOUR[colour])
            axes.text(x + 15, 10, text, va="center", fontsize=8.2, color=COLOUR["muted"])
        for index, bar in enumerate(bars):
            _pair(axes, bar, top + step * index)
        said = ". ".join(f"{b.label}: {b.text[0]} before, {b.text[1]} after" for b in bars)
        return svg(figure, "cost", said)


def _pair(axes: Axes, bar: Bars, y: float) -> None:
    """One quantity at the height `y`: label, change, two bars with their values."""
    room, larger = 318.0, max(bar.before, bar.after) or 1.0
    longest = min(1.2 * larger, max(larger, *(high for _, high in bar.spread or ((0.0, 0.0),))))
    change = words.change(bar.before, bar.after)
    axes.text(0, y + 7, bar.label, va="center", fontsize=8.8)
    axes.text(room, y + 7, change, va="center", ha="right", fontsize=8.8, color=COLOUR["muted"], weight="bold")
    for row, (value, colour, text) in enumerate(
        zip((bar.before, bar.after), ("dense", "shrunk"), bar.text, strict=True)
    ):
        at = y + 20 + 13 * row
        axes.barh(at, room, height=9, color=COLOUR["grid"], alpha=0.45)
        axes.barh(at, room * value / longest, height=9, color=COLOUR[colour])
        if bar.spread is not None:
            low, high = (min(room, room * b / longest) for b in bar.spread[row])
            axes.plot([low, high], [at, at], color=COLOUR["ink"], linewidth=1.1, solid_capstyle="butt")
        axes.text(room + 10, at, text, va="center", fontsize=8.6)
