"""Checkpoints of healing: resumed inside one process, refused when damaged or foreign, read back when finished."""

from __future__ import annotations

import itertools

import pytest
import torch

from palmette.errors import DataError, RunError
from palmette.run import Run
from palmette.train import HealConfig, heal, healed, load_checkpoint

FAST = HealConfig(epochs=2, lr=0.05)


def test_a_stage_of_a_run_is_done_once(nets, tmp_path):
    loader, first, second = nets.loader(), nets.net(), nets.net()
    history = healed(Run(tmp_path, seed=4), "round/heal", first, loader, FAST)
    refusing = [(torch.zeros(2, 5), torch.tensor([9, 9]))]  # never looked at again
    assert healed(Run(tmp_path, resume=True, seed=4), "round/heal", second, refusing, FAST) == history
    assert nets.equal(nets.weights(first), nets.weights(second))
    assert not second.training


class Interrupted(Exception):
    pass


def interrupted(nets, checkpoint, at=8, config=None, **options):
    """Heal until step `at`, with a checkpoint after each step; then an error."""
    calls = itertools.count()

    def bomb(network, inputs, output):
        if next(calls) == at:
            raise Interrupted
        return output.new_zeros(())

    config = HealConfig(epochs=2, lr=0.05, checkpoint_every_steps=1) if config is None else config
    with pytest.raises(Interrupted):
        heal(nets.net(), nets.loader(), config, checkpoint=checkpoint, loss_terms=[bomb], **options)


def calm(network, inputs, output):
    return output.new_zeros(())


@pytest.mark.parametrize("at", [1, 6, 8])  # inside an epoch, after the last step of an epoch, in the second
def test_resuming_in_one_process(nets, tmp_path, at):
    whole, resumed, file = nets.net(), nets.net(), tmp_path / "h.safetensors"
    history = heal(whole, nets.loader(), FAST, loss_terms=[calm])
    interrupted(nets, file, at)
    place = load_checkpoint(file)[1]["place"]
    assert (place["epoch"] * 6 + place["step"]) == at
    assert heal(resumed, nets.loader(), FAST, checkpoint=file, loss_terms=[calm]) == history
    assert nets.equal(nets.weights(whole), nets.weights(resumed))


def test_how_often_checkpoints_are_written_does_not_matter(nets, tmp_path):
    models, files = [nets.net(), nets.net()], [tmp_path / "a", tmp_path / "b"]
    heal(models[0], nets.loader(), FAST, checkpoint=files[0])
    often = HealConfig(epochs=2, lr=0.05, checkpoint_every_steps=1, checkpoint_seconds=0)
    heal(models[1], nets.loader(), often, checkpoint=files[1])
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("cut", [1, 100, 5000, -1])
def test_a_damaged_checkpoint_is_named(nets, tmp_path, cut):
    file = tmp_path / "h.safetensors"
    interrupted(nets, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    with pytest.raises(RunError, match=r"damaged.*h\.safetensors"):
        heal(nets.net(), nets.loader(), FAST, checkpoint=file)
    file.write_bytes(whole[:-500] + bytes([whole[-500] ^ 1]) + whole[-499:])
    with pytest.raises(RunError, match=r"damaged.*h\.safetensors.*checksum"):
        heal(nets.net(), nets.loader(), FAST, checkpoint=file)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"label": "x"}, "label"),
        ({"config": HealConfig(epochs=2, lr=0.06)}, "recipe.lr"),
        ({"model": 5}, "start"),
        ({"teacher": 5}, "teacher"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(nets, tmp_path, change, name):
    file = tmp_path / "h.safetensors"
    interrupted(nets, file)
    options = {"seed": 0, "label": "heal", "config": FAST, **change}
    model = nets.net(options.pop("model", 0))
    if "teacher" in options:
        options["teacher"] = nets.net(options["teacher"])
    with pytest.raises(RunError, match=f"another {name} "):
        heal(model, nets.loader(), checkpoint=file, **options)


def test_other_data_on_resume_is_refused(nets, tmp_path):
    file = tmp_path / "h.safetensors"
    interrupted(nets, file)
    with pytest.raises(DataError, match="other batches than before"):
        heal(nets.net(), nets.loader(61), FAST, checkpoint=file)
    with pytest.raises(DataError, match="other batches than before"):
        heal(nets.net(), nets.loader(shuffle=False), FAST, checkpoint=file)


def test_a_checkpoint_that_cannot_be_written(nets, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written.*h\.safetensors"):
        heal(nets.net(), nets.loader(), FAST, checkpoint=tmp_path / "file" / "h.safetensors")
