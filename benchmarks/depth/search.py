"""What a search costs: `auto` against EASIER in the paper's form, in trainings and in seconds, on handwritten digits.

Usage: python benchmarks/depth/search.py [--network digits-mobile] [--epochs 12]

Every training has the length of the dense one. EASIER trains once for each activation; `auto` times and compares what
can be removed, heals each of these and some rival plans a little, and trains: three times at most, what was healed a
little counted by its steps. Also: the knapsack against brute force on small instances, with the time that both take.
Written to benchmarks/results/depth_search.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import palmette as pm
from palmette.depth.auto import AutoConfig
from palmette.depth.knapsack import Item, front, least_loss
from palmette.depth.race import steps_for_each
from palmette.meter.latency import hardware
from palmette.models import build
from palmette.resolve import resolve_data
from palmette.seeding import seeded
from palmette.train.loop import HealConfig, heal

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="digits-mobile")
    parser.add_argument("--epochs", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = {"hardware": hardware("onnxruntime"), "knapsack": knapsack(), **searches(given.network, given.epochs)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "depth_search.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def searches(name: str, epochs: int) -> dict[str, Any]:
    """Seconds and trainings of both searches beside those of the dense network."""
    data = resolve_data("digits")
    with seeded("search", 0):
        dense = build(name, shape=tuple(data.example_inputs.shape[1:]))
    recipe = HealConfig(optimizer="adamw", lr=3e-3, epochs=epochs)
    begun = time.perf_counter()
    heal(dense, data.train, recipe)
    dense_seconds = time.perf_counter() - begun
    found: dict[str, Any] = {"network": name, "epochs": epochs, "dense_seconds": dense_seconds, "rows": []}
    for method, options in (("auto", {}), ("easier", {"reproduce": True})):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            result = pm.shrink(
                dense.eval(),
                data.train,
                data.val,
                data.test,
                method=method,
                max_drop=1.0 if method == "auto" else 100.0,
                heal=recipe,
                controls=False,
                run_dir=Path(folder) / "run",
                say=print,
                **options,
            )
            seconds = time.perf_counter() - begun
            trainings = float(len(list((Path(folder) / "run" / "stages").glob("*-heal.json"))))
            schedule, config = SimpleNamespace(train=data.train, heal=recipe), AutoConfig()
            for journal, most in (("importance", config.steps), ("race", 2 * config.steps)):
                tried = len(list((Path(folder) / "run" / journal).glob("*.json")))
                trainings += tried * steps_for_each(schedule, tried, most) / (epochs * len(data.train))
        found["rows"].append(
            {
                "method": method,
                "trainings": trainings,
                "seconds": seconds,
                "dense_trainings": seconds / dense_seconds,
                "macs": result.cost["macs"],
                "accuracy": result.cost["accuracy"],
                "n": result.cost["n"],
            }
        )
    return found


def knapsack(instances: int = 200, most: int = 12) -> dict[str, Any]:
    """Random small instances: whether both agree for every saving, and the seconds of each."""
    draw = random.Random(0)
    agree, ours, brute = True, 0.0, 0.0
    for _ in range(instances):
        items = []
        for index in range(draw.randint(1, most)):
            start = draw.randint(0, 10)
            reach = start + draw.randint(1, 4)
            items.append(Item(key=str(index), start=start, end=reach, gain=draw.randint(1, 9), loss=draw.random()))
        begun = time.perf_counter()
        picks = front(items)
        ours += time.perf_counter() - begun
        begun = time.perf_counter()
        best = _brute(items)
        brute += time.perf_counter() - begun
        for gain in range(sum(i.gain for i in items) + 1):
            pick = least_loss(picks, gain)
            wanted = min((loss for saved, loss in best if saved >= gain), default=None)
            agree &= (pick is None) == (wanted is None) and (pick is None or abs(pick.loss - (wanted or 0)) < 1e-9)
    return {"instances": instances, "agree": agree, "seconds": ours, "brute_force_seconds": brute}


def _brute(items: list[Item]) -> list[tuple[int, float]]:
    found = []
    for size in range(len(items) + 1):
        for subset in itertools.combinations(items, size):
            ordered = sorted(subset, key=lambda i: i.start)
            if all(a.end <= b.start for a, b in itertools.pairwise(ordered)):
                found.append((sum(i.gain for i in subset), sum(i.loss for i in subset)))
    return found


if __name__ == "__main__":
    main()
