"""The page of an `adapt`: what training keeps within its budget, who holds it, and what that did to the accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palmette.errors import RunError
from palmette.report import words
from palmette.report.adapted_pictures import epochs_picture, holders_picture, layers_picture
from palmette.report.page import MAX_ROWS, artifacts, figures_of, flat, templates, write_page

FILES = {
    "model.safetensors": "weights of the fine-tuned network under its own names: -w takes them",
    "plan.json": "the memory plan of the first epoch: adapt(model, sample, plan=text)",
    "adapt.safetensors": "the state after the last epoch: --resume goes on from it",
    "figures.json": "every number on this page",
}
SCOPES = {
    "saved": "what autograd keeps for backward",
    "saved+gradients+optimizer": "what autograd keeps for backward, gradients and optimizer",
    "peak": "the most that is alive at once",
}
_NEEDED = ("bytes", "peak", "gradients", "parameters", "holders", "layers", "history", "accuracy", "training")


def adapt_figures(folder: Path) -> dict[str, Any] | None:
    """The figures of an adapt's run folder, None for another. Raises RunError when they are damaged."""
    return figures_of(folder, "adapt", _NEEDED)


def render_adapted(run_folder: str | Path) -> Path:
    """Write report.html into the folder of an adapt, from figures.json there, and return its path.

    Raises RunError when figures.json is missing or is not that of an adapt.
    """
    folder = Path(run_folder)
    figures = adapt_figures(folder)
    if figures is None:
        raise RunError("The folder holds no adapt", where=str(folder), fix="Pass the run folder of `palmette adapt`.")
    environment = figures.get("environment", {})
    page = (
        templates()
        .get_template("adapt.html.j2")
        .render(
            figures=figures,
            words=words,
            headline=headline(figures),
            verdict=verdict(figures),
            lead=lead(figures),
            tiles=tiles(figures),
            holders=holders_picture(figures),
            layers=layers_picture(figures),
            epochs=epochs_picture(figures),
            account=account(figures),
            assumptions=assumptions(figures),
            notes=notes(figures),
            judged=bool(figures["history"]) and "val_accuracy" in figures["history"][0],
            traced=figures["holders"]["before"] is not None,
            environment=flat({k: v for k, v in environment.items() if k not in ("command", "seed")}),
            files=artifacts(folder, FILES),
            max_rows=MAX_ROWS,
        )
    )
    return write_page(folder, page)


def headline(figures: dict[str, Any]) -> str:
    """One sentence: what is kept, against what would be."""
    before, after = figures["bytes"]["vanilla"], figures["bytes"]["measured"]
    if after >= before:
        return f"Fine-tuning keeps {words.size(after)} for backward, as it does without a plan."
    times = f"{words.three(before / max(after, 1))}{words.TIMES} less"
    return f"Fine-tuning keeps {words.size(after)} for backward instead of {words.size(before)}: {times}."


def spent(figures: dict[str, Any]) -> int:
    """Bytes that count in the run's scope, as measured."""
    if figures["scope"] == "peak":
        return int(figures["peak"]["adapted"])
    copies = 0 if figures["scope"] == "saved" else 1 + figures["training"]["copies"]
    return int(figures["bytes"]["measured"] + copies * figures["gradients"]["adapted"])


def verdict(figures: dict[str, Any]) -> dict[str, str]:
    """Whether the measured bytes are within the budget. kind: good, bad or none."""
    budget = figures["budget"]
    if budget is None:
        return {"kind": "none", "text": "No budget was given: exact forms alone"}
    within = spent(figures) <= budget
    text = f"{words.size(spent(figures))} of {words.size(budget)}: {SCOPES[figures['scope']]}"
    return {"kind": "good" if within else "bad", "text": f"{'Within' if within else 'Over'} the budget. {text}"}


def lead(figures: dict[str, Any]) -> list[str]:
    """The sentences under the headline: method and sample, accuracy with its interval."""
    found, training = figures["accuracy"], figures["training"]
    split = "validation" if found["split"] == "val" else found["split"]
    before, after = found["before"], found["after"]
    did = (
        f"The method \u201c{figures['method']}\u201d trained {figures['model']} for "
        f"{words.plural(training['epochs'], 'epoch')} with {optimizer_name(figures)}, in batches of at most "
        f"{figures['batch']}."
    )
    reached = (
        f"Accuracy on {after['n']:,} {split} samples: {words.percent(before['accuracy'])} "
        f"{words.interval(before['interval'])} before, {words.percent(after['accuracy'])} "
        f"{words.interval(after['interval'])} after fine-tuning; difference {words.points(found['difference'])} points "
        f"(95{words.NARROW}% intervals, paired)."
    )
    said = [did, reached]
    if found["split"] == "val":
        said.append("No test data was given, so these are validation data.")
    return said


def optimizer_name(figures: dict[str, Any]) -> str:
    """The optimizer as people call it."""
    return {"sgd": "plain SGD", "momentum": "SGD with momentum", "adam": "Adam"}[figures["training"]["optimizer"]]


