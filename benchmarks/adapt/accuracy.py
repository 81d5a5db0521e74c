"""Transfer learning within a budget of bytes: stored ImageNet networks on CIFAR-10 or Fashion-MNIST at 96 px.

    PALMETTE_DATA=DIR python benchmarks/adapt/accuracy.py --network mcunet --data cifar10 --seeds 0 1 2 --share 50

Every method trains the same images for as many epochs from the same new head. Learning rates are chosen per method on
validation images with seed 0; the test images are looked at once, after the last epoch. Rows that exist are left.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import setups
import stored
import torch
from lora import with_lora
from torch import Tensor, nn
from torch.nn import functional as F

import palmette as pm
from palmette.stats import wilson_interval

NETWORKS = {
    "mcunet": "imagenet_mcunet-5fps_int8",
    "proxyless": "imagenet_proxyless-w0.3_int8",
    "mbv2": "imagenet_mbv2-w0.35_int8",
}
SELECTIONS = ("sparse_update", "velocity", "trady", "medyate")
CODECS = ("auto", "asi")
PLAIN = ("full", "head", "last2", "last4", "lora")
RATES = (0.01, 0.04)
CLASSES, BATCH, CLIP = 10, 32, 2.0


def images(name: str, split: str, count: int) -> tuple[Tensor, Tensor]:
    """First images of a split in 0..1 [n, 3, 32, 32], and labels; Fashion-MNIST's test set serves as val and test."""
    load = stored._import(stored.folder() / "load.py")
    if name == "cifar10":
        x, y = load.cifar10(split)
    else:
        x, y = load.fashion_mnist("train" if split == "train" else "test")
        x = np.repeat(np.pad(x, ((0, 0), (2, 2), (2, 2)))[:, None], 3, axis=1)
        x, y = (x[:2000], y[:2000]) if split == "val" else (x[2000:6000], y[2000:6000]) if split == "test" else (x, y)
    if split == "train":
        order = np.random.default_rng(0).permutation(len(x))[:count]
        x, y = x[order], y[order]
    return torch.from_numpy(np.ascontiguousarray(x)).float() / 255, torch.from_numpy(y.astype(np.int64))


def prepared(x: Tensor, pixels: int) -> Tensor:
    """Resized, in -1..1."""
    return F.interpolate(x, size=(pixels, pixels), mode="bilinear", align_corners=False) * 2 - 1


def fresh(name: str, seed: int) -> nn.Module:
    """The stored network with a new head of ten classes."""
    network: Any = stored.build(NETWORKS[name])
    torch.manual_seed(seed)
    old = network.classifier.conv
    network.classifier.conv = nn.Conv2d(old.in_channels, CLASSES, 1)
    nn.init.normal_(network.classifier.conv.weight, std=0.01)
    nn.init.zeros_(network.classifier.conv.bias)
    network.classifier.act = nn.Identity()
    return network.train()


def freeze_but_last(model: nn.Module, count: int) -> None:
    """Leave the last `count` layers and the head trainable."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    trained = {id(p) for layer in layers[len(layers) - count - 1 :] for p in layer.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


class Trainee:
    """One method's way to train: parameters, optimizer, what to do between epochs, and the bytes that it keeps."""

    def __init__(self, model: nn.Module, method: str, sample: tuple[Tensor, Tensor], budget: int | None, rate: float):
        self.model, self.end_epoch = model, lambda: None
        name, _, options = method.partition(":")
        if name in PLAIN:
            if name.startswith("last") or name == "head":
                freeze_but_last(model, int(name.removeprefix("last")) if name != "head" else 0)
            if name == "lora":
                self.model = model = with_lora(model, rank=8, keep=model.classifier.conv)  # type: ignore[arg-type]
            self.parameters = [p for p in model.parameters() if p.requires_grad]
            self.optimizer: Any = torch.optim.SGD(self.parameters, lr=rate)
            memory = pm.measure_training(model, *sample, F.cross_entropy)
            self.figures = {"saved_bytes": memory.saved_bytes, "peak_bytes": memory.peak_bytes}
            return
        config = dict(part.split("=") for part in options.split(",")) if options else {}
        found = pm.adapt(
            model, sample, F.cross_entropy, budget=budget, method=name, config={k: int(v) for k, v in config.items()}
        )
        self.optimizer = found.optimizer(torch.optim.SGD, lr=rate)
        self.parameters = found.parameters()
        self.end_epoch, self.figures = found.next_epoch, found.to_dict()
        self.adaptation = found


