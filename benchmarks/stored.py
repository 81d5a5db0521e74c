"""Trained networks of the folder that PALMETTE_DATA names, as functions for `palmette --model FILE:FUNCTION`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from palmette.errors import DataError


def folder() -> Path:
    """The data folder. Raises DataError when PALMETTE_DATA does not name one."""
    root = Path(os.environ.get("PALMETTE_DATA", ""))
    if not (root / "networks.py").is_file():
        raise DataError(
            "PALMETTE_DATA names no folder with networks.py", fix="Point it at the folder of data and weights."
        )
    return root


def build(name: str) -> nn.Module:
    """A stored network in eval mode."""
    root = folder()
    sys.path.insert(0, str(root))
    try:
        module = _import(root / "networks.py")
        network: nn.Module = module.build(name)[0]
    finally:
        sys.path.remove(str(root))
    return network


def _import(file: Path) -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location("palmette_stored_networks", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resnet20() -> nn.Module:
    """ResNet-20 for CIFAR-10 (32 px, ImageNet normalisation)."""
    return build("cifar10_resnet20_akamaster")


def resnet56() -> nn.Module:
    """ResNet-56 for CIFAR-10 (32 px, ImageNet normalisation)."""
    return build("cifar10_resnet56_akamaster")


def mobilenetv2(num_classes: int = 10) -> nn.Module:
    """MobileNetV2 with ImageNet weights and a fresh classifier, to be fine-tuned (96 px, inputs -1..1)."""
    network: Any = build("imagenet_mobilenetv2_1.0_224_q8")
    old = network.classifier.conv
    network.classifier.conv = nn.Conv2d(old.in_channels, num_classes, 1)
    network.skip_first = False
    return network  # type: ignore[no-any-return]