def tiles(figures: dict[str, Any]) -> list[dict[str, str]]:
    """The four figures under the headline: label, result, before, change."""
    kept, peak, gradients, parameters = (figures[key] for key in ("bytes", "peak", "gradients", "parameters"))
    share = parameters["trained"] / max(parameters["numbers"], 1)
    return [
        _tile("Kept for backward", kept["vanilla"], kept["measured"]),
        _tile("Peak of a step", peak["vanilla"], peak["adapted"]),
        _tile("Gradients", gradients["vanilla"], gradients["adapted"]),
        {
            "label": "Numbers trained",
            "after": words.count(parameters["trained"]),
            "before": f"{words.percent(share, 1)} of {words.count(parameters['numbers'])}",
            "change": "",
        },
    ]


def _tile(label: str, before: int | None, after: int) -> dict[str, str]:
    was = "" if before is None else f"{words.size(before)} without the plan"
    if before and after and before >= 2 * after:
        change = f"{words.three(before / after)}{words.TIMES} less"
    else:
        change = "" if before == after else words.change(before, after)
    return {"label": label, "after": words.size(after), "before": was, "change": change}


def account(figures: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of the account: quantity, without the plan, with it, a note."""
    kept, peak, gradients = (figures[key] for key in ("bytes", "peak", "gradients"))
    copies, number = figures["training"]["copies"], "{:,} bytes".format
    rows = [
        ("Kept for backward, by formula", number(kept["vanilla"]), number(kept["predicted"]), ""),
        (
            "Kept for backward, measured",
            _bytes(kept.get("vanilla_measured")),
            number(kept["measured"]),
            "one step on the sample, before training",
        ),
    ]
    if "measured_at_end" in kept:
        end = ("\u2013", number(kept["measured_at_end"]), "one step on the sample, after the last epoch")
        rows.append(("Kept for backward, measured again", *end))
    rows += [
        ("Gradients", _bytes(gradients["vanilla"]), number(gradients["adapted"]), ""),
        (
            "Optimizer",
            _bytes(gradients["vanilla"], copies),
            number(copies * gradients["adapted"]),
            f"{optimizer_name(figures)}: {copies} for each number trained",
        ),
        ("Peak, weights left out", _bytes(peak["vanilla"]), number(peak["adapted"]), f"at {peak['adapted_where']}"),
        ("Remembered by codecs from step to step", "0 bytes", number(figures["remembered_bytes"]), ""),
    ]
    return rows


def _bytes(value: int | None, times: int = 1) -> str:
    return "\u2013" if value is None else f"{value * times:,} bytes"


def assumptions(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What the plan holds for."""
    shapes = " and ".join("\u00d7".join(map(str, shape)) for shape in figures["inputs"])
    options = ", ".join(f"{k} {v}" for k, v in (figures["options"] or {}).items() if v not in (None, False))
    training = figures["training"]
    return [
        ("largest batch", f"{shapes}, {figures['dtype']}; a larger one is refused"),
        ("method", figures["method"] + (f" ({options})" if options else "")),
        ("scope of the budget", SCOPES[figures["scope"]]),
        ("batch norms", "use running statistics" if figures["freeze_bn"] else "use statistics of the batch"),
        ("optimizer", f"{optimizer_name(figures)}, rate {training['lr']:g}, {training['schedule']}"),
        ("clipping", "none" if training["clip"] is None else f"gradient norm at most {training['clip']:g}"),
    ]


KEPT = (
    "Kept for backward: every storage that autograd holds at one time in a step, each once, measured under hooks of "
    "torch. Parameters and buffers are not in it. Without the plan: the same network and batch, its batch norms in the "
    "same mode, under torch alone."
)
PEAK = (
    "Peak: the most bytes of tensors that were alive at once in one step, inputs and gradients included, weights and "
    "the optimizer\u2019s numbers not. Scratch space inside a kernel is not seen."
)
ERRORS = (
    "Gradient errors are those on the sample when the plan was made, relative to the exact weight gradient of that "
    "layer. They are not bounds on later batches."
)
FACTORS = (
    "Weights in factors lose what their rank cannot hold already before training; the accuracy before is that of the "
    "network with whole weights."
)


def notes(figures: dict[str, Any]) -> list[str]:
    """What the bytes count, and what they do not."""
    said = [KEPT, PEAK]
    if any(row["error"] is not None for row in figures["layers"]):
        said.append(ERRORS)
    if figures["remembered_bytes"]:
        kept = words.size(figures["remembered_bytes"])
        said.append(
            f"Codecs remember {kept} from one step to the next (bases, random states). Autograd does not hold them, so "
            "they are in no scope of the budget."
        )
    if figures["holders"]["before"] is None:
        said.append("The network without the plan could not be run without data: its peak and holders are unknown.")
    if len({entry["kept_bytes"] for entry in figures["history"]}) > 1:
        said.append("The method chose anew after each epoch; each choice is within the budget by formula.")
    if any(row["trained"] == "in factors" for row in figures["layers"]):
        said.append(FACTORS)
    return said
