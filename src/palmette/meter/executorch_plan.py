"""The arena of an ExecuTorch program: how large the memory planner makes it, and a planner that wastes less.

ExecuTorch's own planner puts tensors into buckets that never grow and adds the buckets up, which can leave gaps. The
one here gives each tensor the lowest free offset, larger tensors first (greedy by size, Pisarchyk and Lee 2020), tries
three orders, and leaves the program to ExecuTorch's where that is smaller. Programs of either run the same operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from palmette.compat import optional
from palmette.errors import ExportError
from palmette.graph.inputs import tensors
from palmette.meter.compute import evaluating
from palmette.meter.running import Flat, quiet, reason
from palmette.meter.runtime_executorch import executorch_parts, in_order

_KEPT = (torch.ops.aten.linear.default,)
"""Operators that ExecuTorch has a kernel for but would take apart: a linear layer would copy its weight, transposed."""


@dataclass(frozen=True)
class Planned:
    """A program of ExecuTorch's portable operators, and its memory in bytes.

    arena_bytes: what the runtime allocates for inputs, activations and outputs. live_bytes: the most of it that is in
    use at once, the least that any planner could reach. content: the .pte file.
    """

    arena_bytes: int
    live_bytes: int
    content: bytes


class Block(NamedTuple):
    """A tensor in an arena: bytes, and the first and last step at which it is needed."""

    size: int
    first: int
    last: int


def plan_arena(model: nn.Module, inputs: Any, *, tight: bool = True) -> Planned:
    """Lower the model to ExecuTorch's portable operators, without a delegate, and plan its memory.

    inputs: as the model takes them; the program is for their shapes. tight: use the planner of this module besides
    ExecuTorch's own. Takes some seconds. Raises MissingDependency without ExecuTorch, ExportError when the model does
    not lower.
    """
    exir = executorch_parts()["exir"]
    planning = optional("executorch.exir.memory_planning", package="palmette[executorch]")
    passes = optional("executorch.exir.passes", package="palmette[executorch]")
    algorithms = [planning.greedy, _algorithm(planning)] if tight else [planning.greedy]
    suite = planning.MemoryPlanningAlgorithmSuite(algorithms)
    try:
        with quiet(), evaluating(model):
            exported = torch.export.export(Flat(model, inputs).eval(), tuple(map(in_order, tensors(inputs))))
            how = exir.EdgeCompileConfig(_check_ir_validity=False, preserve_ops=list(_KEPT))
            edge = exir.to_edge(exported, compile_config=how)
            planner = passes.MemoryPlanningPass(memory_planning_algo=suite)
            program = edge.to_executorch(exir.ExecutorchBackendConfig(memory_planning_pass=planner))
    except Exception as error:  # torch.export and ExecuTorch's passes raise whatever they like
        raise ExportError("The network cannot be lowered for ExecuTorch", why=reason(error)) from error
    lowered = program.exported_program()
    specs = planning.collect_specs_from_nodes(lowered.graph_module.graph.nodes, lowered.graph_signature)
    blocks = [_block(spec) for spec in specs if spec.mem_offset is not None]
    arena = sum(program.executorch_program.execution_plan[0].non_const_buffer_sizes)
    return Planned(int(arena), most_alive(blocks), bytes(program.buffer))


def most_alive(blocks: Iterable[Block]) -> int:
    """The largest number of bytes that are needed at one step."""
    change: dict[int, int] = {}
    for block in blocks:
        change[block.first] = change.get(block.first, 0) + block.size
        change[block.last + 1] = change.get(block.last + 1, 0) - block.size
    most = alive = 0
    for step in sorted(change):
        alive += change[step]
        most = max(most, alive)
    return most


_ORDERS: tuple[Callable[[Block], tuple[int, ...]], ...] = (
    lambda block: (-block.size, block.first),
    lambda block: (block.first - block.last, -block.size),
    lambda block: (block.first, -block.size),
)
"""By size, by how long a tensor lives, by when it is born."""


def offsets(blocks: list[Block]) -> tuple[list[int], int]:
    """An offset in bytes for each block, so that none overlap while both live, and the size of the arena."""
    found = [_placed(blocks, order) for order in _ORDERS]
    return min(found, key=lambda placed: placed[1])


def _placed(blocks: list[Block], order: Callable[[Block], tuple[int, ...]]) -> tuple[list[int], int]:
    """Blocks at the lowest offset that is free for all their life, one after the other."""
    at = [0] * len(blocks)
    done: list[int] = []
    for i in sorted(range(len(blocks)), key=lambda i: order(blocks[i])):
        mine, start = blocks[i], 0
        beside = [j for j in done if blocks[j].first <= mine.last and mine.first <= blocks[j].last]
        for j in sorted(beside, key=at.__getitem__):
            if start + mine.size <= at[j]:
                break
            start = max(start, at[j] + blocks[j].size)
        at[i] = start
        done.append(i)
    return at, max((at[i] + blocks[i].size for i in done), default=0)


def _block(spec: Any) -> Block:
    return Block(int(spec.allocated_memory), int(spec.lifetime[0]), int(spec.lifetime[1]))


def _algorithm(planning: Any) -> Callable[..., Any]:
    """`offsets` as an algorithm of ExecuTorch's planner; views of other tensors' memory are left to its own."""

    def by_offset(alignment: int, specs: Any, graph_module: Any, graph_signature: Any, extra_padding: int = 0) -> Any:
        listed = list(specs)
        special = any(spec.storage_base is not None or spec.mem_id not in (None, 1) for spec in listed)
        if special or not listed or getattr(graph_module, "input_mem_buffer_sizes", None):
            return planning.greedy(alignment, specs, graph_module, graph_signature, extra_padding)
        for spec in listed:
            spec.realign(alignment)
        at, size = offsets([_block(spec) for spec in listed])
        placed = {spec: planning.SpecAllocResult(1, 0, start) for spec, start in zip(listed, at, strict=True)}
        return planning.MemoryAlgoResult(placed, [0, size + extra_padding])

    return by_offset
