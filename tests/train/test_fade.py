"""Gradual edits: the stated mix, the same batches and rates as plain healing, the same structure, resumable."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from palmette.errors import DataError, RefusedEdit
from palmette.graph import Plan, capture, drop, fit_linear, identity, linearize
from palmette.graph.blend import insert_blends
from palmette.train import HealConfig, heal
from palmette.train.fade import Fading, fade_checkpoint, fade_in, heal_fading

EXAMPLE = torch.zeros(2, 3, 6, 6)
HALF = HealConfig(epochs=2, lr=0.02, fade=0.4, clip=None)  # 12 steps, of which 5 fade


@pytest.fixture
def dense(nets):
    return capture(nets.residual().eval(), EXAMPLE)


@pytest.fixture
def plan(nets, dense):
    return Plan([drop("blocks.1"), linearize("blocks.0.act")]).fit(dense, nets.images(shuffle=False), EXAMPLE)


def faded(nets, dense, plan, config=HALF, **options):
    return heal_fading(dense, plan, EXAMPLE, nets.images(), config, **options)


# ---- the mix ---------------------------------------------------------------------------------------------------------


def test_the_share_rises_as_half_a_cosine_to_one():
    module, shares = Fading(8), []
    for _ in range(9):
        shares.append(float(module.share()))
        module.advance()
    assert shares[:8] == pytest.approx([0.5 - 0.5 * math.cos(math.pi * (k + 0.5) / 8) for k in range(8)])
    assert shares[8] == 1.0
    assert float(Fading(0).share()) == 1.0


def test_the_mix_is_the_stated_one():
    slope, offset = torch.tensor([0.5, 2.0]), torch.tensor([0.1, -0.2])
    z = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    module = Fading(4, slope, offset, 1)
    module.advance()
    t = 0.5 - 0.5 * math.cos(math.pi * 1.5 / 4)
    line = z * slope[:, None] + offset[:, None]
    torch.testing.assert_close(module(z, z.relu()), (1 - t) * z.relu() + t * line)
    torch.testing.assert_close(Fading(4)(z, z.relu()).double().sum(), z.relu().double().sum(), rtol=0.1, atol=0.1)
    for _ in range(3):
        module.advance()
    assert torch.equal(module(z, z.relu()), line)


def test_a_network_faded_to_the_end_is_the_edited_one(dense, plan):
    """Without moved padding the switch from the blended to the edited network changes nothing but rounding."""
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    blended = copy.deepcopy(dense)
    slope, offset = (torch.tensor(values) for values in (plan.edits[1].slope, plan.edits[1].offset))
    insert_blends(blended, {"blocks.1": Fading(0), "blocks.0.act": Fading(0, slope, offset, 1)})
    torch.testing.assert_close(blended(x), plan.apply(dense, EXAMPLE, "exact")(x), rtol=1e-5, atol=1e-6)


# ---- the schedule ----------------------------------------------------------------------------------------------------


def recorder(seen):
    def term(network, inputs, output):
        seen.append((inputs.sum().item(), network))
        return output.new_zeros(())

    return term


def test_both_parts_together_see_the_batches_of_plain_healing(nets, dense, plan):
    plain, parts = [], []
    heal(copy.deepcopy(dense), nets.images(), HALF, loss_terms=[recorder(plain)])
    faded(nets, dense, plan, loss_terms=[recorder(parts)])
    assert len(plain) == 12
    assert [x for x, _ in parts] == [x for x, _ in plain]
    networks = [network for _, network in parts]
    assert len(set(map(id, networks[:5]))) == len(set(map(id, networks[5:]))) == 1
    assert networks[4] is not networks[5]


def test_parts_of_a_schedule_have_its_learning_rates(nets):
    config = HealConfig(epochs=2, lr=0.1, warmup=0.1)
    whole = [config.rate((step + 0.5) / 12) for step in range(12)]
    for begin, end, steps in ((0.0, 0.4, range(5)), (0.4, 1.0, range(5, 12)), (0.5, 0.75, range(6, 9))):
        part = HealConfig(epochs=2, lr=0.1, warmup=0.1, begin=begin, end=end)
        history = heal(nets.net(), nets.loader(), part)
        ends = [step for step in steps if step == steps[-1] or step % 6 == 5]
        assert [entry["lr"] for entry in history] == pytest.approx([whole[step] for step in ends])
        assert [entry["epoch"] for entry in history] == [step // 6 for step in ends]


def test_whole_and_empty_parts(nets):
    model, twin, loader = nets.net(), nets.net(), nets.loader()
    heal(model, loader, HealConfig(epochs=2, lr=0.05))
    heal(twin, loader, HealConfig(epochs=2, lr=0.05, begin=0.01))  # rounds to the first step
    assert nets.equal(nets.weights(model), nets.weights(twin))
    before = nets.weights(model)
    assert heal(model, loader, HealConfig(epochs=2, begin=0.5, end=0.51)) == []
    assert nets.equal(nets.weights(model), before)


def test_a_part_needs_a_length(nets, dense, plan):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(3, 6, 6), 0)] * 4)

    loader = DataLoader(Endless(), batch_size=2)
    with pytest.raises(DataError, match=r"does not know its length.*fade=0"):
        heal_fading(dense, plan, EXAMPLE, loader, HALF)
    with pytest.raises(DataError, match="fewer batches than it says"):
        heal(nets.net(), Short(nets.loader()), HealConfig(epochs=1, begin=0.9))


class Short:
    """A loader that promises twice what it has."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return 2 * len(self.loader)


# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["repad", "exact"])
def test_the_structure_is_that_of_the_applied_plan(nets, dense, plan, pad):
    if pad == "exact":
        plan = Plan([plan.edits[0]])
    before = nets.weights(dense)
    result = faded(nets, dense, plan, pad=pad)
    applied = plan.apply(dense, EXAMPLE, pad)
    assert result.code == applied.code
    assert list(result.state_dict()) == list(applied.state_dict())
    assert not result.training
    assert nets.equal(nets.weights(dense), before)
    assert not nets.equal(nets.weights(result), nets.weights(applied))


def test_a_run_of_blocks_fades_as_its_blocks_do(nets, dense):
    single = faded(nets, dense, Plan([drop("blocks.0"), drop("blocks.1")]))
    together = faded(nets, dense, Plan([drop("blocks.0..blocks.1")]))
    assert nets.equal(nets.weights(single), nets.weights(together))


@pytest.mark.parametrize(
    ("edits", "blended"),
    [
        ([fit_linear("blocks.0"), drop("blocks.1")], 5),  # the fit at once, before the block fades
        ([linearize("blocks.0.act"), identity("blocks.2.second")], 5),
        ([fit_linear("blocks.0"), fit_linear("blocks.2")], 0),  # nothing to fade
    ],
    ids=["fit and drop", "linearise and identity", "fits"],
)
def test_what_cannot_fade_is_made_at_once(nets, dense, edits, blended):
    plan, seen = Plan(edits).fit(dense, nets.images(shuffle=False), EXAMPLE), []

    def term(network, inputs, output):
        seen.append(any("palmette_blend" in name for name, _ in network.named_modules()))
        return output.new_zeros(())

    result = faded(nets, dense, plan, loss_terms=[term])
    applied = plan.apply(dense, EXAMPLE)
    assert {name: tensor.shape for name, tensor in result.state_dict().items()} == {
        name: tensor.shape for name, tensor in applied.state_dict().items()
    }
    assert seen == [True] * blended + [False] * (12 - blended)


def test_slopes_learn_while_they_fade_in(nets, dense, plan):
    edited, rest = fade_in(dense, plan, EXAMPLE, nets.images(), HALF)
    fresh = plan.apply(dense, EXAMPLE)
    names = [name for name in edited.state_dict() if name.startswith("linearized.")]
    assert len(names) == 2
    assert all(not torch.equal(edited.state_dict()[name], fresh.state_dict()[name]) for name in names)
    assert (rest.begin, rest.end) == (0.4, 1.0)


def test_without_a_fade_it_is_apply_and_heal(nets, dense, plan):
    config = HealConfig(epochs=1, lr=0.02)
    expected = plan.apply(dense, EXAMPLE)
    heal(expected, nets.images(), config)
    for fade in (0.0, 0.05):  # a share that is no whole step
        found = faded(nets, dense, plan, HealConfig(epochs=1, lr=0.02, fade=fade))
        assert nets.equal(nets.weights(found), nets.weights(expected))


def test_a_refused_edit_is_told_before_anything_is_trained(nets, dense):
    seen = []
    with pytest.raises(RefusedEdit):
        faded(nets, dense, Plan([linearize("relu", fit="identity")]), loss_terms=[recorder(seen)])
    assert seen == []


def test_zeros_stay_zero_in_both_parts(nets, dense, plan):
    with torch.no_grad():
        dense.get_submodule("blocks.2.first").weight[:, :4] = 0
    first, result = "blocks.2.first", faded(nets, dense, plan, keep_zeros=True)
    assert not bool(result.get_submodule(first).weight[:, :4].any())
    assert bool(faded(nets, dense, plan).get_submodule(first).weight[:, :4].any())


def test_a_fade_starts_from_the_dense_network(nets):
    model = nets.residual(4)
    heal(model, nets.images(), HealConfig(epochs=8, lr=0.05))
    dense = capture(model.eval(), EXAMPLE)
    losses = {}
    for fade in (0.0, 0.5):
        seen = losses[fade] = []

        def loss_fn(logits, target, seen=seen):
            loss = nn.functional.cross_entropy(logits, target)
            seen.append(loss.item())
            return loss

        heal_fading(dense, Plan([drop("blocks.0"), drop("blocks.2")]), EXAMPLE, nets.images(),
                    HealConfig(epochs=2, lr=1e-4, fade=fade), loss_fn=loss_fn)  # fmt: skip
    assert len(losses[0.0]) == len(losses[0.5]) == 12
    assert losses[0.5][0] < losses[0.0][0]


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [3, 5, 9])  # in the fade, at the switch, after it
def test_resumed_fading_ends_with_the_same_weights(nets, dense, plan, tmp_path, at):
    file = tmp_path / "h.safetensors"
    config = HealConfig(epochs=2, lr=0.02, fade=0.4, features=0.5, distill=0.5, checkpoint_every_steps=1)

    def run(stop, checkpoint):
        calls = itertools.count()

        def term(network, inputs, output):
            if next(calls) == stop:
                raise ValueError("boom")
            return output.new_zeros(())

        found = faded(nets, dense, plan, config, teacher=dense, loss_terms=[term], checkpoint=checkpoint)
        return nets.weights(found), next(calls)

    whole, steps = run(None, None)
    assert steps == 12
    with pytest.raises(ValueError, match="boom"):
        run(at, file)
    assert fade_checkpoint(file).exists()
    assert file.exists() == (at > 5)
    resumed, steps = run(None, file)
    assert steps == 12 - at
    assert nets.equal(resumed, whole)
    assert run(None, file)[1] == 0


def test_bfloat16(nets, dense, plan):
    config = HealConfig(epochs=2, lr=0.02, fade=0.4, precision="bf16-mixed")
    weights = nets.weights(faded(nets, dense, plan, config))
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in weights.values())
