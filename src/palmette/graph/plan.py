"""Plans: what is to be changed, as plain JSON that applies to a fresh copy of the network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from palmette.errors import DataError, PlanError
from palmette.graph.activations import find_activations
from palmette.graph.capture import capture, example_of, set_shapes
from palmette.graph.edit import apply_edits, repad
from palmette.graph.inputs import inputs_of
from palmette.graph.observe import Moments, observe
from palmette.graph.sites import POLICIES, Site, site_axis

FITS = ("affine", "mask", "identity")
"""How an activation is made linear: least-squares line per channel, on/off mask per channel, or the identity."""

FORMAT = 1


@dataclass(frozen=True)
class Edit:
    """One change of one site.

    kind: "linearize" or "drop"; `slope` and `offset` per channel are filled in by `Plan.fit`.
    `force` makes a linearisation that has nothing to merge legal (as the papers count them).
    """

    kind: str
    site: str
    fit: str = ""
    slope: tuple[float, ...] | None = None
    offset: tuple[float, ...] | None = None
    force: bool = False

    @property
    def fitted(self) -> bool:
        """Whether the edit can be applied."""
        return self.kind != "linearize" or self.fit == "identity" or self.slope is not None


def linearize(site: Site | str, fit: str = "affine", *, force: bool = False) -> Edit:
    """Make the activation at `site` linear. Raises PlanError for an unknown fit or a site of another kind."""
    if fit not in FITS:
        raise PlanError(f"Unknown fit '{fit}'", fix=f"Use one of {', '.join(FITS)}.")
    if isinstance(site, Site) and site.kind != "activation":
        raise PlanError(f"'{site.path}' is a {site.kind}, which cannot be linearised", fix="Use pm.drop for blocks.")
    return Edit("linearize", site if isinstance(site, str) else site.path, fit, force=force)


def drop(site: Site | str) -> Edit:
    """Remove the residual block at `site`: its output becomes its input.

    Raises PlanError for a site of another kind.
    """
    if isinstance(site, Site) and site.kind == "activation":
        raise PlanError(
            f"'{site.path}' is an activation, which cannot be dropped", fix="Use pm.linearize for activations."
        )
    return Edit("drop", site if isinstance(site, str) else site.path)


@dataclass(frozen=True)
class Plan:
    """An ordered list of edits."""

    edits: tuple[Edit, ...] = field(default_factory=tuple)

    def __init__(self, edits: Iterable[Edit] = ()) -> None:
        object.__setattr__(self, "edits", tuple(edits))
        paths = [(e.kind, e.site) for e in self.edits]
        for path in paths:
            if paths.count(path) > 1:
                raise PlanError(f"'{path[1]}' is edited twice", fix="Name every site once.")

    def __add__(self, other: Plan | Edit) -> Plan:
        return Plan([*self.edits, *(other.edits if isinstance(other, Plan) else [other])])

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __str__(self) -> str:
        return "\n".join(f"{e.kind} {e.site}" + (f" ({e.fit})" if e.fit else "") for e in self.edits) or "empty plan"

    @property
    def fitted(self) -> bool:
        """Whether every edit can be applied."""
        return all(e.fitted for e in self.edits)

    def to_json(self) -> str:
        """The plan as JSON text."""
        edits = [{k: v for k, v in vars(e).items() if v not in (None, "", False)} for e in self.edits]
        return json.dumps({"palmette_plan": FORMAT, "edits": edits})

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan written by `to_json`. Raises PlanError for anything else."""
        try:
            data = json.loads(text)
            version, raw = data["palmette_plan"], data["edits"]
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(
                "This is no plan", why=f"{type(error).__name__}: {error}", fix="Pass what Plan.to_json wrote."
            ) from error
        if version != FORMAT:
            raise PlanError(f"Plan format {version} is not known", fix="Update palmette.")
        if not isinstance(raw, list):
            raise PlanError("This is no plan", why='"edits" is no list', fix="Pass what Plan.to_json wrote.")
        return Plan([_edit_from(e) for e in raw])

    def fit(
        self, model: nn.Module, loader: Iterable[Any], example_inputs: Any = None, *, max_batches: int | None = None
    ) -> Plan:
        """The plan with slopes and offsets from one calibration pass over `loader`; `model` stays untouched.

        Edits that are fitted already stay. `example_inputs` defaults to the loader's first batch.
        Raises PlanError for unknown sites, DataError for an empty loader.
        """
        missing = [e for e in self.edits if not e.fitted]
        if not missing:
            return self
        gm = capture(model, example_inputs if example_inputs is not None else _first_inputs(loader))
        axes = {a.path: site_axis(gm, a) for a in find_activations(gm)}
        for edit in missing:
            if edit.site not in axes:
                raise PlanError(
                    f"No activation is called '{edit.site}'",
                    fix="List the sites with `palmette sites` or pm.find_sites.",
                )
        moments = {e.site: Moments(axes[e.site]) for e in missing}
        observe(gm, moments, loader, max_batches=max_batches, sums=list(moments.values()))
        return Plan([e if e.fitted else _fitted(e, moments[e.site]) for e in self.edits])

    def apply(self, model: nn.Module, example_inputs: Any, pad: str = "repad") -> fx.GraphModule:
        """An edited, trainable copy of `model`.

        `pad` says what happens to zero padding between operations that are to be merged: "repad" moves it to the first
        of them (which changes the function now, before healing), "exact" and "bias_map" keep the function.
        Raises PlanError if the plan is not fitted or names unknown sites, RefusedEdit with the reason for an edit that
        cannot be done.
        """
        if pad not in POLICIES:
            raise PlanError(f"Unknown padding policy '{pad}'", fix=f"Use one of {', '.join(POLICIES)}.")
        for edit in self.edits:
            if not edit.fitted:
                raise PlanError(
                    f"The edit of '{edit.site}' has no slopes yet", fix="Call plan.fit(model, loader) first."
                )
        gm = capture(model, example_inputs)
        apply_edits(gm, self.edits, pad)
        if pad == "repad":
            repad(gm)
        before = gm.meta["palmette"].get("plan")
        plan = (Plan.from_json(before) if before else Plan()) + self
        steps = [*gm.meta["palmette"].get("steps", []), {"plan": self.to_json(), "pad": pad}]
        gm.meta["palmette"] |= {"plan": plan.to_json(), "pad": pad, "steps": steps}
        gm.recompile()
        set_shapes(gm, example_of(gm))
        return gm


