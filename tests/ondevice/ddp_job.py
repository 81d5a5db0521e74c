"""An adapted model under DistributedDataParallel in two processes: `ddp_job.py FOLDER` writes one file for each."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from palmette.ondevice.adapt import adapt


def job(rank: int, folder: str) -> None:
    """One process: its half of the batch under DDP, and the mean of both halves alone."""
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("kit", Path(__file__).with_name("conftest.py"))
    kit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    net, (x, y) = kit.small_cnn(), kit.batch(8)
    adaptation = adapt(net, (x[:4], y[:4]), budget=30_000, method="hosvd")
    halves = [kit.step(net, x[half], y[half])[1] for half in (slice(0, 4), slice(4, 8))]
    mean = {name: (gradient + halves[1][name]) / 2 for name, gradient in halves[0].items()}
    wrapped = DistributedDataParallel(net)
    mine = slice(4 * rank, 4 * rank + 4)
    for _ in range(2):  # the second pass runs with rebuilt buckets
        wrapped.zero_grad()
        F.cross_entropy(wrapped(x[mine]), y[mine]).backward()
    torch.save(
        {
            "ddp": {name: p.grad for name, p in net.named_parameters()},
            "mean": mean,
            "kept": adaptation.measured.saved_bytes,
            "predicted": adaptation.plan.predicted_bytes,
        },
        Path(folder) / f"{rank}.pt",
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    start_processes(job, (sys.argv[1],), nprocs=2, start_method="fork")
