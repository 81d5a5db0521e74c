"""`palmette shrink`, killed at random moments and resumed each time, ends with the bytes of an uninterrupted run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

NETWORK = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.mlp = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 8))

    def forward(self, x):
        return x + self.mlp(self.norm(x))

def network():
    torch.manual_seed(0)
    return nn.Sequential(*[Branch() for _ in range(4)], nn.Linear(8, 4))

def loaders():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1600, 8, generator=generator)
    y = (x[:, :2] > 0).long() @ torch.tensor([1, 2])
    parts = [TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 1200), (1200, 1400), (1400, 1600))]
    made = [
        DataLoader(part, batch_size=16, shuffle=index == 0, generator=torch.Generator().manual_seed(index))
        for index, part in enumerate(parts)
    ]
    return made
"""


class Shrinking:
    """The command line of one run, started as often as it takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "net.py"
        self.source.write_text(NETWORK)

    def start(self, run: Path, *options: str) -> subprocess.Popen[str]:
        command = [
            *(
                sys.executable,
                "-m",
                "palmette",
                "shrink",
                "--model",
                f"{self.source}:network",
                "--data",
                f"{self.source}:loaders",
            ),
            *(
                "--run",
                str(run),
                "--max-drop",
                "100",
                "--epochs",
                "3",
                "--lr",
                "0.05",
                "--rounds",
                "3",
                "--trust",
                *options,
            ),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, run: Path, *options: str) -> bytes:
        process = self.start(run, *options)
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
        return (run / "model.safetensors").read_bytes()


def _kill_again_and_again(folder: Path, kills: int, seed: int) -> None:
    shrinking = Shrinking(folder)
    begun = time.monotonic()
    shrinking.finish(folder / "first", "--cost", "eager")
    table = folder / "cost_table.json"
    shutil.copy(folder / "first" / "cost_table.json", table)
    stored = ("--cost", str(table))
    expected = shrinking.finish(folder / "whole", *stored)
    duration = (time.monotonic() - begun) / 2
    moments, done, attempt = random.Random(seed), 0, 0
    while done < kills:
        run = folder / f"killed-{attempt}"
        finished = False
        while not finished and done < kills:
            process = shrinking.start(run, *stored, "--resume")
            wait = moments.uniform(0.2, 0.7) * duration
            try:
                printed, _ = process.communicate(timeout=wait)
                assert process.returncode == 0, printed
                finished = True
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                done += 1
        assert shrinking.finish(run, *stored, "--resume") == expected
        attempt += 1


def test_three_kills(tmp_path: Path) -> None:
    _kill_again_and_again(tmp_path, kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills(tmp_path: Path) -> None:
    _kill_again_and_again(tmp_path, kills=20, seed=2)
