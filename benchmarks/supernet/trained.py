"""A real supernet trained here: OFA's and MOOFA's kinds of widths on CIFAR-10, searched within bytes of RAM.

    PALMETTE_DATA=DIR python benchmarks/supernet/trained.py        # goes on where it was stopped

Each space is trained, sub-networks that fit five budgets are measured on validation images, a ridge regression on their
one-hot code proposes optima, these are measured, and so once more. The best that was measured within a budget is its
answer; answers are looked at on the test images once, as they are and after one more epoch. Random search has as many
measurements. Checkpoints are in runs/supernet_trained, rows in benchmarks/results/supernet_trained.json.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "adapt"))
import cifar
import setups

from palmette.device import DeviceProfile
from palmette.meter.compute import macs, params
from palmette.meter.memory import peak_bytes
from palmette.stats import paired_difference, wilson_interval
from palmette.supernet.memory import MemoryModel
from palmette.supernet.optimum import Optimizer
from palmette.supernet.predictor import ridge
from palmette.supernet.sampling import sample_within
from palmette.train.config import HealConfig
from palmette.train.loop import heal

SPACES = ("MOOFA", "OFA")
PROFILES = {
    "device": DeviceProfile(name="device", weights_in="flash", inplace_elementwise=True, inplace_depthwise=True),
    "plain": DeviceProfile(name="plain", weights_in="flash"),
}
BUDGETS = {"device": (48, 56, 64, 80, 96), "plain": (48, 72, 80, 112, 144)}
"""KiB of float32 activations; an int8 device has a quarter."""

SAMPLES, ROUNDS, PROPOSALS = 12, 3, 2
"""At each budget: configurations drawn first, rounds, and optima that are measured in each round."""

STATISTICS, FINAL_STATISTICS = 500, 2000
TUNING = HealConfig(epochs=1, lr=0.02, momentum=0.9, weight_decay=1e-4, warmup=0.1, precision="32-true")
ABOUT = "CIFAR-10 at 32 px, supernets trained on one core; right answers are bits of the 4,000 test images, in hex"

EXAMPLE = torch.zeros(1, 3, 32, 32)
Code = tuple[int, ...]


class Search:
    """One space: its trained supernet, its memory, and what is known of its sub-networks."""

    def __init__(self, name: str, rows: setups.Rows, recipe: cifar.Recipe) -> None:
        self.name, self.rows, self.recipe = name, rows, recipe
        self.net, cost = cifar.trained(name, recipe)
        self.models = {metric: MemoryModel(self.net, profile) for metric, profile in PROFILES.items()}
        self.codes = self.models["device"].codes
        self.train = cifar.images("train", recipe.images)
        self.known: list[Code] = []
        rows.once(f"training {name}", lambda: {**vars(recipe), "samples": SAMPLES, **cost, **self.described()})

    def described(self) -> dict[str, Any]:
        """Widths of the space, the number of networks, and the largest in figures."""
        space, largest = cifar.space(self.name), self.net.extract(self.net.max())
        widths = (space.stem, space.first, *space.widths, space.final, space.last)
        figures = {"macs": macs(largest, EXAMPLE), "params": params(largest)}
        return {"widths": widths, "networks": float(self.net.space.size()), **figures}

    def config(self, code: Code) -> dict[str, int]:
        """The configuration of a code."""
        return self.net.space.canonical(self.codes.decode(np.array(code)))

    def code(self, config: dict[str, int]) -> Code:
        """The code of a configuration, one for all that are the same network."""
        return tuple(self.codes.encode([self.net.space.canonical(config)])[0].tolist())

    def fits(self, code: Code, metric: str, budget: int) -> bool:
        """Whether a configuration keeps a budget in KiB."""
        return bool(self.models[metric].peak_bytes(np.array([code]))[0] <= 1024 * budget)

    def measured(self, code: Code) -> float:
        """Top-1 on the validation images, with statistics of its own."""

        def measure() -> dict[str, Any]:
            config = self.config(code)
            self.net.recalibrate(config, cifar.calibration(*self.train, STATISTICS))
            with self.net.running(config):
                answer = cifar.right(self.net, *cifar.images("val"))
            self.net.forget_statistics()
            return {"top1": float(answer.mean())}

        return float(self.rows.once(f"val {self.name} {text(code)}", measure)["top1"])

    def drawn(self, metric: str, count: int, seed: int) -> list[Code]:
        """Configurations drawn within each budget, `count` for each."""
        found: list[Code] = []
        for budget in BUDGETS[metric]:
            memory = self.models[metric].bounded(ram=1024 * budget)
            rng = np.random.default_rng([seed, budget])
            found += [self.code(self.codes.decode(row)) for row in sample_within(memory, count, rng)]
        return list(dict.fromkeys(found))

    def proposed(self, metric: str, known: list[Code]) -> list[Code]:
        """For each budget the configurations that a ridge on what is known predicts to be best, not yet measured."""
        values = -np.log1p(-np.array([self.measured(code) for code in known]))
        onehot = np.array([self.net.space.encode(self.config(code)) for code in known])
        weights, constant, _ = ridge(onehot, values)
        found: list[Code] = []
        for budget in BUDGETS[metric]:
            optimizer = Optimizer(self.models[metric].bounded(ram=1024 * budget))
            for _ in range(PROPOSALS):
                out = np.array([*known, *found])
                best = optimizer.best(np.array([constant, *weights]), excluded=out)
                if best is not None:
                    found.append(self.code(best.config))
        return found

    def uniform(self, metric: str, budget: int) -> Code | None:
        """All blocks and kernels, and the one share of all widths that just fits."""
        for place in reversed(range(len(cifar.RATIOS))):
            largest = self.net.max()
            code = self.code({c.name: c.values[place] if c.kind == "width" else largest[c.name] for c in self.choices})
            if self.fits(code, metric, budget):
                return code
        return None

    @property
    def choices(self) -> Any:
        """The choices of the space."""
        return self.net.space.choices

    def answers(self, metric: str) -> dict[str, dict[int, Code]]:
        """By way of searching and by budget: the best that was measured."""
        first, device = self.drawn("device", SAMPLES, 0), metric == "device"
        known = self.known or first
        for number in range(ROUNDS if device else 1):
            if number == ROUNDS - 1:  # the largest networks, which draws hardly come near
                same = [self.uniform(metric, budget) for budget in BUDGETS[metric]]
                known = known + [c for c in dict.fromkeys(same) if c is not None and c not in known]
            known = known + self.proposed(metric, known)
        more = [code for code in self.drawn("device", SAMPLES, 1) if code not in first]
        blind = first + spread(more, len(known) - len(first)) if device else []
        self.known = known
        found: dict[str, dict[int, Code]] = {"searched": {}, "random": {}, "uniform": {}}
        for budget in BUDGETS[metric]:
            for way, codes in (("searched", known), ("random", blind)):
                fitting = [code for code in codes if self.fits(code, metric, budget)]
                if fitting:
                    found[way][budget] = max(fitting, key=self.measured)
            uniform = self.uniform(metric, budget)
            if uniform is not None:
                found["uniform"][budget] = uniform
        self.rows.once(
            f"counts {self.name} {metric}", lambda: {"measured": len(known), "random": len(blind)}, again=True
        )
        return found

    def macs(self, code: Code) -> int:
        """Multiply-adds of a configuration."""
        made = self.rows.once(
            f"macs {self.name} {text(code)}", lambda: {"macs": macs(self.net.extract(self.config(code)), EXAMPLE)}
        )
        return int(made["macs"])

    def tested(self, code: Code, *, tune: bool) -> dict[str, Any]:
        """Figures of an extracted network, and its right answers on the test images, as it is and fine-tuned."""

        def figures() -> dict[str, Any]:
            config = self.config(code)
            small = self.extracted(config)
            at = np.array([code])
            return {
                "top1": answered(cifar.right(small, *cifar.images("test"))),
                "macs": macs(small, EXAMPLE),
                "params": params(small),
                "predicted": {metric: int(model.peak_bytes(at)[0]) for metric, model in self.models.items()},
                "peak_bytes": peak_bytes(small, 1, hold_inputs=False),
                "val": self.measured(code),
            }

        def tuned() -> dict[str, Any]:
            small = self.extracted(self.config(code)).to(memory_format=torch.channels_last)
            file = cifar.RUNS / f"{self.name}-tuned-{text(code)}.safetensors"
            heal(small, cifar.Batches(*self.train), TUNING, seed=1, checkpoint=file)
            return {"top1": answered(cifar.right(small, *cifar.images("test")))}

        found = {"as it is": self.rows.once(f"test {self.name} {text(code)}", figures)}
        if tune:
            found["tuned"] = self.rows.once(f"tuned {self.name} {text(code)}", tuned)
        return found

    def alone(self, code: Code) -> dict[str, Any]:
        """A uniform configuration trained from random weights without a supernet, for as many epochs as that had."""

        def make() -> dict[str, Any]:
            space, recipe = cifar.space(self.name), self.recipe
            place = next(i for i, c in zip(code, self.choices, strict=True) if c.kind == "width")
            blocks, depths = np.ones(space.stages * space.blocks, int), np.full(space.stages, space.depths[-1])
            torch.manual_seed(recipe.seed)
            small = space.build(cifar.KERNEL * blocks, space.expands[place] * blocks, depths)
            small = small.to(memory_format=torch.channels_last)
            config = replace(TUNING, epochs=recipe.alone + recipe.sandwich, lr=recipe.alone_lr)
            file = cifar.RUNS / f"{self.name}-uniform-{text(code)}.safetensors"
            heal(small, cifar.Batches(*self.train), config, seed=recipe.seed, checkpoint=file)
            figures = {"macs": macs(small, EXAMPLE), "params": params(small)}
            return {"top1": answered(cifar.right(small, *cifar.images("test"))), **figures}

        return self.rows.once(f"alone {self.name} {text(code)}", make)

    def extracted(self, config: dict[str, int]) -> Any:
        """The plain network of a configuration with statistics of its own."""
        self.net.recalibrate(config, cifar.calibration(*self.train, FINAL_STATISTICS))
        small = self.net.extract(config)
        self.net.forget_statistics()
        return small


def text(code: Code) -> str:
    """A code as digits."""
    return "".join(map(str, code))


def spread(codes: list[Code], count: int) -> list[Code]:
    """`count` of the codes, evenly spaced."""
    return [codes[i] for i in np.linspace(0, len(codes) - 1, count).astype(int)] if count else []


def answered(right: Any) -> dict[str, Any]:
    """Accuracy with its interval, and the answers as bits."""
    low, high = wilson_interval(int(right.sum()), len(right))
    return {"mean": float(right.mean()), "interval": [low, high], "right": np.packbits(right).tobytes().hex()}


def bits(row: dict[str, Any]) -> Any:
    """The answers of a row."""
    n = len(cifar.images("test")[1])
    return np.unpackbits(np.frombuffer(bytes.fromhex(row["top1"]["right"]), np.uint8))[:n].astype(bool)


def matched(spaces: dict[str, Search], metric: str, answers: dict[str, Any]) -> None:
    """Add MOOFA's best measured networks with at most the MACs of OFA's answers, and beside them these answers."""
    moofa, searched = spaces["MOOFA"], answers["OFA"]["searched"]
    answers["OFA"]["matched"], answers["MOOFA"]["matched"] = searched, {}
    for budget, code in searched.items():
        most = spaces["OFA"].macs(code)
        fitting = sorted((c for c in moofa.known if moofa.fits(c, metric, budget)), key=moofa.measured, reverse=True)
        best = next((c for c in fitting if moofa.macs(c) <= most), None)
        if best is not None:
            answers["MOOFA"]["matched"][budget] = best


def write_answers(spaces: dict[str, Search], metric: str, answers: dict[str, Any]) -> None:
    """Which networks answer, by space, way and budget."""
    for name, search in spaces.items():
        said = {way: {str(b): text(c) for b, c in by.items()} for way, by in answers[name].items()}
        search.rows.once(f"search {name} {metric}", lambda s=said: {"answers": s}, again=True)


def compare(rows: setups.Rows, spaces: dict[str, Search], metric: str, answers: dict[str, Any], *, tune: bool) -> None:
    """Test the answers, the tightest budgets first, and write the paired differences between the spaces."""
    for way in ("searched", "matched", "uniform") if tune else ("searched", "matched", "uniform", "random"):
        for budget in BUDGETS[metric]:
            own = {
                name: search.tested(answers[name][way][budget], tune=tune)
                for name, search in spaces.items()
                if budget in answers[name][way]
            }
            if len(own) == len(SPACES):
                gaps = {
                    state: paired_difference(bits(own["MOOFA"][state]), bits(own["OFA"][state]))
                    for state in own["MOOFA"]
                }
                key = f"difference {metric} {way} {budget}"
                rows.once(key, lambda g=gaps: {"n": len(cifar.images("test")[1]), **g}, again=True)


def compare_alone(rows: setups.Rows, spaces: dict[str, Search], answers: dict[str, Any], count: int) -> None:
    """The uniform networks of the tightest budgets, trained without a supernet."""
    for budget in BUDGETS["device"][:count]:
        own = {name: search.alone(answers[name]["uniform"][budget]) for name, search in spaces.items()}
        gap = paired_difference(bits(own["MOOFA"]), bits(own["OFA"]))
        n = len(cifar.images("test")[1])
        rows.once(f"difference device alone {budget}", lambda n=n, g=gap: {"n": n, "as it is": g}, again=True)


def main() -> None:
    """Train, search and compare what is not yet there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", nargs="*", default=["device"], choices=list(PROFILES), help="fine-tune the answers")
    parser.add_argument("--alone", type=int, default=2, help="budgets whose uniform networks are trained by themselves")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = setups.Rows("trained", ABOUT, wing="supernet")
    spaces = {name: Search(name, rows, cifar.Recipe()) for name in SPACES}
    answers = {}
    for metric in PROFILES:
        found = answers[metric] = {name: search.answers(metric) for name, search in spaces.items()}
        matched(spaces, metric, found)
        write_answers(spaces, metric, found)
        compare(rows, spaces, metric, found, tune=False)
    for metric in given.tune:
        compare(rows, spaces, metric, answers[metric], tune=True)
    compare_alone(rows, spaces, answers["device"], given.alone)


if __name__ == "__main__":
    main()
