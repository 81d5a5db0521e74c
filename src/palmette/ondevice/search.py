"""How a plan is found: the exact forms if they suffice, else a method's codecs at the least gradient error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from palmette.meter.training import measure_training
from palmette.ondevice.asi import AsiConfig
from palmette.ondevice.asi import options as asi_options
from palmette.ondevice.codec import Codec, Keep
from palmette.ondevice.install import Before, input_shapes, install, remove
from palmette.ondevice.layer import Layer
from palmette.ondevice.low_bit import LowBitConfig
from palmette.ondevice.low_bit import options as low_bit_options
from palmette.ondevice.mode import Engine
from palmette.ondevice.plan import MemoryPlan
from palmette.ondevice.planner import Costs, Draft, draft, infeasible, lossless, memory_plan, solve, what_binds
from palmette.ondevice.probe import Findings, probe
from palmette.ondevice.trace import Trace, trace
from palmette.registry import Method, MethodConfig
from palmette.train.progress import progress

_STARTS = 12  # first trainable layers that auto looks at, before it looks closer around the best
_PEAK_TRIES = 8  # plans measured for a bound on the peak


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `adapt` was asked for; copies: see `Costs`."""

    x: Any
    y: Any
    loss: Callable[[Any, Any], Tensor]
    budget: int | None
    scope: str
    method: str
    entry: Method | None
    config: MethodConfig | None
    copies: int

    @property
    def replaces(self) -> bool:
        """Whether the method puts something into the place of layers, so that none of them may stay as it is."""
        return self.method == "wasi"

    def blank(self) -> MemoryPlan:
        """A plan of this request that says nothing yet."""
        return MemoryPlan(method=self.method, scope=self.scope, budget=self.budget, inputs=input_shapes(self.x))


def searched(model: nn.Module, request: Request, found: Trace) -> MemoryPlan:
    """The plan for the request, from the trace of its sample. BudgetError when none fits."""
    costs = Costs.of(model, 0 if request.scope == "peak" else request.copies)
    exact = draft(found, lossless(found), costs)
    plain = memory_plan(exact, request.blank(), {})
    asked_for_codec = request.entry is not None and (
        request.budget is None or _has_own_rule(request.config) or request.replaces
    )
    if not asked_for_codec and _fits(model, request, exact, plain):
        return plain
    if request.method == "lossless":
        least = _peak(model, request, plain) if request.scope == "peak" else exact.nbytes
        raise infeasible(request.budget or 0, least, what_binds(found, exact.codecs, exact.stock), request)
    limit = max((entry.storage_bytes for entry in found.layers()), default=0)
    findings = probe(
        model, found, request.x, request.y, request.loss, _options(request), limit=max(limit, request.budget or 0)
    )
    search = _Search(model, request, found, costs, findings)
    if request.budget is None:
        return search.plan_of(search.solved(2**62, may_keep=False))
    return search.for_peak(exact.saved) if request.scope == "peak" else search.within(request.budget)


def _has_own_rule(config: MethodConfig | None) -> bool:
    """Whether the method's options say how coarse its codecs are, so that the budget need not."""
    return any(getattr(config, name, None) is not None for name in ("energy", "rank", "bits", "share", "r"))


def _fits(model: nn.Module, request: Request, exact: Draft, plain: MemoryPlan) -> bool:
    if request.budget is None:
        return True
    if request.scope == "peak":
        return _peak(model, request, plain) <= request.budget
    return exact.nbytes <= request.budget


def _options(request: Request) -> Callable[[Tensor, Layer], Sequence[Codec]]:
    entry, config = request.entry, request.config
    if entry is not None:
        offered: Callable[..., Any] = entry.score
        return lambda x, layer: offered(x, layer, config)

    def mixed(x: Tensor, layer: Layer) -> list[Codec]:
        """Few bits for every layer; factors where they are no loss of time: not for depthwise layers."""
        found: list[Codec] = list(low_bit_options(x, layer, LowBitConfig()))
        if layer.groups == 1:
            found = [*asi_options(x, layer, AsiConfig()), *found]
        return sorted(found, key=lambda codec: codec.nbytes(x.shape, x.element_size()))

    return mixed


def _peak(model: nn.Module, request: Request, plan: MemoryPlan) -> int:
    """Bytes alive at the peak of a step under the plan, measured."""
    before = Before()
    try:
        with training_only(model, plan.frozen):
            install(model, Engine(plan), before)
            return measure_training(model, request.x, request.y, request.loss).peak_bytes
    finally:
        remove(model, before)


