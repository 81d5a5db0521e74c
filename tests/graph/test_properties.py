"""Random small networks and random legal plans: what is collapsed computes what was edited, and stays trainable."""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from palmette.errors import PlanError, RefusedEdit
from palmette.graph import Edit, Plan, candidates, capture, collapse, edits_of, find_sites, linearize
from palmette.graph.candidates import EDITS

Case = Any  # of random_nets.py: net, x, seed

FLOAT64_BOUND, FLOAT32_BOUND, HEALTH = 1e-10, 1e-4, list(HealthCheck)


def random_plan(case: Case, captured: Any, counts: Counter[str]) -> tuple[Plan, str, nn.Module] | None:
    """A random legal plan of edits of every kind, fitted, and the network edited by it; None when nothing can go.

    Edits that overlap others are given up; a mask that cuts the network is rightly refused and becomes an affine fit.
    """
    rng = random.Random(case.seed)
    pad = rng.choice(["repad", "bias_map", "exact"])
    sites = [s for s in find_sites(captured, case.x, pad=pad) if s.removable]
    acts = [s for s in sites if s.kind == "activation" and rng.random() < 0.8]
    paths = sorted({p for s in acts for p in (s.partners or (s.path,))})
    edits = [linearize(path, fit=rng.choice(["affine", "mask", "identity"])) for path in paths]
    others = other_edits(case, captured, rng, counts)
    loader = [(_batch(case, n), torch.zeros(n, dtype=torch.long)) for n in (6, 7)]
    while edits or others:
        try:
            plan = Plan([*edits, *others]).fit(captured, loader, case.x)
            return plan, pad, plan.apply(captured, case.x, pad=pad).eval()
        except (PlanError, RefusedEdit) as error:
            if "cut vertex" in str(error) and any(edit.fit == "mask" for edit in edits):
                edits = [replace(edit, fit="affine") if edit.fit == "mask" else edit for edit in edits]
            elif others:
                others.pop()
            elif "cut vertex" in str(error):  # the least-squares line is a constant too: the network is one
                return None
            else:
                raise
    return None


def other_edits(case: Case, captured: Any, rng: random.Random, counts: Counter[str]) -> list[Edit]:
    """Up to two random edits that are no linearisations; half the time the kind that came least often so far."""
    pools = {}
    for kind, edit in [(kind, edit) for kind, edits in EDITS.items() for edit in edits if kind != "activation"]:
        found = candidates(captured, case.x, kind=kind, edit=edit, longest=3)
        pools[kind, edit] = [c for c in found if c.sites[0].removable]
    possible = [key for key, pool in pools.items() if pool]
    kinds = rng.sample(possible, min(len(possible), rng.choice([0, 1, 2])))
    if possible and rng.random() < 0.6:
        kinds = [min(possible, key=lambda key: counts[key[1]]), *kinds[:1]]
    unique = {(e.kind, e.site): e for key in kinds for e in edits_of(rng.choice(pools[key]))}
    return list(unique.values())


def _relative(reference: Tensor, value: Tensor) -> float:
    scale = reference.abs().max().clamp_min(1e-3)
    return float((reference - value).abs().max() / scale)


def _batch(case: Case, n: int) -> Tensor:
    return torch.randn(n, *case.x.shape[1:], generator=torch.Generator().manual_seed(n))


def check_equal(case: Case, planned: tuple[Plan, str], edited: nn.Module, small: nn.Module) -> None:
    """Edited and collapsed agree in both precisions, at every batch size."""
    plan, pad = planned
    twin = plan.apply(copy.deepcopy(case.net).double(), case.x.double(), pad=pad).eval()
    small_twin = collapse(twin, cost="macs", force=True)[0]
    with torch.no_grad():
        for n in (1, 2, 5):
            x = _batch(case, n)
            assert _relative(edited(x), small(x)) <= FLOAT32_BOUND
            assert _relative(twin(x.double()), small_twin(x.double())) <= FLOAT64_BOUND


def check_copies(
    case: Case, planned: tuple[Plan, str], captured: nn.Module, edited: nn.Module, small: nn.Module
) -> None:
    """Deepcopy, state_dict and the plan's JSON reproduce the network to the bit."""
    x = _batch(case, 3)
    plan, pad = planned
    again = Plan.from_json(plan.to_json())
    assert again.to_json() == plan.to_json()
    with torch.no_grad():
        assert torch.equal(again.apply(captured, case.x, pad=pad).eval()(x), edited(x))
        for network in (edited, small):
            want = network(x)
            twin = copy.deepcopy(network)
            assert torch.equal(twin(x), want)
            for tensor in twin.state_dict().values():
                tensor.zero_()
            twin.load_state_dict(network.state_dict())
            assert torch.equal(twin(x), want)


def check_training(case: Case, edited: nn.Module, small: nn.Module) -> None:
    """One step changes the weights, leaves them finite, and what was shared is shared still."""
    for network in (copy.deepcopy(edited), copy.deepcopy(small)):
        shared = _shared_names(network)
        optimizer = torch.optim.SGD(network.train().parameters(), lr=0.01)
        before = [p.detach().clone() for p in network.parameters()]
        torch.manual_seed(0)
        network(_batch(case, 4)).square().sum().backward()
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in network.parameters())
        assert any(not torch.equal(a, p) for a, p in zip(before, network.parameters(), strict=True))
        assert _shared_names(network) == shared


def _shared_names(network: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, p in network.named_parameters(remove_duplicate=False):
        groups.setdefault(p.data_ptr(), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def check(case: Case, counts: Counter[str]) -> None:
    """Every property of one network and one plan."""
    captured = capture(case.net, case.x)
    with torch.no_grad():
        for n in (1, 2, 5):
            assert torch.equal(case.net(_batch(case, n)), captured(_batch(case, n)))
    counts["networks"] += 1
    drawn = random_plan(case, captured, counts)
    if drawn is None:
        return
    plan, pad, edited = drawn
    small, record = collapse(edited, cost="macs", force=True)
    counts["edited"] += 1
    counts["merged"] += any(m.done for m in record.merges)
    counts["wide"] += any("side by side" in m.reason for m in record.merges)
    counts.update({edit.kind for edit in plan})
    assert all(m.done or m.reason for m in record.merges)
    check_equal(case, (plan, pad), edited, small)
    check_copies(case, (plan, pad), captured, edited, small)
    check_training(case, edited, small)


def _run(random_nets: ModuleType, examples: int) -> Counter[str]:
    counts: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=HEALTH)
    @given(random_nets.cases())
    def run(case: Case) -> None:
        check(case, counts)

    run()
    return counts


def test_random_networks_and_plans(random_nets: ModuleType) -> None:
    counts = _run(random_nets, 25)
    assert counts["merged"] > counts["networks"] / 2, counts
    assert all(counts[kind] for kind in ("linearize", "drop", "fit_linear", "parallelize", "identity")), counts


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_random_networks_and_plans(random_nets: ModuleType) -> None:
    counts = _run(random_nets, 500)
    assert counts["networks"] >= 500 and counts["merged"] > counts["networks"] / 2, counts  # noqa: PT018
    assert counts["wide"] > 10, counts
