"""The matrix of behaviours that every method of this wing must show; `palmette.check_method` runs it.

Each check builds a small network and data of its own and raises VerifyError with what it saw.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from palmette.depth.prepared import keep
from palmette.depth.shrink import ShrinkResult, shrink
from palmette.errors import PalmetteError, VerifyError
from palmette.graph import Candidate, Edit, Plan, candidates, capture, edits_of, load
from palmette.graph.candidates import EDITS
from palmette.registry import Method, bounds_enforced
from palmette.train.constraints import zeros_kept
from palmette.train.loop import HealConfig, LossTerm, heal

SEED = 7


class Specimen(nn.Module):
    """A convolution, a residual block with a functional ReLU, and three MLP branches: something for every edit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:  # [B, 1, 6, 6] -> [B, 4]
        """Logits of images."""
        x = F.relu(self.stem(x))
        x = x + self.conv2(F.relu(self.bn1(self.conv1(x))))
        h = x.mean((2, 3))
        for mlp in self.mlps:
            h = h + mlp(h)
        return self.head(h)  # type: ignore[no-any-return]


def specimen() -> tuple[Specimen, DataLoader[Any]]:
    """The network in eval mode and a loader of 48 labelled samples in a fixed order, the same ones each time."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(48, 1, 6, 6, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Specimen()
    model.eval()
    with torch.no_grad():
        labels = model(x).argmax(1)
    return model, DataLoader(TensorDataset(x, labels), batch_size=16)


def _prepared(method: Method) -> tuple[fx.GraphModule, list[Candidate], DataLoader[Any], Any]:
    """Captured specimen, the candidates that the method ranks, data, and its default config."""
    model, loader = specimen()
    config = method.make_config()
    example = next(iter(loader))[0][:2]
    captured = capture(model, example)
    kind = method.kind(config)
    edit = method.edit if method.edit in EDITS[kind] else ""
    found = [c for c in candidates(captured, example, kind=kind, edit=edit) if c.pays]
    if len(found) < 2:
        raise VerifyError(f"the specimen has {len(found)} candidates of kind {kind!r}, too few to rank")
    if method.prepare is not None:
        keep(captured, method.name, method.prepare(captured, found, _lesson(loader), config, loader=loader, seed=SEED))
        captured.eval()
    return captured, found, loader, config


def _lesson(loader: DataLoader[Any]) -> Callable[..., None]:
    """The `train` that an ingredient is given: one short epoch."""

    def train(network: fx.GraphModule, *, loss_terms: Sequence[LossTerm] = (), keep_zeros: bool = False) -> None:
        constraints = [zeros_kept(network)] if keep_zeros else ()
        heal(network, loader, HealConfig(epochs=1, lr=1e-3), seed=SEED, loss_terms=loss_terms, constraints=constraints)

    return train


def prepared_in_place(method: Method) -> None:
    """A training-time ingredient leaves the structure of the network and the names of its state as they were."""
    if method.prepare is None:
        return
    model, loader = specimen()
    before = capture(model, next(iter(loader))[0][:2])
    after, _, _, _ = _prepared(method)
    _require(list(before.state_dict()) == list(after.state_dict()), method, "its ingredient changes the state's names")
    _require(before.code == after.code, method, "its ingredient leaves something in the graph")


def _score(method: Method, seed: int = SEED) -> dict[str, float]:
    captured, found, loader, config = _prepared(method)
    return method.score(captured, found, loader, config, seed=seed)


def _require(holds: bool, method: Method, what: str) -> None:
    if not holds:
        raise VerifyError(f"method {method.name!r}: {what}")


def described(method: Method) -> None:
    """Title, paper, unit and a summary that says which end is removed first."""
    for part in ("title", "paper", "unit", "edit", "summary"):
        _require(bool(getattr(method, part).strip()), method, f"has no {part}")
    said = "low = remove first" in (method.score.__doc__ or "")
    _require(said, method, "its docstring must say 'low = remove first'")


def complete_and_finite(method: Method) -> None:
    """A finite float for every candidate and for nothing else, fit for JSON."""
    _, found, _, _ = _prepared(method)
    scores = _score(method)
    _require(set(scores) == {c.name for c in found}, method, "does not score exactly the candidates given")
    bad = [name for name, value in scores.items() if type(value) is not float or not math.isfinite(value)]
    _require(not bad, method, f"the score of {bad[:1]} is no finite float")
    _require(json.loads(json.dumps(scores)) == scores, method, "its scores do not survive JSON")


def deterministic(method: Method) -> None:
    """The same seed gives the same scores, bit for bit, whatever was drawn before."""
    first = _score(method)
    torch.rand(3)
    _require(_score(method) == first, method, "gives other scores for the same seed")


def order_free(method: Method) -> None:
    """A candidate's score does not depend on the order in which candidates are given."""
    captured, found, loader, config = _prepared(method)
    forward = method.score(captured, found, loader, config, seed=SEED)
    backward = method.score(captured, found[::-1], loader, config, seed=SEED)
    _require(forward == backward, method, "its scores depend on the order of the candidates")


