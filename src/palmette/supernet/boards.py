"""A whole run of `specialize`: a network becomes a supernet, is trained once, and gives every board its own network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from torch import nn

from palmette.deploy import export_all
from palmette.device import DeviceProfile, parse_latency
from palmette.errors import InputError
from palmette.files import read_json, write_json
from palmette.graph.inputs import inputs_of
from palmette.report.render import render
from palmette.run import Run
from palmette.supernet.latency import LatencyTable
from palmette.supernet.memory import MemoryModel, Mode
from palmette.supernet.sampling import check_feasible
from palmette.supernet.space import Kind
from palmette.supernet.specialize import Searcher, Specialized, specialize
from palmette.supernet.supernet import Supernet, check_elastic
from palmette.supernet.training import train_supernet
from palmette.train.config import HealConfig

Say = Callable[[str], None]

_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the supernet is made (`elastic`: options of `Supernet.from_model`), trained and searched.

    mode, batch: what the RAM of a board bounds, as for `specialize`.
    """

    heal: HealConfig = field(default_factory=HealConfig)
    strategy: str = "sandwich"
    sub_nets: int = 2
    elastic: Mapping[str, Any] = field(default_factory=dict)
    searcher: Searcher = "exact"
    measurements: int = 40
    rounds: int = 3
    batches: int = 10
    control: bool = True
    mode: Mode = "infer"
    batch: int = 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "heal": self.heal.recipe(), "elastic": dict(self.elastic)}


@dataclass(frozen=True, kw_only=True)
class BoardsResult:
    """What `run_boards` did; `report`: the page, None for a dry run."""

    net: Supernet
    boards: list[Specialized]
    folder: Path | None = None
    report: Path | None = None


def parse_board(text: str) -> DeviceProfile:
    """A board from a text such as "nano:ram=256KiB,flash=1MiB,dtype=int8,weights_in=flash".

    The names are the fields of DeviceProfile. Raises InputError for anything else.
    """
    name, colon, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",")] if rest else []
    if not re.fullmatch(_NAME, name) or not colon or not all(equals and value for _, equals, value in pairs):
        raise InputError(f"{text!r} is no board", fix='Write "NAME:ram=256KiB,flash=1MiB,dtype=int8,weights_in=flash".')
    fields = set(DeviceProfile.__dataclass_fields__) - {"name"}
    given: dict[str, Any] = {}
    for key, _, value in pairs:
        key = key.strip().replace("-", "_")
        if key not in fields:
            raise InputError(f"A board has no {key!r}", where=text, fix=f"It has {', '.join(sorted(fields))}.")
        if key in given:
            raise InputError(f"A board has two of {key!r}", where=text, fix="Say it once.")
        given[key] = parse_latency(value) if key == "latency_ms" else _FLAGS.get(value.strip().lower(), value.strip())
    board = DeviceProfile(name=name, **given)
    _ = board.element_bytes  # refuses a type that is not known before anything is trained
    return board


def parse_tables(texts: Sequence[str], boards: Sequence[DeviceProfile]) -> dict[str, LatencyTable]:
    """Tables of latencies by board, from texts "BOARD=FILE", or "FILE" for every board that bounds its latency.

    Raises InputError for a board that is not there, and what `LatencyTable.load` raises.
    """
    found: dict[str, LatencyTable] = {}
    known = [board.name for board in boards]
    for text in texts:
        name, equals, file = text.partition("=")
        if equals and name not in known:
            raise InputError(f"There is no board {name!r}", where=text, fix=f"Name one of {', '.join(known)}.")
        table = LatencyTable.load(file if equals else text)
        found |= dict.fromkeys([name] if equals else [b.name for b in boards if b.latency_ms is not None], table)
    return found


