"""Every method at the same latency and the same healing budget, beside both controls and Torch-Pruning.

Usage: PALMETTE_DATA=DIR python benchmarks/depth/compare.py NETWORK [--seeds 3] [--methods a,b] [--only train|report]
       NETWORK: resnet20, resnet56, mobilenetv2 or vit. [--runs DIR] [--train N] [--epochs E] [--threads 2]

Each method removes in its own order until the collapsed network reaches the target latency (ONNX Runtime, batch 1),
and is healed once; a method with an ingredient of its own trains half of the budget with it and heals with the other
half. Chosen on the 2,000 validation images, reported once on the 4,000 test images, differences paired per image and
pooled over seeds; networks are timed in turn with the dense one, in groups. A run that was cut off goes on where it
stopped. The table is printed and written to benchmarks/results/depth_NETWORK.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import stored
import vit
from published import PUBLISHED
from safetensors.torch import load_file

import palmette as pm
from palmette.depth.opening import Loaders, opened
from palmette.depth.rounds import search, summary
from palmette.depth.session import Session, Settings
from palmette.depth.width import prune_width
from palmette.errors import PalmetteError
from palmette.graph.inputs import with_batch
from palmette.meter.latency import Latency, measure_latency
from palmette.resolve import resolve_data
from palmette.stats import paired_difference
from palmette.train.loop import HealConfig, heal

RESULTS = Path(__file__).resolve().parent.parent / "results"
RESNET = "cifar10:{}?norm=imagenet&augment=flip-shift&batch=64&train={}"


@dataclass(frozen=True)
class Setting:
    """One network: its data, its target share of the dense latency, its healing recipe, images and epochs."""

    data: str
    target: float
    heal: HealConfig
    train: int
    epochs: int


RECIPE = HealConfig(distill=0.9, temperature=4.0, features=2.0, fade=0.3)
SGD = replace(RECIPE, lr=0.01, precision="bf16-mixed")
ADAMW = replace(RECIPE, lr=4e-4, optimizer="adamw")
SETTINGS = {
    "resnet20": Setting(RESNET, 0.75, SGD, 10_000, 2),
    "resnet56": Setting(RESNET, 0.67, SGD, 6_000, 2),
    "mobilenetv2": Setting("cifar10:{}?size=96&norm=half&augment=flip&batch=64&train={}", 0.77, ADAMW, 6_000, 2),
    "vit": Setting("cifar10:{}?norm=imagenet&augment=flip-shift&batch=64&train={}", 0.63, ADAMW, 5_000, 2),
}
TOGETHER = 5
"""How many networks are timed in turn beside the dense one."""
REPEATS = 3
UNHEALED = "auto (no local healing)"
SKIPPED = {"random": "a control, below"}


def main() -> None:
    """Train what the command line names, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=sorted(SETTINGS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", default="")
    parser.add_argument("--only", choices=["train", "report"])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--train", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--target", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train-threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.train_threads)
    setting = SETTINGS[given.network]
    changes = {name: getattr(given, name) for name in ("train", "epochs", "target")}
    setting = replace(setting, **{name: value for name, value in changes.items() if value is not None})
    bench = Bench(given.network, setting, given.runs / "compare" / given.network, given.runs, given.threads)
    if given.only != "report":
        seeds = range(given.first_seed, given.first_seed + given.seeds)
        names = given.methods.split(",") if given.methods else bench.contestants()
        for seed in seeds:
            for name in names:
                bench.train(name, seed)
    if given.only != "train":
        bench.report()


