"""The table of the README: `palmette demo` on scikit-learn's digits, with both controls.

Usage: python benchmarks/shrink_digits.py [--run DIR]

Runs the command a newcomer runs, and writes its figures to benchmarks/results/shrink_digits.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from palmette.files import read_json, write_json

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    """Run the demo, or go on with it, and keep its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    run = parser.parse_args().run
    resume = ["--resume"] if (run / "run.json").exists() else []
    subprocess.run([sys.executable, "-m", "palmette", "demo", "--run", str(run), *resume], check=True)
    RESULTS.mkdir(exist_ok=True)
    figures = read_json(run / "figures.json")
    figures["command"] = figures["environment"]["command"] = "palmette demo"
    write_json(RESULTS / "shrink_digits.json", figures)


if __name__ == "__main__":
    main()
