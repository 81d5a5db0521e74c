"""Which torch functions are known here, and what a call of one means: a table from function to operation.

Nothing depends on modules: the functions are those that any forward pass ends in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from palmette.ondevice.functions import Window
from palmette.ondevice.layer import Layer, conv_layer, linear_layer

_ATEN = torch.ops.aten
_NN: Any = torch._C._nn
_VF: Any = torch._C._VariableFunctions
INFINITE = float("inf")

Kind = Literal["layer", "masked", "smooth", "norm", "recipe", "dropout", "maxpool", "shape_only"]


@dataclass(frozen=True)
class Operation:
    """One call, in the terms of its kind.

    x: the input that codecs care for. compute: the call as a function of x alone.
    layer: weight, bias, layer. norm: weight, bias, mean, var, eps. masked: bends, slopes. dropout: p, inplace.
    maxpool: window. shape_only, smooth: backward. plain: `compute` where that works in place, but leaving x alone.
    """

    kind: Kind
    name: str
    x: Tensor
    compute: Callable[[Tensor], Tensor]
    inplace: bool = False
    layer: Layer | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 0.0
    p: float = 0.0
    bends: tuple[float, float] = (0.0, INFINITE)
    slopes: tuple[float, float] = (1.0, 0.0)
    window: Window | None = None
    backward: Callable[..., Tensor] | None = None
    plain: Callable[[Tensor], Tensor] | None = None


Parser = Callable[..., Operation | None]


def parse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """What the call means, or None when it is left to torch."""
    parser = _PARSERS.get(func)
    return None if parser is None else parser(func, *args, **kwargs)


def is_move(func: Any) -> bool:
    """Whether the function only rearranges the numbers of its first argument."""
    return func in _MOVES


# ---- layers ----------------------------------------------------------------------------------------------------------


def _conv(
    func: Any,
    input: Tensor,  # noqa: A002  # torch's names
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Operation | None:
    if input.dim() != weight.dim():
        return None
    if isinstance(padding, str):
        padding = _named_padding(padding, weight, dilation)
        if padding is None:
            return None
    steps = (_fixed(v) for v in (stride, padding, dilation))
    layer = conv_layer(input.shape, weight.shape, *steps, groups)
    return Operation(
        "layer", func.__name__, input, lambda x: layer.forward(x, weight, bias), layer=layer, weight=weight, bias=bias
    )


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _named_padding(name: str, weight: Tensor, dilation: Any) -> tuple[int, ...] | None:
    """Zeros on each side for "valid" or "same"; None where they differ between the sides."""
    if name == "valid":
        return (0,) * (weight.dim() - 2)
    steps = dilation if isinstance(dilation, tuple | list) else [dilation] * (weight.dim() - 2)
    totals = [step * (size - 1) for step, size in zip(steps, weight.shape[2:], strict=True)]
    return None if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)


def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Operation | None:  # noqa: A002
    if input.dim() < 2 or weight.dim() != 2:
        return None
    layer = linear_layer(input.shape, weight.shape)
    return Operation(
        "layer", func.__name__, input, lambda x: layer.forward(x, weight, bias), layer=layer, weight=weight, bias=bias
    )


# ---- activations -----------------------------------------------------------------------------------------------------


def _relu(func: Any, input: Tensor, inplace: bool = False) -> Operation:  # noqa: A002
    inplace = inplace or func.__name__ == "relu_"
    return Operation("masked", "relu", input, torch.relu_ if inplace else torch.relu, inplace)


def _hardtanh(
    func: Any,
    input: Tensor,  # noqa: A002
    min_val: float = -1.0,
    max_val: float = 1.0,
    inplace: bool = False,
) -> Operation:
    inplace = inplace or func.__name__.endswith("_")
    compute = _NN.hardtanh_ if inplace else _NN.hardtanh
    return Operation(
        "masked", "hardtanh", input, lambda x: compute(x, min_val, max_val), inplace, bends=(min_val, max_val)
    )


def _relu6(func: Any, input: Tensor, inplace: bool = False) -> Operation:  # noqa: A002
    inplace = inplace or func.__name__.endswith("_")
    compute = _NN.hardtanh_ if inplace else _NN.hardtanh
    return Operation("masked", "relu6", input, lambda x: compute(x, 0.0, 6.0), inplace, bends=(0.0, 6.0))


def _leaky_relu(
    func: Any,
    input: Tensor,  # noqa: A002
    negative_slope: float = 0.01,
    inplace: bool = False,
) -> Operation | None:
    if negative_slope <= 0:
        return None  # the output's sign does not tell the input's
    inplace = inplace or func.__name__.endswith("_")
    compute = _NN.leaky_relu_ if inplace else _NN.leaky_relu
    return Operation(
        "masked", "leaky_relu", input, lambda x: compute(x, negative_slope), inplace, slopes=(1.0, negative_slope)
    )


def _hardsigmoid(func: Any, input: Tensor, inplace: bool = False) -> Operation:  # noqa: A002
    inplace = inplace or func.__name__.endswith("_")
    compute = _NN.hardsigmoid_ if inplace else _NN.hardsigmoid
    return Operation("masked", "hardsigmoid", input, compute, inplace, bends=(0.0, 1.0), slopes=(1 / 6, 0.0))


_SMOOTH: dict[str, tuple[Any, Any, Any]] = {
    "silu": (_NN.silu, _NN.silu_, _ATEN.silu_backward),
    "mish": (torch._C._nn.mish, torch._C._nn.mish_, _ATEN.mish_backward),
    "hardswish": (_NN.hardswish, _NN.hardswish_, _ATEN.hardswish_backward),
}


def _smooth(func: Any, input: Tensor, inplace: bool = False) -> Operation:  # noqa: A002
    name = func.__name__.rstrip("_")
    inplace = inplace or func.__name__.endswith("_")
    plain, in_place, backward = _SMOOTH[name]
    return Operation("smooth", name, input, in_place if inplace else plain, inplace, backward=backward, plain=plain)


def _gelu(func: Any, input: Tensor, approximate: str = "none") -> Operation:  # noqa: A002
    return Operation("smooth", func.__name__, input, lambda x: _NN.gelu(x, approximate=approximate))


# ---- norms -----------------------------------------------------------------------------------------------------------


def _batch_norm(
    func: Any,
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,  # noqa: ARG001  # unused in eval mode
    eps: float,
    cudnn_enabled: bool,  # noqa: ARG001
) -> Operation | None:
    if training or running_mean is None or running_var is None:
        return None
    return Operation(
        "norm",
        func.__name__,
        input,
        lambda x: torch.batch_norm(x, weight, bias, running_mean, running_var, False, 0.0, eps, True),
        weight=weight,
        bias=bias,
        mean=running_mean,
        var=running_var,
        eps=eps,
    )


def _recipe(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Operation:  # noqa: A002
    return Operation("recipe", func.__name__, input, lambda x: func(x, *args, **kwargs))


# ---- dropout and pooling ---------------------------------------------------------------------------------------------


def _dropout(func: Any, input: Tensor, p: float = 0.5, train: bool = True) -> Operation | None:  # noqa: A002
    if not train or p == 0.0 or input.device.type != "cpu":
        return None  # on a GPU torch's own fused form keeps one byte; its random numbers cannot be drawn otherwise
    inplace = func.__name__.endswith("_")
    return Operation("dropout", "dropout", input, lambda x: func(x, p, True), inplace, p=p)


def _max_pool2d(
    func: Any,
    input: Tensor,  # noqa: A002
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Operation | None:
    stride = kernel_size if stride is None or stride == [] else stride
    window = Window(_pair(kernel_size), _pair(stride), _pair(padding), _pair(dilation), ceil_mode)
    if window.bits is None or input.dim() != 4 or return_indices:
        return None
    return Operation(
        "maxpool",
        "max_pool2d",
        input,
        lambda x: func(x, window.kernel, window.stride, window.padding, window.dilation, ceil_mode),
        window=window,
    )


def _avg_pool2d(func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Operation | None:  # noqa: A002
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
    kernel = _pair(given["kernel_size"])
    stride = given.get("stride")
    settings = (
        kernel,
        kernel if stride is None or stride == [] else _pair(stride),
        _pair(given.get("padding", 0)),
        given.get("ceil_mode", False),
        given.get("count_include_pad", True),
        given.get("divisor_override"),
    )
    return Operation(
        "shape_only",
        "avg_pool2d",
        input,
        lambda x: func(x, *settings),
        backward=lambda grad, x: _ATEN.avg_pool2d_backward(grad, x, *settings),
    )


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return (value, value)
    return (value[0], value[0] if len(value) == 1 else value[1])


_PARSERS: dict[Any, Parser] = {
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    _NN.linear: _linear,
    F.relu: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    Tensor.relu: _relu,
    Tensor.relu_: _relu,
    F.relu6: _relu6,
    _NN.relu6: _relu6,
    _NN.relu6_: _relu6,
    F.hardtanh: _hardtanh,
    _NN.hardtanh: _hardtanh,
    _NN.hardtanh_: _hardtanh,
    F.leaky_relu: _leaky_relu,
    _NN.leaky_relu: _leaky_relu,
    _NN.leaky_relu_: _leaky_relu,
    F.hardsigmoid: _hardsigmoid,
    _NN.hardsigmoid: _hardsigmoid,
    _NN.hardsigmoid_: _hardsigmoid,
    F.silu: _smooth,
    _NN.silu: _smooth,
    _NN.silu_: _smooth,
    F.mish: _smooth,
    _NN.mish: _smooth,
    _NN.mish_: _smooth,
    F.hardswish: _smooth,
    _NN.hardswish: _smooth,
    _NN.hardswish_: _smooth,
    _NN.gelu: _gelu,
    torch.batch_norm: _batch_norm,
    torch.layer_norm: _recipe,
    torch.group_norm: _recipe,
    torch.rms_norm: _recipe,
    _VF.dropout: _dropout,
    _VF.dropout_: _dropout,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    _NN.avg_pool2d: _avg_pool2d,
}

_MOVES = {
    Tensor.view,
    Tensor.reshape,
    Tensor.permute,
    Tensor.transpose,
    Tensor.flatten,
    Tensor.contiguous,
    Tensor.unsqueeze,
    Tensor.squeeze,
    Tensor.unflatten,
    torch.reshape,
    torch.permute,
    torch.transpose,
    torch.flatten,
    torch.roll,
    torch.unsqueeze,
    torch.squeeze,
    torch.unflatten,
}
