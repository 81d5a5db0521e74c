"""TLC, till the layers collapse: mask the channels that are mostly OFF, linearise the others, where it costs least.

Idea: behind a batch norm a pre-activation is modelled as N(beta, gamma^2), so that P(OFF) = Phi(-beta / |gamma|): the
sign of beta decides whether a channel is masked to 0 (OFF) or passed on (ON); the layers whose masked linearisation
raises the loss least go first. Paper: Liao, Hezbri, Quétu, Nguyen, Tartaglione, "Till the Layers Collapse: Compressing
a Deep Neural Network through the Lenses of Batch Normalization Layers", AAAI 2025. Where no batch norm stands directly
before the activation (none in the network, or an addition between) mean and standard deviation are measured. Differs
from the authors' code in both forms: measured moments and loss increases are those of the whole calibration set, not of
one batch; behind a residual addition beta is not taken for the mean; an OFF unit puts out 0 instead of its bias;
padded tokens are not counted. The paper's form, `reproduce=True`: while the loss falls, ever more layers go together,
the first one that makes it worse included; one activation stays. Sound form, the default: that one is left out, and a
channel beyond the upper bound of its activation (ReLU6) is the constant that it is.

The loss increases are those of cross entropy, whatever the loss that healing is given. Shapes: pre-activations [batch,
channels, ...] or [batch, ..., channels]. Cost: a forward pass over the set per candidate and one or two more, and per
round another for every layer that is tried together with others.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from palmette.errors import DataError, PlanError, RefusedEdit
from palmette.graph import Candidate, Edit, Plan, linearize, observe
from palmette.graph.activations import Activation, find_activations
from palmette.graph.observe import twin_of
from palmette.graph.ops import BATCH_NORMS, ChannelAffine, module_of, op_name, skip_transparent
from palmette.graph.padding import MaskTap
from palmette.graph.sites import site_axis
from palmette.registry import MethodConfig, method
from palmette.train.evaluate import evaluate


@dataclass(frozen=True, kw_only=True)
class TlcConfig(MethodConfig):
    """TLC has nothing to choose but the paper's form."""

    reproduce: bool = False


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """The model of an activation's input: mean and standard deviation per channel, float64 [C]."""

    mean: Tensor
    std: Tensor

    def below(self, level: float = 0.0) -> Tensor:
        """P(z <= level) per channel, P(OFF) at level 0: Phi((level - mean) / std), a step where std is 0."""
        spread = torch.where(self.std > 0, self.std, 1.0)
        normal = torch.special.ndtr((level - self.mean) / spread)
        return torch.where(self.std > 0, normal, (self.mean <= level).double())

    def mask(self, low: float = 0.0, high: float = math.inf) -> tuple[Tensor, Tensor]:
        """Slope and offset [C] for an activation cut off at `low` and `high`, by where a channel mostly is.

        Within: slope 1, offset 0. Below or above: slope 0 and the bound as offset.
        """
        off, above = self.below(low) >= 0.5, self.below(high) < 0.5
        slope = (~(off | above)).double()
        return slope, torch.zeros_like(slope).masked_fill(off, low).masked_fill(above, high)


