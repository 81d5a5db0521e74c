"""What runtimes share: silence that gives back what was said, errors in one line, networks as functions of tensors."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import Tensor, nn

from palmette.errors import ExportError
from palmette.graph.inputs import tensors
from palmette.meter.running import Flat, first_that_works, reason, silent


def test_silent_holds_back_what_compiled_code_writes(capfd: pytest.CaptureFixture[str]) -> None:
    with silent() as said:
        os.write(2, b"one\ntwo\n")
        sys.stderr.write("three")
        assert said() == ["one", "two", "three"]
    os.write(2, b"after\n")
    assert capfd.readouterr() == ("", "after\n")


def test_silence_ends_with_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with silent():
            os.write(2, b"before\n")
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_a_reason_is_one_line_that_tells() -> None:
    assert reason(ValueError("\n  first \nsecond")) == "first"
    assert reason(ValueError()) == "ValueError"
    assert reason(RuntimeError("Check failed at a.cpp:\nSummary:\n-- No rule for: aten.x\n-- more")) == (
        "No rule for: aten.x"
    )
    assert len(reason(ValueError("x" * 1000))) == 200


def test_the_first_attempt_that_works_counts() -> None:
    def fail() -> int:
        raise KeyError("no")

    assert first_that_works("cannot", fail, lambda: 2, lambda: 3) == 2
    with pytest.raises(ExportError, match=r"^cannot: 'no'$"):
        first_that_works("cannot", fail)


class Nested(nn.Module):
    """A dict of a pair and a tensor in, a dict out."""

    def forward(self, pair: tuple[Tensor, Tensor], scale: Tensor) -> dict[str, Tensor]:
        return {"sum": (pair[0] + pair[1]) * scale, "difference": pair[0] - pair[1]}


def test_a_flat_network_takes_and_gives_tensors_in_order() -> None:
    inputs = {"pair": (torch.randn(2), torch.randn(2)), "scale": torch.tensor(3.0)}
    flat = Flat(Nested(), inputs)
    changed = [t + 1 for t in tensors(inputs)]
    total, difference = flat(*changed)
    torch.testing.assert_close(total, (changed[0] + changed[1]) * changed[2])
    torch.testing.assert_close(difference, changed[0] - changed[1])
