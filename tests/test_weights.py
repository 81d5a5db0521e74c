"""Weights files: what is read, and that nothing else is."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from palmette.errors import InputError
from palmette.weights import load_weights


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def refuse(file, model, match):
    """The file is refused in one line that names it, and the model is as it was."""
    before = state(model)
    with pytest.raises(InputError, match=match) as error:
        load_weights(model, file)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)
    assert same(before, state(model))


@pytest.fixture
def source():
    torch.manual_seed(1)
    return net()


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("w.safetensors", None),
        ("w.bin", None),  # a safetensors file of another name
        ("w.pt", lambda s: s),
        ("w.pth", lambda s: {"state_dict": s, "epoch": 3}),
        ("w.pt", lambda s: {"model": s, "optimizer": {"lr": 0.1}}),
        ("w.pt", lambda s: {f"module.{k}": v for k, v in s.items()}),
        ("w.pt", lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}),
    ],
)
def test_every_accepted_form_loads_the_same_weights(tmp_path, source, name, wrap):
    file = tmp_path / name
    save_file(state(source), file) if wrap is None else torch.save(wrap(state(source)), file)
    model = net()
    assert not same(state(model), state(source))
    load_weights(model, file)
    assert same(state(model), state(source))


def test_an_old_format_of_torch_is_read(tmp_path, source):
    file = tmp_path / "w.pt"
    torch.save(state(source), file, _use_new_zipfile_serialization=False)
    model = net()
    load_weights(model, file)
    assert same(state(model), state(source))


def test_half_precision_weights_become_the_models(tmp_path, source):
    file = tmp_path / "w.safetensors"
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state(source).items()}, file)
    model = net()
    load_weights(model, file)
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, source[0].weight.half().float())


def test_a_prefix_is_named(tmp_path, source):
    file = tmp_path / "w.safetensors"
    save_file({f"net.{name}": tensor for name, tensor in state(source).items()}, file)
    refuse(file, net(), "Take 'net.' off the names in the file")
    save_file(state(source), file)
    refuse(file, nn.ModuleDict({"net": net()}), "Put 'net.' before the names in the file")


def test_missing_file(tmp_path):
    refuse(tmp_path / "none.safetensors", net(), "no such weights file")
    refuse(tmp_path, net(), "no such weights file")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.97])
def test_truncated_files(tmp_path, source, name, keep):
    file = tmp_path / name
    save_file(state(source), file) if name.endswith("safetensors") else torch.save(state(source), file)
    raw = file.read_bytes()
    file.write_bytes(raw[: keep if isinstance(keep, int) else int(keep * len(raw))])
    refuse(file, net(), "truncated or no")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_files_of_another_kind(tmp_path, name):
    file = tmp_path / name
    file.write_text("these are notes about weights, not weights")
    refuse(file, net(), "truncated or no")


def test_words_of_the_reader_that_mean_nothing_are_left_out(tmp_path):
    file = tmp_path / "w.pt"
    file.write_text("hello")
    refuse(file, net(), r"no weights file \(at [^)]*\)$")


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


@pytest.mark.parametrize("plain", [False, True])
def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path, plain):
    file, trace = tmp_path / "w.pt", tmp_path / "was-run"
    if plain:
        file.write_bytes(pickle.dumps(Trap(trace)))
    else:
        torch.save({"state_dict": Trap(trace)}, file)
    refuse(
        file, net(), rf"weights file refused.*\({'operand 149' if plain else 'io.open'}\).*could run code.*safetensors"
    )
    assert not trace.exists()


def test_a_pickled_module_is_refused(tmp_path, source):
    file = tmp_path / "w.pt"
    torch.save(source, file)
    refuse(file, net(), r"more than tensors \(torch\.nn\.modules\.container\.Sequential\).*Save model\.state_dict")


def test_a_file_without_a_state_dict(tmp_path):
    file = tmp_path / "w.pt"
    torch.save([torch.zeros(2)], file)
    refuse(file, net(), "no state dict.*a list")
    torch.save({"epoch": 3, "lr": 0.1}, file)
    refuse(file, net(), "no state dict.*a dict of epoch, lr")


def test_wrong_names_are_named_both_ways(tmp_path, source):
    file = tmp_path / "w.safetensors"
    wrong = {f"x.{k}" if k.startswith("4") else k: v for k, v in state(source).items()}
    save_file(wrong, file)
    refuse(file, net(), r"2 of the model's .*\(4\.weight, 4\.bias\); 2 of the file's .*\(x\.4\.\w+, x\.4\.\w+\)")


def test_long_lists_of_names_are_cut(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({f"a{i}": torch.zeros(1) for i in range(9)}, file)
    refuse(file, net(), r"9 of the file's are not in the model \(a0, a1, a2, \.\.\.\)")


def test_wrong_shapes_are_named_with_both(tmp_path, source):
    file = tmp_path / "w.safetensors"
    save_file(state(source) | {"4.weight": torch.zeros(7, 144), "4.bias": torch.zeros(7)}, file)
    refuse(file, net(), "2 tensors are of the wrong shape.*4.weight is 7x144, the model's 10x144")


def test_quantised_weights_are_not_taken_for_real_ones(tmp_path, source):
    file = tmp_path / "w.safetensors"
    save_file(state(source) | {"4.weight": torch.zeros(10, 144, dtype=torch.int8)}, file)
    refuse(file, net(), "1 tensor is of the wrong kind.*4.weight is torch.int8, the model's torch.float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path, source, value):
    file = tmp_path / "w.safetensors"
    broken = state(source)
    broken["0.weight"][1, 0, 2, 2] = value
    save_file(broken, file)
    refuse(file, net(), "NaN or infinite values.*0.weight")


def test_counters_of_batch_norm_may_be_absent(tmp_path, source):
    file = tmp_path / "w.safetensors"
    save_file({k: v for k, v in state(source).items() if "num_batches" not in k}, file)
    model = net()
    load_weights(model, file)
    assert torch.equal(model[4].weight, source[4].weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


def test_a_shared_tensor_is_needed_once(tmp_path):
    file, source, model = tmp_path / "w.safetensors", Tied(), Tied()
    save_file({k: v for k, v in state(source).items() if k != "second.weight"}, file)
    load_weights(model, file)
    assert torch.equal(model.second.weight, source.first.weight)
    assert model.second.weight is model.first.weight
    save_file({k: v for k, v in state(source).items() if "weight" not in k}, file)
    refuse(file, model, "2 of the model's tensors are not in the file")


def test_a_shrunk_network_is_recognised(tmp_path):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata={"palmette": "1"})
    refuse(file, net(), r"rebuild it with palmette\.load")
