"""`palmette shrink` on real data: ResNet-56 and MobileNetV2 (96 px) on CIFAR-10, with both controls.

Usage: PALMETTE_DATA=DIR python benchmarks/shrink_cifar10.py [resnet56] [mobilenetv2] [--runs DIR]

Each network runs through the command line, so that what is measured is what a user gets; a run that was cut off goes
on where it stopped. Removals are chosen on the 2,000 validation images and reported once on the 4,000 test images.
MobileNetV2 (ImageNet weights) is first fine-tuned on CIFAR-10. Sizes fit two CPU cores and about half an hour.
The accounting table is printed and written to benchmarks/results/shrink_NAME.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from stored import folder, mobilenetv2

from palmette.resolve import resolve_data
from palmette.train.evaluate import evaluate
from palmette.train.loop import HealConfig, heal

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
HEAL = ["--max-drop", "1", "--epochs", "1", "--distill", "0.9"]
SHRINK: dict[str, list[str]] = {
    "resnet56": ["--method", "block_influence", "--rounds", "5", "--lr", "0.001", *HEAL],
    "mobilenetv2": ["--method", "easier", "--rounds", "4", "--lr", "0.0003", "--optimizer", "adamw", *HEAL],
}
DATA = {
    "resnet56": "cifar10:{}?norm=imagenet&augment=flip-shift&train=4000&batch=64",
    "mobilenetv2": "cifar10:{}?size=96&norm=half&augment=flip&train=2500&batch=64",
}
FINE_TUNE = "cifar10:{}?size=96&norm=half&augment=flip&train=10000&batch=64"


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*SHRINK, []], default=list(SHRINK))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    for name in arguments.networks:
        show(shrink(name, arguments.runs))


def shrink(name: str, runs: Path) -> dict[str, Any]:
    """The figures of one network, by the command line."""
    run = runs / f"cifar10-{name}"
    data = DATA[name].format(folder() / "cifar10")
    weights = fine_tuned(runs) if name == "mobilenetv2" else None
    command = [
        sys.executable,
        "-m",
        "palmette",
        "shrink",
        "-m",
        f"{HERE / 'stored.py'}:{name}",
        "-d",
        data,
        "-r",
        str(run),
    ]
    command += SHRINK[name] + (["-w", str(weights)] if weights else []) + (["--resume"] if run.exists() else [])
    subprocess.run(command, check=True)
    figures: dict[str, Any] = json.loads((run / "figures.json").read_text())
    root = str(folder().resolve())
    text = json.dumps(figures, indent=1).replace(str(folder()), "$PALMETTE_DATA").replace(root, "$PALMETTE_DATA")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"shrink_{name}.json").write_text(text.replace(str(HERE), "benchmarks") + "\n")
    return figures


def fine_tuned(runs: Path) -> Path:
    """Weights of MobileNetV2 after one epoch on 10,000 CIFAR-10 images at 96 px."""
    file = runs / "mobilenetv2-cifar10.safetensors"
    if file.exists():
        return file
    runs.mkdir(parents=True, exist_ok=True)
    data = resolve_data(FINE_TUNE.format(folder() / "cifar10"))
    network = mobilenetv2()
    heal(
        network,
        data.train,
        HealConfig(epochs=1, lr=5e-4, optimizer="adamw", warmup=0.1),
        checkpoint=runs / "mobilenetv2-checkpoint.safetensors",
        label="fine-tune",
    )
    seen = evaluate(network, data.val)
    print(f"MobileNetV2 fine-tuned: {100 * seen.accuracy:.2f} % on {seen.n} validation images", flush=True)
    part = file.with_suffix(".part")
    save_file(network.state_dict(), str(part))
    part.replace(file)
    return file


def show(figures: dict[str, Any]) -> None:
    """The accounting table, a line a network."""
    print(f"\n{figures['model']}: {figures['message']}")
    for row in figures["rows"]:
        clocks = ", ".join(f"{t['median_ms']:.2f} ms {t['runtime']}" for t in row["latency"])
        paired = row["difference"]
        points = "" if paired is None else "difference {:+.2f} [{:+.2f}, {:+.2f}] points".format(*paired)
        top1 = "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} % of {row['n']}"
        size = f"depth {row['depth']:>3}  {row['macs'] / 1e6:8.2f} M MACs  {row['params'] / 1e3:8.1f} k"
        print(f"  {row['name']:<22} {size}  {clocks}  {top1}  {points}")


if __name__ == "__main__":
    main()
