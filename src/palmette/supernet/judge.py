"""What networks of a supernet are worth: batch norms measured, then judged on data; here, or spread by Ray."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import fx

from palmette.supernet.resolution import RESOLUTION, Scaled
from palmette.supernet.space import Config, key_of
from palmette.supernet.supernet import Supernet, recalibrated
from palmette.train.evaluate import Evaluation, Metric, evaluate
from palmette.train.labels import LossFn
from palmette.trials import Journal, run_trials


class Judge:
    """`judge(configs)` -> the accuracy of each on `val_loader`, its batch norms measured on batches of `train_loader`.

    batches: how many of these. folder: finished judgements lie there, and are not made again. ray: None for this
    process, "local" for workers on this machine, "auto" or the address of a cluster. What a network is worth depends on
    neither. label: what progress calls the networks.
    """

    def __init__(
        self,
        net: Supernet,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        *,
        batches: int = 10,
        metric: Metric | None = None,
        loss_fn: LossFn | None = None,
        folder: str | Path | None = None,
        ray: str | None = None,
        seed: int = 0,
        label: str = "networks",
    ) -> None:
        self.net, self.train, self.val, self.batches, self.seed = net, train_loader, val_loader, batches, seed
        self.scores: dict[str, Any] = {"metric": metric, "loss_fn": loss_fn}
        self.ray, self.label = ray, label
        if folder is None:
            self._own = tempfile.TemporaryDirectory(prefix="palmette-")  # removed with the judge
            folder = self._own.name
        self.folder = Path(folder)

    def __call__(self, configs: Sequence[Config]) -> list[float]:
        """Raises what `run_trials` and `evaluate` raise."""
        return [found.accuracy for found in self.evaluations(configs, self.val, "val")]

    def evaluations(self, configs: Sequence[Config], loader: Iterable[Any], split: str) -> list[Evaluation]:
        """Each configuration judged on `loader`; `split` names it among the finished judgements."""
        trial = partial(
            _judged if self.ray else partial(_extracted, net=self.net),
            train=self.train,
            loader=loader,
            batches=self.batches,
            seed=self.seed,
            **self.scores,
        )
        there = self.folder / split
        items = {_name(config): self._item(config, Journal(there)) for config in configs}
        found = run_trials(trial, items, journal=there, ray=self.ray, seed=self.seed, label=self.label)
        return [Evaluation.unpack(found[_name(config)]) for config in configs]

    def network(self, config: Config) -> fx.GraphModule:
        """The plain network of a configuration, its batch norms measured as they were when it was judged."""
        self.net.recalibrate(config, self.train, self.batches, seed=self.seed)
        return self.net.extract(config).eval()

    def _item(self, config: Config, done: Journal) -> Any:
        """What a trial is given: for a worker elsewhere the network comes along, unless it is judged already."""
        away = self.ray is not None and not done.file(_name(config)).exists()
        return (config, self.net.extract(config)) if away else config


def _name(config: Config) -> str:
    return hashlib.sha256(key_of(config).encode()).hexdigest()[:16]


def _extracted(config: Config, *, net: Supernet, **options: Any) -> dict[str, Any]:
    return _judged((config, net.extract(config)), **options)


def _judged(
    item: tuple[Config, fx.GraphModule],
    *,
    train: Iterable[Any],
    loader: Iterable[Any],
    batches: int,
    seed: int,
    metric: Metric | None,
    loss_fn: LossFn | None,
) -> dict[str, Any]:
    """The evaluation of one network as JSON, on images of its size."""
    config, network = item
    edge = config.get(RESOLUTION)
    if edge is not None:
        train, loader = Scaled(train, edge), Scaled(loader, edge)
    recalibrated(network, train, batches, seed)
    return evaluate(network, loader, metric=metric, loss_fn=loss_fn).pack()
