"""The picture of the page "One training, every board": memory per layer of an OFA network and of a MOOFA one.

    python benchmarks/supernet/picture.py     # writes docs/assets/supernet_memory.png

Both are the largest network of their space whose peak is at most 450,000 elements, in the papers' metric.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

from palmette.supernet import MOOFA, OFA
from palmette.supernet.exact import ExactSearch

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 450_000
COLOURS = {"OFA": "#8d8d92", "MOOFA": "#2f6f4f"}


def main() -> None:
    """Draw both."""
    figure, panels = plt.subplots(2, 1, figsize=(9.6, 4.6), sharey=True, layout="constrained")
    for axes, space in zip(panels, (OFA, MOOFA), strict=True):
        most = ExactSearch(space, "moofa").best(space.cost_table("macs"), BUDGET)
        names, elements = space.layer_elements(*most.configs, "moofa")
        sizes = elements[0]
        shown = [i for i, size in enumerate(sizes) if size > 0]
        values = np.array([sizes[i] for i in shown]) / 1000
        axes.bar(range(len(shown)), values, width=0.8, color=COLOURS[space.name])
        axes.axhline(BUDGET / 1000, color="#b3423a", linewidth=1, linestyle=(0, (4, 3)))
        use = values.mean() / values.max()
        side = int(most.configs.resolution[0])
        axes.set_title(
            f"{space.name} at {side} px: the mean layer uses {100 * use:.0f} % of the peak of {values.max():.0f}",
            loc="left", fontsize=9.5,
        )  # fmt: skip
        axes.set_xticks([])
        axes.set_ylabel("thousand elements", fontsize=8.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, length=2)
        axes.set_xlim(-1, len(shown))
        print(space.name, side, len(names), f"{use:.3f}", int(values.max() * 1000))
    panels[-1].set_xlabel("layers from the input to the output; the dashed line is the budget", fontsize=8.5)
    figure.savefig(ROOT / "docs" / "assets" / "supernet_memory.png", dpi=110)


if __name__ == "__main__":
    main()