def input_untouched(method: Method) -> None:
    """Weights, buffers, mode and graph of the network are as before."""
    captured, found, loader, config = _prepared(method)
    before, code = copy.deepcopy(captured.state_dict()), captured.code
    modes = [module.training for module in captured.modules()]
    method.score(captured, found, loader, config, seed=SEED)
    after = captured.state_dict()
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    _require(same, method, "changes weights or buffers of the network that it scores")
    _require(captured.code == code, method, "changes the graph of the network that it scores")
    _require([module.training for module in captured.modules()] == modes, method, "changes the network's mode")


def _edits(method: Method, candidate: Candidate) -> list[Edit]:
    if method.edits is not None:
        return list(method.edits(candidate, method.make_config()))
    return edits_of(candidate)


def plan_round_trip(method: Method) -> None:
    """The plan of its first choice survives JSON and gives the same network from it; doing it twice changes nothing."""
    captured, found, loader, _ = _prepared(method)
    scores = _score(method)
    first = min(found, key=lambda c: (scores[c.name], c.name))
    x = next(iter(loader))[0]
    plan = Plan(_edits(method, first)).fit(captured, loader, x[:2])
    again = Plan.from_json(plan.to_json())
    _require(again.to_json() == plan.to_json(), method, "its plan does not survive JSON")
    outputs = [p.apply(captured, x[:2]).eval()(x) for p in (plan, again, plan)]
    same = all(torch.equal(outputs[0], y) for y in outputs[1:])
    _require(same, method, "its plan does not give the same network twice")


def _shrunk(
    method: Method, folder: Path | None = None, **options: Any
) -> tuple[Specimen, DataLoader[Any], ShrinkResult]:
    model, loader = specimen()
    heal = HealConfig(epochs=1, lr=1e-3)
    fixed: dict[str, Any] = {"heal": heal, "cost": "macs", "controls": False, "max_drop": 100.0, "run_dir": folder}
    result = shrink(model, loader, loader, method=method, **fixed, **options)
    return model, loader, result


def nothing_at_zero_rounds(method: Method) -> None:
    """Zero rounds give the dense network."""
    model, loader, result = _shrunk(method, rounds=0)
    x = next(iter(loader))[0]
    _require(torch.equal(result.model(x), model(x)), method, "changes the network in zero rounds")
    _require(len(result.plan) == 0, method, "plans edits in zero rounds")


def saved_and_loaded(method: Method) -> None:
    """One round removes something, and the file that it writes rebuilds the same network from the dense one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        model, loader, result = _shrunk(method, folder, rounds=1)
        x = next(iter(loader))[0]
        _require(len(result.plan) > 0, method, "removes nothing from the specimen")
        rebuilt = load(model, folder / "model.safetensors").eval()
        _require(torch.equal(rebuilt(x), result.model(x)), method, "the saved network differs from the one returned")


def resumed(method: Method) -> None:
    """A run that is started again in its folder gives the same weights without training anew."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        _, _, first = _shrunk(method, folder, rounds=1)
        _, _, again = _shrunk(method, folder, rounds=1, resume=True)
        pairs = zip(first.model.state_dict().items(), again.model.state_dict().items(), strict=True)
        _require(all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs), method, "a resumed run differs")


def empty_data_refused(method: Method) -> None:
    """A method that looks at data refuses an empty loader with an error of the family."""
    captured, found, _, config = _prepared(method)
    try:
        scores = method.score(captured, found, [], config, seed=SEED)
    except PalmetteError:
        return
    _require(scores == _score(method), method, "scores an empty loader without an error, and otherwise than data")


def reproduces(method: Method) -> None:
    """Where there is a paper form, it runs and scores every candidate."""
    if "reproduce" not in {field.name for field in dataclasses.fields(method.config)}:
        return
    captured, found, loader, _ = _prepared(method)
    scores = method.score(captured, found, loader, method.make_config(reproduce=True), seed=SEED)
    _require(set(scores) == {c.name for c in found}, method, "its paper form does not score the candidates given")


CHECKS: dict[str, Callable[[Method], None]] = {
    check.__name__: check
    for check in (
        described,
        complete_and_finite,
        deterministic,
        order_free,
        input_untouched,
        prepared_in_place,
        bounds_enforced,
        plan_round_trip,
        nothing_at_zero_rounds,
        saved_and_loaded,
        resumed,
        empty_data_refused,
        reproduces,
    )
}
