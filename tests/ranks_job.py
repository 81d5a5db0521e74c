"""Two processes that share their work: `ranks_job.py FOLDER`; each writes what it found to FOLDER/<rank>.json."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from palmette import ranks
from palmette.errors import DataError, PalmetteError, RefusedEdit, RunError
from palmette.files import atomic_path, write_json
from palmette.run import Run


class Table:
    """A count per name, and a sum."""

    def __init__(self, counts: dict[str, list[int]], total: float) -> None:
        self.counts, self.total = counts, total

    def totals(self):
        sums = {f"count {name}": torch.tensor(values) for name, values in self.counts.items()}
        return {**sums, "total": torch.tensor(self.total, dtype=torch.float64)}

    def take(self, totals):
        self.counts = {name[6:]: t.tolist() for name, t in totals.items() if name.startswith("count ")}
        self.total = float(totals["total"])


class Wrong(Table):
    """Totals of a type that cannot be added up exactly."""

    def totals(self):
        return {"total": torch.tensor(1.0)}


def raised(work) -> list[Any]:
    """What kind of error `work` ends with, its words, and whether every process was told."""
    try:
        work()
    except PalmetteError as error:
        return [type(error).__name__, str(error), error.told]
    except Exception as error:  # noqa: BLE001 - of whatever kind
        return [type(error).__name__, str(error), None]
    return ["none", "", None]


def fails(error: Exception, at: int | None = None) -> None:
    if at is None or dist.get_rank() == at:
        raise error


def jointly(error: Exception, at: int) -> None:
    with ranks.joint():
        fails(error, at)


def shares() -> dict[str, Any]:
    """Who does what, and what comes out."""
    rank = ranks.rank()
    several = Table({"a": [2**60 + rank, 1], "only here": [rank]} if rank else {"a": [5, 1]}, 0.1 * (rank + 1))
    empty = Table({}, 0.0)
    ranks.add_up([several, empty])
    with ranks.alone():
        by_myself = [ranks.count(), ranks.rank(), list(ranks.shard("abc")), ranks.gathered(rank)]
        with ranks.together():
            by_myself.append(ranks.count())
    return {
        "count": ranks.count(),
        "rank": rank,
        "leads": ranks.leads(),
        "is_first": ranks.is_first(),
        "shard": list(ranks.shard("abcde")),
        "gathered": ranks.gathered({"rank": rank, "text": "ä" * (rank + 1)}),
        "from_first": ranks.from_first(lambda: [os.getpid(), dist.get_rank(), ranks.count(), float("inf"), 0.1 + 0.2]),
        "counts": several.counts,
        "total": several.total,
        "empty": [empty.counts, empty.total],
        "alone": by_myself,
    }


def errors() -> dict[str, Any]:
    """Errors in one process, and what every process makes of them."""
    return {
        "first": raised(lambda: ranks.from_first(lambda: fails(RefusedEdit("no", where="a", why="b", fix="c")))),
        "foreign": raised(lambda: ranks.from_first(lambda: fails(ValueError("odd")))),
        "joint": raised(lambda: jointly(DataError("bad batch"), 1)),
        "joint, all": raised(lambda: jointly(DataError("bad batch"), dist.get_rank())),
        "types": raised(lambda: ranks.add_up([Wrong({}, 0.0)])),
        "unrelated": raised(lambda: through(RuntimeError("shapes do not match"))),
    }


def through(error: Exception) -> None:
    with ranks.reached():
        raise error


def files(folder: Path) -> dict[str, Any]:
    """A run folder that both open, and files that both write."""
    rank, names = ranks.rank(), []
    run = Run(folder / "run", config={"network": "same"}, seed=3)
    value = run.once("both", lambda: [rank, ranks.gathered(rank), torch.rand(()).item()])
    timed = run.once("one", lambda: names.append(rank) or dist.get_rank(), alone=True)
    again = run.once("both", lambda: fails(RunError("computed twice")))
    write_json(run.path("own.json"), rank)
    with atomic_path(run.path("text")) as temporary:
        temporary.write_text(str(rank))
    ranks.wait()
    run.close()
    return {
        "value": value,
        "again": again,
        "timed": timed,
        "who timed": names,
        "environment": run.environment["seed"],
        "other": raised(lambda: Run(folder / "other", config={"network": rank})),
        "used": raised(lambda: Run(folder / "run", config={"network": "same"}, seed=3)),
    }


def job(rank: int, folder: Path) -> None:
    """Everything, in one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    outside = [ranks.count(), ranks.leads(), ranks.from_first(lambda: rank), ranks.gathered(rank)]
    with ranks.together():
        found = {"outside": outside, **shares(), **errors(), **files(folder)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if rank == 0:
        with ranks.together():
            (folder / "gone.json").write_text(json.dumps(raised(ranks.wait)))
    os._exit(0)  # the second process leaves, and the first finds out


if __name__ == "__main__":
    mp.start_processes(job, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
