"""How well do latency tables that add up predict networks that they were not fitted to?

    python benchmarks/supernet/latency_tables.py                    # some minutes for each network and runtime
    python benchmarks/supernet/latency_tables.py --folder DIR       # keep the tables there, and go on with them

What `palmette profile` does, for two supernets. Written after every table to
benchmarks/results/supernet_latency.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from palmette import compat
from palmette.files import write_json
from palmette.run import environment
from palmette.supernet.latency import measure_latencies
from palmette.supernet.supernet import Supernet

RESULTS = Path(__file__).parents[1] / "results" / "supernet_latency.json"


def _torchvision(name: str) -> Any:
    return getattr(compat.torchvision().models, name)()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "MobileNetV3-small": (lambda: _torchvision("mobilenet_v3_small"), 96),
    "ResNet-18": (lambda: _torchvision("resnet18"), 64),
}
"""How the largest network is made, and the edge of its images in pixels."""
TABLES = (("MobileNetV3-small", "onnxruntime"), ("ResNet-18", "onnxruntime"), ("MobileNetV3-small", "eager"))


def main() -> None:
    """Make the tables that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the tables are kept")
    parser.add_argument("--count", type=int, default=48, help="networks to time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp())
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    for name, runtime in TABLES:
        build, edge = NETWORKS[name]
        key = f"{name}, {edge} px, {runtime}"
        if key in rows:
            continue
        torch.manual_seed(0)
        net = Supernet.from_model(build().eval(), torch.randn(2, 3, edge, edge))
        file = folder / f"{name}-{runtime}.json"
        table = measure_latencies(net, runtime=runtime, count=options.count, path=file, say=print)
        times = [row.median_ms for row in table.rows]
        rows[key] = {
            "choices": len(net.space),
            "networks": len(times),
            "range_ms": [min(times), max(times)],
            "error": asdict(table.error),
            "hardware": table.device.hardware,
        }
        about = "errors of latency tables, one thread, batch 1, by benchmarks/supernet/latency_tables.py"
        write_json(RESULTS, {"about": about, "environment": environment(), "rows": rows})
        print(key, table.error, flush=True)


if __name__ == "__main__":
    main()
