"""What may be chosen in a supernet: named choices with their values, configurations, and their codes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from palmette.errors import InputError

Kind = Literal["width", "depth", "kernel", "heads", "resolution", "bits"]
Config = dict[str, int]
"""A value for every choice of a space."""

FORMAT = 1


@dataclass(frozen=True)
class Choice:
    """One thing that may be chosen.

    `values`, ascending: channels (width), blocks of the stage that stay (depth), edge of the kernel, attention heads,
    edge of the input image in pixels (resolution), bits. `owner`: the depth choice on which it hangs, with the number
    of blocks from which on it matters; None for one that always does.
    """

    name: str
    kind: Kind
    values: tuple[int, ...]
    owner: tuple[str, int] | None = None


@dataclass(frozen=True)
class Space:
    """Choices in order. Raises InputError for two of one name, unknown kinds and owners, values that do not ascend."""

    choices: tuple[Choice, ...]
    _by_name: dict[str, Choice] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {c.name: c for c in self.choices})
        if len(self._by_name) < len(self.choices):
            raise InputError("Two choices of a space have one name", fix="Name every choice once.")
        for choice in self.choices:
            whole = all(isinstance(value, int) for value in choice.values)
            if not whole or not choice.values or list(choice.values) != sorted(set(choice.values)):
                raise InputError(f"The values of '{choice.name}' are no whole numbers that ascend: {choice.values}")
            owner = None if choice.owner is None else self._by_name.get(choice.owner[0])
            if choice.kind not in get_args(Kind) or (
                choice.owner is not None and (owner is None or owner.kind != "depth")
            ):
                raise InputError(
                    f"'{choice.name}' is a choice of kind {choice.kind!r} that hangs on {choice.owner}",
                    fix=f"Kinds are {', '.join(get_args(Kind))}; choices hang on those of depth.",
                )

    def __getitem__(self, name: str) -> Choice:
        return self._by_name[name]

    def __len__(self) -> int:
        return len(self.choices)

    def of_kind(self, kind: Kind) -> list[Choice]:
        """The choices of one kind, in order."""
        return [c for c in self.choices if c.kind == kind]

    def max(self) -> Config:
        """The largest configuration: the network that the supernet was made from."""
        return {c.name: c.values[-1] for c in self.choices}

    def min(self) -> Config:
        """The smallest configuration."""
        return {c.name: c.values[0] for c in self.choices}

    def sample(self, rng: np.random.Generator) -> Config:
        """A configuration, every choice uniform and independent."""
        return self.canonical({c.name: int(c.values[rng.integers(len(c.values))]) for c in self.choices})

    def active(self, config: Mapping[str, int], choice: Choice) -> bool:
        """Whether the choice matters in a configuration: its block is there."""
        return choice.owner is None or config[choice.owner[0]] >= choice.owner[1]

    def canonical(self, config: Mapping[str, int]) -> Config:
        """The configuration in the order of the choices, with the largest value for what does not matter in it.

        Raises InputError for a choice that is missing or unknown, or a value that it has not.
        """
        unknown = [name for name in config if name not in self._by_name]
        missing = [c.name for c in self.choices if c.name not in config]
        if unknown or missing:
            what = f"has no choice '{unknown[0]}'" if unknown else f"asks for '{missing[0]}', which is not given"
            raise InputError(f"The space {what}", fix="Start from net.space.max() and change its values.")
        for choice in self.choices:
            if config[choice.name] not in choice.values:
                raise InputError(
                    f"'{choice.name}' cannot be {config[choice.name]}", fix=f"Choose one of {list(choice.values)}."
                )
        return {c.name: int(config[c.name]) if self.active(config, c) else c.values[-1] for c in self.choices}

    def size(self) -> int:
        """The number of different configurations."""
        hanging: dict[str, list[Choice]] = {}
        for choice in self.choices:
            if choice.owner is not None:
                hanging.setdefault(choice.owner[0], []).append(choice)
        total = 1
        for choice in self.choices:
            if choice.kind == "depth":
                total *= sum(
                    math.prod(len(c.values) for c in hanging.get(choice.name, ()) if c.owner and value >= c.owner[1])
                    for value in choice.values
                )
            elif choice.owner is None:
                total *= len(choice.values)
        return total

    def encode(self, config: Mapping[str, int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The one-hot code [sum of the numbers of values] of a configuration; zeros for what does not matter in it."""
        code = [
            float(self.active(config, choice) and config[choice.name] == value)
            for choice in self.choices
            for value in choice.values
        ]
        return np.array(code)

    def to_json(self) -> str:
        """The space as JSON text."""
        choices = [{"name": c.name, "kind": c.kind, "values": c.values, "owner": c.owner} for c in self.choices]
        return json.dumps({"palmette_space": FORMAT, "choices": choices})

    @staticmethod
    def from_json(text: str) -> Space:
        """The space that `to_json` wrote. Raises InputError for anything else."""
        try:
            raw = json.loads(text)
            if raw["palmette_space"] != FORMAT:
                raise InputError(f"Space format {raw['palmette_space']} is not known", fix="Update palmette.")
            return Space(
                tuple(
                    Choice(c["name"], c["kind"], tuple(c["values"]), tuple(c["owner"]) if c["owner"] else None)
                    for c in raw["choices"]
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                "This is no space", why=f"{type(error).__name__}: {error}", fix="Pass what Space.to_json wrote."
            ) from error


def key_of(config: Mapping[str, int]) -> str:
    """A configuration as a short text that is equal for equal ones, whatever their order."""
    return json.dumps(dict(sorted(config.items())), separators=(",", ":"))
