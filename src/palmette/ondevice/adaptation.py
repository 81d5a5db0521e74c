"""What `adapt` hands back: the plan in force, what it was predicted and measured to keep, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from palmette.device import format_bytes
from palmette.errors import BudgetError, InputError
from palmette.files import write_atomic
from palmette.meter.training import TrainingMemory, measure_training
from palmette.ondevice.install import Before, freeze, install, remove
from palmette.ondevice.mode import Engine
from palmette.ondevice.plan import MemoryPlan
from palmette.ondevice.search import Request
from palmette.ondevice.tuning import Tuning, check_optimizer
from palmette.ondevice.wasi import Swaps


@dataclass(repr=False)
class Adaptation:
    """An adapted model. Train it as ever; `report()` tells what it keeps, `undo()` takes the plan off."""

    model: nn.Module
    request: Request
    plan: MemoryPlan
    engine: Engine
    before: Before
    vanilla_saved: int
    tuning: Tuning | None = None
    swaps: Swaps | None = None
    measured: TrainingMemory | None = None
    active: bool = False

    def __repr__(self) -> str:
        kept = "?" if self.measured is None else format_bytes(self.measured.saved_bytes)
        return f"Adaptation({self.plan.method}, keeps {kept} instead of {format_bytes(self.vanilla_saved)})"

    def __str__(self) -> str:
        return self.report()

    def start(self) -> None:
        """Put the plan onto the model and hold one step against the meter; BudgetError if it keeps more."""
        freeze(self.model, self.plan.frozen, self.before)
        if self.tuning is not None:
            self.tuning.begin(self.engine)
        install(self.model, self.engine, self.before)
        self.active = True
        self.measured = self.measure()
        if self.measured.saved_bytes > self.plan.predicted_bytes >= self.measured.forward_saved_bytes:
            raise InputError(
                "A part of the model is run again in the backward pass, outside of the plan",
                why=f"that keeps {self.measured.saved_bytes:,} bytes, {self.plan.predicted_bytes:,} are planned",
                fix="Use checkpoint(..., use_reentrant=False) in the model, or no checkpoint.",
            )
        if self.measured.saved_bytes > self.plan.predicted_bytes:
            raise BudgetError(
                f"One step kept {self.measured.saved_bytes:,} bytes, {self.plan.predicted_bytes:,} were predicted",
                why="an operation keeps more than its formula says",
                fix="Please report the model; method='lossless' is the fallback.",
            )

    def measure(self) -> TrainingMemory:
        """One training step on the sample, measured; leaves weights, gradients and random states as they were."""
        held = {key: tuned.grad for key, tuned in self.engine.tuned.items()}
        for tuned in self.engine.tuned.values():
            tuned.grad = None
        with nullcontext() if self.swaps is None else self.swaps.set_aside():
            found = measure_training(self.model, self.request.x, self.request.y, self.request.loss)
        parts = [tuned.grad for tuned in self.engine.tuned.values() if tuned.grad is not None]
        extra = sum(grad.numel() * grad.element_size() for grad in parts)
        for key, grad in held.items():
            self.engine.tuned[key].grad = grad
        return replace(found, gradient_bytes=found.gradient_bytes + extra)

    # ---- training ----------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: for clipping, and with a codec other than WASI for an optimizer of your own."""
        factored = [] if self.swaps is None else self.swaps.parameters()
        return [*self.engine.tuned.values(), *factored, *(p for p in self.model.parameters() if p.requires_grad)]

    def optimizer(self, kind: type[Optimizer], **options: Any) -> Optimizer:
        """An optimizer of this class over what is trained; with a selection method it follows the chosen channels.

        Raises InputError for what is no optimizer class.
        """
        check_optimizer(kind)
        made: Optimizer = kind(self.parameters(), **options)
        if self.tuning is not None:
            self.tuning.attach(made, self.engine)
        if self.swaps is not None:
            self.swaps.attach(made)
        self.engine.waits_for_optimizer = False
        return made

    def next_epoch(self) -> None:
        """To be called after each epoch: a selection method chooses its channels anew, within the same budget."""
        if self.tuning is not None:
            self.tuning.next_epoch(self.engine, self.before)
            self.plan = self.engine.plan

    # ---- figures -----------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """What is kept for backward and alive at the peak: vanilla, predicted and measured; how, and by whom."""
        measured = self.measured or self.measure()
        plan = self.plan
        budget = "none" if plan.budget is None else f"{format_bytes(plan.budget)} ({plan.scope})"
        rows = [
            ("budget", budget),
            ("kept for backward, vanilla", format_bytes(self.vanilla_saved)),
            ("kept for backward, predicted", f"{format_bytes(plan.predicted_bytes)} ({plan.predicted_bytes:,} bytes)"),
            ("kept for backward, measured", f"{format_bytes(measured.saved_bytes)} ({measured.saved_bytes:,} bytes)"),
            ("ratio", f"{self.vanilla_saved / max(measured.saved_bytes, 1):.1f}x less"),
            ("peak, measured", f"{format_bytes(measured.peak_bytes)} at {measured.peak_where}"),
            ("gradients", format_bytes(measured.gradient_bytes)),
            *self._against_budget(measured),
            *self._codec_rows(),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {text}" for name, text in rows]
        lines += ["", "Who holds what"]
        lines += [f"{share:>7.1%} {format_bytes(size):>10}  {name}" for name, size, share in measured.by_operation()]
        return "\n".join(lines)

    def _against_budget(self, measured: TrainingMemory) -> Sequence[tuple[str, str]]:
        """What the scope counts, beside the budget; and the peak, where the budget does not bound it."""
        budget, scope = self.plan.budget, self.plan.scope
        if budget is None:
            return []
        counted = {
            "saved": measured.saved_bytes,
            "peak": measured.peak_bytes,
            "saved+gradients+optimizer": measured.saved_bytes + self.request.copies * measured.gradient_bytes,
        }[scope]
        rows = [("counted against the budget", f"{format_bytes(counted)} of {format_bytes(budget)}")]
        if scope != "peak" and measured.peak_bytes > budget:
            rows.append(
                ("note", "the peak is above the budget, which bounds what is kept; scope='peak' bounds the peak")
            )
        return rows

    def _codec_rows(self) -> Sequence[tuple[str, str]]:
        counts: dict[str, int] = {}
        for codec in self.plan.codecs.values():
            counts[codec.name] = counts.get(codec.name, 0) + 1
        rows = [("layers", ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none")]
        if self.plan.slices:
            count = sum(tuned.numel() for tuned in self.engine.tuned.values())
            rows.append(("trained slices", f"{count:,} numbers in {len(self.plan.slices)} layers"))
        if self.plan.frozen:
            rows.append(("frozen by the plan", f"{len(self.plan.frozen)} parameters"))
        if self.swaps is not None:
            rows.append(("weights in factors", f"{len(self.swaps.modules)}; undo() is off by {self.swaps.error():.1%}"))
        worst = max(self.plan.errors.items(), key=lambda pair: pair[1], default=None)
        if worst is not None:
            rows.append(("largest gradient error", f"{worst[1]:.1%} in {worst[0]}, on the sample"))
        return rows

    def undo(self) -> None:
        """Take the plan off: the original code and modules, with the weights as they are now."""
        if not self.active:
            raise InputError("The adaptation is undone already", fix="Call adapt() again.")
        self.active = False
        if self.tuning is not None:
            self.tuning.close(self.engine)
        remove(self.model, self.before)
        if self.swaps is not None:
            self.swaps.undo()

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_atomic(Path(path), self.plan.to_json())

    def to_dict(self) -> dict[str, Any]:
        """Figures for JSON."""
        measured = self.measured or self.measure()
        return {
            "method": self.plan.method,
            "scope": self.plan.scope,
            "budget": self.plan.budget,
            "vanilla_saved_bytes": self.vanilla_saved,
            "predicted_bytes": self.plan.predicted_bytes,
            "measured_saved_bytes": measured.saved_bytes,
            "peak_bytes": measured.peak_bytes,
            "gradient_bytes": measured.gradient_bytes,
        }
