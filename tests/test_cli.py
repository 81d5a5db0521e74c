"""The command line: help that teaches, one line and exit code 2 for bad input, and every command on a small network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from palmette.cli import main
from palmette.cli.app import app
from palmette.models import build

COMMANDS = [
    "demo",
    "shrink",
    "curve",
    "specialize",
    "adapt",
    "profile",
    "sites",
    "measure",
    "collapse",
    "export",
    "report",
]
COMMANDS += ["methods"]

SOURCE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def _part(n, shift=0, wide=8):
    x = torch.randn(n, wide, generator=torch.Generator().manual_seed(n))
    return TensorDataset(x, (x[:, 0] > 0).long() + shift)

def _loaders(*parts):
    return [DataLoader(p, batch_size=16, shuffle=not i, generator=torch.Generator()) for i, p in enumerate(parts)]

def net():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 2)]
    return nn.Sequential(*layers)

def linear():
    return nn.Sequential(nn.Linear(8, 2))

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)
    def forward(self, x):
        if x.sum().item() > 0:
            return self.layer(x)
        return -self.layer(x)

def odd():
    return Odd()

def data():
    return _loaders(_part(96), _part(48), _part(32))

def empty():
    return _loaders(_part(96), _part(0), _part(32))

def shifted():
    return _loaders(_part(96, 5), _part(48, 5), _part(32, 5))

def wide():
    return _loaders(_part(96, 0, 9), _part(48, 0, 9), _part(32, 0, 9))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "net.py"
    path.write_text(SOURCE)
    return path


def run(*arguments: object) -> int:
    """Exit code of one command in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def test_help_teaches_with_an_example_for_every_command(capsys) -> None:
    assert {command.name for command in app.registered_commands} == set(COMMANDS)
    for name in COMMANDS:
        assert run(name, "--help") == 0
        assert f"Example: palmette {name}" in " ".join(capsys.readouterr().out.split())


def test_version(capsys) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("palmette 0.")


