"""The one error family: what was wrong, where, why, and what to do about it."""

from __future__ import annotations

from typing import Any


class PalmetteError(Exception):
    """An error that a user can act on.

    Parts are joined into one message: `what` (the fault), `where` (module, file or option), `why`, and `fix` (what to
    do). `told`: it came from another process of the run, or went to all of them.
    """

    told = False

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        message = what if where is None else f"{what} (at {where})"
        if why is not None:
            message += f": {why}"
        if fix is not None:
            message += f". {fix}" if not message.endswith(".") else f" {fix}"
        super().__init__(message)

    def to_dict(self) -> dict[str, Any]:
        """The error as JSON, for another process."""
        return {"type": type(self).__name__, **{part: getattr(self, part) for part in ("what", "where", "why", "fix")}}


class InputError(PalmetteError):
    """A model, weights file, option or batch given by the user cannot be used."""


class DataError(PalmetteError):
    """A data source is missing, empty, malformed, or cannot be seeded."""


class CaptureError(PalmetteError):
    """A model could not be traced into an editable graph."""


class RefusedEdit(PalmetteError):
    """An edit of a plan cannot be done on this network."""


class PlanError(PalmetteError):
    """A plan is malformed, incomplete, or does not fit the model."""


class VerifyError(PalmetteError):
    """A network does not compute what was promised."""


class BudgetError(PalmetteError):
    """A budget cannot be met; the message says the smallest one that can, and what binds."""


class TrainingError(PalmetteError):
    """Training broke down, for instance by a loss that is not finite."""


class RunError(PalmetteError):
    """A run folder cannot be written, read or resumed."""


class ExportError(PalmetteError):
    """A network could not be written for a runtime, or the runtime disagrees with it."""


class MissingDependency(PalmetteError):
    """An optional package is needed; the message says how to install it."""


class UnknownMethod(PalmetteError):
    """No method of that name is registered."""


def error_from(parts: dict[str, Any]) -> PalmetteError:
    """The error that `to_dict` wrote; a PalmetteError for a type that is not known here."""
    known = {kind.__name__: kind for kind in PalmetteError.__subclasses__()}
    kind = known.get(str(parts.get("type")), PalmetteError)
    return kind(str(parts["what"]), where=parts.get("where"), why=parts.get("why"), fix=parts.get("fix"))
