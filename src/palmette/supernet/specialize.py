"""`specialize`: the best network of a supernet that provably fits a device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx, nn

from palmette.device import DeviceProfile, format_bytes
from palmette.errors import InputError, VerifyError
from palmette.files import write_json
from palmette.graph.int8 import stored_bytes
from palmette.graph.io import save as save_network
from palmette.meter.memory import peak_bytes
from palmette.run import Run
from palmette.seeding import seeded
from palmette.supernet.memory import MemoryModel
from palmette.supernet.sampling import check_feasible
from palmette.supernet.search import Found, Search, search
from palmette.supernet.space import Config, key_of
from palmette.supernet.supernet import Supernet
from palmette.train.evaluate import Evaluation, Metric, evaluate
from palmette.train.labels import LossFn
from palmette.train.progress import progress

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Specialized:
    """The network for one device.

    `model`: plain, with weights of its own; the best of all that were measured, drawn ones included. `found`: what the
    search says of it; `measured`: bytes of activations and parameters by the meter on `model`; `evaluation`: on test
    data if there were any, else on validation data. `random`: the best of as many networks drawn at random, on the same
    data. `steps`: path and bytes alive of each operation.
    """

    profile: DeviceProfile
    config: Config
    model: fx.GraphModule
    found: Found
    measured: dict[str, int]
    evaluation: Evaluation
    random: dict[str, Any]
    search: Search = field(repr=False)
    steps: list[tuple[str, int]] = field(repr=False)
    split: str = "val"
    folder: Path | None = None

    def __str__(self) -> str:
        low, high = (100 * v for v in self.evaluation.interval)
        what = f"{self.evaluation.n:,} {'validation' if self.split == 'val' else self.split} samples"
        tried, drawn = len(self.search.found), len(self.search.random)
        ram, params = self.found.ram_bytes, self.found.param_bytes
        value, chance = 100 * self.search.best.value, 100 * self.search.best_random.value
        lines = [
            f"{self.profile.name}: {_bounds(self.profile)}",
            f"accuracy: {100 * self.evaluation.accuracy:.2f} % [{low:.1f}, {high:.1f}], {what}",
            f"RAM: {ram:,} bytes ({format_bytes(ram)}); parameters: {params:,} bytes ({format_bytes(params)})",
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
            "random": self.random,
            "measurements": [f.to_dict() for f in self.search.found],
            "control": [f.to_dict() for f in self.search.random],
            "promise": self.search.promise(),
            "steps": [list(step) for step in self.steps],
        }


def specialize(
    net: Supernet,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    *,
    profile: DeviceProfile,
    source: nn.Module | None = None,
    measurements: int = 40,
    rounds: int = 3,
    batches: int = 10,
    control: bool = True,
    metric: Metric | None = None,
    loss_fn: LossFn | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    say: Say | None = None,
) -> Specialized:
    """The best network of a trained supernet within the bounds of `profile`; `net` keeps its weights.

    Each candidate has its batch norms measured on `batches` batches of `train_loader` and is judged on `val_loader`;
    test data are looked at once, for the answer and the control. measurements: networks that are judged, half of them
    drawn among those that fit, half proposed. control: judge as many drawn at random. run_dir: a folder for the
    network (model.safetensors, for `pm.load` with `source`, the model that the supernet was made from), figures.json
    and each measurement, so that an interrupted search goes on with `resume`.

    Raises BudgetError at once if nothing fits, with the smallest need and what binds; InputError for options out of
    bounds; VerifyError if the answer needs more than was computed; RunError for a folder that cannot be used.
    """
    if measurements < 10 or rounds < 1 or batches < 1:
        raise InputError(
            f"measurements = {measurements}, rounds = {rounds}, batches = {batches} are out of bounds",
            fix="Give at least 10, 1 and 1.",
        )
    memory = MemoryModel(net, profile)
    check_feasible(memory)
    options = {"profile": str(profile), "measurements": measurements, "rounds": rounds, "batches": batches}
    run = None if run_dir is None else Run(run_dir, resume=resume, config=options, seed=seed)
    say = say or (lambda _: None)
    judge = _Judge(net, train_loader, batches, run, seed)
    with progress(f"networks for {profile.name}", measurements * (2 if control else 1)) as report:

        def measure(config: Config) -> float:
            found = judge(config, val_loader, "val", metric, loss_fn)
            report(judge.seen, f"{100 * found.accuracy:.2f} %")
            return found.accuracy

        result = search(memory, measure, measurements=measurements, rounds=rounds, control=control, seed=seed)
    split, loader = ("val", val_loader) if test_loader is None else ("test", test_loader)
    best, chance = result.taken, result.best_random
    say(f"{profile.name}: {judge.seen} networks measured, the best has {100 * best.value:.2f} % on validation")
    answers = [judge(f.config, loader, split, metric, loss_fn) for f in (best, chance)]
    model = net.extract(best.config)
    made = Specialized(
        profile=profile,
        config=best.config,
        model=model,
        found=best,
        measured=_verified(memory, best, model),
        evaluation=answers[0],
        random={"config": chance.config, "evaluation": answers[1].to_dict(), "measured": len(result.random)},
        search=result,
        steps=memory.per_step(best.config),
        split=split,
        folder=None if run is None else run.folder,
    )
    if run is not None:
        save_network(model, run.path("model.safetensors"), source=source)
        write_json(run.path("figures.json"), made.to_dict())
        run.close()
    return made


class _Judge:
    """Measures batch norms and accuracy of configurations, each once, in a run's folder if there is one."""

    def __init__(self, net: Supernet, loader: Iterable[Any], batches: int, run: Run | None, seed: int) -> None:
        self.net, self.loader, self.batches, self.run, self.seed = net, loader, batches, run, seed
        self.seen = 0

    def __call__(
        self, config: Config, loader: Iterable[Any], split: str, metric: Metric | None, loss_fn: LossFn | None
    ) -> Evaluation:
        self.seen += 1
        name = f"{split}-{hashlib.sha256(key_of(config).encode()).hexdigest()[:16]}"

        def measured() -> dict[str, Any]:
            with seeded(self.seed, "recalibrate"):
                self.net.recalibrate(config, self.loader, self.batches)
            with self.net.running(config):
                return evaluate(self.net, loader, metric=metric, loss_fn=loss_fn).pack()

        if self.run is None:
            return Evaluation.unpack(measured())
        return Evaluation.unpack(self.run.once(name, measured))


def _verified(memory: MemoryModel, found: Found, model: fx.GraphModule) -> dict[str, int]:
    """Bytes of the extracted network by the meter, held against what was computed and the bounds."""
    activations, parameters = peak_bytes(model, 1, hold_inputs=False), stored_bytes(model)
    plain = MemoryModel(memory.net, DeviceProfile())
    code = plain.codes.encode([found.config])
    said = int(plain.peak_bytes(code)[0]), int(plain.param_bytes(code)[0])
    if activations > said[0] or parameters > said[1]:
        raise VerifyError(
            f"The network needs {activations:,} and {parameters:,} bytes, computed were {said[0]:,} and {said[1]:,}",
            where="activations in float32, parameters as they are stored",
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
    return f"{' and '.join(parts) or 'no bounds'}, {profile.dtype}, weights in {profile.weights_in}"
