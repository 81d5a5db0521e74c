"""Checkpoint files, the configuration, and the distillation loss."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from palmette.errors import InputError, RunError
from palmette.train import HealConfig, distillation_loss, load_checkpoint, save_checkpoint
from palmette.train.checkpoint import (
    digest,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
)

KINDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


def all_kinds() -> dict[str, torch.Tensor]:
    base = torch.arange(6).reshape(2, 3)
    tensors = {str(kind): (base % 2 if kind == torch.bool else base).to(kind) for kind in KINDS}
    whole = torch.randn(8)
    views = {"a": whole[:4], "b": whole[2:], "turned": torch.randn(3, 4).T, "scalar": torch.tensor(3.0)}
    return tensors | views | {"empty": torch.zeros(0, 2)}


def test_every_kind_of_tensor_comes_back(tmp_path):
    tensors, meta = all_kinds(), {"b": [0.1, None, "ü"], "a": {"x": True}}
    save_checkpoint(tmp_path / "c", tensors, meta)
    loaded, found = load_checkpoint(tmp_path / "c")
    assert found == meta
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_equal_content_gives_equal_bytes(tmp_path):
    tensors = all_kinds()
    backwards = {name: tensors[name].clone() for name in reversed(tensors)}
    for attempt in range(5):
        save_checkpoint(tmp_path / f"a{attempt}", tensors, {"x": 1, "y": 2})
        save_checkpoint(tmp_path / f"b{attempt}", backwards, {"y": 2, "x": 1})
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def test_damage_anywhere_is_noticed(tmp_path):
    file, tensors, meta = tmp_path / "c", {"a": torch.arange(3.0), "b": torch.arange(4)}, {"lr": 0.1}
    save_checkpoint(file, tensors, meta)
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(whole[:position])
        with pytest.raises(RunError, match="damaged"):
            load_checkpoint(file)
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            found = load_checkpoint(file)
        except RunError:
            continue
        # a bit that says nothing: the content is what was stored, bit for bit
        assert digest(*found) == digest(tensors, meta)


def test_foreign_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(RunError, match=r"damaged.*plain\.safetensors"):
        load_checkpoint(tmp_path / "plain.safetensors")
    with pytest.raises(RunError, match=r"cannot be read.*absent"):
        load_checkpoint(tmp_path / "absent")


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model.register_buffer("passing", torch.zeros(2), persistent=False)
    return model


def test_shared_parameters_are_stored_once_and_stay_shared(tmp_path):
    source, target = tied(), tied()
    source.passing.fill_(5)
    tensors = model_tensors(source)
    assert "model.2.weight" not in tensors
    save_checkpoint(tmp_path / "c", tensors, {})
    load_model_tensors(target, load_checkpoint(tmp_path / "c")[0], "c")
    assert target[2].weight is target[0].weight
    assert digest(model_tensors(target)) == digest(model_tensors(source))
    assert target.passing.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (nn.Sequential(nn.Linear(3, 3)), "'1.bias' does not fit .*the model has no such tensor"),
        (
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3)),
            "the file has no such tensor",
        ),
        (
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 4)),
            r"\(3, 3\) in the file, .*\(4, 3\) in the model",
        ),
        (
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double(),
            "float32 .* in the file, torch.float64",
        ),
    ],
)
def test_weights_of_another_model_are_named(other, fault):
    source = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    before = digest(model_tensors(other))
    with pytest.raises(RunError, match=fault):
        load_model_tensors(other, model_tensors(source), "file")
    assert digest(model_tensors(other)) == before


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_come_back_with_their_layout(tmp_path, kind):
    options = {"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.1}
    model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    first, second = kind(model.parameters(), **options), kind(twin.parameters(), **options)
    x = torch.randn(2, 4, 5, 5)

    def step(network, optimizer):
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()

    step(model, first)
    tensors, rest = optimizer_tensors(first)
    save_checkpoint(tmp_path / "c", model_tensors(model) | tensors, rest)
    loaded, found = load_checkpoint(tmp_path / "c")
    load_model_tensors(twin, loaded, "c")
    load_optimizer_tensors(second, loaded, found, "c")
    for parameter, its_twin in zip(model.parameters(), twin.parameters(), strict=True):
        old, new = first.state[parameter], second.state[its_twin]
        assert old.keys() == new.keys()
        assert all(old[key].stride() == new[key].stride() for key in old)
    for _ in range(3):
        step(model, first)
        step(twin, second)
    assert digest(model_tensors(model)) == digest(model_tensors(twin))
    small = kind([twin.bias], **options)
    with pytest.raises(RunError, match="another optimizer"):
        load_optimizer_tensors(small, loaded, found, "c")


# ---- configuration ---------------------------------------------------------------------------------------------------

BAD = {
    "epochs": [-1, 1.5],
    "lr": [0, -1, math.nan, math.inf],
    "optimizer": ["lion"],
    "momentum": [1.0, -0.1],
    "weight_decay": [-1, math.inf],
    "warmup": [-0.1, 1.0],
    "distill": [1.1, -0.1],
    "temperature": [0.0],
    "features": [-0.1, math.inf],
    "fade": [-0.1, 1.0],
    "begin": [-0.1, 1.0],
    "end": [0.0, 1.1],
    "precision": ["8-bit"],
    "clip": [0.0],
    "checkpoint_seconds": [-1.0],
    "checkpoint_every_steps": [0],
}


def test_every_field_is_bounded():
    assert set(BAD) == {field.name for field in dataclasses.fields(HealConfig)}
    for name, values in BAD.items():
        for value in values:
            with pytest.raises(InputError, match=f"^{name} = .*It must be"):
                HealConfig(**{name: value})


def test_the_recipe_leaves_out_how_often_checkpoints_are_written():
    often = HealConfig(checkpoint_seconds=1, checkpoint_every_steps=2)
    assert often.recipe() == HealConfig().recipe()
    assert often.to_dict() != HealConfig().to_dict()
    assert HealConfig(**often.to_dict()) == often


def test_the_recipe_is_that_of_the_first_version_until_a_later_field_is_used():
    later = {"features", "fade", "begin", "end"}
    assert not later & HealConfig().recipe().keys()
    assert HealConfig(features=0.5, fade=0.2).recipe().items() >= {("features", 0.5), ("fade", 0.2)}
    assert HealConfig(begin=0.2, end=0.4).recipe().items() >= {("begin", 0.2), ("end", 0.4)}


def test_the_rate_rises_and_falls():
    config = HealConfig(lr=2.0, warmup=0.25)
    assert [config.rate(done) for done in (0, 0.125, 0.25, 0.625, 1.0)] == pytest.approx([0, 1, 2, 1, 0])
    assert HealConfig(lr=2.0).rate(0) == 2.0


# ---- distillation ----------------------------------------------------------------------------------------------------


def test_distillation_is_the_divergence_of_the_softened_distributions():
    student, teacher = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    p, q = F.softmax(teacher / 3, 1), F.softmax(student / 3, 1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert distillation_loss(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-12)
    assert distillation_loss(student, student + 1).item() == pytest.approx(0, abs=1e-12)
    per_pixel = distillation_loss(student.T.reshape(1, 4, 2, 3), teacher.T.reshape(1, 4, 2, 3), 3.0)
    assert per_pixel.item() == pytest.approx(expected.item(), rel=1e-12)


def test_its_gradient_keeps_its_size_when_it_is_softened():
    teacher = torch.randn(50, 10)
    sizes = []
    for temperature in (4.0, 8.0):
        student = torch.zeros(50, 10, requires_grad=True)
        distillation_loss(student, teacher, temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_unlike_logits_are_refused():
    with pytest.raises(InputError, match=r"\(2, 4\).*\(2, 3\)"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))