def run_boards(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    *,
    boards: Sequence[DeviceProfile],
    latency: Mapping[str, LatencyTable] | None = None,
    recipe: Recipe | None = None,
    example_inputs: Any = None,
    run_dir: str | Path = "runs/specialize",
    resume: bool = False,
    dry_run: bool = False,
    ray: str | None = None,
    storage: str | Path | None = None,
    seed: int = 0,
    names: Mapping[str, str] | None = None,
    say: Say | None = None,
) -> BoardsResult:
    """Make a supernet of `model`, train it once, and find the best network for each board; `model` stays untouched.

    The run folder gets the supernet's weights, for each board a folder with its network and exports, and a report.
    latency: by the name of a board its table of latencies, for those that bound it. ray, storage: as for `specialize`.
    dry_run: say what is elastic and whether each board can be met; nothing is trained or written. names: what
    figures.json calls command, model and data.

    Raises BudgetError before anything is trained if a board cannot be met, InputError for two boards of one name, and
    what `train_supernet` and `specialize` raise.
    """
    recipe, say = recipe or Recipe(), say or (lambda _: None)
    names_of = [board.name for board in boards]
    if len(set(names_of)) < len(boards) or not boards or not all(re.fullmatch(_NAME, name) for name in names_of):
        raise InputError(
            f"Boards cannot be called {names_of}",
            why="each has a folder of its name",
            fix="Name each once, in letters, digits, points, - and _, and give one at least.",
        )
    example = inputs_of(next(iter(train_loader))) if example_inputs is None else example_inputs
    net = Supernet.from_model(model, example, **recipe.elastic)
    say(describe(net))
    check_elastic(net)
    tables = dict(latency or {})
    for board in boards:
        memory = MemoryModel(net, board, latency=tables.get(board.name), mode=recipe.mode, batch=recipe.batch)
        check_feasible(memory)
        say(reach(memory))
    if dry_run:
        return BoardsResult(net=net, boards=[])
    run = Run(run_dir, resume=resume, command=(names or {}).get("command", ""), config=recipe.to_dict(), seed=seed)
    history = train_supernet(
        net,
        train_loader,
        recipe.heal,
        strategy=recipe.strategy,
        sub_nets=recipe.sub_nets,
        seed=seed,
        checkpoint=run.path("supernet.safetensors"),
    )
    made = []
    for board in boards:
        folder = run.path(f"boards/{board.name}/figures.json").parent
        found = specialize(
            net,
            train_loader,
            val_loader,
            test_loader,
            profile=board,
            latency=tables.get(board.name),
            source=model,
            searcher=recipe.searcher,
            measurements=recipe.measurements,
            rounds=recipe.rounds,
            batches=recipe.batches,
            control=recipe.control,
            mode=recipe.mode,
            batch=recipe.batch,
            ray=ray,
            storage=storage,
            run_dir=folder,
            resume=True,
            seed=seed,
            say=say,
        )
        sized = net.scaled(example, found.config)
        run.once(f"export-{board.name}", partial(export_all, found.model, sized, folder, batches=[sized]), alone=True)
        made.append(found)
    write_json(run.path("figures.json"), _figures(run, net, recipe, made, history, names))
    return BoardsResult(net=net, boards=made, folder=run.folder, report=render(run.folder))


def describe(net: Supernet) -> str:
    """What is elastic in a supernet, in one line."""
    kinds = {kind: len(net.space.of_kind(kind)) for kind in get_args(Kind)}
    found = ", ".join(f"{count} of {kind}" for kind, count in kinds.items() if count)
    static = f"{len(net.static)} layers stay as they are"
    return f"Supernet: {net.space.size():.3g} networks; choices: {found or 'none'}; {static}"


def reach(memory: MemoryModel) -> str:
    """What the smallest and the largest network need of a board, in one line."""
    codes = memory.codes.encode([memory.net.min(), memory.net.max()])
    ram, params = memory.ram_bytes(codes), memory.param_bytes(codes)
    fits = "the largest fits" if memory.fits(codes)[1] else "the largest does not fit"
    step = f" to train at batch {memory.batch}" if memory.mode == "train" else ""
    return (
        f"{memory.profile.name}: RAM{step} {ram[0]:,} to {ram[1]:,} bytes, parameters {params[0]:,} to {params[1]:,} "
        f"bytes from the smallest to the largest; {fits}"
    )


def _earlier(run: Run, names: set[str]) -> dict[str, Any]:
    """Boards and exports of an earlier call on this run, but for those of these names."""
    file = run.path("figures.json")
    if not file.exists():
        return {}
    figures = read_json(file)
    boards = [board for board in figures["boards"] if board["profile"]["name"] not in names]
    kept = {board["profile"]["name"] for board in boards}
    return {"boards": boards, "exports": {name: e for name, e in figures["exports"].items() if name in kept}}


def _figures(
    run: Run,
    net: Supernet,
    recipe: Recipe,
    made: Sequence[Specialized],
    history: list[dict[str, Any]],
    names: Mapping[str, str] | None,
) -> dict[str, Any]:
    earlier = _earlier(run, {found.profile.name for found in made})
    return {
        "kind": "specialize",
        "command": "",
        "model": "the network",
        "data": "",
        **(names or {}),
        "environment": run.environment,
        "recipe": recipe.to_dict(),
        "supernet": {
            "networks": float(net.space.size()),
            "choices": [{"name": c.name, "kind": c.kind, "values": list(c.values)} for c in net.space.choices],
            "static": net.static,
        },
        "history": history,
        "boards": [*earlier.get("boards", []), *(found.to_dict() for found in made)],
        "exports": earlier.get("exports", {})
        | {found.profile.name: run.once(f"export-{found.profile.name}", dict) for found in made},
    }