@contextmanager
def training_only(model: nn.Module, frozen: Sequence[str]) -> Iterator[None]:
    """In this block, these parameters are frozen."""
    named = dict(model.named_parameters())
    changed = [named[name] for name in frozen if named[name].requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class _Search:
    """One request on its way to a plan."""

    model: nn.Module
    request: Request
    found: Trace
    costs: Costs
    findings: Mapping[str, Findings]

    @property
    def is_auto(self) -> bool:
        """Whether layers may be frozen for the budget."""
        return self.request.entry is None

    def solved(self, budget: int, *, may_keep: bool = True) -> Draft | int:
        """The best draft, or the fewest bytes of any."""
        if not self.is_auto:
            may_keep = may_keep and not self.request.replaces
            return solve(self.found, self.findings, self.costs, budget, may_skip=False, may_keep=may_keep)
        return self._from_starts(budget)

    def plan_of(self, result: Draft | int) -> MemoryPlan:
        """The plan; BudgetError when there is none."""
        if isinstance(result, int):
            raise self.too_small(result)
        return memory_plan(result, self.request.blank(), self.findings)

    def too_small(self, least: int) -> Exception:
        """The error for a budget that cannot be met."""
        return infeasible(self.request.budget or 0, least, self._binds(), self.request)

    def _binds(self) -> str:
        """What stays kept when every layer takes its smallest form."""
        if self.is_auto:
            return "it trains the last layer alone, or one that keeps less"
        smallest: dict[str, Codec] = {}
        for entry in self.found.layers():
            known = self.findings.get(entry.key)
            sizes = {} if known is None else {c: c.nbytes(entry.shape, entry.itemsize) for c, _ in known.choices}
            smallest[entry.key] = min(sizes, key=sizes.__getitem__, default=Keep())
        return what_binds(self.found, smallest, ())

    def within(self, budget: int) -> MemoryPlan:
        """The plan for a bound on what is kept."""
        return self.plan_of(self.solved(budget))

    def for_peak(self, most: int) -> MemoryPlan:
        """The plan that keeps most among those whose measured peak is within the budget: by halving the interval."""
        budget = self.request.budget or 0
        least = self.solved(0)
        low = least if isinstance(least, int) else least.nbytes
        smallest = self.plan_of(self.solved(low))
        lowest = _peak(self.model, self.request, smallest)
        if lowest > budget:
            raise self.too_small(lowest)
        best, high = smallest, most
        for _ in range(_PEAK_TRIES):
            middle = (low + high) // 2
            tried = self.plan_of(self.solved(middle))
            if _peak(self.model, self.request, tried) <= budget:
                best, low = tried, middle
            else:
                high = middle
        return best

    # ---- where training begins ---------------------------------------------------------------------------------------

    def _from_starts(self, budget: int) -> Draft | int:
        """The best draft over the layers at which training may begin; before it nothing is kept at all."""
        layers = [entry.key for entry in self.found.layers() if entry.kind == "layer"]
        step = max(1, len(layers) // _STARTS)
        tried: dict[int, Draft | int] = {}
        with progress("plan", None) as report:
            for number in [*range(0, len(layers), step), len(layers) - 1]:
                tried[number] = self._from(layers[number], budget)
                report(len(tried), layers[number])
            while step > 1:
                step = max(1, step // 2)
                best = self._best(tried)
                for number in (best - step, best + step):
                    if 0 <= number < len(layers) and number not in tried:
                        tried[number] = self._from(layers[number], budget)
        return tried[self._best(tried)]

    def _best(self, tried: Mapping[int, Draft | int]) -> int:
        def worth(number: int) -> tuple[bool, float]:
            result = tried[number]
            return (True, result) if isinstance(result, int) else (False, result.error)

        return min(tried, key=worth)

    def _from(self, first: str, budget: int) -> Draft | int:
        """The best draft with everything before the layer `first` frozen; exact in bytes, traced as it will train."""
        begin = next(i for i, entry in enumerate(self.found.calls) if entry.key == first)
        frozen = {name for name, (_, last) in self.found.uses().items() if last < begin} & self.costs.trained
        lost = sum(f.energy for key, f in self.findings.items() if self._is_frozen(key, frozen))
        result: Draft | int = 0
        for _ in range(3):
            with training_only(self.model, tuple(frozen)):
                found = trace(self.model, self.request.x, self.request.y, self.request.loss)
            result = solve(found, self.findings, self.costs, budget, may_skip=True, frozen=tuple(sorted(frozen)))
            if isinstance(result, int) or set(result.frozen) == frozen:
                break
            more = set(result.frozen) - frozen
            lost += sum(f.energy for key, f in self.findings.items() if self._is_frozen(key, more))
            frozen |= more
        if isinstance(result, int):
            return result
        return replace(result, error=result.error + lost)

    def _is_frozen(self, key: str, frozen: set[str]) -> bool:
        entry = next((e for e in self.found.layers() if e.key == key), None)
        return entry is not None and bool(entry.weights) and entry.weights[0] in frozen
