"""From a supernet to the network of a board: the search, what it returns, what it leaves on disk, the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import palmette as pm
from palmette.cli import main
from palmette.device import DeviceProfile
from palmette.errors import BudgetError, InputError
from palmette.meter.memory import peak_bytes
from palmette.supernet.boards import Recipe, parse_board, run_boards
from palmette.supernet.memory import MemoryModel
from palmette.supernet.search import search
from palmette.supernet.space import key_of
from palmette.supernet.specialize import specialize
from palmette.supernet.supernet import Supernet
from palmette.train.config import HealConfig


def run(*command):
    with pytest.raises(SystemExit) as left:
        main(list(command))
    return left.value.code


@pytest.fixture
def blobs():
    """Training, validation and test images of four colours."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(160, 3, 8, 8, generator=generator), torch.arange(160) % 4
    for i, label in enumerate(y.tolist()):
        x[i, label : label + 1] += 1.0
    parts = [TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 96), (96, 128), (128, 160))]
    return [DataLoader(part, batch_size=32) for part in parts]


@pytest.fixture
def net(nets):
    torch.manual_seed(0)
    return Supernet.from_model(nets.Mixed().eval(), torch.randn(2, 3, 8, 8))


def middle(net, **options):
    """A board that the largest network breaks and the smallest keeps."""
    free = MemoryModel(net, DeviceProfile(weights_in="flash"))
    low, high = free.ram_bytes(free.codes.encode([net.min(), net.max()]))
    return DeviceProfile(name="middle", ram=int(low + high) // 2, weights_in="flash", **options)


def test_the_search_beats_random_on_an_additive_value_and_measures_nothing_twice(net):
    memory, rng = MemoryModel(net, middle(net)), np.random.default_rng(1)
    weights = rng.random(memory.codes.width - 1) * 0.1
    seen = []

    def measure(configs):
        seen.extend(key_of(config) for config in configs)
        return [float(1 - np.exp(-weights @ net.space.encode(config))) for config in configs]

    found = search(memory, measure, measurements=40, rounds=3, seed=2)
    assert len(seen) == len(set(seen))
    assert len(found.found) == len(found.random) == 40
    assert found.best.value > found.best_random.value
    assert all(f.ram_bytes <= memory.profile.ram_bytes for f in (*found.found, *found.random))
    assert found.taken == found.best
    assert found.promise()["n"] == 20
    again = search(memory, measure, measurements=40, rounds=3, seed=2)
    assert again.found == found.found


def test_the_answer_fits_by_the_meter_and_is_rebuilt_from_its_file(net, nets, blobs, tmp_path):
    train, val, test = blobs
    torch.manual_seed(0)
    source = nets.Mixed().eval()
    profile = middle(net)
    options = {"profile": profile, "source": source, "measurements": 10, "rounds": 1, "batches": 2}
    found = specialize(net, train, val, test, run_dir=tmp_path / "run", **options)
    assert peak_bytes(found.model, 1, hold_inputs=False) <= profile.ram_bytes
    assert found.split == "test"
    assert found.evaluation.n == 32
    assert pm.evaluate(found.model, test).accuracy == found.evaluation.accuracy
    x = next(iter(test))[0]
    assert torch.equal(pm.load(source, tmp_path / "run" / "model.safetensors")(x), found.model(x))
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert len(figures["measurements"]) == len(figures["control"]) == 10
    for text in ("middle:", "10; the better was taken", "test samples"):
        assert text in str(found)
    again = specialize(net, train, val, test, run_dir=tmp_path / "run", resume=True, **options)
    assert again.config == found.config
    assert again.evaluation.accuracy == found.evaluation.accuracy


def test_impossible_boards_and_options_are_refused_before_anything_is_written(net, blobs, tmp_path):
    train, val, _ = blobs
    with pytest.raises(BudgetError, match=r"the smallest needs [\d,]+ bytes of RAM"):
        specialize(net, train, val, profile=DeviceProfile(ram=16), measurements=10)
    with pytest.raises(InputError, match="out of bounds"):
        specialize(net, train, val, profile=middle(net), measurements=3)
    with pytest.raises(BudgetError, match="device 'b'"):
        run_boards(net.network, train, val, boards=[DeviceProfile(name="b", ram=16)], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_boards_are_read_from_text():
    board = parse_board("nano:ram=256KiB,flash=1MiB,dtype=int8,weights_in=flash,inplace-elementwise=true,reserve=4KiB")
    assert (board.name, board.ram_bytes, board.flash_bytes, board.reserve_bytes) == ("nano", 2**18, 2**20, 4096)
    assert board.inplace_elementwise is True
    assert parse_board("free:").ram_bytes is None
    for text, said in (
        ("nano", "is no board"),
        (":ram=1KiB", "is no board"),
        ("nano:ram", "is no board"),
        ("nano:rum=1KiB", "has no 'rum'"),
        ("nano:ram=lots", "amount of memory"),
    ):
        with pytest.raises(InputError, match=said):
            parse_board(text)


def test_one_training_serves_every_board_and_ends_in_a_report(net, nets, blobs, tmp_path):
    torch.manual_seed(0)
    model = nets.Mixed().eval()
    boards = [middle(net), DeviceProfile(name="free", weights_in="flash")]
    recipe = Recipe(heal=HealConfig(epochs=1, lr=0.02), measurements=10, rounds=1, batches=2)
    said: list[str] = []
    options = {"boards": boards, "recipe": recipe, "run_dir": tmp_path / "run"}
    result = run_boards(model, *blobs, say=said.append, **options)
    assert [made.profile.name for made in result.boards] == ["middle", "free"]
    assert "networks" in said[0]
    for name in ("middle", "free"):
        files = {file.name for file in (tmp_path / "run" / "boards" / name).iterdir()}
        assert {"model.safetensors", "model.pt2", "figures.json"} <= files
    page = result.report.read_text()
    for text in ("One training, 2 boards", "middle", "RAM of the board", "What stayed as it is"):
        assert text in page
    weights = (tmp_path / "run" / "supernet.safetensors").read_bytes()
    again = run_boards(model, *blobs, resume=True, **options)
    assert (tmp_path / "run" / "supernet.safetensors").read_bytes() == weights
    assert [made.config for made in again.boards] == [made.config for made in result.boards]


def test_the_command_says_what_is_elastic(capsys, tmp_path):
    command = ["specialize", "-m", "palmette:digits-mobile", "-d", "digits", "-r", str(tmp_path / "run"), "--dry-run"]
    assert run(*command, "-b", "nano:ram=64KiB,dtype=int8,weights_in=flash") == 0
    printed = capsys.readouterr().out
    assert "choices: 9 of width" in printed
    assert "nano: RAM" in printed
    assert run(*command, "-b", "nano:ram=1KiB,weights_in=flash") == 2
    assert "No network of the supernet fits device 'nano'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
