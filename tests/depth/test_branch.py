"""A branch with a gradual edit: the budget of every contender, kills in and behind the fade, what stays behind."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from palmette.depth.accounts import random_branch
from palmette.depth.branch import Branch, dense_again
from palmette.depth.opening import Loaders, opened
from palmette.depth.session import Settings
from palmette.registry import get_method
from palmette.train.loop import HealConfig
from palmette.train.trainer import Trainer

FADE = HealConfig(epochs=2, lr=1e-2, fade=0.3, features=0.5, distill=0.5, checkpoint_every_steps=1)  # 3 of 10 steps


class Killed(Exception):
    pass


@pytest.fixture
def steps(monkeypatch) -> Counter:
    """Steps of training by label and whether the network was a blended one; `limit` ends the training by force."""
    found, plain = Counter(), Trainer._train_step

    def counted(self, batch):
        if found.total() == found.limit:
            raise Killed
        found[self.task.label, any("palmette_blend" in name for name, _ in self.task.model.named_modules())] += 1
        plain(self, batch)

    found.limit = None
    monkeypatch.setattr(Trainer, "_train_step", counted)
    return found


@pytest.fixture
def session(trained, blobs):
    @contextmanager
    def make(folder=None, heal=FADE, method="easier", reproduce=False):
        with opened(
            Loaders(train=blobs.train, val=blobs.val),
            model=trained,
            example_inputs=None,
            method=method,
            config=None,
            settings=Settings(reproduce=reproduce),
            heal=heal,
            run_dir=folder,
            resume=folder is not None and folder.exists(),
            cost="macs",
            protect=(),
            loss_fn=None,
            metric=None,
            names={},
        ) as found:
            yield found

    return make


def two_rounds(session, method=None) -> Branch:
    branch = Branch(session, "shrink")
    for number in range(2):
        branch.choose(number, lambda _, pool: {candidate.name: float(i) for i, candidate in enumerate(pool)})
        branch.heal(number, method)
    return branch


def test_every_contender_trains_as_long(session, steps) -> None:
    with session(method="block_influence") as opened_session:
        two_rounds(opened_session)
        random_branch(opened_session, [1, 1])
        dense_again(opened_session, 2)
    assert steps.pop(("dense-000", False)) == steps.pop(("dense-001", False)) == 10  # nothing to fade in
    expected = {(f"{name}-{number:03d}", blended) for name in ("shrink", "random") for number in (0, 1)
                for blended in (True, False)}  # fmt: skip
    assert steps == {(label, blended): 3 if blended else 7 for label, blended in expected}


@pytest.mark.parametrize("at", [2, 3, 8, 11])  # in the fade, at its end, behind it, in that of the second round
def test_a_killed_run_ends_with_the_same_weights(session, steps, tmp_path, at) -> None:
    with session() as found:
        whole = two_rounds(found)
    assert steps.total() == 20
    steps.clear()
    steps.limit = at
    with pytest.raises(Killed), session(tmp_path / "run") as found:
        two_rounds(found)
    steps.limit = None
    with session(tmp_path / "run") as found:
        resumed = two_rounds(found)
        again = resumed.at(1)
    assert steps.total() == 20
    for other in (resumed, again):
        assert other.network.code == whole.network.code
        pairs = zip(whole.network.state_dict().items(), other.network.state_dict().items(), strict=True)
        assert all(name == its_name and torch.equal(a, b) for (name, a), (its_name, b) in pairs)
        assert other.plan == whole.plan
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_observers_watch_what_follows_the_fade(session, steps) -> None:
    heal = HealConfig(epochs=1, lr=1e-2, fade=0.4)
    with session(heal=heal, reproduce=True) as found:
        branch = two_rounds(found, get_method("easier"))
    assert set(branch.watched) == {"3.mlp.1"}
    assert steps == {(f"shrink-{n:03d}", blended): 2 if blended else 3 for n in (0, 1) for blended in (True, False)}