class InputMoments:
    """Mean and standard deviation per channel of an activation's input over all samples and positions, in float64."""

    def __init__(self, axis: int) -> None:
        self.axis, self.count = axis, 0
        self.sums: Tensor | None = None  # [2, C]: z, z * z

    def add(self, z: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch; `mask` [samples, tokens] leaves tokens out of a `z` [samples, tokens, C]."""
        rows = z.detach() if mask is None else z.detach()[mask.to(z.device, torch.bool)]
        if mask is None:
            rows = rows.movedim(self.axis, -1).reshape(-1, z.shape[self.axis])
        rows = rows.double()
        sums = torch.stack([rows.sum(0), rows.square().sum(0)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += rows.shape[0]

    def totals(self) -> dict[str, Tensor]:
        """What was added up so far, to be summed over processes."""
        return {} if self.sums is None else {"sums": self.sums, "count": torch.tensor(self.count)}

    def take(self, totals: Mapping[str, Tensor]) -> None:
        """Go on with the sums of all processes."""
        if totals:
            self.sums, self.count = totals["sums"], int(totals["count"])

    def gaussian(self) -> Gaussian:
        """What was seen as a model; raises DataError before the first batch, or when that was not finite."""
        if self.sums is None or self.count == 0:
            raise DataError("no batch reached an activation", fix="Give a calibration loader that is not empty")
        if not bool(torch.isfinite(self.sums).all()):
            raise DataError(
                "a pre-activation is not finite", fix="Look for NaN or infinite values in the data and the weights"
            )
        mean, square = self.sums / self.count
        variance = square - mean * mean
        steady = variance <= 1e-12 * square  # rounding of a constant
        return Gaussian(mean=mean, std=torch.where(steady, 0.0, variance.clamp_min(0)).sqrt())


def gaussians(network: fx.GraphModule, paths: Iterable[str], loader: Iterable[Any]) -> dict[str, Gaussian]:
    """The model of each activation's input, by path: of the batch norm directly before it, else measured in one pass.

    Raises PlanError for a path that is no activation, DataError for an empty loader where a pass is needed.
    """
    activations, wanted = {found.path: found for found in find_activations(network)}, list(paths)
    missing = [path for path in wanted if path not in activations]
    if missing:
        raise PlanError(f"No activation is called '{missing[0]}'", fix="`palmette sites` lists them.")
    models = {path: _norm_before(network, activations[path]) for path in wanted}
    measured = {p: InputMoments(site_axis(network, activations[p])) for p, model in models.items() if model is None}
    if measured:
        tap = MaskTap(loader)
        watchers = {path: _adder(moments, tap) for path, moments in measured.items()}
        observe(network, watchers, tap, sums=list(measured.values()))
    return {path: model if model is not None else measured[path].gaussian() for path, model in models.items()}


def _adder(moments: InputMoments, tap: MaskTap) -> Callable[[Tensor, Tensor], None]:
    return lambda z, _: moments.add(z, tap.for_tokens(z, moments.axis))


def _norm_before(network: fx.GraphModule, activation: Activation) -> Gaussian | None:
    """Shift and size of the scale of the batch norm whose output is the activation's input; None when there is none."""
    norm: Any = module_of(network, skip_transparent(network, activation.source))
    if not isinstance(norm, BATCH_NORMS) or not norm.affine:
        return None
    return Gaussian(mean=norm.bias.detach().double(), std=norm.weight.detach().double().abs())


def bounds(activation: Activation) -> tuple[float, float]:
    """The values at which an activation is cut off below and above (-inf, inf: not at all)."""
    node, name = activation.output, op_name(activation.output)
    if name == "relu6":
        return 0.0, 6.0
    if name == "hardtanh":
        return _number(node, 1, "min_val", -1.0), _number(node, 2, "max_val", 1.0)
    if name == "clamp":
        return _number(node, 1, "min", -math.inf), _number(node, 2, "max", math.inf)
    return 0.0, math.inf


def _number(node: fx.Node, position: int, key: str, default: float) -> float:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(key)
    return float(value) if isinstance(value, int | float) else default


def fit(plan: Plan, network: fx.GraphModule, config: TlcConfig, *, loader: Iterable[Any]) -> Plan:
    """The plan with the slopes and offsets of the states in its masks; edits of other kinds stay as they are."""
    masks = [edit.site for edit in plan if edit.kind == "linearize" and edit.fit == "mask" and not edit.fitted]
    if not masks:
        return plan
    models, activations = gaussians(network, masks, loader), {a.path: a for a in find_activations(network)}
    fitted: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}
    for path in masks:
        slope, offset = models[path].mask(*(() if config.reproduce else bounds(activations[path])))
        fitted[path] = tuple(slope.tolist()), tuple(offset.tolist())
    return Plan(replace(e, slope=fitted[e.site][0], offset=fitted[e.site][1]) if e.site in fitted else e for e in plan)


