"""The page of an adapt: it says what the figures say, stands alone, and claims no more."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from palmette.errors import RunError
from palmette.report import render
from palmette.report.adapted import verdict
from palmette.stats import wilson_interval

sys.path.insert(0, str(Path(__file__).parent))
from test_report import Page

KIB = 1024


def judged(right: int) -> dict[str, Any]:
    """An accuracy of 400 samples."""
    return {"accuracy": right / 400, "n": 400, "loss": 1.0, "interval": list(wilson_interval(right, 400))}


def figures(**changed: Any) -> dict[str, Any]:
    """Figures of a run, in the schema that `run_adapt` writes."""
    layers = [
        {"layer": f"blocks.{i}.conv", "before": 64 * KIB, "after": (i % 3) * KIB, "codec": "asi" if i % 3 else "",
         "trained": "all" if i % 3 else "none", "error": 0.25 if i % 3 else None}
        for i in range(12)
    ]  # fmt: skip
    history = [
        {"epoch": i, "loss": 2.0 / (i + 1), "lr": 0.05, "kept_bytes": 12 * KIB, "val_accuracy": 0.5 + 0.1 * i,
         "val_interval": [0.4 + 0.1 * i, 0.6 + 0.1 * i], "val_loss": 1.0, "val_n": 100}
        for i in range(3)
    ]  # fmt: skip
    return {
        "kind": "adapt",
        "schema": 1,
        "model": "timm:<small>",
        "data": "digits",
        "command": "palmette adapt -m 'timm:<small>'",
        "seed": 0,
        "environment": {"versions": {"torch": "2.13"}, "hardware": {"cores": 2}, "threads": 1},
        "method": "asi",
        "options": {"energy": None, "reproduce": False},
        "scope": "saved",
        "budget": 16 * KIB,
        "batch": 64,
        "inputs": [[64, 3, 8, 8]],
        "dtype": "float32",
        "freeze_bn": True,
        "training": {"epochs": 3, "lr": 0.05, "optimizer": "momentum", "schedule": "cosine", "clip": 2.0, "copies": 1},
        "bytes": {"vanilla": 768 * KIB, "predicted": 12 * KIB, "measured": 12 * KIB, "measured_at_end": 12 * KIB},
        "peak": {
            "vanilla": 900 * KIB,
            "vanilla_where": "relu",
            "adapted": 90 * KIB,
            "adapted_where": "conv2d, forward",
        },
        "gradients": {"vanilla": 20 * KIB, "adapted": 10 * KIB},
        "parameters": {"bytes": 20 * KIB, "numbers": 5120, "trained": 2560},
        "remembered_bytes": 3 * KIB,
        "holders": {
            "before": [{"operations": f"op {i}", "bytes": (12 - i) * KIB, "share": 0.1} for i in range(11)],
            "after": [{"operations": "conv2d (asi)", "bytes": 12 * KIB, "share": 1.0}],
        },
        "layers": layers,
        "history": history,
        "accuracy": {"split": "test", "before": judged(200), "after": judged(320), "difference": [30.0, 25.0, 35.0]},
        **changed,
    }


def page(folder: Path, **changed: Any) -> Page:
    (folder / "figures.json").write_text(json.dumps(figures(**changed)))
    return Page(render(folder).read_text())


def test_the_page_says_what_the_figures_say(tmp_path) -> None:
    text = page(tmp_path).text.replace("\u202f", " ").replace("\u00a0", " ")
    for said in (
        "Fine-tuning keeps 12.0 KiB for backward instead of 768 KiB: 64.0\u00d7 less.",
        "Within the budget. 12.0 KiB of 16.0 KiB",
        "50.00 % [45.12, 54.88] before, 80.00 % [75.80, 83.63] after fine-tuning",
        "difference +30.00 [+25.00, +35.00] points",
        "50.0 % of 5.12 k",
        "SGD with momentum: 1 for each number trained",
        "Codecs remember 3.00 KiB",
        "64\u00d73\u00d78\u00d78, float32; a larger one is refused",
        "palmette adapt -m 'timm:<small>'",
        "blocks.7.conv",
        "5 others",
    ):
        assert said in text, said


def test_the_page_stands_alone_and_is_the_same_again(tmp_path) -> None:
    found = page(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    assert first == render(tmp_path).read_bytes()
    assert b"<script" not in first
    assert [v for _, name, v in found.attributes if name in ("src", "href") and not v.startswith("#")] == []
    identities = [value for _, name, value in found.attributes if name == "id"]
    assert len(identities) == len(set(identities))


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({}, "good"),
        ({"budget": 11 * KIB}, "bad"),
        ({"budget": None}, "none"),
        ({"scope": "peak", "budget": 64 * KIB}, "bad"),
        ({"scope": "saved+gradients+optimizer", "budget": 31 * KIB}, "bad"),
        ({"scope": "saved+gradients+optimizer", "budget": 32 * KIB}, "good"),
    ],
)
def test_the_verdict_counts_what_the_scope_counts(changed, kind) -> None:
    assert verdict(figures(**changed))["kind"] == kind


def test_figures_that_are_missing_leave_no_holes(tmp_path) -> None:
    holders = figures()["holders"] | {"before": None}
    peak = figures()["peak"] | {"vanilla": None, "vanilla_where": None}
    layers = [row | {"before": None} for row in figures()["layers"]]
    validated = figures()["accuracy"] | {"split": "val"}
    history = [{k: v for k, v in entry.items() if not k.startswith("val")} for entry in figures()["history"]]
    found = page(tmp_path, holders=holders, peak=peak, layers=layers, accuracy=validated, history=history)
    for said in ("could not be run without data", "No test data was given", "Mean training loss of each epoch."):
        assert said in found.text
    assert "None" not in found.text
    assert "The epochs" not in page(tmp_path, history=[]).text
    many = [row | {"layer": f"stage.{i}.block.{i}.conv"} for i, row in enumerate(figures()["layers"] * 5)]
    assert "60 modules in the order of the network" in page(tmp_path, layers=many).text


def test_damaged_figures_are_told(tmp_path) -> None:
    kept = {key: value for key, value in figures().items() if key != "peak"}
    (tmp_path / "figures.json").write_text(json.dumps(kept))
    with pytest.raises(RunError, match="lacks 'peak'"):
        render(tmp_path)
