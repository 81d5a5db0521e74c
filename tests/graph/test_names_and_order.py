"""Sites whose names look alike stay apart, and edits and collapses in any order survive save and load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from palmette.errors import InputError, PlanError
from palmette.graph import Plan, capture, collapse, find_sites, linearize, load, save, verify
from palmette.graph.ops import ChannelAffine


class _Shared(nn.Module):
    """One ReLU called twice ('relu', 'relu#1') beside a module called 'relu_1'."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.relu, self.relu_1 = nn.ReLU(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc[1](self.relu(self.fc[0](x)))
        return self.fc[3](self.relu_1(self.fc[2](self.relu(x))))


class _Nested(nn.Module):
    """'a.b' beside 'a_b'."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.a, self.a_b = nn.ModuleDict({"b": nn.ReLU()}), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc[2](self.a_b(self.fc[1](self.a["b"](self.fc[0](x)))))


class _Functional(nn.Module):
    """A functional linear of its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.weight2 = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.weight).relu(), self.weight2)


class _TwoFunctional(nn.Module):
    """Functional linears in 'a.b' and in 'a_b', kept apart by a barrier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_b = nn.ModuleDict({"b": _Functional()}), _Functional()

    def forward(self, x: Tensor) -> Tensor:
        return self.a_b(self.a["b"](x).softmax(-1))


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).relu()
        return self.head(x.mean((2, 3)))


def _plan(net: nn.Module, x: Tensor, sites: list[str]) -> Plan:
    return Plan([linearize(site, force=True) for site in sites]).fit(net, [(x, torch.zeros(len(x)))], x)


def _edit(net: nn.Module, x: Tensor, sites: list[str], pad: str = "repad") -> Any:
    return _plan(net, x, sites).apply(net, x, pad=pad).eval()


@pytest.mark.parametrize("build", [_Shared, _Nested, _TwoFunctional])
def test_sites_whose_names_look_alike_keep_their_own_slopes(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = build().double().eval(), torch.randn(32, 8, dtype=torch.float64)
    sites = [s.path for s in find_sites(net, x) if s.kind == "activation" and s.removable]
    assert len(sites) > 1
    plan = _plan(net, x, sites)
    at_once, singly = plan.apply(net, x).eval(), net
    for edit in plan:
        singly = Plan([edit]).apply(singly, x).eval()
    slopes = [m.slope.detach() for m in at_once.modules() if isinstance(m, ChannelAffine)]
    assert sorted(s.tolist() for s in slopes) == sorted(list(e.slope or ()) for e in plan)
    small, record = collapse(at_once, force=True)
    assert record.done
    torch.testing.assert_close(small(x), at_once(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(singly(x), at_once(x), rtol=1e-10, atol=1e-10)
    save(small, tmp_path / "small.safetensors", source=net)
    assert torch.equal(load(build().double(), tmp_path / "small.safetensors")(x), small(x))


@pytest.mark.parametrize("pads", [("repad", "exact"), ("exact", "repad"), ("repad", "repad")])
@pytest.mark.parametrize("between", [False, True], ids=["edit-edit", "edit-collapse-edit"])
@pytest.mark.parametrize("sites", [("relu", "relu#1"), ("relu#1", "relu"), ("relu", "relu#2")])
def test_edits_and_collapses_are_loaded_in_their_order(
    pads: tuple[str, str], between: bool, sites: tuple[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, x = _Convolutions().eval(), torch.randn(4, 3, 9, 8)
    edited: Any = _edit(net, x, [sites[0]], pads[0])
    if between:
        edited, _ = collapse(edited, force=True)
    edited = _edit(edited, x, [sites[1]], pads[1])
    small, _ = collapse(edited, force=True)
    for network in (edited, small):
        save(network, tmp_path / "net.safetensors", source=net)
        again = load(_Convolutions(), tmp_path / "net.safetensors")
        with torch.no_grad():
            assert torch.equal(again(x), network.eval()(x))
        save(again, tmp_path / "again.safetensors", source=net)
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()


def _damage(file: Path, change: Any) -> None:
    with safe_open(file, framework="pt") as f:
        facts = json.loads(f.metadata()["palmette"])
        state = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
    change(facts, state)
    save_file(state, file, metadata={"palmette": json.dumps(facts)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts, _: facts.pop("inputs"), "damaged"),
        (lambda facts, _: facts.update(inputs="{"), "damaged"),
        (lambda facts, _: facts.update(steps='[{"decisions": [{"type": "merge"}]}]'), "damaged"),
        (lambda facts, _: facts.update(steps="[1]"), "damaged"),
        (lambda facts, _: facts.update(aliases='{"a": "b"}'), "damaged"),
        (lambda _, state: next(iter(state.values())).add_(1), "not those"),
    ],
)
def test_a_damaged_file_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    net, x, file = _Nested().eval(), torch.randn(4, 8), tmp_path / "net.safetensors"
    save(collapse(_edit(net, x, ["a.b"]), force=True)[0], file, source=net)
    _damage(file, change)
    with pytest.raises(InputError, match=message):
        load(net, file)


@pytest.mark.parametrize(
    "edits",
    [
        5,
        [{"kind": "linearize", "site": "a.b", "fit": "affine", "slope": "abc", "offset": [0.0]}],
        [{"kind": "linearize", "site": "a.b", "fit": "affine", "slope": [None], "offset": [0.0]}],
        [{"kind": "linearize", "site": "a.b", "fit": "affine", "slope": 7, "offset": [0.0]}],
        [{"kind": "linearize", "site": "a.b", "fit": "affine", "slope": [1.0, 2.0]}],
        [{"kind": "linearize", "site": "a.b", "fit": "affine", "slope": [1.0, 2.0], "offset": [1.0]}],
        [{"kind": "linearize", "site": "a.b", "fit": "identity", "force": "yes"}],
    ],
)
def test_a_malformed_plan_is_refused(edits: Any) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps({"palmette_plan": 1, "edits": edits}))


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) * y.mean(1, keepdim=True)


@pytest.mark.parametrize("labelled", [False, True])
def test_verify_takes_pairs_of_inputs_with_and_without_labels(labelled: bool) -> None:
    net, x = _TwoInputs().eval(), (torch.randn(4, 8), torch.randn(4, 2))
    plan = Plan([linearize("relu")]).fit(net, [(x, torch.zeros(4))], x)
    edited = plan.apply(net, x)
    small, _ = collapse(edited, force=True)
    seen = verify(edited, small, [(x, torch.zeros(4)) if labelled else x], example_inputs=x)
    assert seen.exact
    assert seen.samples == 2 * 4 + 4


def test_what_is_no_network_is_refused() -> None:
    with pytest.raises(InputError, match="function is no network"):
        capture(lambda x: x, torch.randn(2, 3))  # type: ignore[arg-type]


def test_networks_that_give_nothing_finite_are_not_called_equal() -> None:
    net, x = _Nested().eval(), torch.randn(4, 8)
    edited = _edit(net, x, ["a.b"])
    with torch.no_grad():
        edited.get_submodule("fc.0").bias.fill_(float("nan"))
    small, _ = collapse(edited, force=True)
    assert not verify(edited, small, [x], example_inputs=x).exact
