"""Methods: a config with bounds, a decorated score function, and discovery, so that a new method is one new file.

A method ranks candidates: `score(captured, candidates, loader, config, *, seed) -> {candidate name: float}`, low =
remove first. It registers itself with `@method(...)`; `methods()` imports every module of every wing, so no list is
kept by hand.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import pkgutil
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from palmette.errors import InputError, UnknownMethod, VerifyError
from palmette.usercode import is_file_spec, user_function

WINGS = ("depth", "ondevice", "supernet", "sparsity", "fairness")

_VERBS = {"depth": "shrink", "ondevice": "adapt"}

SiteKind = Literal["activation", "block", "span", "layer", "convolution", "input", "channel"]
ScoreFunction = Callable[..., dict[str, float]]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """An interval for the number in a config field, closed unless an end is called open."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        left = "(" if self.low_open or math.isinf(self.low) else "["
        right = ")" if self.high_open or math.isinf(self.high) else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's config: a frozen dataclass whose fields are checked when it is made.

    Raises InputError for a value of the wrong type, outside its `Annotated[..., Bounds(...)]`, or not among its
    `Literal` choices.
    """

    def __post_init__(self) -> None:
        check_config(self)


def config_help(config: type[MethodConfig]) -> str:
    """What the options of a method mean: the docstrings of its config and of those that it extends."""
    own = [kind for kind in config.__mro__[: config.__mro__.index(MethodConfig)] if kind.__doc__]
    return "\n\n".join(inspect.cleandoc(kind.__doc__ or "") for kind in own)


def check_config(config: Any) -> None:
    """Hold every field of a dataclass against its annotation: type, Literal choices and Bounds.

    Raises InputError naming the field, the value and what is allowed.
    """
    kind: type = type(config)
    hints = _hints(kind)
    for field in dataclasses.fields(config):
        problem = _problem(getattr(config, field.name), hints[field.name])
        if problem is not None:
            value = getattr(config, field.name)
            raise InputError(
                f"{field.name}={value!r} is not allowed", where=type(config).__name__, fix=f"Choose {problem}"
            )


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a config, resolved once."""
    return get_type_hints(kind, include_extras=True)


def _problem(value: Any, hint: Any) -> str | None:
    """What would be allowed instead of `value`, or None when it fits the annotation."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        problem = _problem(value, inner)
        if problem is not None or value is None:
            return problem
        return next((f"a value in {mark}" for mark in marks if isinstance(mark, Bounds) and value not in mark), None)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return None if value in choices else "one of " + ", ".join(repr(choice) for choice in choices)
    if get_origin(hint) in (Union, types.UnionType):
        problems = [_problem(value, option) for option in get_args(hint)]
        return None if None in problems else " or ".join(problem for problem in problems if problem)
    return _type_problem(value, hint)


def _type_problem(value: Any, hint: Any) -> str | None:
    if hint is Any:
        return None
    if hint is type(None):
        return None if value is None else "None"
    if hint is bool:
        return None if isinstance(value, bool) else "True or False"
    if hint is int:
        return None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return None if number else "a finite number"
    if isinstance(hint, type) and not isinstance(value, hint):
        return f"a {hint.__name__}"
    return None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A registered method: what it is, what it ranks, the edit it proposes, and its score function.

    `watch`, where given, is `watch(captured, candidates, config, *, steps) -> None`: it puts observers into the graph
    before an epoch-wise training of `steps` batches per epoch, whose findings the next call of `score` reads;
    `unwatch(captured)` removes them.

    `prepare`: a training-time ingredient, `prepare(network, candidates, train, config, *, loader, seed) -> {site path:
    number}`. It trains `network` in place by calls of `train(network, loss_terms=..., keep_zeros=...)`, each one
    healing schedule, and leaves the network's structure as it was; scores read what it returns with
    `palmette.depth.prepared.findings`. `select(candidates, scores, config, *, losses, step) -> [names]` says which
    candidates go together in a round (default: the `step` lowest); `losses(names)` is the loss on the calibration set
    with these edited, of the present network for (). `edits(candidate, config) -> [Edit]`: default the candidate's own
    edit at each site. `fit(plan, network, config, *, loader) -> Plan`: slopes and offsets of its own; what it leaves
    open is fitted as ever. `heals(config)`: whether a removal is followed by healing (default yes). `keeps_zeros`:
    weights that are exactly 0 stay 0 in healing. `cross_entropy`: its score is that loss, so that it is refused beside
    another one. `search(session, baseline, say)`: a search of its own in place of the rounds.
    """

    name: str
    wing: str
    title: str
    paper: str
    unit: str
    sites: SiteKind
    edit: str
    config: type[MethodConfig]
    score: ScoreFunction
    summary: str = ""
    watch: Callable[..., None] | None = None
    unwatch: Callable[..., None] | None = None
    prepare: Callable[..., dict[str, float]] | None = None
    select: Callable[..., list[str]] | None = None
    edits: Callable[..., list[Any]] | None = None
    fit: Callable[..., Any] | None = None
    heals: Callable[..., bool] | None = None
    keeps_zeros: bool = False
    cross_entropy: bool = False
    search: Callable[..., Any] | None = None

    @property
    def verb(self) -> str:
        """The command that uses it: one of your own is told by the sites that it ranks."""
        return _VERBS.get(self.wing) or ("adapt" if self.sites in ("input", "channel") else "shrink")

    @property
    def ranks(self) -> str:
        """What it ranks, for tables: a kind of site, or "all" for a search of its own."""
        return "all" if self.search is not None else self.sites

    def make_config(self, **options: Any) -> MethodConfig:
        """The method's config from options; raises InputError for an option it does not know (suggests the nearest)."""
        known = [field.name for field in dataclasses.fields(self.config)]
        for option in options:
            if option not in known:
                near = difflib.get_close_matches(option, known, n=1)
                fix = f"Did you mean {near[0]!r}?" if near else f"It knows {', '.join(known) or 'none'}"
                raise InputError(f"method {self.name!r} has no option {option!r}", fix=fix)
        return self.config(**options)

    def kind(self, config: MethodConfig) -> SiteKind:
        """The kind of sites ranked under `config`: its field `sites` where it has one, else the method's own."""
        return getattr(config, "sites", self.sites)


_METHODS: dict[str, Method] = {}
_OWN: dict[str, Method] = {}


def method(
    *,
    name: str,
    title: str,
    paper: str,
    unit: str,
    sites: SiteKind,
    edit: str,
    config: type[MethodConfig],
    **hooks: Any,
) -> Callable[[F], F]:
    """Register the decorated score function as a method; its wing is the package that its file lies in.

    `hooks`: the optional fields of `Method` (watch, unwatch, prepare, select, edits, fit, heals, keeps_zeros,
    search).

    Raises InputError when another file has registered the same name.
    """

    def register(score: F) -> F:
        parts = score.__module__.split(".")
        wing = parts[1] if parts[0] == "palmette" and len(parts) > 2 else parts[0]
        summary = (score.__doc__ or "").strip().splitlines()
        entry = Method(
            name=name,
            wing=wing,
            title=title,
            paper=paper,
            unit=unit,
            sites=sites,
            edit=edit,
            config=config,
            score=score,
            summary=summary[0] if summary else "",
            **hooks,
        )
        known = _METHODS.get(name)
        if known is not None and known.score.__module__ != score.__module__:
            raise InputError(
                f"two methods are named {name!r}", where=f"{known.score.__module__} and {score.__module__}"
            )
        _METHODS[name] = entry
        return score

    return register


@functools.cache
def _discover() -> None:
    """Import every module of every wing once, so that its methods register themselves."""
    for wing in WINGS:
        package = f"palmette.{wing}"
        if importlib.util.find_spec(package) is None:
            continue
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")


def methods(wing: str | None = None) -> list[Method]:
    """All registered methods, or those of one wing, by name."""
    _discover()
    return sorted((entry for entry in _METHODS.values() if wing in (None, entry.wing)), key=lambda entry: entry.name)


def get_method(name: str | Method, *, verb: str | None = None) -> Method:
    """The method of that name, or that of a score function of your own, `path/file.py:function`; a Method as it is.

    Raises UnknownMethod, which suggests the nearest name (of the methods of `verb`, where one is given), and InputError
    for a file without that method.
    """
    if isinstance(name, Method):
        return name
    _discover()
    if is_file_spec(name):
        return _own(name)
    if name in _METHODS:
        return _METHODS[name]
    names = sorted(entry.name for entry in _METHODS.values() if verb in (None, entry.verb))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = f"`palmette methods` lists {'all' if verb is None else f'those of {verb}'}: {', '.join(names)}"
    raise UnknownMethod(f"no method is named {name!r}", fix=f"Did you mean {near[0]!r}? {listed}" if near else listed)


def method_of(verb: str, name: str | Method) -> Method:
    """`get_method` for one verb. Raises UnknownMethod, and InputError for a method of another verb."""
    entry = get_method(name, verb=verb)
    if entry.verb != verb:
        raise InputError(
            f"{entry.name!r} is a method of palmette {entry.verb}, not of {verb}",
            fix=f"Run palmette {entry.verb} --method {entry.name}; `palmette methods` lists those of {verb}",
        )
    return entry


def _own(spec: str) -> Method:
    """The method whose score function is `path/file.py:function`; the file is read once."""
    known = _OWN.get(spec)
    if known is None:
        score = user_function(spec)
        known = next((entry for entry in _METHODS.values() if entry.score is score), None)
    if known is None:
        raise InputError("the function is no method", where=spec, fix="Decorate it with palmette.method(...)")
    _OWN[spec] = known
    return known


def check_method(name: str | Method) -> list[str]:
    """Run the public battery of behaviours on a method and return the names of the checks that it passed.

    A method of your own need not lie in the package: decorate it with `@method` and pass its name. Takes some seconds.
    Raises VerifyError naming the first check that fails and what it saw.
    """
    entry = get_method(name)
    wing = next(wing for wing, verb in _VERBS.items() if verb == entry.verb)
    battery = importlib.import_module(f"palmette.{wing}.battery")
    passed: list[str] = []
    for label, check in battery.CHECKS.items():
        check(entry)
        passed.append(label)
    return passed


def bounds_enforced(method: Method) -> None:
    """Values beyond a field's bounds or choices are refused, unknown options too."""
    for name, hint in get_type_hints(method.config, include_extras=True).items():
        for value in _beyond(hint):
            _refuses(method, {name: value})
    _refuses(method, {"no_such_option": 1})


def _beyond(hint: Any) -> list[Any]:
    if get_origin(hint) is not Annotated:
        return [object()]
    bounds = [mark for mark in get_args(hint) if isinstance(mark, Bounds)]
    ends = [end for bound in bounds for end in (bound.low - 1, bound.high + 1) if math.isfinite(end)]
    return [object(), *ends]


def _refuses(method: Method, options: dict[str, Any]) -> None:
    try:
        method.make_config(**options)
    except InputError:
        return
    raise VerifyError(f"method {method.name!r}: accepts {options}")
