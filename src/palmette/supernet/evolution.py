"""NSGA-II over a supernet, by Optuna: for values that do not add up, several goals, several processes in one study.

What Optuna proposes is a genotype. Its network is the nearest one that keeps the bounds: choices are taken over one
after the other, each as far as the rest can still be completed, so that nothing that does not fit is ever measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from palmette import compat
from palmette.errors import InputError, RunError
from palmette.graph.io import weights_hash
from palmette.seeding import derive_seed
from palmette.supernet.codes import Ints
from palmette.supernet.memory import MemoryModel
from palmette.supernet.sampling import sample_balanced, sample_within, start_of
from palmette.supernet.search import Found, Measure, asked, found_of
from palmette.supernet.space import Config, key_of
from palmette.train.progress import progress

Goal = Literal["ram", "flash", "latency"]
GOALS: tuple[Goal, ...] = ("ram", "flash", "latency")
"""What can be made small beside a large value."""

_CONFIG = "palmette:config"
_ABOUT = "palmette:about"
_DRAWN = 20
"""Networks that are drawn for each new one that is missing, before a space counts as known."""


def evolve(
    memory: MemoryModel,
    measure: Measure,
    *,
    trials: int = 100,
    population: int = 20,
    goals: Sequence[Goal] = ("ram",),
    storage: str | Path | None = None,
    study: str = "palmette",
    seed: int = 0,
) -> list[Found]:
    """Measure up to `trials` different networks that keep the bounds, for a large value and small `goals`; all of them.

    measure: is asked for a generation at once, each network once. population: networks of a generation. storage: where
    the study lives: a URL of a database ("sqlite:///study.db"), or a file for a journal; processes and machines that
    name the same one work together, and a stopped study goes on; what two of them measure at one time may be the same,
    and there may be up to a population more. None: in this process alone. Source: NSGA-II (Deb et al. 2002), after
    LINAS (DyNAS-T, 2022).

    Raises BudgetError if nothing fits, InputError for options out of bounds, or a study of another supernet or device,
    MissingDependency without Optuna, RunError for a storage that cannot be used.
    """
    wrong = not goals or set(goals) - set(GOALS) or len(set(goals)) < len(goals)
    if trials < 1 or population < 2 or wrong or ("latency" in goals and memory.latency is None):
        raise InputError(
            f"trials = {trials}, population = {population}, goals = {tuple(goals)} are out of bounds",
            fix=f"Give 1 or more, 2 or more, and goals among {', '.join(GOALS)}, each once, latency with a table.",
        )
    start = start_of(memory)
    optuna = compat.optional("optuna", package="palmette[evolution]")
    with _quiet(optuna), progress("generations of networks", trials) as report:
        shared = _study(optuna, memory, storage, study, goals, population, seed)
        if not shared.trials:
            for code in sample_balanced(memory, population, np.random.default_rng(seed)):
                shared.enqueue_trial(_parameters(memory, code), skip_if_exists=True)
        ends = {c.name: optuna.distributions.IntDistribution(0, len(c.values) - 1) for c in memory.codes.choices}
        for _ in range(trials):  # a generation brings one new network at least, or the study is at its end
            known = _measured(shared)
            report(min(trials, len(known)), "")
            if len(known) >= trials:
                break
            if not _generation(
                memory, measure, shared, ends, start, known, min(population, trials - len(known)), goals
            ):
                break
        return [found_of(memory, config, value) for config, value in list(_measured(shared).values())[:trials]]


def front(found: Sequence[Found], goals: Sequence[Goal] = ("ram",)) -> list[Found]:
    """Those of which no other is at least as good in value and all goals, and better in one; the leanest first."""
    points = np.array([[-f.value, *_costs(f, goals)] for f in found])
    best = [
        f
        for f, point in zip(found, points, strict=True)
        if not ((points <= point).all(1) & (points < point).any(1)).any()
    ]
    return sorted({key_of(f.config): f for f in best}.values(), key=lambda f: _costs(f, goals))


def _generation(
    memory: MemoryModel,
    measure: Measure,
    study: Any,
    ends: dict[str, Any],
    start: Ints,
    known: dict[str, tuple[Config, float]],
    count: int,
    goals: Sequence[Goal],
) -> int:
    """Ask for networks until `count` are new, drawn ones if parents have no others; measure and tell. How many are new.

    None are once every network that fits is known.
    """
    proposed: list[tuple[Any, Config]] = []
    new: dict[str, Config] = {}
    drawn: Iterator[Ints] | None = None
    for attempt in range(5 * count + _DRAWN * count):
        if attempt >= 5 * count:
            if drawn is None:
                drawn = iter(sample_within(memory, _DRAWN * count, np.random.default_rng(derive_seed(0, len(known)))))
            study.enqueue_trial(_parameters(memory, next(drawn)))
        trial = study.ask(ends)
        wanted = np.array([trial.params[choice.name] for choice in memory.codes.choices])
        config = memory.net.space.canonical(memory.codes.decode(nearest_within(memory, wanted, start)))
        proposed.append((trial, config))
        if key_of(config) not in known:
            new.setdefault(key_of(config), config)
        if len(new) == count:
            break
    values = {key: value for key, (_, value) in known.items()}
    values |= dict(zip(new, asked(measure, list(new.values())), strict=True))
    for trial, config in proposed:
        found = found_of(memory, config, values[key_of(config)])
        trial.set_user_attr(_CONFIG, config)
        study.tell(trial, [found.value, *_costs(found, goals)])
    return len(new)


def _parameters(memory: MemoryModel, code: Ints) -> dict[str, int]:
    return {c.name: int(i) for c, i in zip(memory.codes.choices, code, strict=True)}


def nearest_within(memory: MemoryModel, wanted: Ints, start: Ints) -> Ints:
    """The code [choices] that a wanted one becomes: each choice in turn as far towards it as the rest can be completed.

    start: a code that keeps the bounds. The order of the choices follows from the wanted code: none is favoured.
    """
    code = start.copy()
    order = np.random.default_rng(derive_seed(0, *(int(i) for i in wanted))).permutation(len(code))
    for j in order:
        step = 1 if wanted[j] >= code[j] else -1
        values = np.arange(wanted[j], code[j] - step, -step)  # the wanted one first, the present one last
        tried = np.repeat(code[None], len(values), axis=0)
        tried[:, j] = values
        code[j] = values[int(memory.fits(tried).argmax())]
    return code


def _costs(found: Found, goals: Sequence[Goal]) -> list[float]:
    costs = {"ram": found.ram_bytes, "flash": found.param_bytes, "latency": found.latency_ms or 0.0}
    return [float(costs[goal]) for goal in goals]


def _measured(study: Any) -> dict[str, tuple[Config, float]]:
    """Every different network of a study with its value, in the order in which they were finished."""
    done = [t for t in study.trials if t.state.name == "COMPLETE" and _CONFIG in t.user_attrs]
    return {key_of(t.user_attrs[_CONFIG]): (t.user_attrs[_CONFIG], float(t.values[0])) for t in done}


def _study(
    optuna: Any,
    memory: MemoryModel,
    storage: str | Path | None,
    name: str,
    goals: Sequence[Goal],
    population: int,
    seed: int,
) -> Any:
    parts = memory.net.space.to_json(), weights_hash(memory.net.state_dict()), memory.profile, tuple(goals)
    about = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()
    try:
        kept: Any = None if storage is None else str(storage)
        if kept is not None and "://" not in kept:
            Path(kept).parent.mkdir(parents=True, exist_ok=True)
            journal = optuna.storages.journal
            kept = optuna.storages.JournalStorage(journal.JournalFileBackend(kept, journal.JournalFileOpenLock(kept)))
        study = optuna.create_study(
            storage=kept,
            study_name=name,
            load_if_exists=True,
            directions=["maximize", *["minimize"] * len(goals)],
        )
        known = study.user_attrs.get(_ABOUT, about)
        study.set_user_attr(_ABOUT, known)
    except Exception as error:
        raise RunError(
            "The storage of the study cannot be used",
            where=str(storage),
            why=str(error).splitlines()[0],
            fix='Give a file, or the URL of a database such as "sqlite:///study.db".',
        ) from error
    if known != about:
        raise InputError(
            f"The study {name!r} is about another supernet, other weights, another device or goal",
            where=str(storage),
            fix="Give it another name, or another storage.",
        )
    # Several processes, and a study that goes on, must not draw the same again.
    apart = () if storage is None else (platform.node(), os.getpid(), len(study.trials))
    own = derive_seed(seed, "evolution", *apart) % 2**32
    study.sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=own)
    return study


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Optuna says every trial otherwise."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
