"""Make trained PyTorch networks physically smaller and faster, and prove that they still work.

The public names are imported when they are first used, so that `import palmette` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palmette.deploy import export, export_onnx, export_program, load_program
    from palmette.deploy.huggingface import save_pretrained
    from palmette.deploy.quantize import quantize_int8
    from palmette.depth.curve import CurveResult, curve
    from palmette.depth.shrink import ShrinkResult, shrink
    from palmette.depth.width import prune_width
    from palmette.device import DeviceProfile
    from palmette.errors import PalmetteError
    from palmette.graph import (
        Plan,
        Site,
        drop,
        find_sites,
        fit_linear,
        identity,
        linearize,
        load,
        parallelize,
        remove_dead_channels,
        save,
    )
    from palmette.graph.candidates import candidates
    from palmette.graph.capture import capture
    from palmette.graph.collapse import collapse
    from palmette.graph.observe import observe
    from palmette.graph.verify import verify
    from palmette.meter import Cost, CostTable, measure, measure_latency
    from palmette.meter.training import TrainingMemory, measure_training
    from palmette.ondevice.adapt import adapt
    from palmette.ondevice.adaptation import Adaptation
    from palmette.ondevice.plan import MemoryPlan
    from palmette.ondevice.session import FineTuned, fine_tune
    from palmette.registry import Bounds, MethodConfig, check_method, get_method, method, methods
    from palmette.report.render import render
    from palmette.supernet.boards import run_boards
    from palmette.supernet.memory import MemoryModel
    from palmette.supernet.specialize import Specialized, specialize
    from palmette.supernet.supernet import Supernet
    from palmette.supernet.training import train_supernet
    from palmette.train.evaluate import evaluate
    from palmette.train.loop import HealConfig, heal
    from palmette.train.wasserstein import lacoot_term, max_sliced_wasserstein
    from palmette.trials import run_trials

_HOMES = {
    "palmette.ondevice.adapt": ("adapt",),
    "palmette.ondevice.adaptation": ("Adaptation",),
    "palmette.ondevice.plan": ("MemoryPlan",),
    "palmette.ondevice.session": ("FineTuned", "fine_tune"),
    "palmette.deploy": ("export", "export_onnx", "export_program", "load_program"),
    "palmette.deploy.huggingface": ("save_pretrained",),
    "palmette.deploy.quantize": ("quantize_int8",),
    "palmette.depth.curve": ("CurveResult", "curve"),
    "palmette.depth.shrink": ("ShrinkResult", "shrink"),
    "palmette.depth.width": ("prune_width",),
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
        "fit_linear",
        "identity",
        "linearize",
        "load",
        "observe",
        "parallelize",
        "remove_dead_channels",
        "save",
        "verify",
    ),
    "palmette.meter": ("Cost", "CostTable", "measure", "measure_latency"),
    "palmette.meter.training": ("TrainingMemory", "measure_training"),
    "palmette.supernet.boards": ("run_boards",),
    "palmette.supernet.memory": ("MemoryModel",),
    "palmette.supernet.specialize": ("Specialized", "specialize"),
    "palmette.supernet.supernet": ("Supernet",),
    "palmette.supernet.training": ("train_supernet",),
    "palmette.registry": ("Bounds", "MethodConfig", "check_method", "get_method", "method", "methods"),
    "palmette.report": ("render",),
    "palmette.train.evaluate": ("evaluate",),
    "palmette.train.loop": ("HealConfig", "heal"),
    "palmette.train.wasserstein": ("lacoot_term", "max_sliced_wasserstein"),
    "palmette.trials": ("run_trials",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Adaptation",
    "Bounds",
    "Cost",
    "CostTable",
    "CurveResult",
    "DeviceProfile",
    "FineTuned",
    "HealConfig",
    "MemoryModel",
    "MemoryPlan",
    "MethodConfig",
    "PalmetteError",
    "Plan",
    "ShrinkResult",
    "Site",
    "Specialized",
    "Supernet",
    "TrainingMemory",
    "adapt",
    "candidates",
    "capture",
    "check_method",
    "collapse",
    "curve",
    "drop",
    "evaluate",
    "export",
    "export_onnx",
    "export_program",
    "find_sites",
    "fine_tune",
    "fit_linear",
    "get_method",
    "heal",
    "identity",
    "lacoot_term",
    "linearize",
    "load",
    "load_program",
    "max_sliced_wasserstein",
    "measure",
    "measure_latency",
    "measure_training",
    "method",
    "methods",
    "observe",
    "parallelize",
    "prune_width",
    "quantize_int8",
    "remove_dead_channels",
    "render",
    "run_boards",
    "run_trials",
    "save",
    "save_pretrained",
    "shrink",
    "specialize",
    "train_supernet",
    "verify",
]


def __getattr__(name: str) -> Any:
    """A public name, imported from where it lives."""
    if name == "supernet":  # a room of the house with names of its own, such as pm.supernet.MOOFA
        return importlib.import_module("palmette.supernet")
    if name not in _HOME:
        raise AttributeError(f"module 'palmette' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
