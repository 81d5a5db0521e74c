"""`palmette shrink`, killed at random moments and resumed each time, ends with the bytes of an uninterrupted run."""

from __future__ import annotations

import json
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
        fixed = f"--model {self.source}:network --data {self.source}:loaders --max-drop 100 --epochs 3 --lr 0.05"
        command = [sys.executable, "-m", "palmette", "shrink", *fixed.split(), "--run", str(run), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, run: Path, *options: str) -> tuple[object, bytes]:
        """What the run's network file holds in the end."""
        process = self.start(run, *options)
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
        return _content(run / "model.safetensors")


def _content(file: Path) -> tuple[object, bytes]:
    """Header as a value (its keys come in any order) and all tensor bytes of a safetensors file."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _kill_again_and_again(shrinking: Shrinking, kills: int, seed: int, *options: str) -> None:
    begun = time.monotonic()
    expected = shrinking.finish(shrinking.folder / "whole", *options)
    duration = time.monotonic() - begun
    moments, done, attempt = random.Random(seed), 0, 0
    while done < kills:
        run = shrinking.folder / f"killed-{attempt}"
        finished = False
        while not finished and done < kills:
            process = shrinking.start(run, *options, "--resume")
            try:
                printed, _ = process.communicate(timeout=moments.uniform(0.2, 0.7) * duration)
                assert process.returncode == 0, printed
                finished = True
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                done += 1
        assert shrinking.finish(run, *options, "--resume") == expected
        attempt += 1


@pytest.mark.slow
def test_two_kills(tmp_path: Path) -> None:
    _kill_again_and_again(Shrinking(tmp_path), 2, 1, "--cost", "macs", "--no-controls", "--rounds", "2")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_with_a_stored_cost_table(tmp_path: Path) -> None:
    shrinking = Shrinking(tmp_path)
    shrinking.finish(tmp_path / "first", "--cost", "eager", "--rounds", "3")
    table = tmp_path / "cost_table.json"
    shutil.copy(tmp_path / "first" / "cost_table.json", table)
    _kill_again_and_again(shrinking, 20, 2, "--cost", str(table), "--rounds", "3")
