"""`palmette shrink --devices 2`: one voice, one run folder, a plan as with one process; killed and resumed, refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NETWORK = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.mlp = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 8))

    def forward(self, x):
        return x + self.mlp(self.norm(x))

def network():
    torch.manual_seed(0)
    return nn.Sequential(*[Branch() for _ in range(4)], nn.Linear(8, 4))

def unseeded():
    torch.seed()
    return nn.Sequential(*[Branch() for _ in range(4)], nn.Linear(8, 4))

def loaders():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1600, 8, generator=generator)
    y = (x[:, :2] > 0).long() @ torch.tensor([1, 2])
    parts = [TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 1200), (1200, 1400), (1400, 1600))]
    return [DataLoader(part, batch_size=16, shuffle=index == 0) for index, part in enumerate(parts)]

def wrong_label():
    train, val, test = loaders()
    val.dataset.tensors[1][20] = 9  # in the second batch, which the second process answers
    return [train, val, test]

def lists():
    return [list(loader) for loader in loaders()]
"""


class Command:
    """The command line, with a network and data of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "net.py"
        self.source.write_text(NETWORK)

    def start(
        self, run: str, *options: str, network: str = "network", data: str = "loaders", **environment: str
    ) -> subprocess.Popen[str]:
        fixed = f"--model {self.source}:{network} --data {self.source}:{data} --max-drop 100 --epochs 3 --lr 0.05"
        fixed += " --no-controls --rounds 2"
        command = [
            sys.executable,
            "-m",
            "palmette",
            "shrink",
            *fixed.split(),
            "--run",
            str(self.folder / run),
            *options,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, run: str, *options: str, code: int = 0, **files: str) -> str:
        """What the command printed."""
        process = self.start(run, *options, **files)
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == code, printed
        return printed

    def weights(self, run: str) -> bytes:
        """The bytes of the network, without the names of files that the header may hold."""
        data = (self.folder / run / "model.safetensors").read_bytes()
        return data[8 + int.from_bytes(data[:8], "little") :]

    def plan(self, run: str) -> list[dict]:
        return json.loads((self.folder / run / "plan.json").read_text())["edits"]


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Command:
    return Command(tmp_path_factory.mktemp("devices"))


@pytest.fixture(scope="module")
def whole(command) -> str:
    """What an uninterrupted run over two processes printed."""
    return command.run("whole", "--cost", "macs", "--devices", "2")


def test_one_process_speaks(command, whole) -> None:
    for line in ("dense network:", "round 1:", "round 2:", "exporting", "Proof:", "Report:"):
        assert whole.count(line) == 1, whole
    for noise in ("distributed_backend", "GLOBAL_RANK", "Traceback", "Warning"):
        assert noise not in whole
    assert json.loads((command.folder / "whole" / "run.json").read_text())["config"]["processes"] == 2
    assert not list((command.folder / "whole").rglob(".tmp-*"))


def test_the_first_choice_is_that_of_one_process(command, whole) -> None:
    command.run("single", "--cost", "macs")
    one, two = command.plan("single")[0], command.plan("whole")[0]
    assert {key: one[key] for key in ("kind", "site", "fit")} == {key: two[key] for key in ("kind", "site", "fit")}
    assert two["slope"] == pytest.approx(one["slope"], rel=1e-12)


def test_a_killed_run_goes_on_to_the_same_weights(command, whole) -> None:
    process = command.start("killed", "--cost", "macs", "--devices", "2")
    stage = command.folder / "killed" / "stages" / "shrink-000-heal.json"
    deadline = time.monotonic() + 300
    while not stage.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)  # the other process lets go of the pipe: it ends too
    assert not (command.folder / "killed" / "model.safetensors").exists()
    refused = command.run("killed", "--cost", "macs", "--resume", code=2)
    assert "The run was started with another config.processes" in refused
    command.run("killed", "--cost", "macs", "--devices", "2", "--resume")
    assert command.weights("killed") == command.weights("whole")
    assert command.plan("killed") == command.plan("whole")


def free_port() -> str:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return str(door.getsockname()[1])


def test_two_nodes_train_as_two_devices_do(command, whole) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = [
        command.start("nodes", "--cost", "macs", "--nodes", "2", NODE_RANK=str(rank), **meeting) for rank in (0, 1)
    ]
    printed = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert "round 2:" in printed[0]
    assert printed[1] == ""
    assert command.weights("nodes") == command.weights("whole")


def test_timings_of_one_process_decide(command) -> None:
    command.run("timed", "--cost", "eager", "--devices", "2", "--rounds", "1")
    assert json.loads((command.folder / "timed" / "cost_table.json").read_text())["entries"]


@pytest.fixture(scope="module")
def searched(command) -> str:
    """What `auto` printed in one process."""
    return command.run("auto", "--cost", "macs", "--method", "auto")


def table(run: Path) -> dict[str, bytes]:
    """The importance table of a run."""
    return {file.name: file.read_bytes() for file in (run / "importance").iterdir()}


@pytest.mark.parametrize("options", [["--devices", "2"], ["--ray", "local"]])
def test_auto_finds_the_same_table_and_plan_over_processes_and_on_ray(command, searched, options) -> None:
    if "--ray" in options:
        pytest.importorskip("ray", reason="ray is not installed")
    name = f"auto{options[0]}"
    printed = command.run(name, "--cost", "macs", "--method", "auto", *options, "--rounds", "1")
    assert printed.count("round 1:") == 1, printed
    for noise in ("Traceback", "Warning", "INFO", "ray::"):
        assert noise not in printed
    assert table(command.folder / name) == table(command.folder / "auto")
    first = [json.loads((command.folder / run / "stages" / "probe-000.json").read_text()) for run in ("auto", name)]
    assert first[0] == first[1]
    choices = [command.folder / run / "stages" / "auto-000-000-choice.json" for run in ("auto", name)]
    assert choices[0].read_bytes() == choices[1].read_bytes()


def test_an_interrupted_search_goes_on_from_its_table(command, searched) -> None:
    run = command.folder / "interrupted"
    process = command.start("interrupted", "--cost", "macs", "--method", "auto")
    deadline = time.monotonic() + 300
    while len(list(run.glob("importance/[!.]*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    kept = {file.name: file.stat().st_mtime_ns for file in run.glob("importance/[!.]*")}
    assert len(kept) >= 3
    command.run("interrupted", "--cost", "macs", "--method", "auto", "--resume")
    assert {name: (run / "importance" / name).stat().st_mtime_ns for name in kept} == kept
    assert table(run) == table(command.folder / "auto")
    assert command.plan("interrupted") == command.plan("auto")
    assert command.weights("interrupted") == command.weights("auto")


def test_networks_that_differ_are_refused_once(command) -> None:
    printed = command.run("unseeded", "--cost", "macs", "--devices", "2", code=2, network="unseeded")
    assert printed.count("The processes were started for different runs: another network") == 1, printed
    assert not (command.folder / "unseeded").exists()


def test_an_error_of_another_process_is_told(command) -> None:
    printed = command.run("label", "--cost", "macs", "--devices", "2", code=2, data="wrong_label")
    assert printed.count("palmette: ") == 1, printed
    assert "evaluation, batch 1" in printed
    assert "Traceback" not in printed


def test_data_that_cannot_be_dealt_out_are_refused_before_anything_starts(command) -> None:
    printed = command.run("lists", "--cost", "macs", "--devices", "2", code=2, data="lists")
    assert "The training data cannot be dealt out to several processes" in printed
    assert printed.count("\n") == 1, printed


def test_a_notebook_is_refused() -> None:
    text = "import sys; sys.ps1 = '>'; from palmette.train.spread import launched; launched(2, 1, 'auto')"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=False)
    assert "InputError: 2 devices on 1 node cannot be started (at --devices, --nodes)" in done.stderr
