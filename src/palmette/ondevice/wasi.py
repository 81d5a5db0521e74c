"""WASI: weights and inputs of linear layers in a subspace; neither the dense weight nor its gradient ever exists.

Idea: a fine-tuned weight stays near a subspace of few directions, so it is kept as L R and moved by one pass of
subspace iteration per step, while inputs are kept as ASI does. Paper: "Weight-Activation Subspace Iteration", ICLR 2026
(arXiv 2510.09160). What differs: the released code keeps the dense weight and projects it after a dense step; here the
thin step of the same update is taken from the factors (spec adapt 6): R'^T = R^T (L^T L) - rate U (T^T L) and
L' = orth(L (R R'^T) - rate T (U^T R'^T)) with the weight gradient T U^T. Then R' is projected on L', the nearest
product; `reproduce=True` leaves it on the L before, one step late, as published. Truncated parts are lost, unless
`error_feedback` keeps them in a dense buffer, which costs a weight's memory and is there to measure what they matter.
Shapes: weight [O, I] -> L [O, K], R [K, I]. Cost of a step: K (O + I) (K + r). Undoing gives L R: near the weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from palmette.errors import InputError
from palmette.meter.training import labelled
from palmette.ondevice.asi import Asi, AsiConfig
from palmette.ondevice.asi import options as asi_options
from palmette.ondevice.codec import State
from palmette.ondevice.factor_gradients import linear_weight_gradient_factored
from palmette.ondevice.functions import no_autocast, refuse_twice
from palmette.ondevice.layer import Layer, linear_layer
from palmette.ondevice.tucker import exact_arithmetic
from palmette.registry import Bounds, MethodConfig, method


@dataclass(frozen=True, kw_only=True)
class WasiConfig(MethodConfig):
    """weight_energy: share of a weight's squared singular values that its factors keep.

    energy: HOSVD's rule for the ranks of the inputs, instead of the budget. error_feedback: keep what truncation drops.
    reproduce: R belongs to the L of the step before, as published.
    """

    weight_energy: Annotated[float, Bounds(low=0.0, low_open=True, high=1.0)] = 0.9
    energy: Annotated[float | None, Bounds(low=0.0, low_open=True, high=1.0)] = None
    error_feedback: bool = False
    reproduce: bool = False


@method(
    name="wasi",
    title="WASI: linear layers trained in the subspace of weight and input",
    paper="Weight-Activation Subspace Iteration, ICLR 2026, arXiv 2510.09160",
    unit="squared gradient error",
    sites="input",
    edit="codec",
    config=WasiConfig,
)
def options(x: Tensor, layer: Layer, config: WasiConfig) -> list[Asi]:
    """The Tucker forms to choose from for the input of a linear layer, from coarse to fine; none for convolutions."""
    return asi_options(x, layer, AsiConfig(energy=config.energy)) if layer.kind == "linear" else []


class FactoredLinear(nn.Module):
    """A linear layer whose weight is left [O, K] times right [K, I]."""

    def __init__(self, layer: nn.Linear, codec: Asi, config: WasiConfig) -> None:
        """Factors by the singular value decomposition of the layer's weight."""
        super().__init__()
        left, right = factors(layer.weight.detach(), config.weight_energy)
        self.left, self.right = nn.Parameter(left, requires_grad=False), nn.Parameter(right, requires_grad=False)
        self.bias = layer.bias
        self.codec, self.lagged = codec, config.reproduce
        self.state: State = {}
        self.pending: list[tuple[Tensor, Tensor | None]] = []
        self.made = 0.0  # norm of `left.grad` as it was made
        self.residual = torch.zeros_like(layer.weight) if config.error_feedback else None
        lost = torch.linalg.vector_norm(layer.weight.detach() - left @ right)
        self.start_error = float(lost / torch.linalg.vector_norm(layer.weight.detach()).clamp_min(1e-30))

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] -> [..., O]."""
        if not torch.is_grad_enabled():
            return F.linear(F.linear(x, self.right), self.left, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()
        with labelled("linear (wasi)"):
            result: Tensor = _Thin.apply(x, self.bias, x.new_zeros((), requires_grad=True), self)  # type: ignore[no-untyped-call]
        return result

    def dense(self) -> Tensor:
        """The weight [O, I]."""
        return (self.left @ self.right).detach()

    def note(self, t: Tensor, u: Tensor | None) -> None:
        """Add a gradient T U^T. `left.grad` stands for it where gradients are cleared, clipped or unscaled."""
        seen = t @ (self.right.T if u is None else u.T @ self.right.T)
        if self.left.grad is None or not bool(self.left.grad.any()):
            self.pending.clear()  # gradients were cleared since
            self.left.grad = seen
        else:
            self.left.grad = self.left.grad + seen
        self.pending.append((t, u))
        self.made = float(torch.linalg.vector_norm(self.left.grad))

    def take(self) -> None:
        """Before a step: do to the gradient in factors what was done to `left.grad`, and drop that."""
        if self.left.grad is None:
            self.pending.clear()
            return
        now = float(torch.linalg.vector_norm(self.left.grad))
        scale = now / self.made if self.made > 0 else 1.0
        if scale != 1.0:
            self.pending = [(t * scale, u) for t, u in self.pending]
        self.left.grad = None

    def step(self, rate: float, decay: float = 0.0) -> None:
        """One step of gradient descent on the product, by the factors alone; forgets the gradients."""
        if not self.pending:
            return
        left, right = self.left.detach(), self.right.detach() * (1 - rate * decay)
        if self.residual is not None:
            whole = left @ right + self.residual - rate * sum(_product(t, u) for t, u in self.pending)
            new_left, new_right = iterated(whole, left, lagged=self.lagged)
            self.residual = whole - new_left @ new_right
        else:
            new_left, new_right = thin_step(left, right, self.pending, rate, lagged=self.lagged)
        self.left.copy_(new_left)
        self.right.copy_(new_right)
        self.pending.clear()


class _Thin(Function):
    """Forward through the factors; backward leaves the weight gradient, in factors, with the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, anchor: Tensor, module: FactoredLinear) -> Tensor:  # noqa: ARG004
        ctx.module = module
        ctx.layer = linear_layer(x.shape, torch.Size((len(module.left), module.right.shape[1])))
        advance = torch._C._current_graph_task_id() == -1
        payload = module.codec.encode(x, module.state if advance else dict(module.state))
        ctx.save_for_backward(module.left, module.right, *payload)
        return F.linear(F.linear(x, module.right), module.left, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_twice()
        left, right, *payload = ctx.saved_tensors
        module: FactoredLinear = ctx.module
        with no_autocast(grad.device):
            form = module.codec.form(tuple(payload), ctx.layer)
            module.note(*linear_weight_gradient_factored(form, grad))
            dx = (grad @ left) @ right if ctx.needs_input_grad[0] else None
        db = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None, None


def factors(weight: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """L [O, K] with orthonormal columns and R [K, I]; K the smallest that keeps this share of the energy."""
    with exact_arithmetic(weight.device):
        u, s, v = torch.linalg.svd(weight.float() if weight.dtype != torch.float64 else weight, full_matrices=False)
        reached = s.square().cumsum(0) / s.square().sum().clamp_min(1e-30)
        rank = min(len(s), 1 + int((reached < energy * (1 - 1e-7)).sum()))
        return u[:, :rank].contiguous().to(weight.dtype), (s[:rank, None] * v[:rank]).contiguous().to(weight.dtype)


def thin_step(
    left: Tensor, right: Tensor, gradient: list[tuple[Tensor, Tensor | None]], rate: float, *, lagged: bool = False
) -> tuple[Tensor, Tensor]:
    """L', R' after a step along sum of T U^T, without a tensor [O, I] (spec adapt 6).

    lagged: R' belongs to the L before the step, as published; otherwise it is projected on L', the nearest product.
    """
    with exact_arithmetic(left.device):
        new_right = _projected(left, right, gradient, rate, left)
        moved = left @ (right @ new_right.T)
        for t, u in gradient:
            moved = moved - rate * (t @ (new_right.T if u is None else u.T @ new_right.T))
        new_left = _orthonormal(moved)
        return new_left, new_right if lagged else _projected(left, right, gradient, rate, new_left)


def _projected(
    left: Tensor, right: Tensor, gradient: list[tuple[Tensor, Tensor | None]], rate: float, basis: Tensor
) -> Tensor:
    """basis^T (L R - rate sum of T U^T), [K, I]."""
    found = (basis.T @ left) @ right
    for t, u in gradient:
        inner = basis.T @ t
        found = found - rate * (inner if u is None else inner @ u.T)
    return found.contiguous()


def _orthonormal(columns: Tensor) -> Tensor:
    """The same span, orthonormal, each column on the side of its own: a sign that flips would part L from R."""
    q, r = torch.linalg.qr(columns)
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return signed.contiguous()


def iterated(whole: Tensor, left: Tensor, *, lagged: bool = False) -> tuple[Tensor, Tensor]:
    """The same pass on a dense matrix: R'^T = W^T L, L' = orth(W R'^T); Algorithm 1 of the paper."""
    with exact_arithmetic(whole.device):
        new_right = (whole.T @ left).T
        new_left = _orthonormal(whole @ new_right.T)
        return new_left, (new_right if lagged else new_left.T @ whole).contiguous()


def _product(t: Tensor, u: Tensor | None) -> Tensor:
    return t if u is None else t @ u.T


@dataclass
class Swaps:
    """The linear layers that were put into factors, and the way back."""

    modules: list[tuple[nn.Module, str, nn.Linear, FactoredLinear]] = field(default_factory=list)

    def make(self, model: nn.Module, codecs: dict[str, Any], config: WasiConfig) -> set[str]:
        """Swap every plain linear layer that has a codec of factors; the names of the weights that are gone."""
        gone: set[str] = set()
        for path, module in list(model.named_modules()):
            codec = codecs.get(path)
            if type(module) is not nn.Linear or not isinstance(codec, Asi) or not module.weight.requires_grad:
                continue
            parent, _, name = path.rpartition(".")
            factored = FactoredLinear(module, copy.copy(codec), config).train(module.training)
            self.modules.append((model.get_submodule(parent), name, module, factored))
            setattr(self.modules[-1][0], name, factored)
            module.weight.data = module.weight.new_empty(0)
            gone.add(f"{path}.weight")
        if not self.modules:
            raise InputError("WASI found no linear layer to put into factors", fix="Take method='asi' or 'auto'.")
        return gone

    def undo(self) -> None:
        """Put the linear layers back, with the products of their factors as weights."""
        for parent, name, module, factored in self.modules:
            module.weight.data = factored.dense()
            setattr(parent, name, module)
        self.modules.clear()

    def error(self) -> float:
        """The largest relative error of a weight when it was put into factors."""
        return max((factored.start_error for *_, factored in self.modules), default=0.0)

    def attach(self, optimizer: Optimizer) -> None:
        """Let each step of the optimizer move the factors, too. InputError for another than plain SGD."""
        group = optimizer.param_groups[0]
        if not isinstance(optimizer, SGD) or group["momentum"]:
            raise InputError(
                "WASI steps are those of plain SGD",
                why="the gradient exists in factors alone, momentum or Adam would need it whole",
                fix="Use adaptation.optimizer(torch.optim.SGD, lr=...) without momentum.",
            )
        optimizer.register_step_pre_hook(lambda *_: self.take())
        optimizer.register_step_post_hook(lambda *_: self.step(group["lr"], group["weight_decay"]))

    def take(self) -> None:
        """Make the gradients in factors what clipping and clearing left of them."""
        for *_, factored in self.modules:
            factored.take()

    def step(self, rate: float, decay: float) -> None:
        """Move all factors."""
        for *_, factored in self.modules:
            factored.step(rate, decay)

    def parameters(self) -> list[nn.Parameter]:
        """The left factors, whose gradients stand for those in factors."""
        return [factored.left for *_, factored in self.modules]

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """In this block, gradients and what codecs remember are put away; after it, back."""
        parts = [factored for *_, factored in self.modules]
        held = [(part.pending, dict(part.state), part.left.grad, part.made) for part in parts]
        for part in parts:
            part.pending, part.left.grad = [], None
        try:
            yield
        finally:
            for part, (pending, state, grad, made) in zip(parts, held, strict=True):
                part.pending, part.state, part.left.grad, part.made = pending, state, grad, made
