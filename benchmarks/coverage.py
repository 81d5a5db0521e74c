"""The coverage table: which networks palmette captures, edits and collapses, and how exactly.

    python benchmarks/coverage.py                       # every family; goes on where it was stopped
    python benchmarks/coverage.py --only timm:convnext_atto --fresh
    python benchmarks/coverage.py --markdown docs/coverage-table.md

Results are added to benchmarks/results/coverage.json after every family.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from coverage_errors import bound, cast, condition, relative, rounding_error, worst_error
from coverage_families import CLASSES, Family, build, families, inputs, spread
from torch import nn

from palmette import graph
from palmette.errors import PalmetteError
from palmette.graph.candidates import EDITS
from palmette.graph.inputs import call, main_output

RESULTS = Path(__file__).parent / "results" / "coverage.json"
FITS = ("affine", "mask", "identity")
PADS = ("repad", "bias_map", "exact")
OTHERS = {"drops": "drop", "fits": "fit_linear", "parallel": "parallelize", "identities": "identity"}
"""Columns of the table for edits that are no linearisations."""
PLANS = 3


# the checks of one family


def check_family(family: Family) -> dict[str, Any]:
    """Runs every check of one family; returns a JSON-able row with `passed` and, per failed check, its reason."""
    start = time.monotonic()
    row: dict[str, Any] = {"family": family.key, "input": family.size, "failures": []}
    # In eval mode without gradients torch runs nn.MultiheadAttention through a fused kernel that cannot train and
    # rounds differently (3e-6): every family is compared with the one that trains.
    torch.backends.mha.set_fastpath_enabled(False)
    model = build(family)
    example = inputs(family, 2, 0)
    with torch.no_grad():
        row["spread"] = spread(main_output(call(model, inputs(family, 5, 9))))
    row["parameters"] = sum(p.numel() for p in model.parameters())
    captured = graph.capture(model, example)
    _check(row, "bit-equal", lambda: check_equal(family, model, captured))
    _check(row, "train", lambda: check_train(family, model, captured))
    _check(row, "sites", lambda: check_sites(row, captured, example))
    wide = graph.capture(copy.deepcopy(model).double(), cast(example, torch.float64))
    for seed in range(PLANS):
        _check(row, f"plan {seed}", lambda seed=seed: check_plan(row, family, (captured, wide), example, seed))
    _check(row, "merges", lambda: check_merges(row))
    row["seconds"] = round(time.monotonic() - start, 1)
    row["passed"] = not row["failures"]
    return row


def _check(row: dict[str, Any], name: str, run: Callable[[], str]) -> None:
    """Runs one check: an empty answer is a pass, anything else, or any exception, a failure with its reason."""
    try:
        reason = run()
    except Exception as error:  # noqa: BLE001 - a fault of one family is a row of the table
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} [{Path(where.filename).name}:{where.lineno}]"
    if reason:
        row["failures"].append(f"{name}: {reason}")


def check_equal(family: Family, model: nn.Module, captured: nn.Module) -> str:
    """The captured network gives the same bits at batches 1, 2 and 5, and keeps the names of the state it reads."""
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = inputs(family, batch, 100 + batch)
            if not torch.equal(main_output(call(model, x)), main_output(call(captured, x))):
                return f"the outputs differ at batch {batch}"
    ours, theirs = captured.state_dict().keys(), model.state_dict().keys()
    told = bool(captured.meta["palmette"]["lost"])  # capture says itself what only training reads
    other = (ours - theirs) if told else (ours ^ theirs)
    return f"state entries lost or added: {sorted(other)[:3]}" if other else ""


def check_train(family: Family, model: nn.Module, captured: nn.Module) -> str:
    """Random layers draw in training where the original's do; batch norm holds the same statistics after one step."""
    ours, theirs = copy.deepcopy(captured).train(), copy.deepcopy(model).train()
    x = inputs(family, 4, 7)
    if _draws(theirs, x) != _draws(ours, x):
        return f"random layers in train mode: original {_draws(theirs, x)}, captured {_draws(ours, x)}"
    ours, theirs = copy.deepcopy(captured).train(), copy.deepcopy(model).train()
    for network in (ours, theirs):
        step(network, x)
    mine = ours.state_dict()
    for name, value in theirs.state_dict().items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            error = relative(value, mine[name])
            if error > 1e-5:
                return f"{name} differs by {error:.1e} after one step"
    return ""


def _draws(network: nn.Module, x: Any) -> bool:
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            outputs.append(main_output(call(network, x)))
    return not torch.equal(*outputs)


