"""The exact forms on images: gradients are autograd's, bytes are as predicted, undo leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


def bn(channels: int = 6) -> nn.Module:
    return nn.BatchNorm2d(channels)


def conv(**options) -> nn.Module:
    return nn.Conv2d(6, 6, **{"kernel_size": 3, "padding": 1, **options})


IMAGES = {
    "folded norm": lambda k: [*k.conv_bn(6, 6), nn.ReLU()],
    "folded norm with bias": lambda k: [*k.conv_bn(6, 6, bias=True), nn.ReLU()],
    "norm without affine": lambda k: [conv(), nn.BatchNorm2d(6, affine=False), nn.ReLU()],
    "norm before the activation before the layer": lambda k: [
        bn(),
        nn.ReLU(),
        conv(),
        bn(),
        nn.ReLU(inplace=True),
        conv(),
    ],
    "two norms in a row": lambda k: [conv(), bn(), bn(), conv()],
    "a norm's input read twice": lambda k: [k.Fn(lambda x, c, b: (y := c(x)) + b(y), conv(), bn())],
    "a norm's output and input read": lambda k: [k.Fn(lambda x, c, b: torch.relu(b(y := c(x))) * y, conv(), bn())],
    "residual": lambda k: [
        k.Residual(nn.Sequential(*k.conv_bn(6, 6), nn.ReLU(inplace=True), *k.conv_bn(6, 6)), outer=True)
    ],
    "inverted residual": lambda k: [
        k.Residual(
            nn.Sequential(
                *k.conv_bn(6, 12, 1),
                nn.ReLU6(inplace=True),
                *k.conv_bn(12, 12, 3, 1, 12),
                nn.ReLU6(),
                *k.conv_bn(12, 6, 1),
            )
        )
    ],
    "in-place silu": lambda k: [*k.conv_bn(6, 6), nn.SiLU(inplace=True), conv()],
    "in-place hardswish": lambda k: [*k.conv_bn(6, 6), nn.Hardswish(inplace=True), conv()],
    "in-place mish": lambda k: [*k.conv_bn(6, 6), nn.Mish(inplace=True), conv()],
    "silu": lambda k: [conv(), nn.SiLU(), conv()],
    "gelu": lambda k: [conv(), nn.GELU(), conv(kernel_size=1, padding=0)],
    "tanh gelu": lambda k: [conv(), nn.GELU("tanh"), conv()],
    "elu": lambda k: [conv(), nn.ELU(), conv()],
    "leaky relu": lambda k: [conv(), nn.LeakyReLU(0.1, inplace=True), conv(), nn.LeakyReLU(0.2)],
    "leaky relu that falls": lambda k: [conv(), nn.LeakyReLU(-0.1), conv()],
    "hardtanh": lambda k: [conv(), nn.Hardtanh(-0.5, 0.7), conv(), nn.Hardtanh(inplace=True)],
    "hardsigmoid": lambda k: [
        k.Residual(nn.Sequential(conv(), nn.Hardsigmoid(inplace=True))),
        conv(),
        nn.Hardsigmoid(),
    ],
    "prelu": lambda k: [conv(), nn.PReLU(6), conv()],
    "tanh and sigmoid": lambda k: [conv(), nn.Tanh(), conv(), nn.Sigmoid()],
    "squeeze and excite": lambda k: [
        k.Fn(
            lambda x, a, b: x * torch.sigmoid(b(F.silu(a(x.mean((2, 3), keepdim=True)), inplace=True))),
            conv(kernel_size=1, padding=0),
            conv(kernel_size=1, padding=0),
        )
    ],
    "in-place relu on a view": lambda k: [
        conv(),
        k.Fn(lambda x: F.relu(x[:, :3], inplace=True).repeat(1, 2, 1, 1)),
        conv(),
    ],
    "relu on a chunk": lambda k: [conv(), k.Fn(lambda x: torch.cat([F.relu(h) for h in x.chunk(2, 1)], 1)), conv()],
    "an activation read twice": lambda k: [
        k.Fn(lambda x, c, d, e: d(y := torch.relu(c(x))) + e(y), conv(), conv(), conv())
    ],
    "in-place sum": lambda k: [k.Fn(lambda x, c: F.relu(c(x).add_(x), inplace=True), conv()), conv()],
    "shuffle": lambda k: [conv(), nn.ReLU(), nn.ChannelShuffle(2), conv(groups=2)],
    "max pool": lambda k: [conv(), nn.ReLU(), nn.MaxPool2d(2), conv()],
    "max pool with padding": lambda k: [conv(), nn.MaxPool2d(3, 2, 1), conv()],
    "max pool with dilation": lambda k: [conv(), nn.MaxPool2d(3, 1, 1, dilation=2), conv()],
    "max pool with ceil": lambda k: [conv(), nn.MaxPool2d((3, 2), (2, 3), ceil_mode=True), conv()],
    "large max pool": lambda k: [conv(), nn.MaxPool2d(5, 1, 2), conv()],
    "max pool of 17 by 17": lambda k: [conv(), nn.MaxPool2d(17, 1, 8), conv()],
    "max pool with indices": lambda k: [conv(), k.Fn(lambda x: F.max_pool2d(x, 2, return_indices=True)[0])],
    "avg pool": lambda k: [conv(), nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), conv()],
    "avg pool by name": lambda k: [conv(), k.Fn(lambda x: F.avg_pool2d(x, kernel_size=2, divisor_override=3)), conv()],
    "adaptive pools": lambda k: [conv(), nn.AdaptiveAvgPool2d(5), conv(), nn.AdaptiveMaxPool2d(3)],
    "upsampling": lambda k: [conv(), nn.Upsample(scale_factor=2, mode="bilinear"), conv()],
    "padding same": lambda k: [conv(padding="same"), nn.ReLU(), conv(padding="same", dilation=2)],
    "padding same, even kernel": lambda k: [
        conv(kernel_size=4, padding="same"),
        nn.ReLU(),
        conv(kernel_size=(2, 3), padding="same"),
    ],
    "padding valid": lambda k: [conv(padding="valid"), nn.ReLU()],
    "circular padding": lambda k: [conv(padding_mode="circular"), nn.ReLU(), conv(padding_mode="reflect")],
    "strides and dilation": lambda k: [
        conv(stride=2),
        nn.ReLU(),
        conv(dilation=(2, 1), padding=(2, 0)),
        conv(stride=(1, 2)),
    ],
    "a stride beyond the kernel": lambda k: [conv(kernel_size=1, stride=3, padding=0), nn.ReLU(), conv()],
    "groups": lambda k: [conv(groups=2), bn(), nn.ReLU(), conv(groups=3), conv(groups=6)],
    "channel multiplier": lambda k: [nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 1)],
    "transposed": lambda k: [nn.ConvTranspose2d(6, 6, 2, 2), bn(), nn.ReLU(), conv()],
    "weight norm": lambda k: [weight_norm(conv()), nn.ReLU(), weight_norm(conv()), bn()],
    "a computed weight": lambda k: [
        k.Fn(lambda x, c: F.conv2d(x, c.weight.tanh(), c.bias, padding=1), conv()),
        nn.ReLU(),
        conv(),
    ],
    "a layer twice": lambda k: [c := conv(), nn.ReLU(), c],
    "a layer and its norm twice": lambda k: [c := conv(), b := bn(), nn.ReLU(), c, b],
    "a norm twice": lambda k: [conv(), b := bn(), nn.ReLU(), conv(), b, nn.ReLU()],
    "group norm": lambda k: [conv(), nn.GroupNorm(2, 6), nn.SiLU(), conv(kernel_size=1, padding=0)],
    "instance norm": lambda k: [conv(bias=False), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), conv()],
    "dropout": lambda k: [conv(), nn.Dropout(0.3), conv(), nn.Dropout(0.2, inplace=True), nn.Dropout2d(0.3), conv()],
    "dropout of everything": lambda k: [k.Residual(nn.Sequential(conv(), nn.Dropout(1.0))), conv()],
    "concatenation": lambda k: [k.Fn(lambda x, c, d: d(torch.cat([x, c(x)], 1)), conv(), nn.Conv2d(12, 6, 1))],
    "branches of one input": lambda k: [k.Fn(lambda x, b, c, d: c(F.relu(y := b(x))) + d(y), bn(), conv(), conv())],
    "layer norm on channels": lambda k: [
        k.Residual(
            k.Fn(
                lambda x, c, n, a, b: b(F.gelu(a(n(c(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2),
                conv(groups=6),
                nn.LayerNorm(6),
                nn.Linear(6, 24),
                nn.Linear(24, 6),
            )
        )
    ],
    "nothing but identity": lambda k: [nn.Identity()],
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_images(kit, name, dtype):
    torch.manual_seed(4)
    net = kit.images(*IMAGES[name](kit))
    x, y = kit.batch(dtype=dtype)
    kit.check_exact(net, x, y, dtype)


@pytest.mark.parametrize("name", ["residual", "in-place silu", "max pool", "dropout", "squeeze and excite", "groups"])
def test_channels_last(kit, name):
    net = kit.images(*IMAGES[name](kit)).to(memory_format=torch.channels_last)
    x, y = kit.batch(dtype=torch.float64)
    kit.check_exact(net, x.contiguous(memory_format=torch.channels_last), y)


@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_axes(kit, axes):
    Conv, Norm = (nn.Conv1d, nn.BatchNorm1d) if axes == 1 else (nn.Conv3d, nn.BatchNorm3d)
    layers = [Conv(3, 6, 3, padding=1), Norm(6), nn.ReLU(True), Conv(6, 6, 3, 2, groups=2), Norm(6), nn.SiLU(True)]
    net = kit.lively(nn.Sequential(*layers, Conv(6, 4, 1), kit.Mean()))
    kit.check_exact(net, torch.randn(4, 3, *[9] * axes, dtype=torch.float64), torch.arange(4))


@pytest.mark.slow
def test_random_networks(kit):
    """Held by test_budget for bytes; here: gradients of networks with everything switched on at once."""
    torch.manual_seed(0)
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        names = [list(IMAGES)[int(i)] for i in torch.randint(0, len(IMAGES), (4,), generator=generator)]
        net = kit.images(*(layer for name in names for layer in IMAGES[name](kit)))
        x, y = kit.batch(3, 24, dtype=torch.float64)
        try:
            kit.frozen(net).double()(x)
        except RuntimeError:
            continue  # too small for its pools
        kit.check_exact(net, x, y)
