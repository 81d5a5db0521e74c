"""What autograd holds in a training step, counted by hand; who holds it, by which name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from palmette.errors import InputError
from palmette.meter.training import TrainingMemory, is_measuring, labelled, measure_training, opened

MIB = 2**20


def kept(memory: TrainingMemory) -> dict[str, list[int]]:
    """Bytes of the storages by who holds them; tables and totals must agree."""
    found: dict[str, list[int]] = {}
    for holder in memory.holders:
        if holder.bytes:
            found.setdefault(" + ".join(sorted(map(str, holder.holders))), []).append(holder.bytes)
    for table in (memory.by_operation(), memory.by_module(), memory.by_module(1)):
        assert sum(size for _, size, _ in table) == memory.forward_saved_bytes
        assert sum(share for _, _, share in table) == pytest.approx(1)
        assert [size for _, size, _ in table] == sorted((size for _, size, _ in table), reverse=True)
    assert sum(holder.bytes for holder in memory.holders) == memory.forward_saved_bytes
    assert memory.forward_saved_bytes <= memory.saved_bytes <= memory.peak_bytes
    return found


# ---- bytes by hand ---------------------------------------------------------------------------------------------------


def test_linear_relu_linear() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    memory = measure_training(model, torch.randn(5, 8))
    assert kept(memory) == {"linear in 0": [5 * 8 * 4], "linear in 2 + relu in 1": [5 * 16 * 4]}
    assert memory.saved_bytes == memory.forward_saved_bytes == 480
    assert memory.gradient_bytes == memory.param_bytes == (8 * 16 + 16 + 16 * 4 + 4) * 4
    assert memory.device_peak_bytes is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_conv_bn_relu_keep_the_same_in_eval_mode_but_for_the_statistics(training: bool, inplace: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace)).train(training)
    wide = 2 * 4 * 8 * 8 * 4
    expected = {
        "conv2d in 0": [2 * 3 * 8 * 8 * 4],
        "batch_norm in 1": [wide, 16, 16] if training else [wide],  # the batch's mean and deviation
        f"relu{'_' * inplace} in 2": [wide],
    }
    assert kept(measure_training(model, torch.randn(2, 3, 8, 8))) == expected


def test_a_storage_kept_by_two_calls_is_listed_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
    memory = measure_training(model, torch.randn(2, 3, 8, 8))
    assert kept(memory) == {"conv2d in 0": [2 * 3 * 64 * 4], "conv2d in 2 + relu_ in 1": [2 * 4 * 36 * 4]}
    assert [name for name, _, _ in memory.by_operation()] == ["conv2d", "conv2d + relu_"]
    assert [name for name, _, _ in memory.by_module()] == ["0", "1 + 2"]


def test_max_pooling_keeps_indices_of_eight_bytes() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2))
    memory = measure_training(model, torch.randn(3, 1, 8, 8))
    assert kept(memory) == {
        "conv2d in 0": [3 * 64 * 4],
        "max_pool2d in 1": [3 * 2 * 64 * 4, 3 * 2 * 16 * 8],
    }
    assert [h.dtype for h in memory.holders if h.shape == (3, 2, 4, 4)] == ["int64"]


def test_a_frozen_linear_keeps_no_input_and_a_frozen_convolution_does() -> None:
    linear = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3).requires_grad_(False))
    assert kept(measure_training(linear, torch.randn(2, 4))) == {"linear in 0": [2 * 4 * 4]}
    conv = nn.Sequential(nn.Conv1d(4, 6, 1), nn.Conv1d(6, 3, 1).requires_grad_(False))
    found = kept(measure_training(conv, torch.randn(2, 4, 5)))
    assert found == {"conv1d in 0": [2 * 4 * 5 * 4], "conv1d in 1": [2 * 6 * 5 * 4]}


def test_dropout_keeps_its_mask() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))
    x = torch.randn(2, 4)
    assert kept(measure_training(model, x)) == {"linear in 0": [32], "dropout in 1": [2 * 6 * 4]}
    assert kept(measure_training(model.eval(), x)) == {"linear in 0": [32]}


class Attends(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.weights)[0]


def test_attention_is_looked_into() -> None:
    x, scores = torch.randn(2, 5, 16), 2 * 4 * 5 * 5 * 4
    one = x.nbytes
    linear, attention = "linear in attention", "scaled_dot_product_attention in attention"
    assert kept(measure_training(Attends(True), x)) == {
        linear: [one, one],  # into the joint projection, and out
        "bmm in attention": [3 * one, one],  # keys and values within the joint projection; scaled queries
        "bmm in attention + softmax in attention": [scores],
    }
    assert kept(measure_training(Attends(False), x)) == {
        linear: [one],
        attention: [3 * one, 2 * 4 * 5 * 4],  # the joint projection; the logarithm of each softmax's sum
        f"{linear} + {attention}": [one],
    }


def test_a_shared_layer_counts_each_call_and_its_weights_once() -> None:
    layer = nn.Linear(4, 4)
    memory = measure_training(nn.Sequential(layer, nn.Tanh(), layer), torch.randn(2, 4))
    assert kept(memory) == {"linear in 0": [32], "linear in 0 + tanh in 1": [32]}
    assert memory.gradient_bytes == memory.param_bytes == 20 * 4


def test_views_of_one_storage_count_once_and_whole() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(4, 12)

        def forward(self, x: Tensor) -> Tensor:
            wide = self.wide(x)
            return wide[:, :4] * wide[:, 4:8]

    memory = measure_training(Gated(), torch.randn(2, 4))
    assert kept(memory) == {"linear in wide": [32], "mul": [2 * 12 * 4]}
    assert memory.by_module() == [("(model)", 96, 0.75), ("wide", 32, 0.25)]


def test_the_peak_of_one_layer_by_hand() -> None:
    memory = measure_training(nn.Sequential(nn.Linear(8, 16, bias=False)), torch.randn(5, 8))
    x, out, loss, weight = 160, 320, 4, 512
    assert memory.peak_bytes == x + out + loss + loss + out + weight  # each result beside its gradient
    assert memory.peak_where == "linear in 0, backward"
    memory = measure_training(nn.Sequential(nn.Linear(8, 16, bias=False), nn.Sigmoid()), torch.randn(5, 8))
    assert memory.peak_bytes == x + out + loss + loss + out + weight  # sigmoid keeps its result, linear only its input


# ---- functions of others ---------------------------------------------------------------------------------------------


class Square(torch.autograd.Function):
    """x², by a Function: autograd takes x when no torch call is in flight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class Again(torch.autograd.Function):
    """tanh(exp(x)) that keeps x alone, and computes both again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp().tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(x.exp().tanh(), x, grad)[0]


class Applies(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def test_a_function_is_known_by_its_name_or_by_its_label() -> None:
    x = torch.randn(2, 4)
    assert kept(measure_training(Applies(Square.apply), x)) == {"linear in layer": [32], "Square": [48]}

    def named(x: Tensor) -> Tensor:
        with labelled("square"):
            with labelled("power", "deep.inside"):
                return Square.apply(x)

    assert kept(measure_training(Applies(named), x)) == {"linear in layer": [32], "power in deep.inside": [48]}

    def outer(x: Tensor) -> Tensor:
        with labelled("swish"):
            return x.sigmoid() * x

    assert kept(measure_training(Applies(outer), x)) == {"linear in layer": [32], "swish": [48, 48]}


def test_a_label_names_what_runs_below_another_mode() -> None:
    class Swaps(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.relu:
                with labelled("my_relu"):
                    return Square.apply(*args)
            return func(*args, **(kwargs or {}))

    def swapped(x: Tensor) -> Tensor:
        with Swaps():
            return F.relu(x)

    assert kept(measure_training(Applies(swapped), torch.randn(2, 4))) == {"linear in layer": [32], "my_relu": [48]}


def test_labels_outside_a_measurement_do_nothing() -> None:
    seen = []
    assert not is_measuring()
    with labelled("a"), labelled("b", "c"):
        measure_training(Applies(lambda x: seen.append(is_measuring()) or x), torch.randn(2, 4))
    assert seen == [True]
    assert not is_measuring()


def test_what_backward_computes_again_is_held_too() -> None:
    memory = measure_training(Applies(Again.apply), torch.randn(2, 4))
    assert kept(memory) == {"linear in layer": [32], "Again": [48]}
    assert memory.forward_saved_bytes == 80
    assert memory.saved_bytes == 80 + 48 + 48  # the results of exp and tanh


def test_a_checkpoint_shows_in_the_peak() -> None:
    class Deep(nn.Module):
        def __init__(self, reentrant: bool | None) -> None:
            super().__init__()
            self.reentrant = reentrant
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            return x

    x = torch.randn(256, 8, requires_grad=True)
    plain, no, yes = (measure_training(Deep(reentrant), x) for reentrant in (None, False, True))
    assert kept(no) == {"checkpoint": [x.nbytes] * 6} == kept(yes)
    assert no.forward_saved_bytes == yes.forward_saved_bytes < plain.forward_saved_bytes / 10
    assert max(no.peak_bytes, yes.peak_bytes) < plain.peak_bytes / 2
    assert min(no.peak_bytes, yes.peak_bytes) > 2 * 256 * 64 * 4
    assert yes.saved_bytes >= yes.forward_saved_bytes + 2 * 256 * 64 * 4 - x.nbytes


# ---- the interface ---------------------------------------------------------------------------------------------------


def test_inputs_losses_and_targets_of_every_kind() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layer(a + b)}

    a, b, model = torch.randn(2, 4), torch.randn(2, 4), Sums()
    linear = {"linear in layer": [32]}
    assert kept(measure_training(model, (a, b))) == linear
    assert kept(measure_training(model, {"a": a, "b": b})) == linear
    squared = kept(measure_training(model, (a, b), torch.randn(2, 3)))
    assert squared == linear | {"mse_loss in loss": [24, 24]}
    classes = kept(measure_training(model, (a, b), torch.tensor([0, 2])))
    assert classes == linear | {"cross_entropy_loss in loss": [24, 16, 4]}
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3))
    found = kept(measure_training(model, (a, b), torch.tensor([0, 2]), lambda out, y: weighted(out["logits"], y)))
    assert found == linear | {"cross_entropy_loss in loss": [24, 16, 12, 4]}

    class Weighted(nn.CrossEntropyLoss):
        def forward(self, output: Any, y: Tensor) -> Tensor:
            return super().forward(output["logits"], y)

    own = Weighted(weight=torch.ones(3))  # the weights of a loss that is a module are its buffer
    assert kept(measure_training(model, (a, b), torch.tensor([0, 2]), own)) == classes


def test_what_cannot_be_measured_is_refused_with_a_remedy() -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    with pytest.raises(InputError, match=r"The loss is not a scalar \(at shape \(2, 3\)\)\. Reduce it"):
        measure_training(model, x, loss=lambda output, y: output)
    with pytest.raises(InputError, match=r"The loss is not a scalar \(at type float\)"):
        measure_training(model, x, loss=lambda output, y: 1.0)
    with pytest.raises(
        InputError, match=r"nothing to train: the loss depends on no trainable parameter\. Set requires_"
    ):
        measure_training(model, x, loss=lambda output, y: output.detach().sum())
    with pytest.raises(InputError, match=r"nothing to train: all parameters are frozen"):
        measure_training(nn.Linear(4, 3).requires_grad_(False), x)
    with pytest.raises(InputError, match=r"No default loss takes a target of type str\. Pass loss"):
        measure_training(model, x, "cat")
    with pytest.raises(InputError, match=r"output has shape \(2, 3\), the target \(2,\)\. Pass loss"):
        measure_training(model, x, torch.randn(2))


def test_it_can_be_read_and_written() -> None:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)]
    memory = measure_training(nn.Sequential(*blocks), torch.randn(2, 4))
    written = memory.to_dict()
    assert json.loads(json.dumps(written)) == written
    assert written["saved_bytes"] == 32 * 9
    assert written["holders"][0]["shape"] == [2, 4]
    assert written["holders"][0]["holders"][0].keys() == {"operation", "module"}
    text = str(memory).splitlines()
    assert " ".join(text[0].split()) == "Held for backward 288 B 288 B of it when the loss was computed"
    assert any(line.split()[:4] == ["77.8%", "224", "B", "linear"] for line in text)
    assert len(text) <= 30
    assert [name for name, _, _ in memory.by_module(1)][:2] == ["0", "0 + 1"]
    assert memory.by_module(0) == [("(model)", 288, 1.0)]


def test_composites_are_opened_and_compute_the_same() -> None:
    x, weight = torch.randn(2, 6), torch.randn(6)
    for func, args in ((F.layer_norm, (x, (6,), weight)), (F.normalize, (x,)), (F.gelu, (x,)), (F.softmin, (x, 1))):
        inner = opened(func)
        assert (inner is None) == (func is F.gelu)  # which is not written in Python
        if inner is not None:
            assert opened(func) is inner
            torch.testing.assert_close(inner(*args), func(*args), rtol=0, atol=0)
    for func in (F.max_pool2d, torch.add, torch.Tensor.add, torch.Tensor.split, lambda x: x, None):
        assert opened(func) is None
    assert opened(F.multi_head_attention_forward).__kwdefaults__ == F.multi_head_attention_forward.__kwdefaults__


def test_pooling_that_gives_its_indices_ends() -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(self.layer(x), 2, return_indices=True)[0]
            return F.adaptive_max_pool2d(x, 1, return_indices=True)[0] + F.lp_pool2d(x, 2.0, 2)

    memory = measure_training(Pools(), torch.randn(1, 1, 4, 4))
    names = {held.operation for holder in memory.holders for held in holder.holders}
    assert {"conv2d", "max_pool2d_with_indices", "adaptive_max_pool2d"} <= names


def test_a_module_that_fails_and_is_caught_is_left() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad, self.good = nn.Linear(9, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.bad(x)
            except RuntimeError:
                return self.good(x).exp()

    assert kept(measure_training(Tries(), torch.randn(2, 4))) == {"linear in good": [32], "exp": [24]}


def test_what_the_caller_holds_is_part_of_the_peak_even_if_unused() -> None:
    model, x = nn.Linear(8, 16), torch.randn(5, 8)
    plain = measure_training(model, x, None, lambda output, y: output.mean())
    unused = measure_training(model, x, torch.randn(7), lambda output, y: output.mean())
    assert unused.peak_bytes == plain.peak_bytes + 7 * 4
    assert unused.holders == plain.holders