def check_sites(row: dict[str, Any], captured: nn.Module, example: Any) -> str:
    """Counts the sites and says why those that cannot be removed cannot."""
    sites = graph.find_sites(captured, example)
    for kind in ("activation", "block", "convolution"):
        of_kind = [s for s in sites if s.kind == kind]
        row[f"{kind}s"], row[f"{kind}s_removable"] = len(of_kind), sum(s.removable for s in of_kind)
    unexplained = [s.path for s in sites if not s.removable and not s.reason]
    row["reasons"] = sorted({s.reason for s in sites if not s.removable})[:6]
    if unexplained:
        return f"no reason given for {unexplained[:3]}"
    return "" if sites else "no site found"


def check_plan(row: dict[str, Any], family: Family, pair: tuple[nn.Module, nn.Module], example: Any, seed: int) -> str:
    """A random legal plan: the collapsed network equals the edited one in float32 and float64, and trains one step.

    `pair`: the captured network in both precisions.
    """
    plan, pad, edited = draw_plan(family, pair[0], example, random.Random(f"{family.key} {seed}"))
    done: dict[str, Any] = {"seed": seed, "edits": len(plan), "pad": pad}
    done["kinds"] = {kind: sum(edit.kind == kind for edit in plan) for kind in sorted({e.kind for e in plan})}
    done["dropped"] = done["kinds"].get("drop", 0)
    row.setdefault("plans", []).append(done)
    small, record = graph.collapse(edited, cost="macs", force=True)
    done["merged"] = sum(m.done for m in record.merges)
    done["wide"] = sum(m.done and "side by side" in m.reason for m in record.merges)
    done["refused"] = sorted({m.reason for m in record.merges if not m.done})[:4]
    done["parameters"] = sum(p.numel() for p in small.parameters())
    done["float32"] = worst_error(family, edited, small)
    twin = plan.apply(pair[1], cast(example, torch.float64), pad=pad)
    done["float64"] = worst_error(family, twin, graph.collapse(twin, cost="macs", force=True)[0], torch.float64)
    done["rounding"] = rounding_error(family, edited, twin)
    done["condition"] = condition(family, twin)
    if done["float64"] > bound(done, torch.float64) or done["float32"] > bound(done, torch.float32):
        return f"errors float64 {done['float64']:.1e}, float32 {done['float32']:.1e} ({pad}, {len(plan)} edits)"
    before = [p.detach().clone() for p in small.parameters()]
    step(small.train(), inputs(family, 4, 7))
    moved = any(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))
    finite = all(bool(p.isfinite().all()) for p in small.parameters())
    return "" if moved and finite else "one training step of the collapsed network changed nothing or gave NaN"


def check_merges(row: dict[str, Any]) -> str:
    """Merges or drops were done, or the reasons why none is possible were printed."""
    row["merges"] = sum(p.get("merged", 0) for p in row.get("plans", []))
    for name, kind in OTHERS.items():
        row[name] = sum(p.get("kinds", {}).get(kind, 0) for p in row.get("plans", []))
    row["wide"] = sum(p.get("wide", 0) for p in row.get("plans", []))
    for dtype in ("float64", "float32"):
        row[f"worst_{dtype}"] = max((p[dtype] for p in row.get("plans", []) if dtype in p), default=None)
    possible = row.get("activations_removable", 0) + row.get("blocks_removable", 0)
    if possible and not row["merges"] + sum(row[name] for name in OTHERS):
        return f"{possible} sites are removable but nothing was merged, dropped or replaced"
    return "" if possible or row.get("reasons") else "nothing is removable and no reason is given"


# random legal plans


def draw_plan(family: Family, model: Any, example: Any, rng: random.Random) -> tuple[graph.Plan, str, nn.Module]:
    """A random subset of the removable sites with random edits, the padding policy, and the network edited by it.

    Blocks and spans may hold each other and activations of the plan, so that it is refused: what is no linearisation is
    then given up, one by one.
    """
    pad = rng.choice(PADS)
    sites = [s for s in graph.find_sites(model, example, pad=pad) if s.removable]
    chosen = {p for s in sites if s.kind == "activation" and rng.random() < 0.6 for p in s.partners or (s.path,)}
    edits = [graph.linearize(path, fit=rng.choice(FITS)) for path in sorted(chosen)]
    others = other_edits(model, example, rng)
    loader = [(inputs(family, 4, seed), torch.zeros(4, dtype=torch.long)) for seed in (50, 51)]
    while True:
        plan = graph.Plan([*edits, *others])
        try:
            fitted = plan.fit(model, loader, example)
            return fitted, pad, fitted.apply(model, example, pad=pad)
        except PalmetteError:
            if not others:
                raise
            others.pop()


