"""Sample figures of a run, in the schema that `shrink` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from palmette.stats import wilson_interval

BLOCKS = [f"features.{i}.conv" for i in range(2, 14)]
HARDWARE = "4-core x86-64 CPU at 2.6 GHz"


def clocks(eager_ms: float, onnx_ms: float) -> list[dict[str, Any]]:
    """Latencies in both runtimes."""
    common = {"runs": 30, "batch": 1, "threads": 1, "dtype": "float32", "hardware": HARDWARE}
    return [
        {"runtime": name, "median_ms": ms, "q25_ms": 0.97 * ms, "q75_ms": 1.04 * ms, **common}
        for name, ms in (("eager", eager_ms), ("onnxruntime", onnx_ms))
    ]


def row(name: str, removed: int, scale: float, correct: int, n: int, difference: list[float] | None) -> dict[str, Any]:
    """A row of the accounting table."""
    return {
        "name": name,
        "linearized": 2 * removed,
        "dropped": 0,
        "depth": 53 - 2 * removed,
        "macs": int(94_200_000 * scale),
        "params": int(2_236_682 * (0.3 + 0.7 * scale)),
        "peak_bytes": int(1_806_336 * scale),
        "latency": clocks(11.9 * scale, 3.42 * (0.15 + 0.85 * scale)),
        "accuracy": correct / n,
        "n": n,
        "interval": list(wilson_interval(correct, n)),
        "difference": difference,
    }


def rounds() -> list[dict[str, Any]]:
    """Seven rounds: four accepted, one of them after a miss, then two misses that are undone."""
    correct = [4712, 4706, 4699, 4671, 4694, 4668, 4655]
    return [
        {
            "round": i,
            "candidate": BLOCKS[k],
            "sites": [f"{BLOCKS[k]}.0.2", f"{BLOCKS[k]}.1.2"],
            "score": 0.08 + 0.06 * i,
            "val_accuracy": right / 5000,
            "val_n": 5000,
            "val_interval": list(wilson_interval(right, 5000)),
            "macs": int(94_200_000 * (1 - 0.055 * (i + 1))),
            "latency_ms": 3.42 * (1 - 0.048 * (i + 1)),
            "accepted": right >= 4690,
            "reason": f"{(4715 - right) / 50:.2f} points lost, 0.5 allowed",
        }
        for i, (k, right) in enumerate(zip((4, 7, 9, 2, 5, 11, 8), correct, strict=True))
    ]


def merges() -> list[dict[str, Any]]:
    """Merges of every exactness class and two refused ones."""
    found = []
    for index, kind in zip((4, 7, 9, 2, 5), ("repad", "exact", "bias_map", "repad", "approx"), strict=True):
        block = BLOCKS[index]
        found.append(
            {
                "members": [f"{block}.0.0", f"{block}.1.0", f"{block}.2"],
                "result": f"{block}.0.0",
                "done": True,
                "reason": "",
                "exactness": kind,
                "worst_error": 3.1e-15 * index,
                "worst_error_float32": 2.4e-7 * index,
                "macs_before": 5_120_000,
                "macs_after": 3_240_000,
                "ms_before": 0.212,
                "ms_after": 0.149,
            }
        )
    return [
        *found,
        {
            "members": ["features.1.conv.0.0", "features.1.conv.1"],
            "result": "",
            "done": False,
            "exactness": "repad",
            "reason": "slower (0.31 ms instead of 0.22 ms)",
            "worst_error": 0.0,
            "worst_error_float32": 0.0,
            "macs_before": 4_100_000,
            "macs_after": 9_800_000,
            "ms_before": 0.22,
            "ms_after": 0.31,
        },
        {
            "members": ["features.14.conv.0.0", "features.14.conv.1.0"],
            "result": "",
            "done": False,
            "exactness": "",
            "reason": "padding mode 'reflect' has no merged form",
            "worst_error": 0.0,
            "worst_error_float32": 0.0,
            "macs_before": 2_300_000,
            "macs_after": None,
            "ms_before": None,
            "ms_after": None,
        },
    ]


def figures() -> dict[str, Any]:
    """A finished run that removed five pairs of activations."""
    parity = {
        "relative_error": 4.1e-07,
        "snr_db": 128.4,
        "top1_agreement": 1.0,
        "samples": 32,
        "runtime": "ONNX Runtime",
    }
    return {
        "schema": 1,
        "command": "palmette shrink --model torchvision:mobilenet_v2 --weights net.safetensors --data cifar10:data "
        "--method easier --max-drop 0.5 --run-dir runs/mobilenet --seed 0",
        "method": "easier",
        "seed": 0,
        "model": "torchvision:mobilenet_v2",
        "data": "cifar10:data",
        "max_drop": 0.5,
        "environment": {
            "python": "3.11.7",
            "hardware": HARDWARE,
            "platform": "Linux",
            "versions": {"torch": "2.13.0", "palmette": "0.1.0"},
        },
        "rounds": rounds(),
        "scores": [
            {
                "round": 0,
                "name": name,
                "score": 0.05 + ((7 * i) % 12) / 14,
                "unit": "bits",
                "macs_saved": 1_880_000,
                "ms_saved": 0.06,
                "entropy": 0.05 + ((7 * i) % 12) / 14,
            }
            for i, name in enumerate(BLOCKS)
        ],
        "rows": [
            row("dense", 0, 1.0, 9422, 10000, None),
            row("shrunk", 5, 0.725, 9398, 10000, [-0.24, -0.46, -0.02]),
            row("dense + same training", 0, 1.0, 9441, 10000, [0.19, -0.01, 0.39]),
            row("random removal", 5, 0.74, 9287, 10000, [-1.35, -1.69, -1.01]),
        ],
        "split": "test",
        "merges": merges(),
        "verification": {
            "max_relative_error": 6.1e-07,
            "max_relative_error_float64": 1.3e-15,
            "top1_agreement": 1.0,
            "resolutions": [[96, 96], [112, 112]],
            "samples": 512,
            "exact": True,
        },
        "export": {"onnx": parity, "pt2": {**parity, "relative_error": 0.0, "snr_db": None, "runtime": "torch.export"}},
        "message": "10 sites removed in 5 rounds. The rounds ended because 2 in a row lost more than 0.5 points.",
    }


def plan() -> dict[str, Any]:
    """A plan with fitted edits."""
    edits = [
        {"kind": "linearize", "site": f"{BLOCKS[i]}.{j}.2", "fit": "affine", "slope": [0.5] * 96, "offset": [0.1] * 96}
        for i in (4, 7, 9, 2, 5)
        for j in (0, 1)
    ]
    return {"palmette_plan": 1, "edits": edits}


def write_run(folder: Path, changed: dict[str, Any] | None = None, *, with_plan: bool = True) -> Path:
    """A run folder with these figures; `changed` replaces top-level entries."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(figures() | (changed or {})))
    if with_plan:
        (folder / "plan.json").write_text(json.dumps(plan()))
    (folder / "model.onnx").write_bytes(bytes(7_300_000))
    return folder
