"""The only door to packages that may be absent or broken: torchvision, timm, transformers, scikit-learn, Pillow.

A CPU build of torch beside a torchvision wheel built for CUDA cannot load torchvision's compiled library, and then
torchvision (and whatever imports it) fails with "operator torchvision::nms does not exist". Its Python side needs
only the schemas of two operators.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from palmette.errors import MissingDependency

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library withdraws its schemas when it is collected


def optional(module: str, *, package: str) -> Any:
    """Import `module`.

    Raises MissingDependency saying how to install `package` (a requirement, or an extra such as palmette[hf]).
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingDependency(
            f"{name} cannot be imported",
            why=" ".join(str(error).split()),
            fix=f"Install it with: pip install '{package}'",
        ) from error


def torchvision() -> Any:
    """The torchvision package. Raises MissingDependency when it is not installed."""
    declare_missing_schemas()
    return optional("torchvision", package="palmette[zoo]")


def timm() -> Any:
    """The timm package. Raises MissingDependency when it is not installed."""
    declare_missing_schemas()
    return optional("timm", package="palmette[zoo]")


def transformers() -> Any:
    """The transformers package, which imports torchvision where it finds it.

    Raises MissingDependency when it is not installed.
    """
    declare_missing_schemas()
    return optional("transformers", package="palmette[hf]")


def declare_missing_schemas() -> bool:
    """Declare torchvision's two schemas if, and only if, its compiled library fails to load; True when done now."""
    if "torchvision" in sys.modules or _declared or _has_operators():
        return False
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations or _loads(Path(found.submodule_search_locations[0])):
        return False
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return True


def _has_operators() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


def _loads(folder: Path) -> bool:
    """Whether the compiled library of the torchvision in `folder`, the one that it would load, brings its operators."""
    for file in sorted(folder.glob("_C*.so")) + sorted(folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(file))
        except (OSError, ImportError):
            continue
        if _has_operators():
            return True
    return False