def accuracy(model: nn.Module, x: Tensor, y: Tensor, pixels: int) -> np.ndarray:
    """Whether each image is told right."""
    model.eval()
    with torch.no_grad():
        pairs = zip(x.split(100), y.split(100), strict=True)
        right = [model(prepared(a, pixels)).flatten(1).argmax(1) == b for a, b in pairs]
    model.train()
    return torch.cat(right).numpy()


def trained(
    options: argparse.Namespace, method: str, seed: int, rate: float, budget: int | None, data: dict[str, Any]
) -> dict[str, Any]:
    """Train once; validation and test accuracy, bytes, and which test images were right."""
    x, y = data["train"]
    model = fresh(options.network, seed)
    sample = prepared(x[:BATCH], options.pixels), y[:BATCH]
    trainee = Trainee(model, method, sample, budget, rate)
    order = torch.Generator().manual_seed(seed)
    steps = options.epochs * (len(x) // BATCH)
    done = 0
    for epoch in range(options.epochs):
        for index in torch.randperm(len(x), generator=order)[: len(x) // BATCH * BATCH].view(-1, BATCH):
            progress = done / steps
            for group in trainee.optimizer.param_groups:
                group["lr"] = rate * min(1.0, 10 * progress + 0.1) * 0.5 * (1 + math.cos(math.pi * progress))
            batch = prepared(x[index], options.pixels)
            flip = torch.rand(BATCH, generator=order) < 0.5
            batch[flip] = batch[flip].flip(-1)
            trainee.optimizer.zero_grad()
            F.cross_entropy(trainee.model(batch), y[index]).backward()
            torch.nn.utils.clip_grad_norm_([p for g in trainee.optimizer.param_groups for p in g["params"]], CLIP)
            trainee.optimizer.step()
            done += 1
        if epoch + 1 < options.epochs:
            trainee.end_epoch()
    val = accuracy(trainee.model, *data["val"], options.pixels)
    return {"val": float(val.mean()), "rate": rate, **trainee.figures, "model": trainee.model}


def row(
    options: argparse.Namespace, method: str, seed: int, rate: float, budget: int | None, data: Any
) -> dict[str, Any]:
    """A row of the results."""
    found = trained(options, method, seed, rate, budget, data)
    right = accuracy(found.pop("model"), *data["test"], options.pixels)
    low, high = wilson_interval(int(right.sum()), len(right))
    return {
        **found,
        "test": float(right.mean()),
        "n": len(right),
        "interval": [low, high],
        "wrong": np.flatnonzero(~right).tolist(),
    }


def chosen_rate(rows: setups.Rows, key: str, make: Callable[[float], dict[str, Any]]) -> float:
    """The rate with the best validation accuracy after a third of the epochs, with seed 0."""

    def tried(rate: float) -> dict[str, Any]:
        return {"val": make(rate)["val"]}

    found = {rate: rows.once(f"rate/{key}/{rate}", lambda rate=rate: tried(rate)) for rate in RATES}
    good = {rate: entry["val"] for rate, entry in found.items() if "val" in entry}
    return max(good, key=lambda rate: good[rate]) if good else RATES[0]


def main() -> None:
    """Run what is asked for and not yet there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="mcunet")
    parser.add_argument("--data", choices=("cifar10", "fashion_mnist"), default="cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--share", type=int, nargs="+", default=[50], help="budgets as vanilla / SHARE")
    parser.add_argument("--budget", type=int, default=None, help="a budget in bytes, instead")
    parser.add_argument("--methods", nargs="+", default=[*PLAIN, *CODECS, *SELECTIONS])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pixels", type=int, default=96)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = setups.Rows(f"accuracy_{options.network}_{options.data}", __doc__ or "")
    data = {split: images(options.data, split, options.images) for split in ("train", "val", "test")}
    sample = prepared(data["train"][0][:BATCH], options.pixels), data["train"][1][:BATCH]
    vanilla = pm.measure_training(fresh(options.network, 0), *sample, F.cross_entropy).saved_bytes
    budgets = [options.budget] if options.budget else [vanilla // share for share in options.share]
    short = copy.copy(options)
    short.epochs = max(1, options.epochs // 3)
    recipe = f"{options.images}x{options.epochs}"
    for seed in options.seeds:
        for budget in budgets:
            for method in options.methods:
                bound = None if method in PLAIN or ":" in method else budget
                key = f"{method}/{'none' if bound is None else bound}/{recipe}"
                rate = chosen_rate(rows, key, lambda r, m=method, b=bound: trained(short, m, 0, r, b, data))
                rows.once(
                    f"{key}/seed{seed}",
                    lambda m=method, s=seed, r=rate, b=bound: {"vanilla": vanilla, **row(options, m, s, r, b, data)},
                )


if __name__ == "__main__":
    main()
