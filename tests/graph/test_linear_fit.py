"""Linear maps in closed form: against least squares by hand, in every layout, in plans and files."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from palmette import ranks
from palmette.errors import DataError, PlanError, RefusedEdit
from palmette.graph import (
    Plan,
    capture,
    collapse,
    find_sites,
    fit_linear,
    linear_residuals,
    load,
    read_plan,
    save,
    verify,
)
from palmette.graph.linear_fit import Gram, LinearFit, decode, encode


def _lstsq(x: Tensor, y: Tensor) -> Tensor:
    """The map [D, D + 1] of rows x to rows y by an orthogonal factorisation."""
    ones = torch.cat([x, torch.ones_like(x[:, :1])], 1).double()
    return torch.linalg.lstsq(ones, y.double()).solution.T


@pytest.mark.parametrize("shape", [(40, 6), (10, 5, 6), (10, 4, 3, 6)])
def test_the_fit_is_least_squares_over_all_tokens(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(shape, generator=generator) + 1 for _ in range(5)]
    y = [v + torch.tanh(v.roll(1, -1)) for v in x]
    fit = LinearFit(Gram(len(shape) - 1))
    for a, b in zip(x, y, strict=True):
        fit(a, b)
    rows = [torch.cat([v.reshape(-1, 6) for v in side]) for side in (x, y)]
    seen = len(rows[0]) / 5 <= 8 * 7  # beyond that, a choice of rows is looked at
    expected = _lstsq(*rows)
    assert float((fit.matrix() - expected).abs().max()) < (1e-3 if seen else 0.2)


def test_a_linear_site_has_no_residual_and_noise_has_all() -> None:
    generator = torch.Generator().manual_seed(0)
    linear, noise = LinearFit(Gram(1, held=True)), LinearFit(Gram(1, held=True))
    weight = torch.randn(6, 6, generator=generator)
    for _ in range(12):
        x = torch.randn(40, 6, generator=generator)
        linear(x, x @ weight + 2)
        noise(x, torch.randn(40, 6, generator=generator))
    assert linear.residual() < 1e-7
    assert 0.9 < noise.residual() < 1.3


def test_held_out_samples_catch_what_is_learnt_by_heart() -> None:
    x, y = torch.randn(2, 48, 40, generator=torch.Generator().manual_seed(0))
    fit = LinearFit(Gram(1, held=True))
    fit(x, y)
    assert fit.residual() > 1.0
    everything = LinearFit(Gram(1))
    everything(x, y)
    assert everything.residual() < 0.5


def test_a_constant_input_gives_the_mean_and_no_data_an_error() -> None:
    fit = LinearFit(Gram(1))
    with pytest.raises(DataError, match="No calibration data"):
        fit.matrix()
    fit(torch.full((8, 3), 2.0), torch.full((8, 3), 5.0))
    assert torch.allclose(fit.matrix(), torch.cat([torch.eye(3), torch.full((3, 1), 3.0)], 1).double())
    assert fit.residual() == 0.0
    bad = LinearFit(Gram(1))
    bad(torch.full((8, 3), torch.inf), torch.ones(8, 3))
    with pytest.raises(DataError, match="not finite"):
        bad.residual()


def test_two_processes_see_what_one_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [torch.randn(30, 9, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def watched(share: list[Tensor]) -> LinearFit:
        fit = LinearFit(Gram(2, held=True))
        for x in share:
            fit(x, x + x.abs())
        return fit

    alone, halves = watched(batches), []
    for rank in range(2):
        monkeypatch.setattr(ranks, "count", lambda: 2)
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        halves.append(watched(batches[rank::2]))
    for part in ("gram", ""):
        one, two = ((getattr(h, part) if part else h).totals() for h in halves)
        (getattr(halves[0], part) if part else halves[0]).take({name: one[name] + two[name] for name in one})
    assert halves[0].residual() == pytest.approx(alone.residual(), rel=1e-12)
    assert torch.allclose(halves[0].matrix(), alone.matrix())


def test_residuals_of_all_sites_in_one_pass(nets: ModuleType) -> None:
    net = nets.tokens(nets.Straight(8), nets.Mlp(8, 16), nets.Mlp(8, 16))
    gm = capture(net, torch.randn(2, 5))
    passes: list[int] = []

    class Counted:
        def __iter__(self) -> Any:
            passes.append(1)
            return iter(nets.batches(32, 5))

    found = linear_residuals(gm, ["1", "2", "2..3", "1..3"], Counted())
    assert len(passes) == 1
    assert found["1"] < 1e-6 < found["2"] < found["2..3"]
    assert found["1..3"] == pytest.approx(found["2..3"], rel=0.05)
    with pytest.raises(PlanError, match="No block is called"):
        linear_residuals(gm, ["9"], [])


def test_padding_tokens_are_left_out(nets: ModuleType) -> None:
    torch.manual_seed(0)
    net = nets.lively(nets.Masked([nets.Mlp(8, 16), nets.Mlp(8, 16)], 8))
    generator = torch.Generator().manual_seed(3)
    long = [torch.randint(1, 11, (16, 6), generator=generator) for _ in range(3)]
    mask = torch.ones(16, 6)
    mask[:, 4:] = 0

    def loader(pad: int) -> list[Any]:
        ids = [torch.cat([v[:, :4], torch.full((16, 2), pad)], 1) for v in long]
        return [({"input_ids": v, "attention_mask": mask}, torch.zeros(16)) for v in ids]

    example = loader(0)[0][0]
    gm = capture(net, {k: v[:2] for k, v in example.items()})
    plans = [Plan([fit_linear("blocks.0")]).fit(gm, loader(pad)) for pad in (0, 5)]
    assert plans[0] == plans[1]
    scores = [linear_residuals(gm, ["blocks.0", "blocks.0..blocks.1"], loader(pad)) for pad in (0, 5)]
    assert scores[0] == scores[1]


def _fitted(net: nn.Module, x: Tensor, loader: list[Any], site: str) -> tuple[Plan, Any]:
    plan = Plan([fit_linear(site)]).fit(net, loader, x)
    return plan, plan.apply(net, x).eval()


def test_an_outer_activation_stays_behind_the_map(nets: ModuleType) -> None:
    net = nets.images(*(nets.Conv(6, 4, outer=True) for _ in range(2)), relu=True)
    loader, x = nets.batches(16, 3, 5, 5), torch.randn(3, 3, 5, 5)
    plan, edited = _fitted(net, x, loader, "2..3")
    module = edited.get_submodule("fitted.2__3")
    assert isinstance(module, nn.Conv2d)
    assert module.kernel_size == (1, 1)
    stem = torch.relu(net[0](x))
    assert torch.allclose(edited(x), net[4](torch.relu(module(stem))), atol=1e-6)
    assert verify(edited, collapse(edited, cost="macs")[0], example_inputs=x).exact
    assert len(plan) == 1


def test_a_norm_behind_the_sum_stays_behind_the_map(nets: ModuleType) -> None:
    net = nets.lively(nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nets.PostNorm(8), nn.Linear(8, 2)))
    loader, x = nets.batches(32, 5), torch.randn(4, 5)
    _, edited = _fitted(net, x, loader, "2")
    inner = net[1](net[0](x))
    assert torch.allclose(edited(x), net[3](net[2].norm(edited.get_submodule("fitted.2")(inner))), atol=1e-6)


def test_channels_may_lie_last_on_maps(nets: ModuleType) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Conv2d(3, 8, 1), nets.Mlp(8, 16), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))

    net, x = nets.lively(Last()), torch.randn(2, 3, 8, 8)
    _, edited = _fitted(net, x, nets.batches(8, 3, 8, 8), "body")
    assert isinstance(edited.get_submodule("fitted.body"), nn.Linear)


def test_the_fit_trains_and_merges_with_its_neighbours(nets: ModuleType) -> None:
    net, x = nets.tokens(nets.Mlp(8, 16), nets.Mlp(8, 16)), torch.randn(4, 5)
    _, edited = _fitted(net, x, nets.batches(32, 5), "1..2")
    edited.train()(x).square().sum().backward()
    assert edited.get_submodule("fitted.1__2").weight.grad.abs().sum() > 0
    small, record = collapse(edited.eval(), cost="macs")
    assert [m.members for m in record.done] == [("0", "fitted.1__2", "3")]
    assert verify(edited, small, example_inputs=x).exact
    assert sum(isinstance(m, nn.Linear) for m in small.modules()) == 1


def test_saved_without_the_matrix_and_loaded_with_the_weights(nets: ModuleType, tmp_path: Path) -> None:
    net, x = nets.tokens(nets.Mlp(8, 16), nets.Mlp(8, 16)), torch.randn(4, 5)
    plan, edited = _fitted(net, x, nets.batches(32, 5), "1")
    file = tmp_path / "net.safetensors"
    save(edited, file, source=net)
    with safe_open(str(file), framework="pt") as f:
        assert plan.edits[0].matrix not in f.metadata()["palmette"]
    assert torch.equal(load(net, file)(x), edited(x))
    stored = read_plan(file)
    assert [(e.kind, e.site, e.shape, e.fitted) for e in stored] == [("fit_linear", "1", (8, 9), False)]
    with pytest.raises(PlanError, match="no matrix yet"):
        stored.apply(net, x)


def test_a_matrix_survives_text_and_damage_is_told() -> None:
    matrix = torch.randn(4, 5)
    assert torch.equal(decode(encode(matrix), (4, 5)), matrix)
    for text, shape in (("!!", (4, 5)), (encode(matrix), (3, 4)), (encode(torch.full((1, 2), torch.nan)), (1, 2))):
        with pytest.raises(ValueError, match=r"base64|bytes|finite"):
            decode(text, shape)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [8]}, "is not"),
        ({"shape": [8, 8]}, "is not"),
        ({"shape": [8.0, 9]}, "is not"),
        ({"shape": None}, "is not"),
        ({"matrix": 5}, "no text"),
        ({"matrix": "AAAA"}, "damaged"),
        ({"matrix": "?"}, "damaged"),
        ({"fit": "affine"}, "unknown fields: fit"),
        ({"kind": "drop"}, "unknown fields: matrix, shape"),
        ({"kind": "melt"}, "malformed"),
    ],
)
def test_plans_are_read_strictly(change: dict[str, Any], words: str) -> None:
    edit = {"kind": "fit_linear", "site": "1", "shape": [8, 9], "matrix": encode(torch.randn(8, 9))}
    Plan.from_json(json.dumps({"palmette_plan": 1, "edits": [edit]}))
    with pytest.raises(PlanError, match=words):
        Plan.from_json(json.dumps({"palmette_plan": 1, "edits": [{**edit, **change}]}))


def test_what_cannot_be_fitted_is_refused(nets: ModuleType) -> None:
    net, x = nets.tokens(nets.Mlp(8, 16), nets.Mlp(8, 16)), torch.randn(4, 5)
    other = Plan([fit_linear("1")]).fit(nets.tokens(nets.Mlp(6, 12), width=6), nets.batches(8, 5), x)
    with pytest.raises(PlanError, match="for 6 channels, not for 8"):
        other.apply(net, x)
    activation = next(s for s in find_sites(net, x) if s.kind == "activation")
    with pytest.raises(PlanError, match="cannot be replaced by a linear map"):
        fit_linear(activation)
    stem = nets.lively(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), _Widening(), nn.Conv2d(6, 2, 1)))
    with pytest.raises(RefusedEdit, match="unequal shapes"):
        Plan([fit_linear("1")]).fit(stem, nets.batches(2, 3, 5, 5), torch.randn(2, 3, 5, 5))


class _Widening(nn.Module):
    """A block that changes the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.branch = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)
