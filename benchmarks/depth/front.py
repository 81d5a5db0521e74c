"""The whole front of one network: depth, width and 8 bits as one curve, healed, timed and reported.

Usage: PALMETTE_DATA=DIR python benchmarks/depth/front.py NETWORK [--points 3] [--width 0.25] [--no-int8] [--runs DIR]
       NETWORK: resnet20, resnet56, mobilenetv2 or vit. [--train N] [--epochs E] [--threads N]

Data and healing are those of compare.py. Figures go to benchmarks/results/depth_curve_NETWORK.json, the picture to
docs/assets/front-NETWORK.svg; a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import stored
from compare import RESULTS, SETTINGS, dense_network

import palmette as pm
from palmette.resolve import resolve_data

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "assets"


def main() -> None:
    """Trace the front and keep its figures and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=sorted(SETTINGS))
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--width", type=float, action="append")
    parser.add_argument("--no-int8", action="store_true")
    parser.add_argument("--train", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting = SETTINGS[given.network]
    changes = {name: getattr(given, name) for name in ("train", "epochs") if getattr(given, name) is not None}
    setting = replace(setting, **changes)
    data = resolve_data(setting.data.format(stored.folder() / "cifar10", setting.train))
    place = given.runs / "front" / given.network
    result = pm.curve(
        dense_network(given.network, given.runs).eval(),
        data.train,
        data.val,
        data.test,
        example_inputs=data.example_inputs,
        calibration_loader=data.calibration,
        points=given.points,
        width=given.width or [0.25],
        int8=not given.no_int8,
        heal=replace(setting.heal, epochs=setting.epochs),
        threads=given.threads,
        cost="onnxruntime",
        run_dir=place,
        resume=(place / "run.json").exists(),
        names={"model": given.network, "data": f"CIFAR-10, {setting.train:,} images"},
        say=lambda line: print(line, flush=True),
    )
    print(result)
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(place / "figures.json", RESULTS / f"depth_curve_{given.network}.json")
    shutil.copyfile(place / "front.svg", PICTURES / f"front-{given.network}.svg")


if __name__ == "__main__":
    main()
