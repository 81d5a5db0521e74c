"""Time of a training step, adapted against stock: forward, loss, backward, and a step of SGD.

Usage: PALMETTE_DATA=DIR python benchmarks/adapt/speed.py [--networks a,b] [--runs 15] [--again]
       PALMETTE_DATA=DIR python benchmarks/adapt/speed.py --profile resnet18 [--arm lossless]

One copy of the network for each arm; the arms take turns in one process on one thread, timed in processor time, so that
other work on the machine disturbs them little and alike. Ratios to the stock network are taken round by round: median
and quartiles. "stock again" is the noise. Batch norms use their running statistics in every arm. all: every parameter
is trained; last 4: the last four convolutions and what follows. Goals: lossless at most 1.05, auto at most 1.
Rows go to benchmarks/results/adapt_speed.json. --profile prints which operators one arm and the stock network spend
their time in.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from published import BUDGETS, choose
from setups import MIB, Rows, network, sample
from torch import Tensor, nn
from torch.autograd.profiler_util import EventList
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from palmette.meter.training import default_loss
from palmette.ondevice.adapt import adapt
from palmette.ondevice.codec import Recompute
from palmette.ondevice.trace import saved_bytes, trace

PIXELS = {"mcunet": 96, "resnet18": 128, "mobilenet_v2": 128, "vit_b_32": 224}
BATCH = 16
Arm = tuple[nn.Module, Any]


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(PIXELS))
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--profile", default="")
    parser.add_argument("--arm", default="lossless")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.profile:
        profiled(given.profile, given.arm)
        return
    rows = Rows("speed", "processor time of a training step, as a ratio to the stock network's; batch 16, one thread")
    for name in given.networks.split(","):
        for last in (None, 4) if name != "vit_b_32" else (None,):
            key = f"{name} {'all' if last is None else 'last 4'}"
            rows.once(key, lambda n=name, k=last: compared(n, k, given.runs), again=given.again)


def compared(name: str, last: int | None, runs: int) -> dict[str, Any]:
    """The arms of one network, in turn."""
    data = sample(BATCH, PIXELS[name])
    arms = made(name, last, data)
    steps = {arm: step_of(model, data) for arm, (model, _) in arms.items()}
    times: dict[str, list[float]] = {arm: [] for arm in steps}
    order = list(steps)
    for number in range(runs + 1):
        for arm in order:
            steps[arm]()  # the allocator gets used to this arm's sizes
            elapsed = timed(steps[arm])
            if number:  # the first round warms up
                times[arm].append(elapsed)
        order = order[1:] + order[:1]
    found: dict[str, Any] = {}
    for arm, (_, adaptation) in arms.items():
        low, middle, high = statistics.quantiles(
            [a / b for a, b in zip(times[arm], times["stock"], strict=True)], n=4, method="inclusive"
        )
        found[arm] = {"ratio": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}
        found[arm]["seconds_a_step"] = round(statistics.median(times[arm]), 5)
        if adaptation is not None:
            found[arm] |= {"saved_bytes": adaptation.measured.saved_bytes, "frozen": len(adaptation.plan.frozen)}
            found[arm]["stock_saved_bytes"] = adaptation.vanilla_saved
    return {"pixels": PIXELS[name], "batch": BATCH, "runs": runs, "arms": found}


def made(name: str, last: int | None, data: tuple[Tensor, Tensor]) -> dict[str, Arm]:
    """Networks by arm, with their adaptations."""
    model = network(name, 64)
    if last is not None:
        choose(model, last)
    stock = trace(model, *data, default_loss).stock_bytes()
    arms: dict[str, Arm] = {"stock": (copy.deepcopy(model), None), "stock again": (copy.deepcopy(model), None)}
    asked: list[tuple[str, str, int | None]] = [("lossless", "lossless", None), ("auto 1/50", "auto", stock // 50)]
    if last is not None:
        asked.append(("asi, published bytes", "asi", published_budget(model, name, last, data)))
    for arm, method, budget in asked:
        adapted = copy.deepcopy(model)
        arms[arm] = adapted, adapt(adapted, data, None, budget=budget, method=method)
    return arms


def published_budget(model: nn.Module, name: str, last: int, data: tuple[Tensor, Tensor]) -> int:
    """The paper's share of the inputs' bytes, and what stays in any case."""
    found = trace(model, *data, default_loss)
    floor = saved_bytes(found, {entry.key: Recompute() for entry in found.layers()})
    factors = BUDGETS.get((name, last), 0.5) * MIB * BATCH / 128
    inputs = sum(entry.shape.numel() * entry.itemsize for entry in found.layers())
    return int(floor + max(factors, inputs / 100))


def step_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """One training step, with a learning rate that changes nothing worth speaking of."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    x, y = data

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def timed(run: Callable[[], Any]) -> float:
    """Seconds of processor time."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def profiled(name: str, arm: str) -> None:
    """Print the operators of three steps of the stock network and of one arm."""
    data = sample(BATCH, PIXELS[name])
    arms = made(name, None, data)
    for which in ("stock", arm):
        step = step_of(arms[which][0], data)
        step()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(3):
                step()
        table: EventList = found.key_averages()
        print(f"== {name}, {which}")
        print(table.table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=48))


if __name__ == "__main__":
    main()
