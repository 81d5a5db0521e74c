"""`specialize`: the best network of a supernet that provably fits a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import fx, nn

from palmette.device import DeviceProfile, format_bytes, parse_latency
from palmette.errors import InputError, VerifyError
from palmette.files import write_json
from palmette.graph.int8 import stored_bytes
from palmette.graph.io import save as save_network
from palmette.graph.io import weights_hash
from palmette.meter.memory import peak_bytes
from palmette.run import Run
from palmette.supernet.clock import Timed, in_time
from palmette.supernet.evolution import Goal, evolve
from palmette.supernet.judge import Judge
from palmette.supernet.latency import LatencyTable
from palmette.supernet.memory import MemoryModel, Mode
from palmette.supernet.resolution import RESOLUTION
from palmette.supernet.sampling import check_feasible
from palmette.supernet.search import Found, Search, drawn_within, found_of, search
from palmette.supernet.space import Config
from palmette.supernet.supernet import Supernet, check_elastic
from palmette.supernet.train_trace import measured_step
from palmette.train.evaluate import Evaluation, Metric
from palmette.train.labels import LossFn

Searcher = Literal["exact", "nsga2"]
SEARCHERS = ("exact", "nsga2")
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Specialized:
    """The network for one device.

    `model`: plain, with weights of its own; the best of all that were measured, drawn ones included. `found`: what the
    search says of it; `measured`: bytes of activations and parameters by the meter on `model`; `evaluation`: on test
    data if there were any, else on validation data. `random`: the best of as many networks drawn at random, on the same
    data; `dense`: the largest network on them, whether it fits or not. `steps`: path and bytes alive of each operation,
    `largest`: of the largest network. `latency`: of the answer, where the device bounds it. `mode`, `batch`: what was
    counted, an inference or a training step.
    """

    profile: DeviceProfile
    config: Config
    model: fx.GraphModule
    found: Found
    measured: dict[str, int]
    evaluation: Evaluation
    random: dict[str, Any]
    dense: Evaluation
    search: Search = field(repr=False)
    steps: list[tuple[str, int]] = field(repr=False)
    largest: list[tuple[str, int]] = field(repr=False)
    latency: Timed | None = None
    split: str = "val"
    mode: Mode = "infer"
    batch: int = 1
    folder: Path | None = None

    def __str__(self) -> str:
        low, high = (100 * v for v in self.evaluation.interval)
        what = f"{self.evaluation.n:,} {'validation' if self.split == 'val' else self.split} samples"
        tried, drawn = len(self.search.found), len(self.search.random)
        ram, params = self.found.ram_bytes, self.found.param_bytes
        value, chance = 100 * self.search.best.value, 100 * self.search.best_random.value
        step = f" to train at batch {self.batch}" if self.mode == "train" else ""
        lines = [
            f"{self.profile.name}: {_bounds(self.profile)}",
            f"accuracy: {100 * self.evaluation.accuracy:.2f} % [{low:.1f}, {high:.1f}], {what}",
            f"the largest network, whether it fits or not: {100 * self.dense.accuracy:.2f} % on the same data",
            f"RAM{step}: {ram:,} bytes ({format_bytes(ram)}); parameters: {params:,} bytes ({format_bytes(params)})",
            *([] if self.latency is None else [f"latency: {self.latency}"]),
            *([f"images: {self.config[RESOLUTION]} pixels"] if RESOLUTION in self.config else []),
            f"validation: search {value:.2f} %, {tried} networks; random {chance:.2f} %, {drawn}; the better was taken",
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "profile": {k: v for k, v in vars(self.profile).items() if v is not None},
            "config": self.config,
            "found": self.found.to_dict(),
            "measured": self.measured,
            "evaluation": self.evaluation.to_dict(),
            "split": self.split,
            "mode": self.mode,
            "batch": self.batch,
            "random": self.random,
            "dense": self.dense.to_dict(),
            "measurements": [f.to_dict() for f in self.search.found],
            "control": [f.to_dict() for f in self.search.random],
            "promise": self.search.promise(),
            "latency": None if self.latency is None else self.latency.to_dict(),
            "steps": [list(step) for step in self.steps],
            "largest": [list(step) for step in self.largest],
        }


def specialize(
    net: Supernet,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    *,
    profile: DeviceProfile,
    latency: LatencyTable | None = None,
    mode: Mode = "infer",
    batch: int = 1,
    source: nn.Module | None = None,
    searcher: Searcher = "exact",
    measurements: int = 40,
    rounds: int = 3,
    batches: int = 10,
    control: bool = True,
    ray: str | None = None,
    storage: str | Path | None = None,
    metric: Metric | None = None,
    loss_fn: LossFn | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    say: Say | None = None,
) -> Specialized:
    """The best network of a trained supernet within the bounds of `profile`; `net` keeps its weights.

    Each candidate has its batch norms measured on `batches` batches of `train_loader` and is judged on `val_loader`;
    test data are looked at once, for the answer and the control. measurements: networks that are judged. searcher:
    "exact" takes the largest that fit, draws others, learns, and solves for the best that is promised, in `rounds`;
    "nsga2" is evolution, for values that do not add up. control: judge as many drawn at random. latency: a table of the
    device, needed where the profile bounds the latency; on the table's machine the best are timed, and one that proves
    too slow gives way to the next. mode: "train" bounds the RAM of a training step at `batch`, as `MemoryModel`
    counts it, in place of that of an inference. ray: "local", "auto" or an address, to judge on several workers.
    storage: of the study of "nsga2", as `evolve` has it; processes that share it work together. run_dir: a folder for
    the network (model.safetensors, for `pm.load` with `source`, the model that the supernet was made from),
    figures.json and each measurement, so that an interrupted search goes on with `resume`.

    Raises BudgetError at once if nothing fits, with the smallest need and what binds; InputError for options out of
    bounds, or a bound on latency without a table; VerifyError if the answer needs more than was computed; RunError for
    a folder that cannot be used; MissingDependency without the packages of a searcher or Ray.
    """
    if measurements < 10 or rounds < 1 or batches < 1 or searcher not in SEARCHERS:
        raise InputError(
            f"measurements = {measurements}, rounds = {rounds}, batches = {batches} or searcher = {searcher!r} is out "
            "of bounds",
            fix=f"Give at least 10, 1 and 1, and one of {', '.join(SEARCHERS)}.",
        )
    check_elastic(net)
    memory = MemoryModel(net, profile, latency=latency, mode=mode, batch=batch)
    check_feasible(memory)
    options = {"profile": str(profile), "measurements": measurements, "rounds": rounds, "batches": batches}
    options |= {} if latency is None else {"latency": str(latency.device), "base_ms": latency.base_ms}
    options |= {"searcher": searcher, "network": weights_hash(net.state_dict()), "space": net.space.to_json()}
    options |= {"metric": _name(metric), "loss": _name(loss_fn)}
    options |= {} if mode == "infer" else {"mode": mode, "batch": batch}
    run = None if run_dir is None else Run(run_dir, resume=resume, config=options, seed=seed)
    say = say or (lambda _: None)
    scores: dict[str, Any] = {"metric": metric, "loss_fn": loss_fn}
    folder = None if run is None else run.path("judged")
    label = f"networks for {profile.name}"
    judge = Judge(
        net, train_loader, val_loader, batches=batches, folder=folder, ray=ray, seed=seed, label=label, **scores
    )
    if searcher == "exact":
        result = search(memory, judge, measurements=measurements, rounds=rounds, control=control, seed=seed)
    else:
        result = _evolved(memory, judge, measurements, storage, control, seed)
    best, chance, clock = result.taken, result.best_random, None
    seen = len(result.ranked())
    say(f"{profile.name}: {seen} networks measured, the best has {100 * best.value:.2f} % on validation")
    if latency is not None and profile.latency_ms is not None:
        best, clock = in_time(net, latency, parse_latency(profile.latency_ms), result.ranked(), say)
    split, loader = ("val", val_loader) if test_loader is None else ("test", test_loader)
    answers = judge.evaluations([best.config, chance.config, net.max()], loader, split)
    model = judge.network(best.config)
    made = Specialized(
        profile=profile,
        config=best.config,
        model=model,
        found=best,
        measured=_verified(memory, best, model),
        evaluation=answers[0],
        random={"config": chance.config, "evaluation": answers[1].to_dict(), "measured": len(result.random)},
        dense=answers[2],
        search=result,
        steps=memory.per_step(best.config),
        largest=memory.per_step(net.max()),
        latency=clock,
        split=split,
        mode=mode,
        batch=batch,
        folder=None if run is None else run.folder,
    )
    if run is not None:
        save_network(model, run.path("model.safetensors"), source=source)
        write_json(run.path("figures.json"), made.to_dict())
        run.close()
    return made


def _name(function: Any) -> str:
    return "" if function is None else str(getattr(function, "__qualname__", type(function).__qualname__))


def _evolved(
    memory: MemoryModel, judge: Judge, measurements: int, storage: str | Path | None, control: bool, seed: int
) -> Search:
    """As `search`, by NSGA-II."""
    goals: tuple[Goal, ...] = ("ram",) if memory.latency is None else ("ram", "latency")
    population, study = max(5, measurements // 4), memory.profile.name
    found = evolve(
        memory, judge, trials=measurements, population=population, goals=goals, storage=storage, study=study, seed=seed
    )
    drawn = drawn_within(memory, measurements if control else population, seed)
    return Search(found, [found_of(memory, c, v) for c, v in zip(drawn, judge(drawn), strict=True)])


def _verified(memory: MemoryModel, found: Found, model: fx.GraphModule) -> dict[str, int]:
    """Bytes of the extracted network by the meter, held against what was computed and the bounds."""
    training = memory.mode == "train"
    activations = measured_step(model, memory.batch) if training else peak_bytes(model, 1, hold_inputs=False)
    parameters = stored_bytes(model)
    plain = MemoryModel(memory.net, DeviceProfile(), mode=memory.mode, batch=memory.batch)
    code = plain.codes.encode([found.config])
    said = int(plain.peak_bytes(code)[0]), int(plain.param_bytes(code)[0])
    if activations > said[0] or parameters > said[1]:
        raise VerifyError(
            f"The network needs {activations:,} and {parameters:,} bytes, computed were {said[0]:,} and {said[1]:,}",
            where=f"{'a training step' if training else 'activations'} in float32, parameters as they are stored",
            fix="Report this model: a bound does not hold for it.",
        )
    if not memory.fits(memory.codes.encode([found.config]))[0]:
        raise VerifyError("The network breaks a bound of the device", where=memory.profile.name)
    return {"float32_peak_bytes": activations, "param_bytes": parameters}


def _bounds(profile: DeviceProfile) -> str:
    parts = [
        f"{format_bytes(bytes_)} of {name}"
        for name, bytes_ in (("RAM", profile.ram_bytes), ("flash", profile.flash_bytes))
        if bytes_ is not None
    ]
    if profile.latency_ms is not None:
        parts.append(f"{parse_latency(profile.latency_ms):.4g} ms")
    return f"{' and '.join(parts) or 'no bounds'}, {profile.dtype}, weights in {profile.weights_in}"
