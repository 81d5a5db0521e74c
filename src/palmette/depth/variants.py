"""What `curve` makes of a network beside removing depth: fewer channels, healed once more, and 8 bits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import fx, nn

import palmette.ranks as ranks
from palmette.depth.accounts import Contender, static
from palmette.depth.session import Session
from palmette.errors import ExportError
from palmette.train.checkpoint import load_checkpoint, load_model_tensors, model_tensors, save_checkpoint
from palmette.train.loop import heal

Say = Callable[[str], None]


def widths(session: Session, rows: Sequence[Contender], ratios: Sequence[float], say: Say) -> list[Contender]:
    """Every row with every share of its channels pruned away, healed by one schedule more; journaled.

    Raises MissingDependency without torch-pruning.
    """
    found = []
    for row in rows:
        for ratio in ratios:
            say(f"pruning {100 * ratio:g} % of the channels of {row.name}, and healing")
            name = f"{row.name}, width {left(ratio)} %"
            network = narrowed(session, row.network, ratio, name.replace(" ", "-").replace(",", "").replace("-%", ""))
            found.append(replace(row, name=name, network=network, trainings=row.trainings + 1, width=ratio))
    return found


def left(ratio: float) -> str:
    """The percentage of channels that stay, as it stands in names."""
    return f"{100 * (1 - ratio):g}"


def narrowed(session: Session, network: nn.Module, ratio: float, label: str) -> fx.GraphModule:
    """`network` with a share of its channels pruned away and healed under `label`, or read back from the run folder."""
    from palmette.depth.width import prune_width

    small = prune_width(network, session.example, ratio, protect=session.protect)
    file = session.run.path(f"{label}.safetensors.healed")

    def train() -> bool:
        heal(
            small,
            session.train,
            session.heal,
            teacher=session.teacher,
            loss_fn=session.loss_fn,
            seed=session.settings.seed,
            checkpoint=session.run.path(f"{label}-checkpoint.safetensors"),
            label=label,
            fabric=session.trainer,
        )
        save_checkpoint(file, model_tensors(small), {"label": label})
        return True

    session.run.once(f"{label}-heal", train)
    load_model_tensors(small, load_checkpoint(file)[0], str(file))
    return small.eval()


def quantised(session: Session, rows: Sequence[Contender], say: Say) -> tuple[list[Contender], list[str]]:
    """Every row quantised to 8 bits after training, in ONNX Runtime; the files stay in the run folder.

    Also returns a sentence for each row that cannot be quantised, which is left out.
    Raises MissingDependency without ONNX Runtime.
    """
    from palmette.deploy.quantize import quantize_int8

    found: list[Contender] = []
    refused: list[str] = []
    for row in rows:
        if row.name.startswith("dense +"):
            continue
        say(f"quantising {row.name} to 8 bits")
        file = session.run.path(f"{row.name.replace(' ', '-').replace(',', '').replace('-%', '')}.int8.onnx")
        first = ranks.leads()  # of several processes each makes its own, and the first one's stays
        try:
            with ranks.joint(), ranks.alone(), tempfile.TemporaryDirectory() as own:
                target = file if first else Path(own) / file.name
                quantised = quantize_int8(row.network, session.example, session.calibration, target)
        except ExportError as error:
            refused.append(f"{row.name} is not in the table in 8 bits: {error}")
            say(refused[-1])
            continue
        costs = static(session, row.network)
        found.append(replace(row, name=f"{row.name}, int8", network=quantised.model, int8=True, costs=costs))
    return found, refused
