"""Three boards for a trained ResNet-20: what a choice of resolution and of bits adds to widths and depth.

    PALMETTE_DATA=DIR python benchmarks/supernet/boards.py        # goes on where it was stopped

One supernet is trained on CIFAR-10 from the trained network, with all choices. Then each board is met from within four
spaces, with equal measurements: widths and depth alone, with resolution, with bits, with both. Beside each answer stand
the best of as many networks drawn at random, and the widest network of one share of channels everywhere that fits.
Answers are looked at on the test images once. Rows are in benchmarks/results/supernet_boards.json.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "adapt"))
import setups
import stored

import palmette as pm
from palmette.stats import paired_difference
from palmette.supernet.judge import Judge

RUNS = Path(__file__).parents[2] / "runs" / "supernet_boards"
NETWORK = "cifar10_resnet20_akamaster"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHOICES: dict[str, Any] = {"width": (0.25, 0.5, 0.75, 1.0), "depth": 2, "kernel": (), "heads": ()}
RESOLUTION, BITS = {"resolution": (20, 24, 28)}, {"bits": (8,)}
SPACES = {"widths": {}, "resolution": RESOLUTION, "bits": BITS, "both": {**RESOLUTION, **BITS}}
BOARDS = {
    "little flash": {"ram": "192KiB", "flash": "144KiB"},
    "little RAM": {"ram": "80KiB", "flash": "1100KiB"},
    "little of both": {"ram": "96KiB", "flash": "128KiB"},
}
TRAINING = pm.HealConfig(epochs=3, lr=0.02, momentum=0.9, weight_decay=1e-4, warmup=0.1, precision="32-true")
IMAGES, VALIDATION, MEASUREMENTS, ROUNDS, STATISTICS = 12_000, 1_000, 40, 3, 5
ABOUT = (
    "CIFAR-10, ResNet-20 trained elsewhere (91.7 %); right answers are bits of the 4,000 test images, in hex; float32 "
    "activations, weights in flash, element-wise operations in place"
)


@cache
def images(split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 32, 32] as the network wants them, and labels [n]; of some splits `count` drawn ones."""
    x, y = stored._import(stored.folder() / "load.py").cifar10(split)
    order = np.random.default_rng(0).permutation(len(x))[:count]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    scaled = (torch.from_numpy(np.ascontiguousarray(x[order])).float() / 255 - mean) / std
    return scaled, torch.from_numpy(y[order].astype(np.int64))


class Augmented(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Flipped and shifted images."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = nn.functional.pad(x, (4, 4, 4, 4)), y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row, column, flip = (int(torch.randint(n, ())) for n in (9, 9, 2))
        x = self.x[index, :, row : row + 32, column : column + 32]
        return (x.flip(2) if flip else x), self.y[index]


def trained() -> pm.Supernet:
    """The supernet with all choices, trained."""
    source = stored.build(NETWORK).eval()
    net = pm.Supernet.from_model(source, images("val", 4)[0], **CHOICES, **SPACES["both"])
    loader = DataLoader(Augmented(*images("train", IMAGES)), batch_size=64, shuffle=True, drop_last=True)
    pm.train_supernet(net, loader, TRAINING, sub_nets=1, checkpoint=RUNS / "supernet.safetensors")
    return net


def answer(net: pm.Supernet, board: str, kind: str) -> dict[str, Any]:
    """The answer of one space for one board, its control and the uniform network, on the test images."""
    space = pm.Supernet.from_model(net.network, images("val", 4)[0], **CHOICES, **SPACES[kind])
    statistics = DataLoader(TensorDataset(*images("train", IMAGES)), batch_size=200)
    val, test = (
        DataLoader(TensorDataset(*images(s, n)), batch_size=200) for s, n in (("val", VALIDATION), ("test", None))
    )
    profile = pm.DeviceProfile(
        name=board.replace(" ", "-"), weights_in="flash", inplace_elementwise=True, **BOARDS[board]
    )
    found = pm.specialize(
        space,
        statistics,
        val,
        test,
        profile=profile,
        measurements=MEASUREMENTS,
        rounds=ROUNDS,
        batches=STATISTICS,
        run_dir=RUNS / f"{profile.name}-{kind}",
        resume=True,
    )
    judge = Judge(space, statistics, test, batches=STATISTICS)
    memory = pm.MemoryModel(space, profile)
    whole, chance = judge.evaluations([found.config, found.random["config"]], test, "test")
    row = {
        "ram_bytes": found.found.ram_bytes,
        "flash_bytes": found.found.param_bytes,
        "val": found.found.value,
        "resolution": found.config.get("resolution", 32),
        "layers_in_8_bits": [v for k, v in found.config.items() if k.startswith("bits:")].count(8),
        "test": told(whole),
        "random": {**told(chance), "difference": difference(whole, chance)},
    }
    even = uniform(memory)
    if even is not None:
        same = judge.evaluations([even], test, "test")[0]
        row["uniform"] = {**told(same), "difference": difference(whole, same)}
    return row


def uniform(memory: pm.MemoryModel) -> dict[str, int] | None:
    """The widest network that fits, of one share of channels everywhere and otherwise whole; None if none fits."""
    space = memory.net.space
    for share in sorted(CHOICES["width"], reverse=True):
        config = space.max()
        for choice in space.of_kind("width"):
            config[choice.name] = min(choice.values, key=lambda v, c=choice: abs(v - share * c.values[-1]))
        if memory.fits(memory.codes.encode([config]))[0]:
            return config
    return None


def told(found: Any) -> dict[str, Any]:
    """Accuracy with its interval, and the answers as bits."""
    right = np.asarray(found.correct).astype(bool)
    return {
        "mean": found.accuracy,
        "interval": list(found.interval),
        "n": found.n,
        "right": np.packbits(right).tobytes().hex(),
    }


def difference(one: Any, other: Any) -> Any:
    """The paired difference in points with its interval."""
    return paired_difference(np.asarray(one.correct).astype(bool), np.asarray(other.correct).astype(bool))


def answers_of(row: dict[str, Any]) -> Any:
    """The answers in a row."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8))[: row["n"]].astype(bool)


def main() -> None:
    """Train, and answer what is not yet there."""
    torch.set_num_threads(1)
    rows = setups.Rows("boards", ABOUT, wing="supernet")
    net = trained()
    test = DataLoader(TensorDataset(*images("test")), batch_size=200)
    rows.once("source", lambda: {"test": told(pm.evaluate(stored.build(NETWORK).eval(), test))})
    for board in BOARDS:
        found = {kind: rows.once(f"{board}, {kind}", lambda b=board, k=kind: answer(net, b, k)) for kind in SPACES}
        for kind in ("resolution", "bits", "both"):
            if "test" in found[kind] and "test" in found["widths"]:
                gap = paired_difference(answers_of(found[kind]["test"]), answers_of(found["widths"]["test"]))
                rows.once(f"difference {board}, {kind}", lambda g=gap: {"n": 4000, "gain": g}, again=True)


if __name__ == "__main__":
    main()
