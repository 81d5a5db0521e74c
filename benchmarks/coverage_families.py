"""The networks of the coverage table: torchvision, timm and Hugging Face families, small, with random weights.

Nothing here but names and builder arguments (input size, dropout rates): what is checked is the same for every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10
RATES = {"drop_rate": 0.1, "drop_path_rate": 0.1}
NO_PATHS = {"drop_rate": 0.1}


@dataclass(frozen=True)
class Family:
    """One network: its source, its name there, the side of the input in pixels (or tokens), builder arguments."""

    source: str
    name: str
    size: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """`source:name`, unique in the table."""
        return f"{self.source}:{self.name}"


def _torchvision() -> list[Family]:
    no_aux: dict[str, Any] = {"aux_logits": False, "init_weights": False}
    sizes: dict[str, tuple[int, dict[str, Any]]] = {
        "alexnet": (64, {}),
        "convnext_tiny": (64, {}),
        "densenet121": (64, {}),
        "efficientnet_b0": (64, {}),
        "efficientnet_v2_s": (64, {}),
        "googlenet": (64, no_aux),
        "inception_v3": (75, no_aux),
        "maxvit_t": (224, {}),
        "mnasnet0_5": (64, {}),
        "mobilenet_v2": (64, {}),
        "mobilenet_v3_small": (64, {}),
        "regnet_x_400mf": (64, {}),
        "regnet_y_400mf": (64, {}),
        "resnet18": (64, {}),
        "resnet50": (64, {}),
        "resnext50_32x4d": (64, {}),
        "shufflenet_v2_x0_5": (64, {}),
        "squeezenet1_1": (64, {}),
        "swin_t": (64, {}),
        "swin_v2_t": (64, {}),
        "vgg11_bn": (32, {}),
        "vit_b_32": (64, {"image_size": 64, "dropout": 0.1}),
        "wide_resnet50_2": (64, {}),
    }
    return [Family("torchvision", name, size, options) for name, (size, options) in sizes.items()]


def _timm() -> list[Family]:
    at_64 = [
        "convnext_atto",
        "convnextv2_atto",
        "cspresnet50",
        "eca_resnet33ts",
        "edgenext_xx_small",
        "ese_vovnet19b_dw",
        "fastvit_t8",
        "hgnetv2_b0",
        "lcnet_050",
        "mnasnet_small",
        "mobilenetv3_small_050",
        "mobilenetv4_conv_small",
        "mobileone_s0",
        "mobilevit_xxs",
        "mobilevitv2_050",
        "nf_regnet_b0",
        "poolformer_s12",
        "pvt_v2_b0",
        "regnetx_002",
        "repvgg_a0",
        "resnest14d",
        "resnet10t",
        "rexnet_100",
        "skresnet18",
        "starnet_s1",
        "tf_efficientnet_lite0",
        "tinynet_e",
        "xcit_nano_12_p16_224",
    ]
    without_paths = ["densenet121", "dla46_c", "efficientvit_b0", "ghostnet_050", "hrnet_w18_small", "repvit_m0_9"]
    resized = {"vit_tiny_patch16_224": 64, "mixer_s32_224": 64, "resmlp_12_224": 64, "swin_tiny_patch4_window7_224": 56}
    return [
        *(Family("timm", name, 64, RATES) for name in at_64),
        *(Family("timm", name, 64, NO_PATHS) for name in without_paths),
        *(Family("timm", name, size, {**RATES, "img_size": size}) for name, size in resized.items()),
        Family("timm", "levit_128s", 224, RATES),
        Family("timm", "visformer_tiny", 224, RATES),
    ]


_TEXT = {"vocab_size": 99, "max_position_embeddings": 64, "num_labels": CLASSES}
_WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
_VIT = {"image_size": 32, "patch_size": 8, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_CONVNEXT = {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "drop_path_rate": 0.1}


def _huggingface() -> list[Family]:
    return [
        Family("hf", "BertForSequenceClassification", 12, {**_TEXT, **_WIDE}),
        Family("hf", "RobertaForSequenceClassification", 12, {**_TEXT, **_WIDE}),
        Family("hf", "DistilBertForSequenceClassification", 12, {**_TEXT, **_DISTIL}),
        Family("hf", "ViTForImageClassification", 32, {**_WIDE, **_VIT, "num_labels": CLASSES}),
        Family("hf", "SwinForImageClassification", 32, {**_SWIN, "num_labels": CLASSES}),
        Family("hf", "MobileNetV2ForImageClassification", 64, {"depth_multiplier": 0.35, "num_labels": CLASSES}),
        Family("hf", "ConvNextForImageClassification", 32, {**_CONVNEXT, "num_labels": CLASSES}),
    ]


def families() -> list[Family]:
    """Every family of the table, in the order in which it is printed."""
    return [*_torchvision(), *_timm(), *_huggingface()]


def build(family: Family) -> nn.Module:
    """The network of a family in eval mode: random weights, seeded, constants redrawn, batch norm calibrated."""
    torch.manual_seed(0)
    builders: dict[str, Callable[[Family], nn.Module]] = {
        "torchvision": _build_torchvision,
        "timm": _build_timm,
        "hf": _build_huggingface,
    }
    model = builders[family.source](family)
    _redraw_constants(model)
    _calibrate(model, [inputs(family, 8, seed) for seed in range(3)])
    return model.eval()


def inputs(family: Family, batch: int, seed: int) -> Any:
    """Noise of the family's shape: an image tensor [batch, 3, size, size], or a dict with what a text model takes."""
    generator = torch.Generator().manual_seed(seed)
    if "vocab_size" in family.options:
        ids = torch.randint(3, family.options["vocab_size"], (batch, family.size), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    image = torch.randn(batch, 3, family.size, family.size, generator=generator)
    return {"pixel_values": image} if family.source == "hf" else image


def _build_torchvision(family: Family) -> nn.Module:
    from palmette import compat

    models = compat.torchvision().models
    model: nn.Module = models.get_model(family.name, weights=None, num_classes=CLASSES, **family.options)
    return model


def _build_timm(family: Family) -> nn.Module:
    from palmette import compat

    model: nn.Module = compat.timm().create_model(family.name, pretrained=False, num_classes=CLASSES, **family.options)
    return model


def _build_huggingface(family: Family) -> nn.Module:
    from palmette import compat

    compat.torchvision()  # transformers imports torchvision where it finds it
    import transformers

    network = getattr(transformers, family.name)
    model: nn.Module = network(network.config_class(**family.options))
    return model


def _redraw_constants(model: nn.Module) -> None:
    """Replaces every parameter with equal entries: zero heads and 1e-6 layer scales would make any comparison empty."""
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                value = float(p.flatten()[0])
                centre, spread = (value, 0.1) if abs(value) > 0.5 else (0.0, 0.05) if value == 0 else (0.2, 0.05)
                p.copy_(centre + spread * torch.randn_like(p))


def _calibrate(model: nn.Module, batches: list[Any]) -> None:
    """Gives batch norm the statistics of noise (cumulative average over the batches)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
    with torch.no_grad(), _train_mode(model):
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


@contextmanager
def _train_mode(model: nn.Module) -> Iterator[None]:
    model.train()
    yield
    model.eval()


def spread(output: Tensor) -> float:
    """Standard deviation over the batch of the outputs, relative to their largest value (0 for a constant network)."""
    return float(output.std(0).mean() / output.abs().max().clamp_min(1e-30))
