"""Predicted bytes are measured bytes, on every family of the coverage table."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from palmette.errors import BudgetError
from palmette.graph.inputs import map_tensors
from palmette.ondevice.adapt import adapt

QUICK = {
    "hf:MobileNetV2ForImageClassification": True,
    "torchvision:squeezenet1_1": True,
    "timm:tinynet_e": True,
    "timm:mobilenetv3_small_050": False,
    "hf:BertForSequenceClassification": True,
    "hf:SwinForImageClassification": True,
    "hf:ViTForImageClassification": True,
    "hf:ConvNextForImageClassification": True,
}  # whether batch norms are frozen
BUDGETS = (("lossless", None), ("auto", 0.5), ("auto", 0.15), ("asi", 0.6), ("low_bit", 0.4))


def load(families, key):
    """A family's network, a batch of three, and labels."""
    package = {"hf": "transformers"}.get(key.split(":", maxsplit=1)[0], key.split(":", maxsplit=1)[0])
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    family = next(f for f in families.families() if f.key == key)
    return families.build(family), families.inputs(family, 3, 5), torch.tensor([2, 9, 4])


def check_bytes(kit, model, x, y, plans, *, freeze_bn: bool) -> None:
    exact = 0
    for method, share in plans:
        budget = None if share is None else int(exact * share)
        options = {"method": method, "freeze_bn": freeze_bn}
        try:
            adaptation = kit.exactly(model, x, y, budget=budget, **options)
        except BudgetError as error:
            budget = kit.smallest(error)
            adaptation = kit.exactly(model, x, y, budget=budget, **options)
        assert budget is None or adaptation.measured.saved_bytes <= budget
        exact = exact or adaptation.measured.saved_bytes
        assert adaptation.measured.saved_bytes <= adaptation.vanilla_saved
        adaptation.undo()


def check_gradients(kit, model, x, y, *, freeze_bn: bool) -> None:
    """In float64, where rounding does not hide a mistake; torch's hardsigmoid has its 1/6 in single precision."""
    model, x = model.double(), map_tensors(lambda t: t.double() if t.is_floating_point() else t, x)
    reference = kit.frozen(model) if freeze_bn else copy.deepcopy(model)
    rough = any("ard" in type(module).__name__ for module in model.modules())
    want = kit.step(reference, x, y)
    adaptation = adapt(model, (x, y), method="lossless", freeze_bn=freeze_bn)
    got = kit.step(model, x, y)
    assert got[0] == pytest.approx(want[0], rel=1e-10)
    assert kit.apart(want, got) < (1e-6 if rough else 1e-8)
    adaptation.undo()
    pairs = zip(reference.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)


@pytest.mark.parametrize("key", QUICK)
def test_quick_family(kit, families, key):
    model, x, y = load(families, key)
    freeze = QUICK[key]
    plans = (("lossless", None), ("low_bit", 0.4), *([("auto", 0.3)] if key.startswith("hf:B") else []))
    check_bytes(kit, copy.deepcopy(model).train(), x, y, plans, freeze_bn=freeze)
    check_gradients(kit, model.train(), x, y, freeze_bn=freeze)


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("source", ["torchvision", "timm", "hf"])
def test_all_families(kit, families, source):
    failed: dict[str, str] = {}
    for key in [family.key for family in families.families() if family.key.startswith(source)]:
        model, x, y = load(families, key)
        normed = any(isinstance(module, _BatchNorm) for module in model.modules())
        for freeze_bn in (True, False) if normed else (True,):
            try:
                check_bytes(kit, copy.deepcopy(model).train(), x, y, BUDGETS, freeze_bn=freeze_bn)
                check_gradients(kit, copy.deepcopy(model).train(), x, y, freeze_bn=freeze_bn)
            except Exception as error:  # noqa: BLE001  # all of them are told
                failed[f"{key}, freeze_bn={freeze_bn}"] = f"{type(error).__name__}: {str(error)[:300]}"
    assert failed == {}
