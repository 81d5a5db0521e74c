"""Which call is being made, and in which module: what the meter asks while a network runs.

A call is named as finely as torch lets one see it: the functions of `torch.nn.functional` that are written in Python
are looked into. Whoever computes a call by other means (an autograd.Function has no torch call in flight when autograd
takes what it keeps) says with `labelled` what the call is.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_COMPOSITES = ("torch.nn.functional", "torch.autograd")  # `backward` and `grad`: a backward may recompute, with calls
_REFLECTED = {"radd", "rsub", "rmul", "rdiv", "rtruediv", "rfloordiv", "rpow", "rmod", "rmatmul"}


@dataclass(frozen=True)
class HeldBy:
    """A call: the name of the operation and the path of the module that made it ("" is the model itself)."""

    operation: str
    module: str

    def __str__(self) -> str:
        return " in ".join(part for part in (self.operation, self.module) if part)


def opened(func: Any) -> Callable[..., Any] | None:
    """`func` without its own check for overrides, for a mode to call `with self:`, so that it sees the calls inside.

    None where there is nothing to open: for all but the Python functions of torch.nn.functional (and `backward` and
    `grad` of torch.autograd), and for pooling that dispatches on a boolean, which would come back to the mode under its
    own name for ever. Cached; cheap for each torch call.
    """
    if not isinstance(func, FunctionType) or func.__globals__.get("__name__") not in _COMPOSITES:
        return None
    return _open(func)


@cache
def _open(func: FunctionType) -> Callable[..., Any] | None:
    if not set(func.__code__.co_names) & set(_CHECKS):
        return None
    copy = FunctionType(func.__code__, _unchecked(func.__module__), func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


@cache
def _unchecked(module: str) -> dict[str, Any]:
    """The names of a module of torch, with checks for overrides that find none."""
    return vars(sys.modules[module]) | dict.fromkeys(_CHECKS, _never)


def _never(*_: Any) -> bool:
    return False


class Calls(TorchFunctionMode):
    """Knows the torch call in flight and the module that makes it; entered through `recording`."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[str] = []
        self._modules: list[str] = []
        self._labels: list[tuple[str, str | None]] = []
        self._in_backward = False
        # autograd numbers its nodes as it makes them: from which number on, which call was in flight
        self._numbers: list[int] = []
        self._callers: list[HeldBy] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = opened(func)
        if inside is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        name = _name(func)
        if not name:
            return func(*args, **(kwargs or {}))
        with self._pushed(self._operations, name):
            return func(*args, **(kwargs or {}))

    def current(self) -> HeldBy:
        """The call in flight; the innermost label goes before what torch says. The operation is "" where none is."""
        operation, module = self._labels[-1] if self._labels else ("", None)
        if not operation and self._operations:
            operation = self._operations[-1]
        if module is None:
            module = self._modules[-1] if self._modules else ""
        return HeldBy(operation, module)

    def keeper(self) -> HeldBy:
        """Who keeps a tensor that autograd takes now: the call in flight, else an autograd.Function by its name."""
        found = self.current()
        return found if found.operation else HeldBy(_applied() or "unknown", found.module)

    def where(self) -> str:
        """The call in flight in words, with the half of the step; in backward, the call that backward undoes."""
        found = self.current()
        if not self._in_backward:
            return ", ".join(part for part in (str(found), "forward") if part)
        if found.operation:
            return f"{found}, recomputed in backward"
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return "backward"
        number = node._sequence_nr()
        if number < self._numbers[-1]:  # larger for what backward itself made, and for the accumulation of gradients
            found = self._callers[bisect_right(self._numbers, number) - 1]
        return f"{HeldBy(found.operation or node.name(), found.module)}, backward"

    def start_backward(self) -> None:
        """From here on, calls are part of the backward pass."""
        self._mark()
        self._in_backward = True

    def inside(self, path: str) -> AbstractContextManager[None]:
        """In this block, calls are made by the module `path`."""
        return self._pushed(self._modules, path)

    def labelled(self, operation: str, module: str | None) -> AbstractContextManager[None]:
        """In this block, the call is `operation`."""
        return self._pushed(self._labels, (operation, module))

    def watch(self, path: str, module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """Call `module` by this path while it runs, until the handles are removed."""

        def enter(*_: Any) -> None:
            self._modules.append(path)
            self._mark()

        def leave(*_: Any) -> None:
            self._modules.pop()
            self._mark()

        before = module.register_forward_pre_hook(enter, prepend=True)
        return before, module.register_forward_hook(leave, always_call=True)

    @contextmanager
    def _pushed(self, stack: list[Any], entry: Any) -> Iterator[None]:
        stack.append(entry)
        self._mark()
        try:
            yield
        finally:
            stack.pop()
            self._mark()

    def _mark(self) -> None:
        if not self._in_backward:
            self._numbers.append(torch._C._autograd._get_sequence_nr())
            self._callers.append(self.current())


_recording: list[Calls] = []
_IDLE = nullcontext()


def is_measuring() -> bool:
    """Whether a training step is being measured just now."""
    return bool(_recording)


def labelled(operation: str, module: str | None = None) -> AbstractContextManager[None]:
    """In this block, what autograd takes to keep is held by `operation` (and by `module`; None: the module that runs).

    For code that computes a call by means that torch does not see as a call, such as an autograd.Function. Almost free
    while nobody measures.
    """
    return _recording[-1].labelled(operation, module) if _recording else _IDLE


@contextmanager
def recording(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Calls]:
    """In this block, the calls of these modules (path, module) are known by name."""
    calls = Calls()
    with ExitStack() as stack:
        for path, module in modules:
            for handle in calls.watch(path, module):
                stack.callback(handle.remove)
        _recording.append(calls)
        stack.callback(_recording.remove, calls)
        stack.enter_context(calls)
        yield calls


def _name(func: Any) -> str:
    """`func` as people call it: "conv2d", "relu_", "add"; "" for the reading of an attribute."""
    name = str(getattr(func, "__name__", type(func).__name__)).partition(".")[0]
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    if name in ("get", "set"):
        return ""
    return name[1:] if name in _REFLECTED else name


def _applied() -> str:
    """Who has autograd keep a tensor while no torch call is in flight: an autograd.Function, checkpointing, or "".

    A Function's tensors are taken when its own code has ended, below its `apply` on the stack.
    """
    frame: FrameType | None = sys._getframe(3)  # the caller of the hook
    for _ in range(4):
        if frame is None:
            break
        owner = frame.f_locals.get("cls") if frame.f_code.co_name == "apply" else None
        if "torch.utils.checkpoint" in (frame.f_globals.get("__name__"), getattr(owner, "__module__", None)):
            return "checkpoint"
        if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            return owner.__name__
        frame = frame.f_back
    return ""
