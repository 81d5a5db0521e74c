"""Train a supernet in two processes: `two_processes.py STRATEGY FOLDER` writes what each drew and ended with."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

from palmette.supernet.supernet import Supernet
from palmette.supernet.training import train_supernet
from palmette.train import HealConfig
from palmette.train.checkpoint import digest, model_tensors


def job(fabric: Fabric, strategy: str, folder: Path) -> None:
    """Two epochs of the small supernet on noise; what was activated in every step, in order."""
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("nets", Path(__file__).with_name("nets.py"))
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    torch.manual_seed(0)
    net = Supernet.from_model(nets.Tiny().eval(), torch.randn(2, 3, 8, 8))
    drawn, activate = [], net.activate
    net.activate = lambda config: (drawn.append(dict(config)), activate(config))[1]
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(40, 3, 8, 8, generator=generator), torch.arange(40) % 4)
    train_supernet(net, DataLoader(data, 10), HealConfig(epochs=2, lr=0.02), strategy=strategy, fabric=fabric)
    del net.activate
    found = {"drawn": drawn, "weights": digest(model_tensors(net))}
    (folder / f"{fabric.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    fabric.launch(job, sys.argv[1], Path(sys.argv[2]))
