"""Registration, discovery, configs with bounds, and the battery over every method."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from typing import Annotated, Literal

import pytest

from palmette import registry
from palmette.depth import battery
from palmette.errors import InputError, UnknownMethod, VerifyError
from palmette.ondevice import battery as adapt_battery
from palmette.registry import Bounds, Method, MethodConfig, check_method, get_method, method, methods

NAMES = [entry.name for entry in methods()]
BATTERIES = {"depth": battery.CHECKS, "ondevice": adapt_battery.CHECKS}
LONG = ("nothing_at_zero_rounds", "saved_and_loaded", "resumed")
"""Checks that take seconds: the default suite runs one of them for every third method, the slow one all."""


def cases():
    for index, entry in enumerate(methods()):
        for check in BATTERIES[entry.wing]:
            later = check in LONG and LONG.index(check) != index % (3 * len(LONG))
            yield pytest.param(entry.name, check, marks=[pytest.mark.slow] * later)


@dataclass(frozen=True, kw_only=True)
class Sample(MethodConfig):
    """A config with a field of every kind."""

    rate: Annotated[float, Bounds(low=0, high=1, low_open=True)] = 0.5
    count: Annotated[int | None, Bounds(low=1)] = None
    mode: Literal["a", "b"] = "a"
    flag: bool = False


def test_discovery_finds_the_methods_of_the_depth_wing() -> None:
    assert {"easier", "block_influence", "random"} <= set(NAMES)
    assert {entry.wing for entry in methods()} == {entry.wing for entry in methods() if entry in methods(entry.wing)}
    assert methods("depth") == [entry for entry in methods() if entry.wing == "depth"]


def test_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(UnknownMethod, match="Did you mean 'easier'"):
        get_method("easer")
    with pytest.raises(UnknownMethod, match="palmette methods"):
        get_method("zzzzzz")


def test_a_method_passes_through_get_method() -> None:
    entry = get_method("easier")
    assert get_method(entry) is entry


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"rate": 0.0}, r"a value in \(0, 1\]"),
        ({"rate": 1.5}, r"a value in \(0, 1\]"),
        ({"rate": float("nan")}, "a finite number"),
        ({"rate": "0.5"}, "a finite number"),
        ({"rate": True}, "a finite number"),
        ({"count": 0}, r"a value in \[1, inf\)"),
        ({"count": 1.5}, "a whole number"),
        ({"mode": "c"}, "one of 'a', 'b'"),
        ({"flag": 1}, "True or False"),
    ],
)
def test_values_that_are_not_allowed(options: dict[str, object], allowed: str) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))}=.*Sample.*{allowed}"):
        Sample(**options)  # type: ignore[arg-type]


def test_values_at_the_bounds_are_allowed_and_configs_are_frozen() -> None:
    config = Sample(rate=1, count=1, mode="b", flag=True)
    assert config.count == 1
    with pytest.raises(FrozenInstanceError):
        config.rate = 0.1  # type: ignore[misc]


def test_unknown_options_suggest_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'zeros'"):
        get_method("easier").make_config(zero="on")


def test_two_methods_of_one_name_are_refused() -> None:
    def score(captured, candidates, loader, config, *, seed):
        return {}

    register = method(name="easier", title="t", paper="p", unit="u", sites="block", edit="drop", config=Sample)
    with pytest.raises(InputError, match="two methods are named 'easier'"):
        register(score)
    assert get_method("easier").sites == "activation"


@pytest.mark.parametrize(("name", "check"), list(cases()))
def test_behaviour(name: str, check: str) -> None:
    entry = get_method(name)
    BATTERIES[entry.wing][check](entry)


def _broken(**changes: object) -> Method:
    entry = get_method("random")
    return dataclasses.replace(entry, **changes)


def _half(captured, candidates, loader, config, *, seed):
    return {candidates[0].name: 0.0}


def _infinite(captured, candidates, loader, config, *, seed):
    return {c.name: float("inf") for c in candidates}


CALLS: list[int] = []


def _growing(captured, candidates, loader, config, *, seed):
    CALLS.append(1)
    return {c.name: float(len(CALLS)) for c in candidates}


def _positional(captured, candidates, loader, config, *, seed):
    return {c.name: float(index) for index, c in enumerate(candidates)}


def _vandal(captured, candidates, loader, config, *, seed):
    next(captured.parameters()).data.add_(1)
    return {c.name: 0.0 for c in candidates}


@pytest.mark.parametrize(
    ("score", "check", "complaint"),
    [
        (_half, "complete_and_finite", "exactly the candidates"),
        (_infinite, "complete_and_finite", "finite"),
        (_growing, "deterministic", "same seed"),
        (_positional, "order_free", "order of the candidates"),
        (_vandal, "input_untouched", "changes weights"),
        (_half, "described", "low = remove first"),
    ],
)
def test_the_battery_catches_bad_methods(score, check: str, complaint: str) -> None:
    with pytest.raises(VerifyError, match=complaint):
        battery.CHECKS[check](_broken(name="bad", score=score))


def test_a_new_method_is_one_file_and_no_shared_edit(tmp_path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "from palmette.depth.random_removal import RandomConfig\n"
        "from palmette.registry import method\n"
        "@method(name='mine', title='t', paper='p', unit='u',\n"
        "        sites='activation', edit='linearize', config=RandomConfig)\n"
        "def score(captured, candidates, loader, config, *, seed):\n"
        "    '''Names in order; low = remove first.'''\n"
        "    return {c.name: 0.0 for c in candidates}\n"
    )
    code = (
        "import json, palmette.depth\n"
        f"palmette.depth.__path__.append({str(tmp_path)!r})\n"
        "from palmette.registry import methods\n"
        "print(json.dumps([[m.name, m.wing] for m in methods()]))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ["mine", "depth"] in json.loads(found.stdout)


OWN = '''
from dataclasses import dataclass

import palmette as pm


@dataclass(frozen=True, kw_only=True)
class LastFirstConfig(pm.MethodConfig):
    """Nothing to set."""


@pm.method(
    name="back_first", title="back first", paper="-", unit="depth", sites="block", edit="drop", config=LastFirstConfig
)
def score(captured, candidates, loader, config, *, seed):
    """Depth of a block from the end; low = remove first."""
    order = {str(n.meta.get("block")): -i for i, n in enumerate(captured.graph.nodes)}
    return {c.name: float(order[c.sites[0].path]) for c in candidates}


def plain():
    return None
'''


@pytest.mark.slow
def test_a_method_of_a_file_of_ones_own(tmp_path, monkeypatch) -> None:
    methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    entry = get_method(f"{file}:score")
    assert entry.name == "back_first"
    assert get_method(f"{file}:score") is entry is get_method("back_first")
    assert check_method(entry) == list(battery.CHECKS)
    with pytest.raises(InputError, match="the function is no method"):
        get_method(f"{file}:plain")
    with pytest.raises(InputError, match="no function 'other'"):
        get_method(f"{file}:other")
