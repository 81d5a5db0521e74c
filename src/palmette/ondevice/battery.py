"""The matrix of behaviours that every method of this wing must show; `palmette.check_method` runs it.

Each check builds a small network and data of its own and raises VerifyError with what it saw.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palmette.errors import BudgetError, InputError, VerifyError
from palmette.ondevice.adapt import adapt
from palmette.ondevice.adaptation import Adaptation
from palmette.ondevice.plan import MemoryPlan
from palmette.registry import Method, bounds_enforced

SEED = 7
BATCH = 16


class Specimen(nn.Module):
    """Convolutions with batch norm, one depthwise, a shortcut, pooling, linear layers: something for every method."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.inner, self.head = nn.Linear(128, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:  # [B, 2, 8, 8] -> [B, 4]
        """Logits of images."""
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.point(F.relu6(self.depthwise(x)))
        h: Tensor = F.max_pool2d(x, 2).flatten(1)
        return self.head(F.relu(self.inner(h)))  # type: ignore[no-any-return]


def specimen() -> tuple[Specimen, tuple[Tensor, Tensor]]:
    """The network and a batch, the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model, x = Specimen(), torch.randn(BATCH, 2, 8, 8)
        with torch.no_grad():
            for _ in range(20):
                model(x)
        return model, (x, torch.arange(BATCH) % 4)


def described(method: Method) -> None:
    """Title, paper, unit and a summary."""
    for part in ("title", "paper", "unit", "edit", "summary"):
        _require(bool(getattr(method, part).strip()), method, f"has no {part}")
    _require(method.sites in ("input", "channel"), method, "is neither about inputs nor about channels")


def predicted_is_measured(method: Method) -> None:
    """What one step keeps is what the plan says, to the byte, with room and with little."""
    for share in (2, 4):
        model, sample = specimen()
        found = _adapted(method, model, sample, share)
        seen = found.measure().saved_bytes
        _require(seen == found.plan.predicted_bytes, method, f"keeps {seen}, predicts {found.plan.predicted_bytes}")


def budget_kept(method: Method) -> None:
    """No epoch keeps more than the budget, a smaller batch keeps no more, a larger one is refused."""
    model, (x, y) = specimen()
    found = _adapted(method, model, (x, y), 3)
    optimizer = found.optimizer(torch.optim.SGD, lr=0.01)
    for count in (BATCH, BATCH - 5):
        _step(model, x[:count], y[:count], optimizer)
        found.next_epoch()
        seen = found.measure().saved_bytes
        _require(found.plan.budget is None or seen <= found.plan.budget, method, f"keeps {seen} of {found.plan.budget}")
    try:
        model(torch.cat([x, x]))
    except InputError:
        return
    raise VerifyError(f"method {method.name!r}: takes a batch larger than planned")


def trains(method: Method) -> None:
    """Steps with its optimizer lower the loss; what its plan freezes stays as it was."""
    model, (x, y) = specimen()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = _adapted(method, model, (x, y), 2)
    optimizer = found.optimizer(torch.optim.SGD, lr=0.05)
    losses = [_step(model, x, y, optimizer) for _ in range(25)]
    sliced = {f"{key}.weight" for key in found.plan.slices}
    frozen = set(found.plan.frozen) - sliced
    found.undo()
    _require(losses[-1] < losses[0], method, f"the loss goes from {losses[0]:.3f} to {losses[-1]:.3f}")
    moved = [n for n, p in model.named_parameters() if n in frozen and not torch.equal(p.detach(), before[n])]
    _require(not moved, method, f"moves {moved[:1]}, which its plan freezes")


def deterministic(method: Method) -> None:
    """The same request gives the same plan, and a deepcopy of the adapted model the same gradients."""
    plans = []
    for _ in range(2):
        model, sample = specimen()
        found = _adapted(method, model, sample, 3)
        plans.append(found.plan.to_json())
    _require(plans[0] == plans[1], method, "plans differently the second time")
    copied = copy.deepcopy(model)
    outputs = [network(sample[0]) for network in (model, copied)]
    _require(torch.equal(*outputs), method, "gives another output in a deepcopy")


def plan_round_trip(method: Method) -> None:
    """The plan survives JSON."""
    model, sample = specimen()
    plan = _adapted(method, model, sample, 3).plan
    _require(MemoryPlan.from_json(plan.to_json()) == plan, method, "has a plan that JSON changes")


def undone(method: Method) -> None:
    """Taken off before any step, the model computes what it did: to the bit; nearly, where weights were in factors."""
    model, (x, y) = specimen()
    model.eval()
    with torch.no_grad():
        before = model(x)
    found = _adapted(method, model, (x, y), 3)
    allowed = 0.0 if found.swaps is None else 10 * found.swaps.error()
    found.undo()
    model.eval()
    with torch.no_grad():
        gap = float((model(x) - before).norm() / before.norm())
    _require(gap <= allowed, method, f"leaves a model whose output is off by {gap:.2g}")
    _require(all(p.requires_grad for p in model.parameters()), method, "leaves parameters frozen")


def _adapted(method: Method, model: nn.Module, sample: tuple[Tensor, Tensor], share: int) -> Adaptation:
    """The model within a share of its bytes, or within the smallest budget that the method can keep."""
    free = adapt(model, sample, F.cross_entropy, method="lossless")
    budget = free.vanilla_saved // share
    free.undo()
    try:
        return adapt(model, sample, F.cross_entropy, budget, method=method.name)
    except BudgetError as error:
        words = str(error).split("the smallest for this model and sample is ")
        if len(words) < 2:
            raise
        return adapt(model, sample, F.cross_entropy, int(words[1].split(" ")[0].replace(",", "")), method=method.name)


def _step(model: nn.Module, x: Tensor, y: Tensor, optimizer: Any) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _require(holds: bool, method: Method, what: str) -> None:
    if not holds:
        raise VerifyError(f"method {method.name!r}: {what}")


CHECKS: dict[str, Callable[[Method], None]] = {
    check.__name__: check
    for check in (
        described,
        bounds_enforced,
        predicted_is_measured,
        budget_kept,
        trains,
        deterministic,
        plan_round_trip,
        undone,
    )
}