class Bench:
    """One network with its data, and the networks made from it."""

    def __init__(self, name: str, setting: Setting, folder: Path, runs: Path, threads: int) -> None:
        self.name, self.setting, self.folder, self.threads = name, setting, folder, threads
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dense = dense_network(name, runs).eval()
        self.data = resolve_data(setting.data.format(stored.folder() / "cifar10", setting.train))
        self.table = pm.CostTable("onnxruntime", folder / "cost_table.json", threads=threads)

    def contestants(self) -> list[str]:
        """Names of the rows that are trained: methods, controls and the peer."""
        methods = [m.name for m in pm.methods("depth") if m.name not in SKIPPED]
        return [UNHEALED, *methods, "random blocks", "random activations", "torch-pruning", "dense + same training"]

    def train(self, name: str, seed: int) -> None:
        """Make one contestant, unless its file is there."""
        label = label_of(name, seed)
        record = self.folder / f"{label}.json"
        if record.exists():
            return
        begun = time.time()
        try:
            network, facts = self._made(name, seed, self.folder / label)
        except PalmetteError as error:
            network, facts = None, {"refused": str(error)}
        if network is not None:
            pm.save(network, self.folder / f"{label}.safetensors", source=self.dense)
            (self.folder / f"{label}-test.npy").unlink(missing_ok=True)
        facts |= {"name": name, "seed": seed, "seconds": round(time.time() - begun, 1)}
        record.write_text(json.dumps(facts, indent=1))
        print(f"{self.name} {label}: {json.dumps(facts)[:300]}", flush=True)

    def _made(self, name: str, seed: int, run: Path) -> tuple[nn.Module | None, dict[str, Any]]:
        if name == "dense + same training":
            network = pm.capture(self.dense, with_batch(self._example(), 2)).eval()
            self._heal(network, seed, run)
            return network, {}
        if name == "torch-pruning":
            return self._pruned(seed, run)
        config = None
        if name.startswith("random"):
            config = pm.get_method("random").make_config(sites=name.split()[1].rstrip("s"))
            name = "random"
        if name == UNHEALED:
            config, name = pm.get_method("auto").make_config(importance="answers"), "auto"
        method = pm.get_method(name)
        epochs = self.setting.epochs if method.prepare is None else max(self.setting.epochs // 2, 1)
        heal_config = replace(self.setting.heal, epochs=epochs)
        settings = Settings(
            max_drop=100, target_latency=f"{self.setting.target}x", one_shot=True, seed=seed, threads=self.threads
        )
        data = Loaders(self.data.train, self.data.val, None, self.data.calibration)
        with opened(
            data,
            model=self.dense,
            example_inputs=self.data.example_inputs,
            method=method,
            config=config,
            settings=settings,
            heal=heal_config,
            run_dir=run,
            resume=run.exists(),
            cost=self.table,
            protect=(),
            loss_fn=None,
            metric=None,
            names={},
        ) as session:
            return self._searched(session)

    def _searched(self, session: Session) -> tuple[nn.Module | None, dict[str, Any]]:
        baseline = self.baseline(session)
        found = (session.method.search or search)(session, baseline, _silent)
        if found.winner < 0:
            return None, {"nothing": found.ended}
        branch = found.branch.at(found.winner)
        small, _ = pm.collapse(branch.network, cost=session.table)
        last = found.rounds[found.winner]
        facts = {"removed": last.removed, "sites": list(last.sites), "val": last.val_accuracy, "ms": last.latency_ms}
        return small, facts | {"trainings": branch.trainings, "ended": found.ended}

    def baseline(self, session: Session) -> dict[str, Any]:
        """The dense network's validation summary, evaluated once for all contestants."""
        file = self.folder / "baseline.json"
        if not file.exists():
            file.write_text(json.dumps(summary(session.evaluate(session.dense, session.val))))
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def _pruned(self, seed: int, run: Path) -> tuple[nn.Module | None, dict[str, Any]]:
        """Torch-Pruning at the first ratio that reaches the target latency, healed with the same budget."""
        single = with_batch(self._example(), 1)
        dense = pm.capture(self.dense, with_batch(single, 2))
        for percent in range(5, 80, 5):
            network = prune_width(self.dense, with_batch(single, 2), percent / 100)
            before, after = self.table.compare(f"torch-pruning {percent}", dense, network, single)
            reached = after / before
            if reached <= self.setting.target:
                self._heal(network, seed, run)
                return network, {"ratio": percent / 100, "ratio_of_dense": reached}
        return None, {"nothing": "no ratio below 0.8 reaches the target"}

    def _heal(self, network: nn.Module, seed: int, run: Path) -> None:
        config = replace(self.setting.heal, epochs=self.setting.epochs)
        run.mkdir(exist_ok=True)
        teacher = pm.capture(self.dense, with_batch(self._example(), 2)).eval()
        heal(network, self.data.train, config, teacher=teacher, seed=seed, checkpoint=run / "heal.safetensors")
        network.eval()

    def _example(self) -> Any:
        return next(iter(self.data.val))[0]

    # -- report --------------------------------------------------------------------------------------------------------

    def report(self) -> None:
        """Time, evaluate, print and write everything that was trained."""
        records = [json.loads(f.read_text()) for f in sorted(self.folder.glob("*-[0-9].json"))]
        networks: dict[str, nn.Module] = {"dense": self.dense}
        for record in records:
            label = label_of(record["name"], record["seed"])
            file = self.folder / f"{label}.safetensors"
            if file.exists():
                networks[label] = pm.load(self.dense, file).eval()
        if self.name == "resnet20":
            networks["distiller, 5 convolutions removed"] = stored.build(
                "cifar10_resnet20_distiller_5convs_removed"
            ).eval()
        example = with_batch(self._example(), 1)
        clocks = {runtime: self._timed(networks, example, runtime) for runtime in ("onnxruntime", "eager")}
        correct = {label: self._correct(label, network) for label, network in networks.items()}
        rows = self._rows(records, networks, clocks, correct, example)
        write(self, rows, clocks)

    def _timed(self, networks: dict[str, nn.Module], example: Any, runtime: str) -> dict[str, tuple[Latency, Latency]]:
        """Latency of each network and of the dense one beside it, interleaved in groups.

        Of two dozen networks in turn each finds the caches full of the others, the more so the larger it is. A machine
        may be in another state for a whole group, so each network is timed with REPEATS different groups, and the
        middle ratio counts.
        """
        others = [label for label in networks if label != "dense"]
        pairs: dict[str, list[tuple[Latency, Latency]]] = {}
        for seed in range(REPEATS):
            order = [others[i] for i in np.random.default_rng(seed).permutation(len(others))]
            for start in range(0, len(order), TOGETHER):
                group = {label: networks[label] for label in ("dense", *order[start : start + TOGETHER])}
                clocks = measure_latency(group, example, runtime=runtime, threads=self.threads, runs=20)
                for label, clock in clocks.items():
                    pairs.setdefault(label, []).append((clock, clocks["dense"]))
        return {label: sorted(found, key=_ratio)[len(found) // 2] for label, found in pairs.items()}

    def _correct(self, label: str, network: nn.Module) -> np.ndarray:
        """Which test images a network gets right; kept beside it."""
        file = self.folder / f"{label}-test.npy"
        if not file.exists():
            np.save(file, pm.evaluate(network, self.data.test).correct)
        return np.asarray(np.load(file))

    def _rows(
        self, records: list[dict[str, Any]], networks: dict[str, nn.Module], clocks: Any, correct: Any, example: Any
    ) -> list[dict[str, Any]]:
        groups: dict[str, list[str]] = {"dense": ["dense"]}
        facts: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            facts.setdefault(record["name"], []).append(record)
            label = label_of(record["name"], record["seed"])
            if label in networks:
                groups.setdefault(record["name"], []).append(label)
        for label in networks:
            if label.startswith("distiller"):
                groups[label] = [label]
        rows = []
        for name in [*groups, *[n for n in facts if n not in groups]]:
            labels = groups.get(name, [])
            row: dict[str, Any] = {"name": name, "seeds": len(labels), "facts": facts.get(name, [])}
            rows.append(row)
            if labels:
                row |= self._figures(labels, networks, clocks, correct, example)
                row["against_auto"] = _against_auto(row, correct)
        return rows

    def _figures(
        self, labels: list[str], networks: dict[str, nn.Module], clocks: Any, correct: Any, example: Any
    ) -> dict[str, Any]:
        costs = [pm.measure(networks[label], example, runtimes=()) for label in labels]
        pooled = np.concatenate([correct[label] for label in labels])
        dense = np.concatenate([correct["dense"] for _ in labels])
        speed = {}
        for runtime, found in clocks.items():
            pairs = [found[label] for label in labels]
            speed[runtime] = {
                "median_ms": [own.median_ms for own, _ in pairs],
                "dense_ms": [dense.median_ms for _, dense in pairs],
                "speedup": float(np.median([dense.median_ms / own.median_ms for own, dense in pairs])),
            }
        return {
            "macs": [c.macs for c in costs],
            "params": [c.params for c in costs],
            "depth": [c.depth for c in costs],
            "peak_bytes": [c.peak_bytes for c in costs],
            "latency": speed,
            "accuracy": float(pooled.mean()),
            "n": len(pooled),
            "difference": None if labels == ["dense"] else list(paired_difference(pooled, dense)),
        }


def label_of(name: str, seed: int) -> str:
    """The name of a contestant's files."""
    plain = re.sub(r"[^\w+]+", "-", name).strip("-")
    return f"{plain}-{seed}"


def _against_auto(row: dict[str, Any], correct: dict[str, np.ndarray]) -> list[float] | None:
    """Points by which a row is better than `auto` on the seeds that both have, with the interval; None for itself."""
    seeds = [f["seed"] for f in row["facts"] if row["name"] != "auto"]
    pairs = [(correct.get(label_of(row["name"], seed)), correct.get(label_of("auto", seed))) for seed in seeds]
    both = [(ours, autos) for ours, autos in pairs if ours is not None and autos is not None]
    if not both:
        return None
    ours, autos = (np.concatenate(side) for side in zip(*both, strict=True))
    return list(paired_difference(ours, autos))


def _ratio(pair: tuple[Latency, Latency]) -> float:
    """How much faster than the dense network beside it; for the dense network itself, how fast it is."""
    own, dense = pair
    return own.median_ms if own is dense else dense.median_ms / own.median_ms


def _silent(_: str) -> None:
    return None


def dense_network(name: str, runs: Path) -> nn.Module:
    """The trained network to start from."""
    if name in ("resnet20", "resnet56"):
        network: nn.Module = getattr(stored, name)()
        return network
    if name == "vit":
        network = vit.vit()
        network.load_state_dict(load_file(str(vit.trained(runs))))
        return network
    from shrink_cifar10 import fine_tuned

    network = stored.mobilenetv2()
    network.load_state_dict(load_file(str(fine_tuned(runs))))
    return network


def write(bench: Bench, rows: list[dict[str, Any]], clocks: Any) -> None:
    """Print the table and store it."""
    dense, _ = clocks["onnxruntime"]["dense"]
    result = {
        "network": bench.name,
        "target": bench.setting.target,
        "healing": {**bench.setting.heal.recipe(), "epochs": bench.setting.epochs, "images": bench.setting.train},
        "hardware": dense.hardware,
        "threads": bench.threads,
        "batch": 1,
        "split": "test",
        "rows": rows,
        "published": PUBLISHED.get(bench.name, []),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"depth_{bench.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{bench.name}, target {bench.setting.target}x, {dense.hardware}, {bench.threads} threads")
    for row in rows:
        if "latency" not in row:
            why = "; ".join(sorted({str(f.get("nothing") or f.get("refused")) for f in row["facts"]}))
            print(f"  {row['name']:<34} {why[:120]}")
            continue
        fast = {runtime: entry["speedup"] for runtime, entry in row["latency"].items()}
        points = "" if row["difference"] is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row["difference"])
        speeds = "  ".join(f"{value:5.2f}x {runtime}" for runtime, value in fast.items())
        top1 = f"{100 * row['accuracy']:.2f} % of {row['n']}"
        print(f"  {row['name']:<34} {speeds}  {np.median(row['macs']) / 1e6:8.1f} M MACs  {top1}  {points}")


if __name__ == "__main__":
    main()
