"""Which networks become supernets: what is elastic in each family of the coverage table, and whether it is exact.

    python benchmarks/supernet/families.py                       # every family; goes on where it was stopped
    python benchmarks/supernet/families.py --only timm:convnext_atto --fresh

Each family: the largest configuration, the smallest and some random ones are run as slices of the shared weights and
extracted as plain networks; outputs are compared, and the closed forms of peak memory and parameters with the meter.
Results are added to benchmarks/results/supernet_families.json after every family.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))
from coverage_families import Family, build, families, inputs

from palmette.files import write_json
from palmette.graph.inputs import call, main_output
from palmette.meter.compute import param_bytes
from palmette.meter.memory import peak_bytes
from palmette.supernet.memory import MemoryModel
from palmette.supernet.supernet import Supernet

RESULTS = Path(__file__).parents[1] / "results" / "supernet_families.json"
KINDS = ("width", "depth", "kernel", "heads")


def check_family(family: Family, count: int = 3) -> dict[str, Any]:
    """A JSON-able row: choices of each kind, the number of networks, the worst error, and where bytes differ."""
    torch.backends.mha.set_fastpath_enabled(False)
    start = time.monotonic()
    model, example = build(family).eval(), inputs(family, 2, 0)
    net = Supernet.from_model(model, example).eval()
    made = time.monotonic() - start
    row: dict[str, Any] = {"family": family.key, "networks": float(net.space.size()), "seconds_made": round(made, 2)}
    row |= {kind: len(net.space.of_kind(kind)) for kind in KINDS}
    row |= {"static": len(net.static), "reasons": sorted(set(net.static.values()))}
    memory, rng = MemoryModel(net), np.random.default_rng(0)
    configs = [net.max(), net.min(), *(net.sample(rng) for _ in range(count))]
    codes = memory.codes.encode(configs)
    predicted = list(zip(memory.peak_bytes(codes).tolist(), memory.param_bytes(codes).tolist(), strict=True))
    errors, wrong = [], []
    x = inputs(family, 3, 11)
    with torch.no_grad():
        if not torch.equal(main_output(call(net, x)), main_output(call(model, x))):
            wrong.append("the largest configuration differs from the original")
        for config, said in zip(configs, predicted, strict=True):
            small = net.extract(config)
            with net.running(config):
                active = main_output(call(net, x)).double()
            gap = (main_output(call(small, x)).double() - active).abs().max() / active.abs().max().clamp_min(1e-30)
            errors.append(float(gap))
            measured = (peak_bytes(small, 1, hold_inputs=False), param_bytes(small))
            if said != measured:
                wrong.append(f"bytes: predicted {said}, measured {measured}")
    row |= {"worst": max(errors), "configurations": len(configs), "failures": wrong}
    if row["worst"] > 1e-5:
        row["failures"].append(f"extract differs from activate by {row['worst']:.1e}")
    if not any(row[kind] for kind in KINDS) and not row["reasons"]:
        row["failures"].append("nothing is elastic and no reason is given")
    return row | {"seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    """Run what is asked for and not yet there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FAMILY")
    parser.add_argument("--fresh", action="store_true", help="check again what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    for family in families():
        if (options.only and family.key not in options.only) or (family.key in rows and not options.fresh):
            continue
        try:
            rows[family.key] = check_family(family)
        except Exception as error:  # noqa: BLE001 - a fault of one family is a row of the table
            rows[family.key] = {"family": family.key, "failures": [f"{type(error).__name__}: {error}"]}
        write_json(RESULTS, {"torch": torch.__version__, "rows": rows})
        row = rows[family.key]
        said = "; ".join(row["failures"]) or f"{row['networks']:.1e} networks, worst {row['worst']:.1e}"
        print(f"{family.key}: {said}, {row.get('seconds', 0)} s", flush=True)


if __name__ == "__main__":
    main()
