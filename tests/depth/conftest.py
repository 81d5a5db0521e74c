"""Small networks and data for the depth wing: seconds on one core, and something to gain."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from palmette.depth.opening import Loaders, opened
from palmette.depth.rounds import search
from palmette.depth.session import Settings
from palmette.registry import get_method
from palmette.train.loop import HealConfig, heal


class Blobs:
    """Four Gaussian blobs in 8 dimensions, cut in three; a residual MLP that learns them in a second."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        centres = 2.2 * torch.randn(4, 8, generator=generator)
        labels = torch.randint(4, (480,), generator=generator)
        points = centres[labels] + torch.randn(480, 8, generator=generator)
        self.parts = [TensorDataset(points[a:b], labels[a:b]) for a, b in ((0, 240), (240, 360), (360, 480))]
        self.train, self.val, self.test = (self.loader(index) for index in range(3))

    def loader(self, part: int) -> DataLoader:
        return DataLoader(
            self.parts[part], batch_size=48, shuffle=part == 0, generator=torch.Generator().manual_seed(part)
        )


class Branch(nn.Module):
    """x + MLP(x), 8-48-8."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 8))

    def forward(self, x):
        return x + self.mlp(x)


def make_net(seed: int = 0, blocks: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 8), *[Branch() for _ in range(blocks)], nn.Linear(8, 4))


@pytest.fixture(scope="session")
def blobs() -> Blobs:
    return Blobs()


@pytest.fixture(scope="session")
def quick() -> HealConfig:
    return HealConfig(epochs=1, lr=1e-2)


@pytest.fixture(scope="session")
def trained() -> nn.Module:
    model = make_net()
    heal(model, Blobs().train, HealConfig(epochs=4, lr=5e-2), seed=1)
    return model.eval()


@pytest.fixture
def searched(trained, blobs, tmp_path):
    """The rounds alone, without timing, export and report: `searched(method, ...)` -> (what they found, its stages).

    A second call of the same `name` resumes.
    """

    def run(method: str, *, heal: HealConfig, rounds: int, reproduce: bool = False, name: str = "run", **config):
        chosen = get_method(method)
        settings = Settings(max_drop=100.0, rounds=rounds, reproduce=reproduce, pad="exact" if reproduce else "repad")
        request = {"example_inputs": None, "config": chosen.make_config(**config), "cost": "macs"}
        rest = {"protect": (), "loss_fn": None, "metric": None, "names": {}}
        data, folder = Loaders(train=blobs.train, val=blobs.val), tmp_path / name
        request |= {"run_dir": folder, "resume": folder.exists()}
        with opened(data, model=trained, method=chosen, settings=settings, heal=heal, **request, **rest) as session:
            found = search(session, {"accuracy": 1.0}, lambda _: None)
        stages = {file.stem: json.loads(file.read_text())["value"] for file in (folder / "stages").glob("*.json")}
        return found, stages

    return run
