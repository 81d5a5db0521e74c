"""A whole run of `adapt`: plan, fine-tune, take the plan off, judge, and leave a folder that says all of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from palmette.device import parse_bytes
from palmette.errors import PalmetteError
from palmette.files import write_atomic, write_json
from palmette.graph.inputs import split_batch, to_device
from palmette.graph.io import structure_hash, weights_hash
from palmette.meter.training import TrainingMemory, default_loss
from palmette.ondevice.accounts import accuracy_figures, described, memory_figures, vanilla_memory
from palmette.ondevice.adapt import adapt
from palmette.ondevice.adaptation import Adaptation
from palmette.ondevice.session import CHECKPOINT, KINDS, FineTuned, Kind, Recipe, fine_tune, loss_for, rate_of
from palmette.registry import MethodConfig
from palmette.report.render import render
from palmette.run import Run
from palmette.seeding import derive_seed, seeded
from palmette.train.batches import check_iterable, drawn, empty
from palmette.train.evaluate import Evaluation, evaluate

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a run of `adapt` is asked for; the fields are those of `adapt` and `fine_tune`."""

    budget: str | int | None = None
    scope: str = "saved"
    method: str = "auto"
    config: MethodConfig | Mapping[str, Any] | None = None
    freeze_bn: bool = True
    epochs: int = 5
    lr: float | None = None
    optimizer: Kind = "sgd"
    clip: float | None = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        self.recipe()
        if self.budget is not None:
            parse_bytes(self.budget)

    def recipe(self) -> Recipe:
        """How to train."""
        return Recipe(
            epochs=self.epochs,
            lr=rate_of(self.optimizer, self.lr),
            optimizer=self.optimizer,
            schedule="cosine",
            clip=self.clip,
            seed=self.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        options = asdict(self.config) if isinstance(self.config, MethodConfig) else dict(self.config or {})
        return {**{name: value for name, value in vars(self).items() if name != "config"}, "options": options}


@dataclass(frozen=True, kw_only=True)
class AdaptResult:
    """What `run_adapt` did. text: the adaptation's report. tuned, folder, report: None for a dry run."""

    model: nn.Module
    text: str
    figures: dict[str, Any]
    tuned: FineTuned | None = None
    folder: Path | None = None
    report: Path | None = None


def run_adapt(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    test_loader: Iterable[Any] | None = None,
    *,
    wish: Wish,
    run_dir: str | Path,
    resume: bool = False,
    dry_run: bool = False,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    names: Mapping[str, str] | None = None,
    say: Say | None = None,
) -> AdaptResult:
    """Fine-tune `model` in place within a budget of bytes, and write plan, weights, figures and report to `run_dir`.

    The sample is the first batch of the training data. Without test data validation data are reported. dry_run: plan
    and measure one step; nothing is trained or written. names: what figures.json calls command, model and data.

    Raises what `adapt` and `fine_tune` raise, and RunError for a folder that cannot be used; a folder that this call
    made goes again when it holds nothing to go on from.
    """
    folder = Path(run_dir)
    judged = _Judge(loader=test_loader or val_loader, loss_fn=loss_fn, split="val" if test_loader is None else "test")
    sample = first_batch(model, train_loader, wish.seed, loss_fn)
    loss = loss_fn or default_loss
    hashes = {"source": structure_hash(model), "start": weights_hash(model.state_dict())}
    if dry_run:
        vanilla = vanilla_memory(model.train(), *sample, loss, freeze_bn=wish.freeze_bn)
        adaptation = _adapted(model, sample, wish, loss_fn)
        figures = {**described(adaptation), **memory_figures(adaptation, vanilla)}
        text = adaptation.report()
        adaptation.undo()
        return AdaptResult(model=model.eval(), text=text, figures=figures)
    names = {"command": "palmette adapt", "model": type(model).__name__, "data": "", **(names or {})}
    config = {"verb": "adapt", **wish.to_dict(), "network": hashes["start"]}
    with (
        _kept(folder),
        closing(Run(folder, resume=resume, command=names["command"], config=config, seed=wish.seed)) as run,
    ):
        before = Evaluation.unpack(run.once("before", lambda: judged(model).pack()))
        if say is not None:
            say(f"before: {100 * before.accuracy:.2f} % on {before.n:,} {judged.name} samples")
        vanilla = vanilla_memory(model.train(), *sample, loss, freeze_bn=wish.freeze_bn)
        adaptation = _adapted(model, sample, wish, loss_fn)
        if say is not None:
            for line in adaptation.report().splitlines():
                say(line)
        session = _Session(adaptation, wish, run, vanilla, judged, names, hashes, say)
        return session.finish(before, train_loader, val_loader, resume)


def first_batch(
    model: nn.Module, loader: Iterable[Any], seed: int, loss_fn: Callable[[Any, Any], Tensor] | None
) -> tuple[Any, Any]:
    """The first batch of the training data, on the model's device. Raises DataError for labels out of range."""
    check_iterable(loader)
    evaluate(model, loader, loss_fn=loss_fn, max_batches=1)
    with drawn(loader, derive_seed(seed, "adapt", "sample")) as epoch:
        try:
            batch = split_batch(epoch.next())
        except StopIteration:
            raise empty() from None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return to_device(batch[0], device), to_device(batch[1], device)


def _adapted(
    model: nn.Module, sample: tuple[Any, Any], wish: Wish, loss_fn: Callable[[Any, Any], Tensor] | None
) -> Adaptation:
    model.train()
    with seeded(wish.seed, "adapt"):
        return adapt(
            model,
            sample,
            loss_fn,
            wish.budget,
            scope=wish.scope,  # type: ignore[arg-type]  # checked there
            method=wish.method,
            config=wish.config,
            freeze_bn=wish.freeze_bn,
            optimizer_copies=KINDS[wish.optimizer][2],
        )


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Evaluates on the data that is reported."""

    loader: Iterable[Any]
    loss_fn: Callable[[Any, Any], Tensor] | None
    split: str

    @property
    def name(self) -> str:
        """The split in words."""
        return "validation" if self.split == "val" else self.split

    def __call__(self, model: nn.Module) -> Evaluation:
        return evaluate(model, self.loader, loss_fn=loss_for(self.loss_fn or default_loss))


@dataclass(frozen=True)
class _Session:
    """A planned run, from the first step to the report."""

    adaptation: Adaptation
    wish: Wish
    run: Run
    vanilla: TrainingMemory | None
    judged: _Judge
    names: Mapping[str, str]
    hashes: dict[str, str]
    say: Say | None

    def finish(self, before: Evaluation, train: Iterable[Any], val: Iterable[Any], resume: bool) -> AdaptResult:
        """Train, take the plan off, judge, write."""
        adaptation, wish, run = self.adaptation, self.wish, self.run
        model = adaptation.model
        memory = memory_figures(adaptation, self.vanilla)
        text = adaptation.report()
        adaptation.save(run.path("plan.json"))
        recipe = wish.recipe()
        tuned = fine_tune(
            adaptation,
            train,
            val,
            epochs=wish.epochs,
            lr=recipe.lr,
            optimizer=wish.optimizer,
            clip=wish.clip,
            run_dir=run.folder,
            resume=resume,
            seed=wish.seed,
            say=self.say,
        )
        model.train()
        memory["bytes"]["measured_at_end"] = adaptation.measure().saved_bytes
        adaptation.undo()
        model.eval()
        after = Evaluation.unpack(run.once("after", lambda: self.judged(model).pack()))
        self._save(model)
        figures = {
            "kind": "adapt",
            "schema": 1,
            **self.names,
            "seed": wish.seed,
            "environment": run.environment,
            **described(adaptation),
            "freeze_bn": wish.freeze_bn,
            "training": {**asdict(recipe), "copies": KINDS[wish.optimizer][2]},
            **memory,
            "history": tuned.history,
            "accuracy": accuracy_figures(before, after, self.judged.split),
        }
        write_json(run.path("figures.json"), figures)
        report = render(run.folder)
        return AdaptResult(model=model, text=text, figures=figures, tuned=tuned, folder=run.folder, report=report)

    def _save(self, model: nn.Module) -> None:
        """The weights under the model's own names, each tensor once: `-w` reads them."""
        state: dict[str, Tensor] = {}
        seen: set[Any] = set()
        for name, value in model.state_dict().items():
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
            if key not in seen:
                seen.add(key)
                state[name] = value.detach().cpu().contiguous()
        facts = {**self.hashes, "weights": weights_hash(state), "verb": "adapt", "method": self.wish.method}
        facts["torch"] = torch.__version__.split("+")[0]
        write_atomic(self.run.path("model.safetensors"), to_bytes(state, metadata={"adapted": json.dumps(facts)}))


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """A folder that this block made goes again when it fails before there is a checkpoint."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except PalmetteError:
        if folder in missing and not (folder / CHECKPOINT).exists():
            shutil.rmtree(folder, ignore_errors=True)
            for path in missing[1:]:
                with suppress(OSError):
                    path.rmdir()
        raise
