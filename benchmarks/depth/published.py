"""Published figures of peers that are not run here, for orientation; their hardware and recipes differ from ours."""

from __future__ import annotations

LAYERMERGE_RESNET = (
    "LayerMerge (ICML 2024), ResNet-34 on ImageNet, 90 epochs: 74.42 dense; "
    "74.26 at 1.36x in PyTorch and 1.25x in TensorRT, 72.84 at 1.79x and 1.72x"
)
LAYERMERGE_MOBILENET = (
    "LayerMerge (ICML 2024), MobileNetV2-1.0 on ImageNet, 180 epochs, RTX 2080 Ti, batch 128: 72.89 dense; "
    "72.99 at 1.63x in PyTorch and 1.42x in TensorRT, 71.74 at 2.18x and 1.84x"
)
KIM_MOBILENET = "Kim et al. (ICML 2023), the same network: 72.83 at 1.62x in PyTorch and 1.41x in TensorRT"
LACOOT_RESNET = (
    "LaCoOT (lambda 5), ResNet-18 on CIFAR-10, stem with max-pooling: 90.99 against 91.77 % dense, "
    "140.19 -> 64.69 M MACs, 7.90 -> 4.78 ms (1.65x); EASIER there: 90.35 %, 140.19 M MACs, 7.07 ms (1.12x)"
)
LACOOT_SWIN = "LaCoOT, Swin-T on Tiny-ImageNet: about 10 points better than the activation methods at equal depth"

PUBLISHED = {
    "resnet20": [LAYERMERGE_RESNET, LACOOT_RESNET],
    "resnet56": [LAYERMERGE_RESNET, LACOOT_RESNET],
    "mobilenetv2": [LAYERMERGE_MOBILENET, KIM_MOBILENET],
    "vit": [LACOOT_SWIN],
}
