"""The pictures of a specialize: memory along the network, and the networks that were measured."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from palmette.device import parse_bytes
from palmette.report import words
from palmette.report.theme import COLOUR, drawing, sheet, svg

_BYTES = FuncFormatter(lambda value, _: words.size(value))


def memory_picture(board: dict[str, Any], index: int) -> Markup:
    """Bytes alive at each operation of the chosen network (bars), of the largest (line), and the board's RAM."""
    own = dict(board["steps"])
    whole: list[tuple[str, int]] = [(path, size) for path, size in board["largest"]]
    place, line = range(len(whole)), [size for _, size in whole]
    bound, label = _room(board)
    with drawing():
        picture, axes = sheet(1000, 230, left=80, right=12, top=30, bottom=30)
        bars = [own.get(path, 0) for path, _ in whole]
        axes.bar(place, bars, width=0.9, color=COLOUR["shrunk"], label="this network", zorder=3)
        axes.step(place, line, where="mid", color=COLOUR["dense"], linewidth=1.1, label="the largest", zorder=2)
        if bound is not None:
            red: dict[str, Any] = {"color": COLOUR["removed"], "linewidth": 1.2, "linestyle": (0, (4, 3))}
            axes.axhline(bound, label=label, zorder=4, **red)
        axes.yaxis.set_major_formatter(_BYTES)
        axes.set_ylabel("alive")
        axes.set_xlim(-0.7, len(whole) - 0.3)
        axes.set_xticks([])
        axes.set_xlabel(f"{len(whole)} operations in the order of the network; gaps are blocks that were left out")
        axes.grid(axis="y", color=COLOUR["grid"], linewidth=0.7)
        _legend(axes)
        most = words.size(max(own.values(), default=0))
        said = f"At most {most} are alive in this network, {words.size(max(line))} in the largest"
        return svg(picture, f"memory{index}", said)


def _room(board: dict[str, Any]) -> tuple[int | None, str]:
    """Bytes that a board has for activations, and what to call them; None without a bound."""
    profile = board["profile"]
    if "ram" not in profile:
        return None, ""
    held = parse_bytes(profile.get("reserve", 0))
    held += board["found"]["param_bytes"] if profile["weights_in"] == "ram" else 0
    return parse_bytes(profile["ram"]) - held, "RAM of the board" + (", less weights and reserve" if held else "")


def cloud_picture(board: dict[str, Any], index: int) -> Markup:
    """Validation accuracy over RAM of every network that was measured."""
    chosen, tried, drawn = board["found"], board["measurements"], [f["config"] for f in board["control"]]
    groups = (
        ("chance", "drawn at random", board["control"]),
        ("shrunk", "found by the search", [f for f in tried if f["config"] not in drawn]),
    )
    with drawing():
        picture, axes = sheet(560, 250, left=58, right=16, top=30, bottom=44)
        for colour, label, rows in groups:
            heights = [100 * f["value"] for f in rows]
            axes.scatter([f["ram_bytes"] for f in rows], heights, s=16, color=COLOUR[colour], label=label, alpha=0.85)
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": COLOUR["ink"], "linewidths": 1.2}
        axes.scatter([chosen["ram_bytes"]], [100 * chosen["value"]], s=70, label="taken", **ring)
        axes.xaxis.set_major_formatter(_BYTES)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("RAM")
        axes.set_ylabel("validation accuracy, %")
        axes.grid(color=COLOUR["grid"], linewidth=0.7)
        axes.tick_params(length=0)
        _legend(axes)
        said = f"{len(tried)} measured networks; the one taken has {100 * chosen['value']:.2f} %"
        return svg(picture, f"cloud{index}", said)


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=8.4, borderaxespad=0.2,
        labelcolor=COLOUR["ink"],
    )  # fmt: skip