def test_help_needs_no_torch() -> None:
    code = "import sys, palmette, palmette.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_names_are_where_they_are_said_to_be() -> None:
    import palmette

    assert set(palmette.__all__) == set(palmette._HOME)
    for name in palmette.__all__:
        assert getattr(palmette, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        palmette.no_such_name  # noqa: B018


def test_methods_are_listed(capsys) -> None:
    assert run("methods") == 0
    printed = capsys.readouterr().out
    shrinks, adapts = printed.split("Methods of palmette adapt")
    for name in ("easier", "random", "block_influence"):
        assert name in shrinks
    for name in ("asi", "trady", "wasi"):
        assert f"\n{name} " in adapts
        assert f"\n{name} " not in shrinks


def test_the_methods_of_one_command_are_listed(capsys) -> None:
    assert run("methods", "adapt") == 0
    printed = capsys.readouterr().out
    assert "\nasi " in printed
    assert "easier" not in printed


def test_the_options_of_a_method_are_listed(capsys) -> None:
    assert run("methods", "auto") == 0
    printed = capsys.readouterr().out
    for line in (r"importance +answers or healed +healed", r"trainings +whole number in \[1, inf\) +3"):
        assert re.search(line, printed), printed
    assert run("methods", "aut") == 2
    assert "Did you mean 'auto'?" in capsys.readouterr().err


def test_sites_and_measure(source, capsys) -> None:
    assert run("sites", "-m", f"{source}:net", "-d", f"{source}:data") == 0
    assert "relu" in capsys.readouterr().out
    assert run("sites", "-m", "torchvision:resnet18", "--image-size", "32") == 0
    printed = capsys.readouterr().out
    assert "\n1: nothing mergeable: 'max_pool2d' reads it" in printed
    assert "merging would not save MACs" in printed
    assert run("measure", "-m", f"{source}:net", "-d", f"{source}:data") == 0
    assert "parameters" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory) -> Path:
    """A run folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = [
        "shrink",
        "-m",
        f"{source}:net",
        "-d",
        f"{source}:data",
        "--run",
        folder,
        "--max-drop",
        "100",
        "--cost",
        "macs",
    ]
    assert run(*arguments, "--epochs", "1", "--no-controls", "--rounds", "1") == 0
    return folder


def test_shrink_prints_the_accounting_table(finished, capsys) -> None:
    figures = json.loads((finished / "figures.json").read_text())
    assert figures["rows"][1]["macs"] < figures["rows"][0]["macs"]
    assert figures["model"].endswith("net.py:net")
    assert figures["command"].split()[0] == "palmette"


def test_report_is_drawn_again(finished, capsys) -> None:
    report = finished / "report.html"
    report.unlink()
    assert run("report", finished) == 0
    assert report.stat().st_size > 1000
    assert run("report", finished / "nowhere") == 2
    _one_line(capsys.readouterr().err, "no such run folder")


def test_collapse_and_export(source, finished, tmp_path, capsys) -> None:
    model = ("-m", f"{source}:net", "-d", f"{source}:data")
    assert run("collapse", *model, "--plan", finished / "plan.json", "--out", tmp_path / "small.safetensors") == 0
    assert "relative output error" in capsys.readouterr().out
    assert run("export", *model, "--saved", tmp_path / "small.safetensors", "--out", tmp_path / "small.pt2") == 0
    program = torch.export.load(tmp_path / "small.pt2").module()
    assert program(torch.randn(3, 8)).shape == (3, 2)


def test_random_weights_are_said_to_be_random(tmp_path, capsys) -> None:
    out = ("--out", tmp_path / "mlp.pt2")
    assert run("export", "-m", "palmette:mlp", "-d", "digits", *out) == 0
    assert "palmette:mlp has random weights" in capsys.readouterr().out
    save_file(build("mlp").state_dict(), tmp_path / "mlp.safetensors")
    weights = tmp_path / "mlp.safetensors"
    assert run("export", "-m", "palmette:mlp", "--image-size", "8", "-w", weights, *out) in (0, 2)
    assert "random weights" not in capsys.readouterr().out


@pytest.mark.slow
def test_random_weights_are_those_of_the_seed(tmp_path, capsys) -> None:
    options = [
        "-m",
        "palmette:mlp",
        "-d",
        "digits",
        "--epochs",
        "0",
        "--rounds",
        "0",
        "--cost",
        "macs",
        "--no-controls",
    ]
    assert run("shrink", *options, "--run", tmp_path / "run") == 0
    assert run("shrink", *options, "--run", tmp_path / "run", "--resume") == 0
    assert run("shrink", *options, "--run", tmp_path / "run", "--resume", "--seed", "1") == 2


def test_defaults_of_healing_are_what_the_help_says() -> None:
    from palmette.train.loop import HealConfig

    config = HealConfig()
    assert (config.epochs, config.lr, config.optimizer, config.distill) == (5, 0.01, "sgd", 0.0)


def test_dry_run_writes_nothing(source, tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    assert (
        run("shrink", "-m", f"{source}:net", "-d", f"{source}:data", "--run", folder, "--cost", "macs", "--dry-run")
        == 0
    )
    assert "down to" in capsys.readouterr().out
    options = ["--run", folder, "--cost", "macs", "--dry-run", "--method", "easier"]
    assert run("shrink", "-m", f"{source}:net", "-d", f"{source}:data", *options) == 0
    assert "1 candidate pays; healing in 1 round: " in capsys.readouterr().out
    assert not folder.exists()


@pytest.mark.slow
def test_demo(tmp_path, capsys) -> None:
    folder = tmp_path / "demo"
    threads = torch.get_num_threads()
    try:
        assert run("demo", "--run", folder, "--epochs", "8", "--heal-epochs", "2") == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "dense + same" in " ".join(printed.split())
    assert "report.html" in printed
    rows = json.loads((folder / "figures.json").read_text())["rows"]
    assert rows[1]["depth"] < rows[0]["depth"]
    assert run("demo", "--run", folder) == 2


class Malicious:
    """Pickles into a call of print."""

    def __reduce__(self):
        return (print, ("this ran",))


def _weights(folder: Path, kind: str) -> Path:
    """A weights file for palmette:mlp that is wrong in one way."""
    state = build("mlp").state_dict()
    path = folder / f"{kind}.safetensors"
    if kind == "truncated":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "keys":
        save_file({f"other.{name}": tensor for name, tensor in state.items()}, path)
    elif kind == "shapes":
        save_file({name: tensor[..., :1].clone() for name, tensor in state.items()}, path)
    elif kind == "pickle":
        path = folder / "pickle.pt"
        torch.save({"1.weight": Malicious()}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "missing.safetensors"),
        ("truncated", "truncated"),
        ("keys", "1.weight"),
        ("shapes", "shape"),
        ("pickle", "code"),
    ],
)
def test_bad_weights(kind, says, tmp_path, capsys) -> None:
    weights = _weights(tmp_path, kind)
    folder = tmp_path / "run"
    assert run("shrink", "-m", "palmette:mlp", "-d", "digits", "-w", weights, "--run", folder) == 2
    captured = capsys.readouterr()
    assert "this ran" not in captured.out + captured.err
    _one_line(captured.err, says)
    assert not folder.exists()


def _one_line(printed: str, says: str) -> None:
    lines = printed.strip().splitlines()
    assert len(lines) == 1, printed
    assert lines[0].startswith("palmette: ")
    assert says in lines[0], printed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"-m": "{source}:odd"}, "net.py"),
        ({"-m": "{source}:linear"}, "no site to remove"),
        ({"-m": "{source}:nothing"}, "nothing"),
        ({"-m": "palmette:nothing"}, "nothing"),
        ({"-d": "{source}:empty"}, "empty"),
        ({"-d": "{source}:shifted"}, "Label"),
        ({"-d": "{source}:wide"}, "9"),
        ({"-d": "nowhere"}, "nowhere"),
        ({"--method": "easer"}, "Did you mean 'easier'"),
        ({"--max-drop": "-1"}, "max_drop=-1"),
        ({"--lr": "1e30"}, "epoch"),
        ({"--target-latency": "soon"}, "soon"),
        ({"--cost": "abacus"}, "abacus"),
        ({"--cost": "none.json"}, "none.json"),
        ({"--run": "{source}/run"}, "net.py"),
        ({"--protect": "no.such.site"}, "no.such.site"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, says, source, tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    chosen = {
        "-m": "{source}:net",
        "-d": "{source}:data",
        "--run": str(folder),
        "--cost": "macs",
        "--epochs": "1",
    } | options
    arguments = [part.format(source=source) for pair in chosen.items() for part in pair]
    assert run("shrink", *arguments) == 2
    _one_line(capsys.readouterr().err, says)
    assert not folder.exists()
    assert list(source.parent.glob("run*")) == []


def test_an_image_size_that_the_model_refuses(tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    assert run("shrink", "-m", "palmette:digits-mlp", "-d", "digits", "--image-size", "7", "--run", folder) == 2
    _one_line(capsys.readouterr().err, "7x7")
    assert not folder.exists()


def test_debug_shows_the_error_itself(source, tmp_path) -> None:
    from palmette.errors import UnknownMethod

    with pytest.raises(UnknownMethod):
        main(["--debug", "shrink", "-m", f"{source}:net", "-d", f"{source}:data", "--method", "easer"])


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "palmette", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("palmette ")
