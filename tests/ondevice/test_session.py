"""Fine-tuning in epochs: it learns, keeps to its plan, and goes on after a stop as if there had been none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from palmette.errors import DataError, InputError, RunError, TrainingError
from palmette.ondevice.adapt import adapt
from palmette.ondevice.session import CHECKPOINT, clip_gradients, fine_tune
from palmette.ondevice.stored import packed, unpacked

EPOCHS = 4
RUNS = [
    ("auto", 20_000, None, "sgd"),
    ("asi", 40_000, None, "momentum"),
    ("low_bit", 60_000, None, "adam"),
    ("trady", 25_000, None, "momentum"),
    ("medyate", 25_000, None, "adam"),
    ("neq", 60_000, None, "sgd"),
    ("scotti", 60_000, None, "momentum"),
    ("velocity", 60_000, {"first": "random"}, "adam"),
    ("wasi", 2_000, None, "sgd"),
    ("wasi", 2_000, {"error_feedback": True}, "sgd"),
]


class Stop(Exception):
    """What ends a training from outside."""


class Broken(DataLoader):
    """A loader that fails at one of its passes."""

    def __init__(self, inner: DataLoader, at: int) -> None:
        super().__init__(inner.dataset, batch_size=inner.batch_size, shuffle=True, generator=torch.Generator())
        self.at, self.passes = at, 0

    def __iter__(self):
        self.passes += 1
        if self.passes > self.at:
            raise Stop
        return super().__iter__()


def loader(method: str = "auto", count: int = 21) -> DataLoader:
    """Labelled noise with something to learn; the last batch is smaller."""
    generator = torch.Generator().manual_seed(4)
    shape = (20,) if method == "wasi" else (3, 12, 12)
    x = torch.randn(count, *shape, generator=generator)
    y = torch.arange(count) % 4
    x[:, 0] += 3 * (y % 2).float().view(-1, *[1] * (len(shape) - 1))
    x[:, 1] += 3 * (y // 2).float().view(-1, *[1] * (len(shape) - 1))
    return DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True, generator=torch.Generator())


def made(kit, method: str, budget: int, config=None):
    """A fresh network, adapted; the same at every call."""
    torch.manual_seed(0)
    if method == "wasi":
        layers = [nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
        net = nn.Sequential(*layers).train()
    else:
        net = kit.small_cnn()
    x, y = next(iter(loader(method)))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(x.shape, generator=generator)
    return adapt(net, (x, torch.arange(len(y)) % 4), budget=budget, method=method, config=config)


def same(one: nn.Module, two: nn.Module) -> bool:
    """Whether all weights agree, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize(("method", "budget", "config", "optimizer"), RUNS)
def test_a_resumed_training_ends_in_the_same_weights(kit, method, budget, config, optimizer, tmp_path) -> None:
    options = {"epochs": EPOCHS, "lr": 0.1, "optimizer": optimizer, "seed": 2}
    whole = made(kit, method, budget, config)
    found = fine_tune(whole, loader(method), loader(method), **options)
    cut = made(kit, method, budget, config)
    with pytest.raises(Stop):  # two passes look whether the loader can be seeded
        fine_tune(cut, Broken(loader(method), 2 + 2), loader(method), **options, run_dir=tmp_path)
    torch.rand(3)
    again = made(kit, method, budget, config)
    resumed = fine_tune(again, loader(method), loader(method), **options, run_dir=tmp_path, resume=True)
    assert (found.resumed, resumed.resumed) == (0, 2)
    assert resumed.history == found.history
    assert same(whole.model, again.model)
    for adaptation in (whole, again):
        adaptation.undo()
    assert same(whole.model, again.model)
    fresh = made(kit, method, budget, config)
    fresh.undo()
    assert not same(fresh.model, again.model)


def test_it_learns_and_says_what_it_did(kit) -> None:
    adaptation = made(kit, "auto", 60_000)
    before = torch.get_rng_state()
    found = fine_tune(adaptation, loader(), loader(), loader(), epochs=12, lr=0.03, optimizer="momentum")
    assert torch.equal(before, torch.get_rng_state())
    assert found.after.accuracy > found.before.accuracy + 0.2
    assert found.history[-1]["loss"] < 0.7 * found.history[0]["loss"]
    assert found.history[0]["lr"] > found.history[-1]["lr"] > 0
    assert {entry["kept_bytes"] for entry in found.history} == {adaptation.plan.predicted_bytes}
    assert "epoch 12  loss" in str(found)
    assert "test accuracy" in str(found)
    assert adaptation.active
    assert not adaptation.model.training


