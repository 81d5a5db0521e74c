"""What one `shrink` knows from beginning to end: dense network, data, method, settings and run folder."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lightning_fabric import Fabric
from torch import fx, nn

import palmette.ranks as ranks
from palmette.errors import DataError, InputError
from palmette.graph import Candidate, Edit, Site, candidates, edits_of, find_sites
from palmette.graph.candidates import EDITS, is_protected
from palmette.graph.inputs import Example, split_batch, with_batch
from palmette.graph.io import structure_hash
from palmette.meter.table import CostTable
from palmette.registry import Bounds, Method, MethodConfig
from palmette.run import Run
from palmette.seeding import derive_seed, preserved, seed_globals, seed_loader
from palmette.train.batches import check_iterable
from palmette.train.evaluate import Evaluation, evaluate
from palmette.train.loop import HealConfig

Pad = Literal["repad", "exact", "bias_map"]


@dataclass(frozen=True, kw_only=True)
class Settings(MethodConfig):
    """How far and how a network is shrunk. `max_drop` is in percentage points of validation accuracy."""

    max_drop: Annotated[float, Bounds(low=0, high=100)] = 0.5
    target_latency: str | None = None
    rounds: Annotated[int | None, Bounds(low=0)] = None
    step: Annotated[int, Bounds(low=1)] = 1
    patience: Annotated[int, Bounds(low=1)] = 2
    pad: Pad = "repad"
    calibration_batches: Annotated[int | None, Bounds(low=1)] = 32
    threads: Annotated[int, Bounds(low=1)] = 1
    controls: bool = True
    one_shot: bool = False
    reproduce: bool = False
    seed: Annotated[int, Bounds(low=0)] = 0


class Calibration:
    """The first batches of a loader, the same ones each time: it is seeded anew for every pass."""

    def __init__(self, loader: Iterable[Any], limit: int | None, seed: int) -> None:
        self.loader, self.limit, self.seed = loader, limit, seed

    def __iter__(self) -> Iterator[Any]:
        with preserved(self.loader):
            seed = derive_seed(self.seed, "calibration")
            seed_globals(seed)
            seed_loader(self.loader, seed)
            yield from itertools.islice(iter(self.loader), self.limit)

    def __len__(self) -> int:
        size = len(self.loader)  # type: ignore[arg-type]
        return size if self.limit is None else min(size, self.limit)


@dataclass(frozen=True, kw_only=True)
class Session:
    """The fixed surroundings of a run; `dense` is the captured network, never changed.

    `keep`: whether the run folder stays, so that files for the user are worth writing.
    """

    model: nn.Module
    dense: fx.GraphModule
    example: Example
    train: Iterable[Any]
    val: Iterable[Any]
    test: Iterable[Any] | None
    calibration: Calibration
    method: Method
    config: MethodConfig
    settings: Settings
    heal: HealConfig
    table: CostTable
    run: Run
    keep: bool = True
    protect: tuple[str, ...] = ()
    loss_fn: Callable[..., Any] | None = None
    metric: Callable[..., Any] | None = None
    names: dict[str, str] = field(default_factory=dict)
    ray: str | None = None
    fabric: Fabric | None = None

    @property
    def trainer(self) -> Fabric | None:
        """The Fabric that trains; None for our own, also where one of several processes works for itself."""
        several = self.fabric is not None and self.fabric.world_size > 1
        return None if several and ranks.count() == 1 else self.fabric

    def described(self) -> dict[str, Any]:
        """What figures.json says of the run as a whole."""
        return {
            "schema": 1,
            "command": self.names.get("command", ""),
            "method": self.method.name,
            "search": self.method.search is not None,
            "seed": self.settings.seed,
            "environment": self.run.environment,
            "model": self.names.get("model", type(self.model).__name__),
            "data": self.names.get("data", "given loaders"),
            "max_drop": self.settings.max_drop,
        }

    @property
    def single(self) -> Example:
        """The example inputs at batch 1, for costs and latencies."""
        example: Example = with_batch(self.example, 1)
        return example

    def pool(self, network: fx.GraphModule) -> list[Candidate]:
        """What may be removed next: the candidates predicted to pay; under `reproduce` every one that is left."""
        kind, paper = self.method.kind(self.config), self.settings.reproduce
        if paper and kind == "activation":
            return [_alone(site) for site in find_sites(network, self.example) if self._open(site, kind)]
        found = candidates(
            network,
            self.example,
            kind=kind,
            edit=self.method.edit if self.method.edit in EDITS[kind] else "",
            cost=self.table,
            pad=self.settings.pad,
            protect=self.protect,
            longest=getattr(self.config, "longest", 1),
        )
        return [c for c in found if c.pays or (paper and all(self._open(site, kind) for site in c.sites))]

    def _open(self, site: Site, kind: str) -> bool:
        possible = site.removable or kind == "activation"  # a linearisation can be forced, a drop cannot
        return site.kind == kind and possible and not is_protected(site.path, self.protect)

    def edits(self, candidate: Candidate) -> list[Edit]:
        """The method's edit for every site of a candidate: its own, else the one that the candidate was made for."""
        if self.method.edits is not None:
            return list(self.method.edits(candidate, self.config))
        paper = self.settings.reproduce
        return edits_of(candidate, "identity" if paper else getattr(self.config, "fit", "affine"), force=paper)

    @property
    def heals(self) -> bool:
        """Whether the method heals after a removal under its config."""
        return self.method.heals is None or bool(self.method.heals(self.config))

    @property
    def teacher(self) -> fx.GraphModule | None:
        """The dense network where healing distils from it."""
        return self.dense if self.heal.distill > 0 or self.heal.features > 0 else None

    def clock(self, network: fx.GraphModule) -> float | None:
        """Milliseconds of one forward pass at batch 1 by the cost table; None where it counts MACs.

        A network is timed in turn with the dense one, and its ratio counts: what else the machine does meanwhile, and
        its changing frequency, would move a time that is taken alone by more than a removal does.
        """
        if self.table.runtime == "macs":
            return None
        dense = _form(self.dense)
        dense_ms = self.table.time(f"network {dense}", self.dense, self.single)
        if network is self.dense:
            return dense_ms
        key = f"network {_form(network)} against {dense}"
        before, after = self.table.compare(key, self.dense, network, self.single)
        return dense_ms * after / before

    def evaluate(self, network: nn.Module, loader: Iterable[Any]) -> Evaluation:
        """Accuracy of a network on a loader, in eval mode."""
        return evaluate(network, loader, loss_fn=self.loss_fn, metric=self.metric)


