"""A run over several devices and nodes: Lightning Fabric starts the processes, DDP trains, passes over data are shared.

Every process runs the same program on the same data. Fabric starts them by running the command or script again, once
per device, so what comes before is done by each of them; on several nodes the command is started once per node, with
MASTER_ADDR, MASTER_PORT and NODE_RANK set, or by torchrun or SLURM, which Fabric knows. The run folder must be one that
all nodes see.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

import palmette.ranks as ranks
from palmette.errors import DataError, InputError
from palmette.registry import Bounds, MethodConfig

_PATIENCE = timedelta(days=7)
"""How long a process waits for another one: while the first times and exports, or Ray works, there is no sign of life.
One that has ended is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class Spread(MethodConfig):
    """Where a run may work: `devices` per node and `nodes` for training and passes over data, `ray` for trials.

    ray: None, "local", "auto" or the address of a cluster; see `palmette.trials.run_trials`. fabric: one that is
    launched already, in place of devices and nodes.
    """

    devices: Annotated[int, Bounds(low=1)] = 1
    nodes: Annotated[int, Bounds(low=1)] = 1
    ray: str | None = None
    fabric: Fabric | None = None

    @contextmanager
    def entered(self, precision: str, train: Any) -> Iterator[Fabric | None]:
        """Launch what is asked for; inside, the processes work together. None where one process is enough.

        precision: that of the training, see HealConfig. train: the loader of the training, whose samples are dealt out
        to the processes. Raises InputError for devices that are not there, DataError for a loader that cannot be dealt
        out, RunError when another process ends before this one.
        """
        several = self.devices * self.nodes > 1 if self.fabric is None else self.fabric.world_size > 1
        if several:
            _check_loader(train)
        fabric = self.fabric
        if fabric is None and several:
            fabric = launched(self.devices, self.nodes, precision)
        with ranks.together():
            if ranks.count() == 1:
                yield fabric
                return
            with ranks.reached():
                yield fabric
                ranks.wait()


def launched(devices: int, nodes: int, precision: str) -> Fabric:
    """A Fabric with DDP over `devices` GPUs, or processes where there is none, on each of `nodes`, launched.

    Raises InputError when it cannot be had.
    """
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        mixed = "bf16-mixed" if accelerator == "cuda" and torch.cuda.is_bf16_supported() else "16-mixed"
        precision = mixed if accelerator == "cuda" else "32-true"
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it would announce each process
    try:
        fabric = Fabric(
            accelerator=accelerator,
            strategy=DDPStrategy(timeout=_PATIENCE),
            devices=devices,
            num_nodes=nodes,
            precision=precision,  # type: ignore[arg-type]
        )
        fabric.launch()
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise InputError(
            f"{devices} device{'s' * (devices > 1)} on {nodes} node{'s' * (nodes > 1)} cannot be started",
            where="--devices, --nodes",
            why=str(error),
            fix="Ask for what is there, and run a script or the command, not a notebook.",
        ) from error
    return fabric


def steps_per_epoch(loader: Any, fabric: Fabric | None) -> int:
    """Batches that one process draws in an epoch of training."""
    if fabric is not None and fabric.world_size > 1:
        loader = fabric.setup_dataloaders(loader, move_to_device=False)
    return len(loader)


def _check_loader(loader: Any) -> None:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise DataError(
            "The training data cannot be dealt out to several processes",
            where="train_loader",
            why=f"it is a {type(loader).__name__}, whose samples cannot be drawn by number",
            fix="Pass a DataLoader over a dataset with __getitem__ and __len__, or use one device.",
        )
