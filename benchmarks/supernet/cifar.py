"""Two spaces of small networks for CIFAR-10, trained as supernets on one core: OFA's kind of widths, and MOOFA's.

Both have the same stem, first stage and choices, so the same layers near the input bound the memory of both. Behind
them one widens gently, as OFA does, the other as `moofa_widths` has it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1]))
import stored

from palmette.files import write_json
from palmette.supernet import StagedSpace, moofa_widths
from palmette.supernet.supernet import Supernet
from palmette.supernet.training import train_supernet
from palmette.train.config import HealConfig
from palmette.train.loop import heal

RUNS = Path(__file__).parents[2] / "runs" / "supernet_trained"
FIRST, STAGES, EXPAND, KERNEL, SIDE = 16, 3, 4, 5, 16
"""The reference block: channels of the first stage, expand and kernel at most, pixels of its side."""

RATIOS = (0.25, 0.5, 0.75, 1.0)
BATCH = 64
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Recipe:
    """How a supernet is trained: the largest network alone, then the sandwich; all by SGD with cosine and warm-up."""

    images: int = 8000
    alone: int = 6
    alone_lr: float = 0.1
    sandwich: int = 4
    sandwich_lr: float = 0.05
    sub_nets: int = 1
    seed: int = 0


def space(name: str) -> StagedSpace:
    """The staged space "OFA" or "MOOFA" for images of 32 x 32."""
    moofa = moofa_widths(FIRST, STAGES, EXPAND, KERNEL, SIDE)
    widths = {"OFA": (16, 24, 40, 160, 160), "MOOFA": moofa}[name]
    return StagedSpace(
        name=name,
        stem=FIRST,
        first=FIRST,
        widths=widths[:STAGES],
        strides=(1, 2, 2),
        se=(False,) * STAGES,
        activations=("relu", "hard_swish", "hard_swish"),
        final=widths[-2],
        last=widths[-1],
        expands=(1, 2, 3, EXPAND),
        kernels=(3, KERNEL),
        depths=(2, 3),
        resolutions=(32,),
        classes=10,
    )


def network(name: str, seed: int) -> nn.Module:
    """The largest network of a space with random weights, in the layout that is fastest on a CPU."""
    torch.manual_seed(seed)
    return space(name).build_max().to(memory_format=torch.channels_last)


def supernet(model: nn.Module) -> Supernet:
    """The supernet of a network: kernels, inner widths of the blocks and depths; what links the blocks stays whole."""
    outer = [path for path, _ in model.named_modules() if path.endswith("projection.0")]
    protect = ("stem", "final", "mix", *outer)
    example = torch.zeros(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return Supernet.from_model(
        model, example, width=RATIOS, depth=1, kernel=(3, KERNEL), heads=(), round_to=8, protect=protect
    )


@cache
def images(split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised images [n, 3, 32, 32] and labels [n] of a split; of "train" `count` drawn ones."""
    load = stored._import(stored.folder() / "load.py")
    x, y = load.cifar10(split)
    if count is not None:
        order = np.random.default_rng(0).permutation(len(x))[:count]
        x, y = x[order], y[order]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    scaled = (torch.from_numpy(np.ascontiguousarray(x)).float() / 255 - mean) / std
    return scaled.contiguous(memory_format=torch.channels_last), torch.from_numpy(y.astype(np.int64))


class Batches:
    """Shuffled batches of flipped and shifted images; repeats itself for one state of torch's generator."""

    def __init__(self, x: Tensor, y: Tensor, batch: int = BATCH, *, augment: bool = True) -> None:
        self.x, self.y, self.batch, self.augment = x, y, batch, augment

    def __len__(self) -> int:
        return len(self.x) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x)) if self.augment else torch.arange(len(self.x))
        for number in range(len(self)):
            index = order[number * self.batch : (number + 1) * self.batch]
            x = self.x[index]
            yield (augmented(x) if self.augment else x), self.y[index]


def augmented(x: Tensor) -> Tensor:
    """Half of the images mirrored, all shifted by up to four pixels, each its own way."""
    count, side = len(x), x.shape[-1]
    mirrored = torch.where(torch.rand(count, 1, 1, 1) < 0.5, x.flip(-1), x)
    padded = F.pad(mirrored, (4, 4, 4, 4))
    rows, columns = (torch.randint(0, 9, (count, 1)) + torch.arange(side) for _ in range(2))
    own = torch.arange(count).view(-1, 1, 1)
    moved = padded[own, :, rows[:, :, None], columns[:, None, :]]  # [n, side, side, channels]: channels last
    return moved.permute(0, 3, 1, 2)


def trained(name: str, recipe: Recipe) -> tuple[Supernet, dict[str, Any]]:
    """The trained supernet of a space, and what its training cost; goes on where it was stopped."""
    RUNS.mkdir(parents=True, exist_ok=True)
    loader = Batches(*images("train", recipe.images))
    start, cpu = time.perf_counter(), time.process_time()
    model = network(name, recipe.seed)
    common: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4, "warmup": 0.1, "precision": "32-true"}
    alone = HealConfig(epochs=recipe.alone, lr=recipe.alone_lr, **common)
    first = heal(model, loader, alone, seed=recipe.seed, checkpoint=RUNS / f"{name}-alone.safetensors")
    middle = time.process_time()
    net = supernet(model)
    together = HealConfig(epochs=recipe.sandwich, lr=recipe.sandwich_lr, **common)
    second = train_supernet(
        net,
        loader,
        together,
        strategy="sandwich",
        sub_nets=recipe.sub_nets,
        seed=recipe.seed,
        checkpoint=RUNS / f"{name}-sandwich.safetensors",
    )
    net.to(memory_format=torch.channels_last).eval()
    cost = {
        "loss_alone": [entry["loss"] for entry in first],
        "loss_sandwich": [entry["loss"] for entry in second],
        "cpu_seconds_alone": round(middle - cpu),
        "cpu_seconds_sandwich": round(time.process_time() - middle),
        "wall_seconds": round(time.perf_counter() - start),
    }
    known = RUNS / f"{name}-cost.json"  # of the process that trained: later ones only read the weights
    if not known.exists():
        write_json(known, cost)
    return net, json.loads(known.read_text())


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """Whether each image [n] is told right; bool [n]."""
    model.eval()
    pairs = zip(x.split(250), y.split(250), strict=True)
    return torch.cat([model(a).argmax(1) == b for a, b in pairs]).numpy()


def calibration(x: Tensor, y: Tensor, count: int) -> Iterable[Any]:
    """The first `count` training images as they are, for the statistics of batch norms."""
    return Batches(x[:count], y[:count], 250, augment=False)
