"""Search on the papers' measured ImageNet data: predictors, optima within budgets, and what is really measured there.

    PALMETTE_DATA=... python benchmarks/supernet/imagenet.py

Writes benchmarks/results/supernet_imagenet.json. A measured top-1 is given for a configuration only where the data
holds a row of exactly that configuration; everything else is a prediction and is called one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from palmette.device import DeviceProfile
from palmette.errors import BudgetError
from palmette.files import write_json
from palmette.run import environment
from palmette.supernet import COMPOFA, MOOFA, OFA, Configs, StagedSpace
from palmette.supernet.coding import to_text
from palmette.supernet.exact import ExactSearch
from palmette.supernet.predictor import Perceptron, Ridge, agreement, near_optimum

RESULTS = Path(__file__).resolve().parents[1] / "results" / "supernet_imagenet.json"
PREDICTORS: dict[str, Callable[[StagedSpace, Configs, Any], Any]] = {
    "ridge on log error": Ridge.fit,
    "ridge on top-1": lambda *rows: Ridge.fit(*rows, scale="linear"),
    "perceptron 3 x 400": Perceptron.fit,
}
BUDGETS = tuple(1000 * k for k in (325, 350, 400, 450, 500, 600, 700, 800))
MCU = DeviceProfile(
    name="int8 microcontroller", dtype="int8", weights_in="flash", inplace_elementwise=True, inplace_depthwise=True
)
MCU_FLASH = replace(MCU, name="int8 microcontroller with 6 MiB of flash", flash="6MiB")
MCU_BUDGETS = tuple(1024 * k for k in (128, 192, 256, 320, 384, 512, 640))
REPLAYS = 50

# top-1 in percent, peak in elements, millions of multiply-adds: the table in the README of the authors' code.
PUBLISHED = {
    "OFA": ((70.81, 262_912, 146), (70.91, 328_704, 163), (70.98, 330_816, 163), (74.33, 410_368, 219),
            (74.24, 410_368, 207), (76.02, 590_592, 271), (75.83, 590_592, 289), (76.04, 740_416, 283)),
    "CompOFA": ((69.91, 262_912, 132), (70.26, 330_816, 134), (70.23, 329_280, 144), (73.33, 410_368, 178),
                (72.76, 410_368, 189), (73.82, 590_592, 258), (75.42, 590_592, 273), (74.78, 722_448, 306)),
    "MOOFA": ((72.13, 305_280, 422), (72.25, 313_344, 431), (73.34, 381_120, 554), (73.66, 440_640, 573),
              (72.99, 475_776, 516), (74.99, 583_200, 719), (76.55, 696_192, 1007), (76.58, 686_976, 959)),
}  # fmt: skip


class Data:
    """One space with its measured networks, and a fixed order in which they are split."""

    def __init__(self, space: StagedSpace, folder: Path) -> None:
        stored = np.load(folder / "supernet" / f"{space.name.lower()}.npz")
        self.configs = Configs(*(stored[field] for field in Configs._fields))
        self.top1 = stored["top1"].astype(float)
        # No measured network of OFA and CompOFA is at 224: what no row had cannot be predicted.
        self.space = replace(space, resolutions=tuple(np.unique(self.configs.resolution).tolist()))
        self.order = np.random.default_rng(0).permutation(len(self.top1))
        self.measured = dict(zip(to_text(space, self.configs), self.top1.tolist(), strict=True))

    def split(self, n: int, order: Any = None) -> tuple[Any, Any]:
        """Rows to learn from, and the others."""
        chosen = self.order if order is None else order
        return chosen[:n], chosen[n:]

    def fit(self, name: str, rows: Any) -> Any:
        return PREDICTORS[name](self.space, self.configs.take(rows), self.top1[rows])


def predictors(data: Data) -> Iterator[dict[str, Any]]:
    """Held-out agreement of every predictor: overall, for the best predicted 5 %, and for those of each bin of peak."""
    peaks = data.space.peak_elements(*data.configs)
    for n in (200, 400, int(0.8 * len(data.top1))):
        learn, rest = data.split(n)
        for name in PREDICTORS:
            predicted, measured = data.fit(name, learn).predict(data.configs.take(rest)), data.top1[rest]
            parts = {
                "all": np.arange(len(rest)),
                "best": near_optimum(predicted),
                "best of each bin": near_optimum(predicted, peaks=peaks[rest], edges=BUDGETS),
            }
            found = {part: asdict(agreement(predicted[rows], measured[rows])) for part, rows in parts.items()}
            yield {"space": data.space.name, "n": n, "predictor": name, **found}


def searches(data: Data, metric: str | DeviceProfile, budgets: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The predicted optimum within each budget, and the best network that was measured within it."""
    space, search = data.space, ExactSearch(data.space, metric)
    learn, _ = data.split(int(0.8 * len(data.top1)))
    ridge, linear = data.fit("ridge on log error", learn), data.fit("ridge on top-1", learn)
    own = isinstance(metric, DeviceProfile)
    peaks = space.peak_bytes(*data.configs, metric) if own else space.peak_elements(*data.configs, metric)
    flash = metric.flash_bytes if own and metric.flash_bytes else np.inf
    weights = space.params(*data.configs)  # one byte each on the microcontroller
    for place, budget in enumerate(budgets):
        row: dict[str, Any] = {"space": space.name, "metric": metric.name if own else metric, "budget": budget}
        row["published"] = None if own else PUBLISHED[space.name][place]
        row["feasible"], row["chance"] = search.count(budget), float(search.chance(budget))
        within = np.flatnonzero((peaks <= budget) & (weights <= flash))
        if len(within):
            best = within[data.top1[within].argmax()]
            row["best_measured"] = {"networks": len(within), **described(data, data.configs.take([best]), peaks[best])}
        try:
            found, times = timed(lambda b=budget: search.best(ridge.table, b))
        except BudgetError as error:
            row["refused"] = str(error)
        else:
            row["optimum"] = described(data, found.configs, found.peak) | {"predicted": ridge.value(found.score)}
            row["median_ms"], row["q25_ms"], row["q75_ms"] = median(times), *np.quantile(times, [0.25, 0.75]).tolist()
            other = search.best(linear.table, budget)
            row["optimum_on_top1"] = {"predicted": other.score, "peak": other.peak}
        yield row


