"""What all runtimes share: how one is described, how a network is handed to it, and silence while it works."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from palmette.errors import ExportError
from palmette.graph.inputs import call, map_tensors

Runner = Callable[[], Any]
"""One forward pass, with model and inputs bound."""


class Loaded(Protocol):
    """A network in a runtime, at the shapes that it was loaded for."""

    def bind(self, inputs: Any) -> Runner:
        """A pass over `inputs` with as little around it as the runtime allows."""

    def outputs(self, inputs: Any) -> list[Tensor]:
        """Every tensor of the network's output, in order, on the CPU or where the model lives."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A way to run networks.

    load: `load(models, inputs, threads, fast)` -> one Loaded per model; fast allows a quicker export, the same for all.
    modules: what must be importable; extra: the extra of palmette that brings them. library: the distribution whose
    version is reported. precision: of floating-point work, None for the model's own. tolerance: largest relative
    difference (2-norms) from eager before a pass counts as another network's. everywhere: runs on the model's device;
    others get the model on the CPU. check: raises when something else is missing.
    """

    name: str
    title: str
    load: Callable[[list[nn.Module], Any, int, bool], list[Loaded]]
    modules: tuple[str, ...] = ()
    extra: str = ""
    library: str | None = None
    precision: str | None = None
    tolerance: float = 1e-2
    everywhere: bool = False
    check: Callable[[], None] | None = None


class Packed(nn.Module):
    """A network in the format of a runtime, called like the module that it was made from; it has no parameters.

    content: the file's bytes. precision: what it computes in, such as "int8". Runs on the CPU with torch's present
    number of threads. Each subclass says in `runtimes` which runtimes can time it.
    """

    runtimes: tuple[str, ...] = ()

    def __init__(self, content: bytes, precision: str = "float32") -> None:
        super().__init__()
        self.content, self.precision = content, precision
        self._sessions: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies make sessions of their own."""
        return {**self.__dict__, "_sessions": {}}

    def extra_repr(self) -> str:
        """Precision and size."""
        return f"{self.precision}, {len(self.content):,} bytes"


class Flat(nn.Module):
    """A model as a function of its input tensors, in the order of `tensors(inputs)`, to a tuple of tensors."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model = model
        self.form = (inputs,)  # in a tuple: a tensor attribute would become a constant of the graph

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """The output's tensors, depth first."""
        following = iter(arguments)
        output = call(self.model, map_tensors(lambda _: next(following), self.form[0]))
        return tuple(flat_outputs(output))


def flat_outputs(output: Any) -> list[Tensor]:
    """Every tensor in a network's output, depth first."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def reason(error: BaseException) -> str:
    """The line of an error that tells most, at most 200 characters: a finding of OpenVINO (--), else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    findings = [line.removeprefix("-- ") for line in lines if line.startswith("-- ")]
    return (findings or lines or [type(error).__name__])[0][:200]


def first_that_works(what: str, *attempts: Callable[[], Any]) -> Any:
    """The result of the first attempt that does not fail. Raises ExportError(`what`) with the last one's reason."""
    error: Exception | None = None
    for attempt in attempts:
        try:
            return attempt()
        except Exception as caught:  # noqa: BLE001 - exporters raise whatever they like
            error = caught
    raise ExportError(what, why=reason(error) if error else None) from error


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """No warnings, logs or prints from inside the block; gives what takes the prints."""
    level, log = logging.root.manager.disable, torch._C._jit_onnx_log
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        torch._C._jit_onnx_log = lambda *_: None  # the older exporter's log goes past Python's streams
        try:
            yield sink
        finally:
            logging.disable(level)
            torch._C._jit_onnx_log = log


@contextlib.contextmanager
def silent() -> Iterator[Callable[[], list[str]]]:
    """Like `quiet`, and what compiled libraries write to the process's standard error is kept off it too.

    Gives a function that returns the lines held back so far: those of compiled libraries, then those of Python.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held, quiet() as sink:

        def said() -> list[str]:
            written = os.pread(held.fileno(), 100_000, 0).decode(errors="replace")
            return [*written.splitlines(), *sink.getvalue().splitlines()]

        try:
            os.dup2(held.fileno(), 2)
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