def test_a_finished_training_is_read_and_not_trained_again(kit, tmp_path) -> None:
    first = made(kit, "trady", 25_000)
    found = fine_tune(first, loader(), None, loader(), epochs=2, run_dir=tmp_path)
    second = made(kit, "trady", 25_000)
    again = fine_tune(second, loader(), None, loader(), epochs=2, run_dir=tmp_path, resume=True)
    assert again.resumed == 2
    assert same(first.model, second.model)
    assert again.history == found.history
    assert (again.before.accuracy, again.after.accuracy) == (found.before.accuracy, found.after.accuracy)


def test_a_checkpoint_of_another_training_is_refused(kit, tmp_path) -> None:
    fine_tune(made(kit, "asi", 40_000), loader(), epochs=1, run_dir=tmp_path)
    with pytest.raises(RunError, match="There is a checkpoint already"):
        fine_tune(made(kit, "asi", 40_000), loader(), epochs=1, run_dir=tmp_path)
    with pytest.raises(RunError, match="another lr"):
        fine_tune(made(kit, "asi", 40_000), loader(), epochs=1, lr=0.3, run_dir=tmp_path, resume=True)
    with pytest.raises(RunError, match="another method"):
        fine_tune(made(kit, "hosvd", 40_000), loader(), epochs=1, run_dir=tmp_path, resume=True)
    file = tmp_path / CHECKPOINT
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(RunError, match="damaged"):
        fine_tune(made(kit, "asi", 40_000), loader(), epochs=1, run_dir=tmp_path, resume=True)


def test_bad_options(kit) -> None:
    adaptation = made(kit, "lossless", 200_000)
    for options, says in (
        ({"epochs": -1}, "epochs"),
        ({"epochs": 1, "lr": 0.0}, "lr"),
        ({"epochs": 1, "optimizer": "lion"}, "no optimizer 'lion'"),
        ({"epochs": 1, "schedule": "steps"}, "no schedule 'steps'"),
        ({"epochs": 1, "clip": 0.0}, "clip"),
    ):
        with pytest.raises(InputError, match=says):
            fine_tune(adaptation, loader(), **options)
    with pytest.raises(TrainingError, match="epoch 0"):
        fine_tune(adaptation, loader(), epochs=1, lr=1e30, clip=None)
    adaptation.undo()
    with pytest.raises(InputError, match="undone"):
        fine_tune(adaptation, loader(), epochs=1)


def test_labels_out_of_range_are_told(kit) -> None:
    x, y = next(iter(loader()))
    data = DataLoader(TensorDataset(x, y + 3), batch_size=6)
    with pytest.raises(DataError, match="Label"):
        fine_tune(made(kit, "lossless", 200_000), data, epochs=1)


def test_no_epochs_change_nothing(kit) -> None:
    adaptation = made(kit, "auto", 60_000)
    before = copy.deepcopy(adaptation.model.state_dict())
    assert fine_tune(adaptation, loader(), epochs=0).history == []
    assert all(torch.equal(a, b) for a, b in zip(before.values(), adaptation.model.state_dict().values(), strict=True))


def test_clipping_sees_gradients_in_factors(kit) -> None:
    adaptation = made(kit, "wasi", 2_000)
    adaptation.optimizer(torch.optim.SGD, lr=0.1)
    x, y = adaptation.request.x, adaptation.request.y
    nn.functional.cross_entropy(adaptation.model(x), y).backward()

    def norm() -> float:
        whole = [sum(t if u is None else t @ u.T for t, u in part.pending) for *_, part in adaptation.swaps.modules]
        grads = [p.grad for p in adaptation.model.parameters() if p.grad is not None and p.requires_grad]
        return float(sum(g.square().sum() for g in [*whole, *grads]).sqrt())

    first = norm()
    assert clip_gradients(adaptation, 10 * first) == pytest.approx(first, rel=1e-4)
    assert norm() == first
    clip_gradients(adaptation, 0.1 * first)
    assert norm() == pytest.approx(0.1 * first, rel=1e-4)


def test_a_nest_comes_back_as_it_was() -> None:
    generator = torch.Generator().manual_seed(3)
    torch.rand(2, generator=generator)
    nest = {"a": [(1, 2.5, None, "x"), torch.arange(6).view(2, 3).T], 7: {"generator": generator, "empty": ()}}
    tensors: dict[str, torch.Tensor] = {}
    back = unpacked(packed(nest, "nest", tensors), {name: t.clone() for name, t in tensors.items()})
    assert back["a"][0] == nest["a"][0]
    assert torch.equal(back["a"][1], nest["a"][1])
    assert back["a"][1].stride() == nest["a"][1].stride()
    assert back[7]["empty"] == ()
    assert torch.equal(torch.rand(4, generator=back[7]["generator"]), torch.rand(4, generator=generator))
    with pytest.raises(RunError, match="set cannot be stored"):
        packed({"odd": {1}}, "nest", {})
