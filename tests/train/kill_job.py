"""Healing jobs for the kill tests, run in processes of their own.

As a script it is a nursery: it imports torch once, then forks a process for every line "case folder" on its input,
prints that process's number, and its exit status when it has ended.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from palmette.graph import capture
from palmette.train.checkpoint import digest, model_tensors
from palmette.train.config import HealConfig
from palmette.train.loop import heal

CHECKPOINT = "state.safetensors"


class Noisy(Dataset):
    """Images whose augmentation draws from torch, NumPy and Python, slow enough to be interrupted."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(52, 3, 6, 6, generator=generator)
        self.labels = torch.randint(0, 4, (52,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        time.sleep(0.001)
        image = self.images[index] + 0.1 * torch.randn(3, 6, 6)
        if random.random() < 0.5:
            image = image.flip(-1)
        return image + float(np.random.normal(0, 0.1)), self.labels[index]  # noqa: NPY002 - what users' code does


class Net(nn.Module):
    """Convolution, batch normalisation, dropout, and one parameter in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 4)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        x = self.drop(torch.relu(self.first(x)))
        return self.head(self.drop(torch.relu(self.second(x))))


SGD = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9}
ADAMW = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "warmup": 0.2}
EVERY_3 = {"checkpoint_every_steps": 3}
CASES = {
    "sgd": ({}, {**SGD, **EVERY_3}),
    "adamw": ({}, {**ADAMW, **EVERY_3}),
    "sgd-distil-workers": ({"num_workers": 2}, {**SGD, **EVERY_3, "distill": 0.7}),
    "adamw-distil": ({"generator": True}, {**ADAMW, "distill": 0.7, "checkpoint_every_steps": 1}),
    "adamw-persistent-workers": (
        {"num_workers": 2, "persistent_workers": True, "generator": True},
        {**ADAMW, **EVERY_3},
    ),
    "by-the-clock": ({}, {**SGD, "checkpoint_seconds": 0.02}),
    "channels-last": ({}, {**ADAMW, **EVERY_3}),
    "features": ({}, {**SGD, **EVERY_3, "distill": 0.7, "features": 0.5, "precision": "bf16-mixed"}),
}


def run(case: str, folder: Path) -> None:
    """Heal the case's network, with the state in `folder`, then write what came out."""
    torch.set_num_threads(1)
    torch.manual_seed(11)
    options, settings = dict(CASES[case][0]), CASES[case][1]
    teacher, model = Net(), Net()
    if case == "channels-last":
        model = model.to(memory_format=torch.channels_last)
    if case == "features":
        teacher, model = (capture(network, torch.zeros(2, 3, 6, 6)) for network in (teacher, model))
    if options.pop("generator", False):
        options["generator"] = torch.Generator().manual_seed(3)
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True, **options)
    config = HealConfig(epochs=3, **settings)
    checkpoint = folder / CHECKPOINT
    history = heal(model, loader, config, teacher=teacher, seed=7, checkpoint=checkpoint, label=case)
    weights = {name: tensor.sum().item() for name, tensor in model_tensors(model).items()}
    outcome = {"weights": digest(model_tensors(model)), "sums": weights, "history": history}
    (folder / "outcome.json").write_text(json.dumps(outcome))


def nursery() -> None:
    """Fork a process for every line of the input."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        case, folder = line.rstrip("\n").split(" ", 1)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run(case, Path(folder))
                status = 0
            except Exception:  # noqa: BLE001 - told here, and by the status
                traceback.print_exc()
            os._exit(status)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    nursery()
