"""Bytes of one training step: stock, checkpointed, with LoRA, and adapted by every method.

Usage: PALMETTE_DATA=DIR python benchmarks/adapt/bytes.py [--networks a,b] [--batch 8] [--fake 128] [--only METHOD]

Every network with all parameters trainable and batch norms on their running statistics. A step really runs, with
random images (224 px, MCUNet 96), and everything that autograd keeps is counted, once a storage. Codecs get a twentieth
of what the stock network keeps, or the least that they can do with; `auto` gets a tenth, a fiftieth, a hundredth.
checkpoint: torch.utils.checkpoint around every block. LoRA: PEFT, rank 8 on all layers but depthwise convolutions and
the attention's output projection of ViT, the last layer trained in full. Rows at a batch of 128 are fake tensors' work.
Rows go to benchmarks/results/adapt_bytes.json as they are made; those that are there are not made again.
"""

from __future__ import annotations

import argparse
import re
import types
from collections.abc import Callable
from typing import Any

import torch
from setups import MIB, NETWORKS, Rows, blocks, head, layers, network, sample, side
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from palmette.compat import optional, torchvision
from palmette.errors import BudgetError
from palmette.meter.training import TrainingMemory, measure_training
from palmette.ondevice.adapt import adapt

CODECS = ("asi", "hosvd", "svd", "low_bit", "fixed_projection", "gradient_filter")
SHARES = (10, 50, 100)
Sample = tuple[Tensor, Tensor]


def main() -> None:
    """Make the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--fake", type=int, default=128, help="batch of the rows that no data runs through")
    parser.add_argument("--only", default="", help="make only this method's rows, also where they are there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows("bytes", "bytes of one training step; saved: held by autograd at most, peak: alive at most")
    for name in given.networks.split(","):
        fake_rows(rows, name, given.fake, given.only)
        real_rows(rows, name, given.batch, given.only)
    report(rows)


# ---- with data -------------------------------------------------------------------------------------------------------


def real_rows(rows: Rows, name: str, batch: int, only: str) -> None:
    """The rows of one network at a batch that is really run."""
    model, data = network(name, side(name)), sample(batch, side(name))
    key = f"{name} b{batch}"
    stock = rows.once(f"{key} stock", lambda: measured(measure_training(model, *data)))
    vanilla = stock["saved_bytes"]

    def make(method: str, row: Callable[[], dict[str, Any]]) -> None:
        if not only or method.startswith(only):
            rows.once(f"{key} {method}", lambda: {**row(), "stock_saved_bytes": vanilla}, again=bool(only))

    make("checkpoint", lambda: checkpointed(network(name, side(name)), data))
    make("lora", lambda: with_lora(network(name, side(name)), data))
    make("lossless", lambda: adapted(model, data, "lossless", None))
    for share in SHARES:
        make(f"auto 1/{share}", lambda share=share: adapted(model, data, "auto", vanilla // share))
    for method in CODECS:
        make(f"{method} 1/20", lambda method=method: adapted(model, data, method, vanilla // 20))


def measured(memory: TrainingMemory) -> dict[str, Any]:
    """A row of the meter's figures."""
    return {
        "saved_bytes": memory.saved_bytes,
        "peak_bytes": memory.peak_bytes,
        "peak_where": memory.peak_where,
        "gradient_bytes": memory.gradient_bytes,
    }


def adapted(model: nn.Module, data: Sample, method: str, budget: int | None) -> dict[str, Any]:
    """The row of an adapted network; with the least budget where the one asked for is too small."""
    asked = budget
    try:
        adaptation = adapt(model, data, None, budget=budget, method=method)
    except BudgetError as error:
        least = re.search(r"is ([\d,]+) bytes", str(error))
        if budget is None or least is None:
            raise
        budget = int(least[1].replace(",", ""))
        adaptation = adapt(model, data, None, budget=budget, method=method)
    try:
        found = adaptation.measure()
        return {
            **measured(found),
            "method": method,
            "asked_bytes": asked,
            "budget_bytes": budget,
            "predicted_bytes": adaptation.plan.predicted_bytes,
            "exact": adaptation.plan.predicted_bytes == found.saved_bytes,
            "vanilla_equal_to_stock": adaptation.vanilla_saved,
            "frozen": len(adaptation.plan.frozen),
            "layers": len(adaptation.plan.codecs),
            "largest_error": max(adaptation.plan.errors.values(), default=0.0),
        }
    finally:
        adaptation.undo()


def checkpointed(model: nn.Module, data: Sample) -> dict[str, Any]:
    """Every block keeps its input and runs again in the backward pass."""
    wrapped = blocks(model)
    for block in wrapped:
        block.__dict__["forward"] = types.MethodType(_checkpointed_forward, block)
    return {**measured(measure_training(model, *data)), "blocks": len(wrapped)}


def _checkpointed_forward(self: nn.Module, *args: Any) -> Any:
    return checkpoint(type(self).forward, self, *args, use_reentrant=False)


def with_lora(model: nn.Module, data: Sample) -> dict[str, Any]:
    """Rank 8 adapters of PEFT beside the frozen layers."""
    torchvision()  # declares what PEFT's imports need of it
    peft = optional("peft", package="peft")
    last = head(model)
    targets = [path for path, layer in layers(model).items() if _takes_lora(path, layer) and path != last]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets, modules_to_save=[last]))
    row = measured(measure_training(wrapped.eval(), *data))
    return {**row, "adapters": len(targets), "peft": peft.__version__}


def _takes_lora(path: str, layer: nn.Module) -> bool:
    return getattr(layer, "groups", 1) == 1 and not path.endswith("out_proj")


# ---- without data ----------------------------------------------------------------------------------------------------


def fake(mode: FakeTensorMode, model: nn.Module) -> nn.Module:
    """The network with fake parameters and buffers."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    made = mode.from_tensor(tensor.detach())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    table[name] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
    return model


def fake_rows(rows: Rows, name: str, batch: int, only: str) -> None:
    """Stock and exact forms at a large batch, by fake tensors."""
    if only and only not in ("fake", "lossless"):
        return
    mode = FakeTensorMode()
    model = fake(mode, network(name))
    with mode:
        data = torch.randn(batch, 3, side(name), side(name)), torch.randint(1000, (batch,))
        key = f"{name} b{batch} fake"
        stock = rows.once(f"{key} stock", lambda: measured(measure_training(model, *data)), again=bool(only))
        vanilla = {"stock_saved_bytes": stock.get("saved_bytes", 0)}
        rows.once(f"{key} lossless", lambda: adapted(model, data, "lossless", None) | vanilla, again=bool(only))


# ---- the table -------------------------------------------------------------------------------------------------------


def report(rows: Rows) -> None:
    """Print what there is."""
    print(f"{'':<38} {'saved':>9} {'peak':>9} {'grads':>8} {'ratio':>7}  exact  error")
    for key, row in rows.content["rows"].items():
        if "error" in row:
            print(f"{key:<38} {row['error'][:90]}")
        elif "saved_bytes" in row:
            sizes = [row[f"{part}_bytes"] / MIB for part in ("saved", "peak", "gradient")]
            ratio = row.get("stock_saved_bytes", row["saved_bytes"]) / row["saved_bytes"]
            shown = f"{sizes[0]:>9.2f} {sizes[1]:>9.2f} {sizes[2]:>8.2f} {ratio:>7.2f}"
            print(f"{key:<38} {shown}  {row.get('exact', ''):<5}  {row.get('largest_error', 0):.2f}")


if __name__ == "__main__":
    main()
