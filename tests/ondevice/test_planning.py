"""What plans are made of: bits, the knapsack, the plan as JSON, the probe, the trace."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from palmette.errors import PlanError
from palmette.meter.training import default_loss
from palmette.ondevice import bits
from palmette.ondevice.asi import Asi
from palmette.ondevice.codec import Keep, Recompute
from palmette.ondevice.hosvd import Hosvd
from palmette.ondevice.knapsack import Choice, choose
from palmette.ondevice.low_bit import LowBit
from palmette.ondevice.plan import Fold, MemoryPlan, Slice
from palmette.ondevice.probe import probe
from palmette.ondevice.trace import trace

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)

# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False], ids=["numpy", "torch"])
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_bits_come_back(plain, shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    whole, bits._is_plain_cpu = bits._is_plain_cpu, (lambda _: plain)
    try:
        packed = bits.pack_bits(mask)
        assert packed.untyped_storage().nbytes() == bits.packed_bytes(mask.numel()) == -(-mask.numel() // 8)
        assert torch.equal(bits.unpack_bits(packed, mask.shape), mask.to(torch.uint8))
    finally:
        bits._is_plain_cpu = whole


@given(SHAPES, st.sampled_from([2, 4, 8]), st.integers(0, 99))
def test_small_numbers_come_back(shape, width, seed):
    numbers = torch.randint(0, 2**width, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = bits.pack_small(numbers, width)
    assert packed.untyped_storage().nbytes() == bits.packed_bytes(numbers.numel(), width)
    assert torch.equal(bits.unpack_small(packed, numbers.shape, width), numbers)


# ---- knapsack --------------------------------------------------------------------------------------------------------

CHOICES = st.lists(st.builds(Choice, st.integers(0, 60), st.floats(0, 10)), min_size=1, max_size=4)


@given(st.lists(CHOICES, min_size=1, max_size=5), st.integers(0, 200), st.sampled_from([1, 997]))
def test_knapsack_against_all_combinations(items, budget, unit):
    items = [[Choice(c.nbytes * unit, c.error) for c in item] for item in items]
    budget *= unit
    fitting = [c for c in itertools.product(*items) if sum(choice.nbytes for choice in c) <= budget]
    chosen = choose(items, budget)
    if not fitting:
        assert chosen is None
        return
    picked = [item[i] for item, i in zip(items, chosen, strict=True)]
    assert sum(c.nbytes for c in picked) <= budget
    # as good as the best of a budget that is smaller by a bucket for each item
    slack = len(items) * max(1, -(-budget // 2000)) * (unit > 1)
    tight = [c for c in fitting if sum(choice.nbytes for choice in c) <= budget - slack]
    if tight:
        best = min(sum(choice.error for choice in c) for c in tight)
        assert sum(c.error for c in picked) <= best + 1e-9


def test_knapsack_of_many_items():
    generator = torch.Generator().manual_seed(0)
    items = []
    for _ in range(200):
        sizes = torch.randint(1, 10**6, (6,), generator=generator).sort().values.tolist()
        items.append([Choice(size, 1.0 / size) for size in sizes])
    budget = sum(item[2].nbytes for item in items)
    chosen = choose(items, budget)
    total = sum(item[i].nbytes for item, i in zip(items, chosen, strict=True))
    assert 0.99 * budget < total <= budget


# ---- the plan as text ------------------------------------------------------------------------------------------------


def a_plan() -> MemoryPlan:
    codecs = {
        "a": Keep(),
        "b": Asi(ranks=(1, 2, 3, 4)),
        "c#1": LowBit(bits=2),
        "d": Recompute(),
        "e": Hosvd(ranks=(2,)),
    }
    return MemoryPlan(
        method="auto",
        scope="saved",
        budget=4096,
        inputs=((4, 3, 8, 8), (4,)),
        codecs=codecs,
        folds={"a": Fold("n.running_mean", "n.running_var", 1e-5, "n.weight", "n.bias")},
        stock=("a/relu",),
        frozen=("z.weight",),
        slices={"b": Slice(1, (0, 2))},
        predicted_bytes=4000,
        errors={"b": 0.25},
    )


def test_a_plan_comes_back():
    plan = a_plan()
    again = MemoryPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert hash(again.codecs["b"]) == hash(plan.codecs["b"])


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.pop("codecs"),
        lambda p: p.update(memory_plan=99),
        lambda p: p.pop("memory_plan"),
        lambda p: p["codecs"].update(a={"codec": "telepathy"}),
        lambda p: p["codecs"].update(a={"codec": "low_bit", "bits": 3}),
        lambda p: p["codecs"].update(a={"codec": "asi", "speed": 3}),
        lambda p: p["codecs"].update(a=7),
        lambda p: p["folds"].update(a={"mean": "x"}),
        lambda p: p.update(unknown=1),
        lambda p: p.update(inputs=3),
    ],
)
def test_a_spoilt_plan_is_refused(change):
    parts = json.loads(a_plan().to_json())
    change(parts)
    with pytest.raises(PlanError):
        MemoryPlan.from_json(json.dumps(parts))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"plan"', "{}"])
def test_text_that_is_no_plan(text):
    with pytest.raises(PlanError):
        MemoryPlan.from_json(text)


# ---- probe -----------------------------------------------------------------------------------------------------------


def probed(net, x, y, options, limit=10**9):
    return probe(net, trace(net, x, y, default_loss), x, y, default_loss, options, limit=limit)


def test_the_probe_measures_squared_errors(kit):
    net, (x, y) = kit.frozen(kit.small_cnn()), kit.batch()
    want = kit.step(net, x, y)[1]
    found = probed(net, x, y, lambda x, layer: [Hosvd(ranks=tuple(max(1, s - 1) for s in x.shape)), LowBit(bits=8)])
    for key, findings in found.items():
        assert findings.energy == pytest.approx(float(want[f"{key}.weight"].square().sum()), rel=1e-3)
        for codec, error in findings.choices:
            if codec.name == "low_bit":
                assert error < 1e-3 * findings.energy


def test_the_probe_against_a_hand_computation(kit):
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(8, 6), torch.randn(8, 3)
    codec = LowBit(bits=2, group=8)
    found = probed(net, x, y, lambda x, layer: [codec])
    hidden = torch.relu(net[0](x)).detach()
    grad = 2 * (net(x) - y).detach() / 24
    packed, low_step = codec.encode(hidden, {})
    low, size = low_step.float()
    rounded = (bits.unpack_small(packed, torch.Size((5, 8)), 2) * size[:, None] + low[:, None]).view(-1)[:40].view(8, 5)
    assert found["2"].energy == pytest.approx(float((grad.T @ hidden).square().sum()), rel=1e-4)
    assert found["2"].choices[0][1] == pytest.approx(float((grad.T @ (rounded - hidden)).square().sum()), rel=1e-3)


def test_the_probe_stays_within_its_limit(kit):
    """What is kept of layer inputs while probing, and the model afterwards."""
    net, (x, y) = kit.small_cnn(), kit.batch(8)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    found = trace(net, x, y, default_loss)
    sizes = {entry.key: entry.storage_bytes for entry in found.layers() if entry.layer is not None}
    limit = max(sizes.values())
    groups: list[set[str]] = []

    def options(x, layer):
        return [LowBit()]

    from palmette.ondevice import probe as module

    inner = module._probe_group

    def watched(model, found, keys, *rest):
        groups.append(set(keys))
        return inner(model, found, keys, *rest)

    module._probe_group = watched
    try:
        results = probe(net, found, x, y, default_loss, options, limit=limit)
    finally:
        module._probe_group = inner
    assert len(groups) > 1
    assert all(sum(sizes[key] for key in group) <= limit or len(group) == 1 for group in groups)
    assert set().union(*groups) == set(results) == set(sizes)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


# ---- trace -----------------------------------------------------------------------------------------------------------


def test_the_trace_changes_nothing_and_counts_what_torch_keeps(kit):
    net, (x, y) = kit.small_cnn(), kit.batch()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    state = torch.get_rng_state()
    found = trace(net, x, y, default_loss)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    kept = {}

    def pack(t):
        if not isinstance(t, nn.Parameter) and t.untyped_storage()._cdata not in weights:
            kept[t.untyped_storage()._cdata] = (t.untyped_storage().nbytes(), t)
        return t

    weights = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = default_loss(net(x), y)
    assert loss.requires_grad
    assert found.stock_bytes() == sum(size for size, _ in kept.values())


def test_layers_have_the_names_of_their_weights(kit):
    net, (x, y) = kit.frozen(kit.small_cnn()), kit.batch()
    found = trace(net, x, y, default_loss)
    modules = dict(net.named_modules())
    assert {entry.key for entry in found.layers()} == {
        name for name, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)
    }
    assert len(found.folds) == sum(isinstance(m, nn.BatchNorm2d) for m in modules.values())
    assert math.prod(found.layers()[0].shape) == x.numel()
