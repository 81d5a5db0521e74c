"""Make trained PyTorch networks physically smaller and faster, and prove that they still work.

The public names are imported when they are first used, so that `import palmette` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palmette.deploy import export, export_onnx, export_program, load_program
    from palmette.depth.shrink import ShrinkResult, shrink
    from palmette.device import DeviceProfile
    from palmette.errors import PalmetteError
    from palmette.graph import (
        Plan,
        Site,
        candidates,
        capture,
        collapse,
        drop,
        find_sites,
        linearize,
        load,
        observe,
        save,
        verify,
    )
    from palmette.meter import Cost, CostTable, measure, measure_latency
    from palmette.registry import check_method, get_method, method, methods
    from palmette.report import render
    from palmette.train.evaluate import evaluate
    from palmette.train.loop import HealConfig, heal

_HOMES = {
    "palmette.deploy": ("export", "export_onnx", "export_program", "load_program"),
    "palmette.depth.shrink": ("ShrinkResult", "shrink"),
    "palmette.device": ("DeviceProfile",),
    "palmette.errors": ("PalmetteError",),
    "palmette.graph": (
        "Plan",
        "Site",
        "candidates",
        "capture",
        "collapse",
        "drop",
        "find_sites",
        "linearize",
        "load",
        "observe",
        "save",
        "verify",
    ),
    "palmette.meter": ("Cost", "CostTable", "measure", "measure_latency"),
    "palmette.registry": ("check_method", "get_method", "method", "methods"),
    "palmette.report": ("render",),
    "palmette.train.evaluate": ("evaluate",),
    "palmette.train.loop": ("HealConfig", "heal"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Cost",
    "CostTable",
    "DeviceProfile",
    "HealConfig",
    "PalmetteError",
    "Plan",
    "ShrinkResult",
    "Site",
    "candidates",
    "capture",
    "check_method",
    "collapse",
    "drop",
    "evaluate",
    "export",
    "export_onnx",
    "export_program",
    "find_sites",
    "get_method",
    "heal",
    "linearize",
    "load",
    "load_program",
    "measure",
    "measure_latency",
    "method",
    "methods",
    "observe",
    "render",
    "save",
    "shrink",
    "verify",
]


def __getattr__(name: str) -> Any:
    """A public name, imported from where it lives."""
    if name not in _HOME:
        raise AttributeError(f"module 'palmette' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
