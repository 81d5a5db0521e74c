"""What looking costs: an entropy pass beside a plain forward pass, and how often a score reads the data.

Usage: PALMETTE_DATA=DIR python benchmarks/depth/overhead.py [--images 512] [--repeats 15] [--threads 1]
       [--only entropy|scores] [--methods a,b]

Part 1: ResNet-20 with stored weights on CIFAR-10 validation images; forward passes of the captured network and entropy
passes over all of its activations are timed in turn, in processor time, so that other work on the machine disturbs them
little and alike. Goal: at most 1.15 forward passes. Part 2: torchvision's ResNet-50 (random weights, 1,000 random
images of 64 pixels): every method whose score tries nothing scores all of its sites through a loader that counts its
batches. Goal: one pass. What was measured before is kept where it is not measured again.
The tables are printed and written to benchmarks/results/depth_overhead.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stored

from palmette import compat
from palmette.depth.entropy import EntropyRule, site_entropies
from palmette.depth.prepared import keep
from palmette.errors import InputError
from palmette.files import write_json
from palmette.graph import Candidate, candidates, capture
from palmette.graph.activations import find_activations
from palmette.graph.candidates import EDITS
from palmette.graph.sites import site_axis
from palmette.registry import Method, get_method, methods
from palmette.resolve import resolve_data
from palmette.run import environment

RESULT = Path(__file__).resolve().parent.parent / "results" / "depth_overhead.json"
RULES = {
    "entropy, EASIER (counts)": EntropyRule(),
    "entropy, EGP (per batch)": EntropyRule(zeros="off", neurons="lively", aggregation="batch"),
    "entropy, NEPENTHE (zeros left out)": EntropyRule(zeros="exclude", neurons="lively"),
    "entropy, per position": EntropyRule(position_first=False),
}
TRIES = {"tlc": "a pass for each candidate, by its definition", "auto": "a search of its own"}
"""Methods whose score removes each candidate on trial."""


def main() -> None:
    """Measure what is asked for, print it and store it beside what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["entropy", "scores"])
    parser.add_argument("--methods", default="", help="which scores, by default all")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    stored_before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result = {**stored_before, "schema": 1, "environment": environment()}
    if given.only != "scores":
        result["entropy"] = entropy_passes(given.images, given.repeats)
        report_entropy(result["entropy"])
    if given.only != "entropy":
        names = given.methods.split(",") if given.methods else [m.name for m in methods("depth") if m.name not in TRIES]
        rows = {row["method"]: row for row in [*result.get("scores", []), *score_passes(names)]}
        result["scores"] = [rows[name] for name in sorted(rows)]
        report_scores(result["scores"])
    write_json(RESULT, result)


def report_entropy(passes: dict[str, Any]) -> None:
    """Print part 1."""
    print(f"Passes over ResNet-20, {passes['images']} images; a forward pass takes {passes['forward_s']:.3f} s")
    for row in passes["rows"]:
        print(f"  {row['pass']:<36} {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")


def report_scores(rows: list[dict[str, Any]]) -> None:
    """Print part 2."""
    print("Scores of all sites of ResNet-50 on 1,000 images")
    for row in rows:
        print(f"  {row['method']:<18} {row['sites']:>4} sites  {row['passes']:g} passes  {row['seconds']:.1f} s")
    for name, why in TRIES.items():
        print(f"  {name:<18} left out: {why}")


def entropy_passes(images: int, repeats: int) -> dict[str, Any]:
    """Ratio of an entropy pass to a forward pass, per rule: median and quartiles over the repeats."""
    data = resolve_data(f"cifar10:{stored.folder() / 'cifar10'}?norm=imagenet&batch=128")
    batches = _first(data.val, images)
    model = stored.resnet20().eval()
    network = capture(model, batches[0][0][:2]).eval()
    axes = {found.path: site_axis(network, found) for found in find_activations(network)}

    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: _forward(network, batches),
        "forward again": lambda: _forward(network, batches),
        "forward of the original": lambda: _forward(model, batches),
    }
    for name, rule in RULES.items():
        runs[name] = lambda rule=rule: site_entropies(network, axes, batches, rule)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            elapsed = _timed(run)
            if number:  # the first round warms up
                seconds[name].append(elapsed)
    rows = []
    for name in list(runs)[1:]:
        ratios = [a / b for a, b in zip(seconds[name], seconds["forward"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append({"pass": name, "ratio": middle, "low": low, "high": high})
    return {
        "network": "ResNet-20, CIFAR-10",
        "images": sum(len(inputs) for inputs, _ in batches),
        "activations": len(axes),
        "repeats": repeats,
        "forward_s": statistics.median(seconds["forward"]),
        "rows": rows,
    }


def _forward(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for inputs, _ in batches:
            network(inputs)


def _first(loader: Any, images: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of at least `images` images in all, decoded."""
    batches: list[tuple[Tensor, Tensor]] = []
    for batch in loader:
        batches.append(batch)
        if sum(len(inputs) for inputs, _ in batches) >= images:
            break
    return batches


def _timed(run: Callable[[], Any]) -> float:
    """Seconds of processor time, which other work on the machine does not add to."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


class Counting:
    """Random images in batches, and how many batches were drawn."""

    def __init__(self, images: int, size: int, pixels: int) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(images, 3, pixels, pixels, generator=generator)
        target = torch.randint(1000, (images,), generator=generator)
        self.batches, self.drawn = list(zip(x.split(size), target.split(size), strict=True)), 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            self.drawn += 1
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


def score_passes(names: list[str]) -> list[dict[str, Any]]:
    """Sites, passes over the data and seconds of the methods' scores."""
    torch.manual_seed(0)
    model: nn.Module = compat.torchvision().models.resnet50(weights=None).eval()
    network = capture(model, torch.randn(2, 3, 64, 64)).eval()
    rows = []
    for name in names:
        rows.append({"method": name, **scored(network, get_method(name))})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def scored(network: fx.GraphModule, method: Method) -> dict[str, Any]:
    """One scoring, in seconds of processor time; a score that only reads what a training found is given zeros."""
    loader, found = Counting(1000, 50, 64), ranked(network, method)
    paths = {site.path for candidate in found for site in candidate.sites}
    begun = time.process_time()
    try:
        method.score(network, found, loader, method.make_config(), seed=0)
    except InputError:
        keep(network, method.name, dict.fromkeys(paths, 0.0))
        method.score(network, found, loader, method.make_config(), seed=0)
    seconds = time.process_time() - begun
    return {"sites": len(paths), "passes": loader.drawn / len(loader), "seconds": seconds}


def ranked(network: fx.GraphModule, method: Method) -> list[Candidate]:
    """Every candidate of the method's kind that can be removed at all, whether it pays or not."""
    kind = method.kind(method.make_config())
    edit = method.edit if method.edit in EDITS[kind] else ""
    found = candidates(network, None, kind=kind, edit=edit)
    return [candidate for candidate in found if kind == "activation" or all(s.removable for s in candidate.sites)]


if __name__ == "__main__":
    main()