def other_edits(model: Any, example: Any, rng: random.Random) -> list[graph.Edit]:
    """Random edits of other kinds: a drop of blocks, a linear fit, parallel blocks, convolutions to identities."""
    found: dict[str, list[graph.Candidate]] = {}
    for kind, kinds in EDITS.items():
        for edit in kinds if kind != "activation" else ():
            pool = graph.candidates(model, example, kind=kind, edit=edit, longest=4)
            found.setdefault(edit, []).extend(c for c in pool if c.sites[0].removable)
    picked = [
        rng.sample(found["parallelize"], min(len(found["parallelize"]), rng.randint(0, 2))),
        rng.sample(found["fit_linear"], min(len(found["fit_linear"]), rng.randint(0, 1))),
        rng.sample(found["identity"], min(len(found["identity"]), rng.randint(0, 2))),
        rng.sample(found["drop"], min(len(found["drop"]), rng.randint(1, 2))),
    ]
    unique = {(e.kind, e.site): e for pool in picked for c in pool for e in graph.edits_of(c)}
    return list(unique.values())


# small tools


def step(network: nn.Module, x: Any) -> None:
    """One step of SGD on random labels, seeded."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD((p for p in network.parameters() if p.requires_grad), lr=1e-3)
    logits = main_output(call(network, x))
    labels = torch.arange(logits.shape[0]) % CLASSES
    nn.functional.cross_entropy(logits, labels).backward()
    optimizer.step()


# one process per family, results in one file


def run_isolated(key: str, *, seconds: float, gibibytes: float) -> dict[str, Any]:
    """The row of one family from a process of its own, within a limit of time and memory."""
    command = [sys.executable, __file__, "--family", key, "--memory", str(gibibytes)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"family": key, "passed": False, "failures": [f"took longer than {seconds:.0f} s"]}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        row: dict[str, Any] = json.loads(lines[-1])
        return row
    tail = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return {"family": key, "passed": False, "failures": [f"crashed: {tail[0]}"]}


def _largest(row: dict[str, Any], name: str) -> str:
    found = [p[name] for p in row.get("plans", []) if name in p]
    return f"{max(found):.1e}" if found else "-"


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, failures below it."""
    titles = ("family", "input", "passes", "activations", "blocks", "merged", "dropped", "fitted", "parallel (wide)")
    titles += ("identities", "float64", "float32", "(rounding)", "condition", "s")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [
            row["family"],
            str(row.get("input", "")),
            "yes" if row["passed"] else "**no**",
            f"{row.get('activations_removable', 0)}/{row.get('activations', 0)}",
            f"{row.get('blocks_removable', 0)}/{row.get('blocks', 0)}",
            str(row.get("merges", 0)),
            str(row.get("drops", 0)),
            str(row.get("fits", 0)),
            f"{row.get('parallel', 0)} ({row.get('wide', 0)})",
            str(row.get("identities", 0)),
            f"{row.get('worst_float64') or 0:.1e}",
            f"{row.get('worst_float32') or 0:.1e}",
            _largest(row, "rounding"),
            _largest(row, "condition"),
            str(row.get("seconds", "")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"{row['family']}: {failure}" for row in rows for failure in row["failures"]]
    nothing = [row for row in rows if not row.get("merges") and row.get("reasons")]
    lines += [f"{row['family']}: nothing was merged: {'; '.join(row['reasons'])}" for row in nothing]
    return "\n".join(lines)


def _store(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({"torch": torch.__version__, "rows": list(rows.values())}, indent=1) + "\n")
    temporary.replace(path)


def run_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs what is not in the results file yet, one family after the other; returns the rows of the whole table."""
    rows: dict[str, dict[str, Any]] = {}
    if options.output.exists() and not options.fresh:
        rows = {row["family"]: row for row in json.loads(options.output.read_text())["rows"]}
    keys = [f.key for f in families() if not options.only or f.key in options.only]
    for key in keys:
        if rows.get(key, {}).get("passed") and OTHERS.keys() <= rows[key].keys():
            continue
        rows[key] = run_isolated(key, seconds=options.seconds, gibibytes=options.memory)
        _store(options.output, rows)
        print(format_table([rows[key]]).split("\n", 2)[2], flush=True)
    return [rows[key] for key in keys]


def main() -> int:
    """Command line; exit code 1 when a family fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", help="check this one in this process and print its row as JSON")
    parser.add_argument("--only", nargs="*", help="names as in the table, for instance timm:convnext_atto")
    parser.add_argument("--fresh", action="store_true", help="forget the stored results")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    parser.add_argument("--seconds", type=float, default=900, help="time limit of one family")
    parser.add_argument("--memory", type=float, default=16, help="memory limit of one family in GiB of address space")
    options = parser.parse_args()
    if options.family:
        limit = int(options.memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.set_num_threads(1)
        row = check_family(next(f for f in families() if f.key == options.family))
        print(json.dumps(row))
        return 0
    table = run_all(options)
    print("\n" + format_table(table))
    if options.markdown:
        options.markdown.write_text(format_table(table) + "\n")
    print(f"\n{sum(row['passed'] for row in table)} of {len(table)} families pass")
    return 0 if all(row["passed"] for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
