"""Heal in two processes: `two_processes.py CASE FOLDER [STEP]`, where every process ends abruptly before step STEP.

CASE: "plain"; "fading" for features of a teacher and a plan that fades in; "sampler" for the same with a loader that
has a DistributedSampler of its own; "left-over" for one that leaves an incomplete batch out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, DistributedSampler

from palmette.graph import Plan, capture, drop, linearize
from palmette.train import HealConfig, heal, load_checkpoint
from palmette.train.checkpoint import digest, model_tensors
from palmette.train.fade import Fading, heal_fading


def job(fabric: Fabric, case: str, folder: Path, stop: int | None) -> None:
    """Heal the shared small network and write what came out, one file per process."""
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("nets", Path(__file__).with_name("nets.py"))
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    steps, planned, faded = 0, set(), None

    def watch(network, inputs, output):
        nonlocal steps
        steps += 1
        if steps == stop:
            os._exit(3)
        planned.update(module.steps for module in network.modules() if isinstance(module, Fading))
        return output.new_zeros(())

    options = {"fabric": fabric, "checkpoint": folder / "state.safetensors", "loss_terms": [watch]}
    history = []
    if case == "plain":
        model = nets.net()
        history = heal(model, nets.loader(), HealConfig(epochs=3, lr=0.05), **options)
    else:
        example = torch.zeros(2, 3, 6, 6)
        dense, loader = capture(nets.residual().eval(), example), nets.images()
        if case == "sampler":
            samples = loader.dataset
            loader = DataLoader(samples, 10, sampler=DistributedSampler(samples, 2, fabric.global_rank))
        elif case == "left-over":
            loader = nets.images(n=58, drop_last=True)
        plan = Plan([drop("blocks.1"), linearize("blocks.0.act")]).fit(dense, nets.images(shuffle=False), example)
        config = HealConfig(epochs=3, lr=0.02, fade=0.4, features=0.5, distill=0.5)
        model = heal_fading(dense, plan, example, loader, config, teacher=dense, **options)
        state = load_checkpoint(folder / "state-fade.safetensors")[0]
        faded = sorted(planned), sorted({int(value) for name, value in state.items() if name.endswith(".done")})
    found = {"history": history, "weights": digest(model_tensors(model)), "steps": steps, "faded": faded}
    (folder / f"outcome-{fabric.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    fabric.launch(job, sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