def described(data: Data, configs: Configs, peak: Any) -> dict[str, Any]:
    """A network: its text, cost, and measured top-1 if exactly this one was measured."""
    (text,) = to_text(data.space, configs)
    return {
        "network": text,
        "peak": int(peak),
        "macs": int(data.space.macs(*configs)[0]),
        "params": int(data.space.params(*configs)[0]),
        "measured": data.measured.get(text),
    }


def timed(run: Callable[[], Any], repeats: int = 21) -> tuple[Any, list[float]]:
    """What `run` returns, and its times in milliseconds."""
    times = []
    for _ in range(repeats):
        begun = perf_counter()
        found = run()
        times.append(1e3 * (perf_counter() - begun))
    return found, times


def replays(data: Data, n: int = 200) -> Iterator[dict[str, Any]]:
    """Searches among measured networks alone, where the truth is known: learn from n, choose among the others.

    Per budget over random splits, in measured top-1: the network predicted best, the really best one, an average one,
    and the best of the n that were learnt from.
    """
    peaks = data.space.peak_elements(*data.configs)
    found: dict[int, list[tuple[float, ...]]] = {budget: [] for budget in BUDGETS}
    for seed in range(REPLAYS):
        learn, rest = data.split(n, np.random.default_rng(seed).permutation(len(data.top1)))
        predicted = data.fit("ridge on log error", learn).predict(data.configs)
        for budget, rows in found.items():
            known, others = (part[peaks[part] <= budget] for part in (learn, rest))
            if len(known) and len(others):
                chosen = data.top1[others[predicted[others].argmax()]]
                rows.append((chosen, data.top1[others].max(), data.top1[others].mean(), data.top1[known].max()))
    for budget, rows in found.items():
        if len(rows) == REPLAYS:
            chosen, best, average, known = np.mean(rows, axis=0).tolist()
            low, high = np.quantile([row[1] - row[0] for row in rows], [0.05, 0.95]).tolist()
            row = {
                "space": data.space.name,
                "n": n,
                "splits": REPLAYS,
                "budget": budget,
                "chosen": chosen,
                "best": best,
            }
            yield {**row, "average": average, "learnt": known, "regret_5_95": [low, high]}


def bounded(data: Data) -> Iterator[dict[str, Any]]:
    """Optima with bounds on sums as well, and how long they take."""
    search = ExactSearch(data.space)
    table = data.fit("ridge on log error", data.order).table
    for bounds in ({"macs": 300_000_000}, {"params": 6_000_000}, {"macs": 300_000_000, "params": 6_000_000}):
        for budget in (400_000, 600_000, 800_000):
            found, times = timed(lambda b=budget, more=bounds: search.best(table, b, **more), repeats=5)
            row = {"space": data.space.name, "budget": budget, "bounds": bounds, "median_ms": median(times)}
            yield row | described(data, found.configs, found.peak)


def main() -> None:
    """Measure everything and write it."""
    folder = Path(os.environ["PALMETTE_DATA"])
    everything = [Data(space, folder) for space in (OFA, COMPOFA, MOOFA)]
    content: dict[str, Any] = {
        "schema": 1,
        "about": "search on measured networks of OFA, CompOFA and MOOFA, ImageNet validation top-1",
        "environment": environment(),
        "networks": {data.space.name: len(data.top1) for data in everything},
    }
    for name, rows in {
        "predictors": predictors,
        "searches": lambda data: [
            *searches(data, "moofa", BUDGETS),
            *searches(data, MCU, MCU_BUDGETS),
            *searches(data, MCU_FLASH, MCU_BUDGETS),
        ],
        "replays": replays,
        "bounded": lambda data: bounded(data) if data.space.name == "MOOFA" else [],
    }.items():
        content[name] = [row for data in everything for row in rows(data)]
        print(name, len(content[name]), flush=True)
    write_json(RESULTS, content)


if __name__ == "__main__":
    main()
