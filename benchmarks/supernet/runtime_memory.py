"""Is the computed peak of a sub-network the memory that a runtime plans for it, and that PyTorch uses?

    python benchmarks/supernet/runtime_memory.py           # ten sub-networks of three supernets, about ten minutes
    python benchmarks/supernet/runtime_memory.py --fresh

Each sub-network is extracted and lowered to ExecuTorch's portable operators, without a delegate. Compared with the
closed form of the supernet: the largest sum of planned tensors alive at once, the arena of ExecuTorch's own planner and
of palmette's, the storages alive in a real eager run, and the peak of torch's allocator. The largest of each supernet
is also counted with its batch norms folded. Written after every row to benchmarks/results/supernet_runtime_memory.json.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palmette import compat
from palmette.device import DeviceProfile
from palmette.files import write_json
from palmette.meter.executorch_plan import plan_arena
from palmette.meter.memory import Operators, live_bytes
from palmette.meter.runtime_executorch import Program
from palmette.run import environment
from palmette.supernet import MOOFA
from palmette.supernet.memory import MemoryModel
from palmette.supernet.sampling import sample_balanced
from palmette.supernet.supernet import Supernet

RESULTS = Path(__file__).parents[1] / "results" / "supernet_runtime_memory.json"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "MobileNetV3-small": (lambda: _torchvision("mobilenet_v3_small"), 96, 4),
    "ResNet-18": (lambda: _torchvision("resnet18"), 64, 3),
    "MOOFA": (lambda: MOOFA.build_max(10), 64, 3),
}
"""How the largest network is made, the edge of its images in pixels, and how many of its sub-networks are looked at."""
WIDTHS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


def _torchvision(name: str) -> Any:
    return getattr(compat.torchvision().models, name)()


class Storages(TorchDispatchMode):
    """The most bytes of storages alive at once, of those that operators return, beside the input's."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), x]}
        self.current = self.peak = x.nbytes
        self.references: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                self.references.append(weakref.ref(storage, self._release(storage._cdata, storage.nbytes())))
        return result

    def _release(self, address: int, size: int) -> Callable[[Any], None]:
        def died(_: Any) -> None:
            self.known.remove(address)
            self.current -= size

        return died


def allocated(model: nn.Module, x: Tensor) -> int:
    """The peak of torch's CPU allocator in a forward pass, with the input: scratch space of kernels counts."""
    model(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model(x)
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak + x.nbytes


def folded(network: fx.GraphModule) -> fx.GraphModule:
    """The network with each batch norm behind a convolution folded into it, in place."""
    for node in list(network.graph.nodes):
        source = node.args[0] if node.op == "call_module" else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        norm, layer = (network.get_submodule(str(n.target)) for n in (node, source))
        if isinstance(norm, nn.BatchNorm2d) and isinstance(layer, nn.Conv2d):
            network.set_submodule(str(source.target), fuse_conv_bn_eval(layer, norm))
            node.replace_all_uses_with(source)
            network.graph.erase_node(node)
    network.recompile()
    return network


def computed(network: fx.GraphModule, operators: Operators, *, hold_inputs: bool = False) -> tuple[int, str]:
    """The peak in bytes, and the step where it is."""
    live = live_bytes(network, 1, hold_inputs=hold_inputs, operators=operators)
    return max(live.values()), max(live, key=lambda name: live[name])


@torch.no_grad()
def measure(network: fx.GraphModule, x: Tensor) -> dict[str, Any]:
    """Computed, planned and used bytes of a network; `error` is of the program with the tight plan against eager."""
    peak, where = computed(network, "core")
    stock, tight = plan_arena(network, x, tight=False), plan_arena(network, x)
    got, want = Program(tight.content).outputs(x)[0], network(x)
    with Storages(network, x) as storages:
        network(x)
    return {
        "core": peak,
        "where": where,
        "own": computed(network, "own")[0],
        "live": stock.live_bytes,
        "arena": stock.arena_bytes,
        "tight": tight.arena_bytes,
        "held": computed(network, "own", hold_inputs=True)[0],
        "storages": storages.peak,
        "allocator": allocated(network, x),
        "error": float((got - want).norm() / want.norm()),
    }


def rows_of(name: str, done: dict[str, Any], write: Callable[[], None]) -> None:
    """Add the rows of a supernet to `done`."""
    build, edge, count = NETWORKS[name]
    torch.manual_seed(0)
    net = Supernet.from_model(build().eval(), torch.randn(2, 3, edge, edge), width=WIDTHS, round_to=4)
    x = torch.randn(1, 3, edge, edge)
    memory = MemoryModel(net, DeviceProfile(operators="core"))
    spread = sample_balanced(memory, count - 2, np.random.default_rng(0))
    configs = {"largest": net.max(), "smallest": net.min()}
    configs |= {f"drawn {i}": memory.codes.decode(code) for i, code in enumerate(spread, 1)}
    for label, config in configs.items():
        key = f"{name}/{label}"
        if key not in done:
            small = net.extract(config).eval()
            closed = int(memory.peak_bytes(memory.codes.encode([config]))[0])
            done[key] = measure(small, x) | {"closed": closed, "edge": edge}
            write()
            print(key, done[key], flush=True)
    key = f"{name}/largest, batch norms folded"
    if key not in done:
        done[key] = measure(folded(net.extract(net.max()).eval()), x) | {"edge": edge}
        write()
        print(key, done[key], flush=True)


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() and not options.fresh else {}
    about = "bytes of sub-networks, batch 1, float32, by benchmarks/supernet/runtime_memory.py"
    for name in NETWORKS:
        rows_of(name, rows, lambda: write_json(RESULTS, {"about": about, "environment": environment(), "rows": rows}))


if __name__ == "__main__":
    main()