def edits(candidate: Candidate, config: TlcConfig) -> list[Edit]:
    """The masked linearisation of every site of the candidate."""
    return [linearize(site, fit="mask", force=config.reproduce) for site in candidate.sites]


def masked(network: fx.GraphModule, plan: Iterable[Edit]) -> fx.GraphModule:
    """A twin of the network with the same weights and fitted linearisations in it, whether they can be merged or not.

    Unlike `Plan.apply` it copies no weights and moves no padding.
    """
    twin = twin_of(network)
    activations = {found.path: found for found in find_activations(twin)}
    like = next(network.parameters())
    for index, edit in enumerate(plan):
        found, name = activations[edit.site], f"palmette_mask_{index}"
        slope, offset = (torch.tensor(values, dtype=torch.float64).to(like) for values in (edit.slope, edit.offset))
        twin.add_module(name, ChannelAffine(slope, offset, site_axis(twin, found), trainable=False))
        with twin.graph.inserting_after(found.output):
            node = twin.graph.call_module(name, (found.source,))
        node.meta.update(found.output.meta, path=name)
        found.output.replace_all_uses_with(node)
        for old in sorted(found.region, reverse=True):
            twin.graph.erase_node(old)
    twin.recompile()
    return twin


def select(
    candidates: Sequence[Candidate],
    scores: Mapping[str, float],
    config: TlcConfig,
    *,
    losses: Callable[[Sequence[str]], float],
    step: int,
) -> list[str]:
    """The paper's set rule: where the best gap is negative, the best 2, 3, 4 ... together while the loss falls.

    The first that makes it worse goes too under `reproduce`, and is left out otherwise. Where no gap is negative: the
    best one, or the `step` best outside `reproduce`. Under `reproduce` the last activation stays.
    """
    names = [candidate.name for candidate in candidates]
    names = names[: len(names) - config.reproduce]
    if not names or scores[names[0]] >= 0:
        return names[: 1 if config.reproduce else step]
    present, taken = losses(()), names[:1]
    for name in names[1:]:
        try:
            gap = losses([*taken, name]) - present
        except (RefusedEdit, PlanError):
            continue
        if not gap <= 0:
            return [*taken, name] if config.reproduce else taken
        taken.append(name)
    return taken


@method(
    name="tlc",
    title="TLC: least loss when channels are masked OFF or linear",
    paper="Liao, Hezbri, Quétu, Nguyen, Tartaglione. Till the Layers Collapse. AAAI 2025",
    unit="loss increase",
    sites="activation",
    edit="linearize",
    config=TlcConfig,
    select=select,
    edits=edits,
    fit=fit,
    cross_entropy=True,
)
def score(
    captured: fx.GraphModule,
    candidates: Sequence[Candidate],
    loader: Iterable[Any],
    config: TlcConfig,
    *,
    seed: int,  # noqa: ARG001 - the interface of scores
) -> dict[str, float]:
    """Increase of the cross entropy on the whole set when a candidate alone is masked; low = remove first.

    Raises DataError for an empty loader, or when the loss of the network as it is is not finite.
    """
    wanted = {edit.site: edit for candidate in candidates for edit in edits(candidate, config)}
    plan = {edit.site: edit for edit in fit(Plan(wanted.values()), captured, config, loader=loader)}
    present = evaluate(captured, loader).loss
    if not math.isfinite(present):
        raise DataError("the loss of the network is not finite", fix="Look for NaN or infinite values in the data")
    scores = {}
    for candidate in candidates:
        loss = evaluate(masked(captured, [plan[site.path] for site in candidate.sites]), loader).loss
        scores[candidate.name] = loss - present if math.isfinite(loss) else sys.float_info.max
    return scores
