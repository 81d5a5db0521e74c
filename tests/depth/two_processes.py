"""What several processes of one run must agree on: `two_processes.py FOLDER` runs it in two of them.

`work` is also called by the tests, in their own process, for the numbers of a single one.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from palmette import ranks
from palmette.depth import battery
from palmette.depth.shrink import shrink
from palmette.graph import Plan, capture, find_sites, linearize, observe
from palmette.graph.observe import Moments
from palmette.registry import Method, methods
from palmette.train import HealConfig, evaluate
from palmette.trials import run_trials


def neighbour(name: str) -> Any:
    """Another file of this folder as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forms(method: Method) -> list[dict[str, Any]]:
    """Options under which a method is scored: its defaults, and whatever counts in another way."""
    fields = method.config.__dataclass_fields__
    every = [{}, {"aggregation": "batch"}, {"position_first": False}, {"reproduce": True}]
    return [options for options in every if options.keys() <= fields.keys()]


def scores() -> dict[str, dict[str, float]]:
    """Of every method, in each of its forms."""
    found = {}
    for method in methods("depth"):
        with ranks.alone():
            captured, candidates, loader, _ = battery._prepared(method)
        for options in forms(method):
            config = method.make_config(**options)
            key = f"{method.name} {options}"
            torch.manual_seed(1)  # a paper's form may draw dropout
            found[key] = method.score(captured, candidates, loader, config, seed=3)
    return found


def passes() -> dict[str, Any]:
    """A fit, an evaluation, and who saw which batch."""
    model, loader = battery.specimen()
    example = next(iter(loader))[0][:2]
    captured = capture(model, example).eval()
    sites = [site for site in find_sites(captured, example) if site.kind == "activation"]
    plan = Plan([linearize(site) for site in sites]).fit(captured, loader, example)
    moments, seen = Moments(1), list[int]()

    def watch(before, after):
        seen.append(len(before))
        moments(before, after)

    batches = observe(captured, {sites[0].path: watch}, loader, sums=[moments])
    answers = evaluate(captured, loader)
    trained = battery.Specimen()  # other weights: not every answer is right
    worse = evaluate(trained.load_state_dict(model.state_dict()) and drifted(trained), loader, metric=margin)
    return {
        "fit": {edit.site: [edit.slope, edit.offset] for edit in plan},
        "batches": batches,
        "residual": moments.residual(),
        "positions": moments.count,
        "own batches": len(seen),
        "evaluations": [answers.pack(), worse.pack()],
    }


def drifted(model: torch.nn.Module) -> torch.nn.Module:
    """The same network a little off."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * (-1) ** number)
    return model.eval()


def margin(logits, target):
    """A metric with values between 0 and 1."""
    return logits.softmax(1).gather(1, target[:, None])[:, 0]


def square(item: float, *, log: list[str]) -> dict[str, Any]:
    """A trial that says that it was done, and draws."""
    log.append(str(item))
    return {"square": item * item, "draw": float(torch.rand(())), "processes": ranks.count()}


def trials(folder: Path) -> dict[str, Any]:
    """Trials dealt out, and how many of them fell to this process."""
    log: list[str] = []
    items = {f"item {number}": number / 2 for number in range(5)}
    values = run_trials(partial(square, log=log), items, journal=folder / "trials", seed=5)
    again = run_trials(partial(square, log=log), items, journal=folder / "trials", seed=5)
    return {"trials": values, "again": again, "own trials": len(log)}


def shrunk(fabric: Fabric | None) -> dict[str, Any]:
    """One round of shrink, healing included."""
    small = neighbour("conftest")
    blobs = small.Blobs()
    result = shrink(
        small.make_net(),
        blobs.train,
        blobs.val,
        method="easier",
        cost="macs",
        heal=HealConfig(epochs=1, lr=1e-2),
        max_drop=100.0,
        rounds=1,
        controls=False,
        fabric=fabric,
    )
    state = {name: tensor.tolist() for name, tensor in result.model.state_dict().items()}
    return {"plan": json.loads(result.plan.to_json()), "ranking": result.ranking, "rows": result.rows, "state": state}


def work(folder: Path, fabric: Fabric | None = None) -> dict[str, Any]:
    """Everything, together with the other processes if there are any."""
    with ranks.together():
        found = {"scores": scores(), **passes(), **trials(folder)}
    return found | {"shrunk": shrunk(fabric)}


def job(fabric: Fabric, folder: Path) -> None:
    """Everything in one of two processes."""
    torch.set_num_threads(1)
    (folder / f"{fabric.global_rank}.json").write_text(json.dumps(work(folder, fabric)))


if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
    fabric.launch(job, Path(sys.argv[1]))
