"""Heal in two processes: `two_processes.py FOLDER [STEP]`, where every process ends abruptly before step STEP."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric

from palmette.train import HealConfig, heal
from palmette.train.checkpoint import digest, model_tensors


def job(fabric: Fabric, folder: Path, stop: int | None) -> None:
    """Heal the shared small network and write what came out, one file per process."""
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("nets", Path(__file__).with_name("nets.py"))
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    steps = 0

    def watch(network, inputs, output):
        nonlocal steps
        steps += 1
        if steps == stop:
            os._exit(3)
        return output.new_zeros(())

    model, config = nets.net(), HealConfig(epochs=3, lr=0.05)
    checkpoint = folder / "state.safetensors"
    history = heal(model, nets.loader(), config, fabric=fabric, checkpoint=checkpoint, loss_terms=[watch])
    found = {"history": history, "weights": digest(model_tensors(model)), "steps": steps}
    (folder / f"outcome-{fabric.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    fabric.launch(job, Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