def _fitted(edit: Edit, moments: Moments) -> Edit:
    slope, offset = moments.affine() if edit.fit == "affine" else moments.mask()
    return replace(edit, slope=tuple(slope.tolist()), offset=tuple(offset.tolist()))


def _edit_from(raw: Any) -> Edit:
    if (
        not isinstance(raw, dict)
        or raw.get("kind") not in ("linearize", "drop")
        or not isinstance(raw.get("site"), str)
    ):
        raise PlanError(
            f"An edit is malformed: {str(raw)[:80]}", fix='An edit has "kind" (linearize or drop) and "site".'
        )
    unknown = set(raw) - {"kind", "site", "fit", "slope", "offset", "force"}
    if unknown:
        raise PlanError(
            f"An edit of '{raw['site']}' has unknown fields: {', '.join(sorted(unknown))}", fix="Update palmette."
        )
    values: dict[str, Any] = dict(raw)
    for key in ("slope", "offset"):
        if key in values:
            values[key] = _numbers(values[key], key, raw["site"])
    if ("slope" in values) != ("offset" in values) or len(values.get("slope", ())) != len(values.get("offset", ())):
        raise PlanError(f"The slopes and offsets of '{raw['site']}' do not pair up", fix="Fit the plan again.")
    if not isinstance(values.get("force", False), bool):
        raise PlanError(f"The edit of '{raw['site']}' is malformed: force is no boolean", fix="Write true or false.")
    if raw["kind"] == "linearize" and raw.get("fit") not in FITS:
        raise PlanError(f"Unknown fit '{raw.get('fit')}' of '{raw['site']}'", fix=f"Use one of {', '.join(FITS)}.")
    return Edit(**values)


def _numbers(raw: Any, key: str, site: str) -> tuple[float, ...]:
    if not isinstance(raw, list) or not all(isinstance(v, int | float) for v in raw):
        raise PlanError(f"The {key} of '{site}' is no list of numbers", fix="Fit the plan again.")
    values = tuple(float(v) for v in raw)
    if not all(math.isfinite(v) for v in values):
        raise PlanError(f"The {key} of '{site}' is not finite", fix="Fit the plan again.")
    return values


def _first_inputs(loader: Iterable[Any]) -> Any:
    for batch in loader:
        return inputs_of(batch)
    raise DataError("The calibration loader is empty", fix="Give it at least one batch.")
