"""What a training-time ingredient found, kept with the network so that scores can read it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from palmette.errors import InputError


def keep(network: fx.GraphModule, method: str, found: Mapping[str, float]) -> None:
    """Store the findings of a method's `prepare`, a number per site path, in the network's meta data; in place."""
    info = network.meta.setdefault("palmette", {})
    info["prepared"] = {**info.get("prepared", {}), method: dict(found)}


def findings(network: fx.GraphModule, method: str) -> dict[str, float]:
    """What `prepare` of the method found on this network, by site path.

    Raises InputError when the network was not trained with that ingredient.
    """
    found = network.meta.get("palmette", {}).get("prepared", {}).get(method)
    if found is None:
        raise InputError(
            f"the network was not trained with the ingredient of {method!r}",
            fix="Use palmette.shrink, or call the method's prepare first",
        )
    return dict(found)
