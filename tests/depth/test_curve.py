"""`curve`: several healed points in one table, the best named, a page and a picture written."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from palmette.depth.curve import curve, spread
from palmette.depth.front import Point
from palmette.errors import InputError, RunError
from palmette.graph import Plan, load
from palmette.report import render
from palmette.report.front import render_front
from palmette.train.loop import HealConfig


@pytest.fixture(scope="module")
def whole(trained, blobs, quick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve") / "run"
    result = curve(
        trained, blobs.train, blobs.val, blobs.test, points=2, cost="macs", heal=quick, max_drop=5, run_dir=folder
    )
    return result, folder


def test_points_are_beside_dense_and_its_control(whole) -> None:
    result, _ = whole
    assert [row["name"] for row in result.rows] == ["dense", "depth 1", "depth 2", "dense + same training"]
    macs = [row["macs"] for row in result.rows[:3]]
    assert macs == sorted(macs, reverse=True)
    assert [row["trainings"] for row in result.rows] == [0, 1, 1, 1]
    assert all(row["n"] == 120 for row in result.rows)


def test_the_best_is_chosen_on_validation_data(whole) -> None:
    result, _ = whole
    dense = result.rows[0]["val"]["accuracy"]
    best = next(row for row in result.rows if row["name"] == result.best)
    assert 100 * (dense - best["val"]["accuracy"]) <= 5
    assert result.best in result.message or "No other network" in result.message


def test_every_file_is_there_and_loads(whole, trained) -> None:
    result, folder = whole
    for name in ("figures.json", "front.svg", "report.html", "depth-1.safetensors", "depth-2.safetensors"):
        assert (folder / name).stat().st_size > 0
    assert "<svg" in (folder / "front.svg").read_text()
    page = (folder / "report.html").read_text()
    assert not re.findall(r"https?://(?!www\.w3\.org)", page)
    load(trained, folder / "depth-1.safetensors")
    assert json.loads((folder / "figures.json").read_text())["best"] == result.best


def test_a_finished_curve_is_read_back(whole, trained, blobs, quick) -> None:
    result, folder = whole
    again = curve(
        trained,
        blobs.train,
        blobs.val,
        blobs.test,
        points=2,
        cost="macs",
        heal=quick,
        max_drop=5,
        run_dir=folder,
        resume=True,
    )
    assert again.rows == result.rows


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"points": 0}, "points = 0"),
        ({"width": (1.5,)}, "width = 1.5"),
        ({"width": (0,)}, "width"),
        ({"width": (0.25, 0.5, 0.25)}, "width = 0.25 is given twice"),
    ],
)
def test_bad_input_is_refused(trained, blobs, tmp_path, options, says) -> None:
    with pytest.raises(InputError, match=says):
        curve(trained, blobs.train, blobs.val, run_dir=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_widths_near_each_other_are_told_apart_and_healed_with_features(trained, blobs) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning (the extra `width`) is not installed")
    inside = HealConfig(epochs=1, lr=1e-2, features=1.0)  # the dense network is the teacher, without distillation too
    options = {"points": 1, "cost": "macs", "heal": inside, "controls": False, "protect": ["1"]}  # a block to compare
    rows = curve(trained, blobs.train, blobs.val, width=(0.246, 0.254), **options).rows
    narrow = {row["name"]: row["params"] for row in rows if row["width"]}
    assert list(narrow) == [f"{row}, width {w} %" for row in ("dense", "depth 1") for w in ("75.4", "74.6")]
    assert narrow["dense, width 75.4 %"] > narrow["dense, width 74.6 %"]


class Recurrent(nn.Module):
    """A GRU and a tanh, which ONNX Runtime does not quantise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.GRU(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x)[0][:, -1])


def test_what_cannot_be_quantised_is_left_out_and_said(blobs, quick) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    points, labels = blobs.parts[1].tensors
    loader = DataLoader(TensorDataset(points.unsqueeze(1), labels), batch_size=48)
    lines: list[str] = []
    result = curve(Recurrent().eval(), loader, loader, cost="macs", heal=quick, int8=True, say=lines.append)
    assert [row["name"] for row in result.rows] == ["dense"]
    said = "dense is not in the table in 8 bits: Nothing in this network can be quantised"
    assert said in result.message
    assert any(line.startswith(said) for line in lines)


def test_points_without_hope_are_counted(trained, blobs, quick, monkeypatch) -> None:
    monkeypatch.setattr("palmette.depth.curve.hopeful", lambda _, points: list(points[:1]))
    lines: list[str] = []
    options = {"points": 2, "cost": "macs", "heal": quick, "max_drop": 50, "controls": False}
    result = curve(trained, blobs.train, blobs.val, say=lines.append, **options)
    assert [row["name"] for row in result.rows] == ["dense", "depth 1"]
    (line,) = [line for line in lines if "left out" in line]
    assert re.fullmatch(r"\d+ of \d+ points of the front are left out, .*", line)


def test_points_are_spread_over_the_front() -> None:
    points = [
        Point(keys=(str(c),), plan=Plan([]), loss=1.0, macs=c, latency_ms=float(c)) for c in (9, 8, 7, 6, 5, 4, 3, 2)
    ]
    assert [points[i].cost for i in spread(points, 4, 10.0)] == [8, 6, 4, 2]
    assert spread(points[:2], 4, 10.0) == [0, 1]


def test_the_page_of_a_curve_is_drawn_again(whole) -> None:
    _, folder = whole
    page = (folder / "report.html").read_text()
    assert render(folder).read_text() == page
    assert page.index("Difference, points") < page.index("Multiply-adds")


def test_another_folder_is_no_curve(tmp_path) -> None:
    (tmp_path / "figures.json").write_text("{}")
    with pytest.raises(RunError, match="holds no curve"):
        render_front(tmp_path)