def _form(network: fx.GraphModule) -> str:
    """What a latency depends on, short: operations in their order, modules, shapes and dtypes; no weights."""
    lines = [network.code, *(f"{path} {module!r}" for path, module in network.named_modules() if path)]
    return hashlib.sha256("\n".join([*lines, structure_hash(network)]).encode()).hexdigest()[:16]


def _alone(site: Site) -> Candidate:
    return Candidate(
        name=site.path,
        sites=(site,),
        macs_saved=site.macs_saved,
        ms_saved=site.ms_saved,
        pays=False,
        reason=site.reason,
    )


def check_given(model: Any, **loaders: Any) -> None:
    """Refuse a model that is no module, and loaders (None: not given) that cannot be passed over again and again.

    Raises InputError or DataError.
    """
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise InputError(f"model is {kind}, not a network", fix="Pass the trained nn.Module itself")
    for name, loader in loaders.items():
        try:
            if loader is not None or name in ("train", "val"):
                check_iterable(loader)
        except DataError as error:
            raise DataError(error.what, where=f"{name}_loader", why=error.why, fix=error.fix) from error


def first_inputs(loader: Iterable[Any], what: str) -> Any:
    """Inputs of the first batch of a loader; raises DataError when it is empty or yields something else."""
    for batch in loader:
        inputs, _ = split_batch(batch)
        return inputs
    raise DataError(f"the {what} loader is empty", fix="Give a loader that yields at least one batch")


def example_from(loader: Iterable[Any]) -> Example:
    """Example inputs of batch 2, from the first batch of a loader."""
    example: Example = with_batch(first_inputs(loader, "validation"), 2)
    return example


def check_protected(protect: Iterable[str], network: fx.GraphModule, example: Example) -> tuple[str, ...]:
    """The protected paths; raises InputError for one that names no site, and none below it."""
    names = tuple(protect)
    if names:
        known = {site.path for site in find_sites(network, example)}
        for name in names:
            if not any(is_protected(path, (name,)) for path in known):
                raise InputError(f"there is no site {name!r} to protect", fix="`palmette sites` lists them")
    return names
