"""Plans: what is to be changed, as plain JSON that applies to a fresh copy of the network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from palmette.errors import DataError, PlanError, RefusedEdit
from palmette.graph.activations import find_activations
from palmette.graph.capture import capture, example_of, set_shapes
from palmette.graph.edit import apply_edits, repad
from palmette.graph.inputs import inputs_of
from palmette.graph.linear_fit import LinearFit, decode, encode, fit_reason, summable, watch_fits
from palmette.graph.observe import Moments, observe
from palmette.graph.padding import MaskTap
from palmette.graph.sites import POLICIES, Site, site_axis
from palmette.graph.spans import run_at

FITS = ("affine", "mask", "identity")
"""How an activation is made linear: least-squares line per channel, on/off mask per channel, or the identity."""

FIELDS = {
    "linearize": {"kind", "site", "fit", "slope", "offset", "force"},
    "drop": {"kind", "site"},
    "fit_linear": {"kind", "site", "shape", "matrix"},
    "parallelize": {"kind", "site"},
    "identity": {"kind", "site"},
}
"""The kinds of edits, and what each of them may hold."""

FORMAT = 1


@dataclass(frozen=True)
class Edit:
    """One change of one site.

    kind: one of `FIELDS`. `slope` and `offset` per channel of a linearisation are filled in by `Plan.fit`, and so is
    the `matrix` of a fit_linear: `shape` [D, D + 1] with the bias last, as base64 of float32 values.
    `force` makes a linearisation that has nothing to merge legal (as the papers count them).
    """

    kind: str
    site: str
    fit: str = ""
    slope: tuple[float, ...] | None = None
    offset: tuple[float, ...] | None = None
    force: bool = False
    shape: tuple[int, int] | None = None
    matrix: str = field(default="", repr=False)

    @property
    def fitted(self) -> bool:
        """Whether the edit can be applied."""
        if self.kind == "fit_linear":
            return bool(self.matrix)
        return self.kind != "linearize" or self.fit == "identity" or self.slope is not None

    def values(self) -> Tensor:
        """The matrix of a fitted fit_linear, [D, D + 1] in float32."""
        return decode(self.matrix, self.shape or (0, 0))


def linearize(site: Site | str, fit: str = "affine", *, force: bool = False) -> Edit:
    """Make the activation at `site` linear. Raises PlanError for an unknown fit or a site of another kind."""
    if fit not in FITS:
        raise PlanError(f"Unknown fit '{fit}'", fix=f"Use one of {', '.join(FITS)}.")
    return Edit("linearize", _path(site, ("activation",), "linearised"), fit, force=force)


def drop(site: Site | str) -> Edit:
    """Remove the residual block, or the blocks of the span, at `site`: the output becomes the input.

    Raises PlanError for a site of another kind.
    """
    return Edit("drop", _path(site, ("block", "span"), "dropped"))


def fit_linear(site: Site | str) -> Edit:
    """Put the best linear map of its input in place of the block or span at `site`; an outer activation stays behind.

    Source: TOAST (arXiv 2410.04941). Raises PlanError for a site of another kind.
    """
    return Edit("fit_linear", _path(site, ("block", "span"), "replaced by a linear map"))


def parallelize(site: Site | str) -> Edit:
    """Let all blocks of the span at `site` read the span's input; `collapse` then makes one wide block of them.

    Source: Make Deep Networks Shallow Again (2023). Raises PlanError for a site of another kind.
    """
    return Edit("parallelize", _path(site, ("span",), "parallelised"))


def identity(site: Site | str) -> Edit:
    """Take out the convolution or linear at `site`; a batch norm behind it stays.

    Source: LayerMerge (ICML 2024). Raises PlanError for a site of another kind.
    """
    return Edit("identity", _path(site, ("convolution",), "replaced by the identity"))


_HINTS = {
    "activation": "Use pm.linearize for activations.",
    "block": "Use pm.drop or pm.fit_linear for blocks.",
    "span": "Use pm.drop, pm.fit_linear or pm.parallelize for spans.",
    "convolution": "Use pm.identity for convolutions.",
}


def _path(site: Site | str, kinds: tuple[str, ...], done: str) -> str:
    if isinstance(site, str):
        return site
    if site.kind not in kinds:
        raise PlanError(f"'{site.path}' is a {site.kind}, which cannot be {done}", fix=_HINTS.get(site.kind))
    return site.path


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
        """The plan with slopes, offsets and matrices from one calibration pass over `loader`; `model` stays untouched.

        Edits that are fitted already stay. `example_inputs` defaults to the loader's first batch.
        Raises PlanError for unknown sites, DataError for an empty loader.
        """
        missing = [e for e in self.edits if not e.fitted]
        if not missing:
            return self
        gm = capture(model, example_inputs if example_inputs is not None else _first_inputs(loader))
        tap = MaskTap(loader)
        moments = _moments(gm, [e.site for e in missing if e.kind == "linearize"], tap)
        fits = watch_fits(gm, _fittable(gm, [e.site for e in missing if e.kind == "fit_linear"]), tap)
        sums = [*moments.values(), *summable(fits.values())]
        observe(gm, {**moments, **fits}, tap, max_batches=max_batches, sums=sums, at_sum=True)
        found = {("linearize", path): m for path, m in moments.items()}
        found |= {("fit_linear", path): f for path, f in fits.items()}  # type: ignore[misc]
        return Plan([e if e.fitted else _fitted(e, found[e.kind, e.site]) for e in self.edits])

    def without_matrices(self) -> Plan:
        """The plan as it is stored beside weights that hold the fitted matrices already."""
        return Plan([replace(e, matrix="") for e in self.edits])

    def with_blank_matrices(self) -> Plan:
        """The plan with zeros where matrices were left out: for a network whose weights are read from a file."""
        blank = {e.site: encode(torch.zeros(e.shape)) for e in self.edits if e.shape is not None and not e.matrix}
        return Plan([replace(e, matrix=blank[e.site]) if e.shape and not e.matrix else e for e in self.edits])

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
                lacking = "no matrix" if edit.kind == "fit_linear" else "no slopes"
                raise PlanError(
                    f"The edit of '{edit.site}' has {lacking} yet", fix="Call plan.fit(model, loader) first."
                )
        gm = capture(model, example_inputs)
        apply_edits(gm, self.edits, pad)
        if pad == "repad":
            repad(gm)
        before = gm.meta["palmette"].get("plan")
        own = self.without_matrices()
        plan = (Plan.from_json(before) if before else Plan()) + own
        steps = [*gm.meta["palmette"].get("steps", []), {"plan": own.to_json(), "pad": pad}]
        gm.meta["palmette"] |= {"plan": plan.to_json(), "pad": pad, "steps": steps}
        gm.recompile()
        set_shapes(gm, example_of(gm))
        return gm


def _moments(gm: fx.GraphModule, paths: Iterable[str], tap: MaskTap) -> dict[str, Moments]:
    axes = {a.path: site_axis(gm, a) for a in find_activations(gm)}
    for path in paths:
        if path not in axes:
            raise PlanError(
                f"No activation is called '{path}'", fix="List the sites with `palmette sites` or pm.find_sites."
            )
    return {path: Moments(axes[path], tap) for path in paths}


def _fittable(gm: fx.GraphModule, paths: list[str]) -> list[str]:
    for path in paths:
        reason = fit_reason(gm, run_at(gm, path))
        if reason:
            raise RefusedEdit(f"'{path}' cannot become a linear map", why=reason)
    return paths


def _fitted(edit: Edit, found: Moments | LinearFit) -> Edit:
    if isinstance(found, LinearFit):
        matrix = found.matrix()
        return replace(edit, shape=(matrix.shape[0], matrix.shape[1]), matrix=encode(matrix))
    slope, offset = found.affine() if edit.fit == "affine" else found.mask()
    return replace(edit, slope=tuple(slope.tolist()), offset=tuple(offset.tolist()))


def _edit_from(raw: Any) -> Edit:
    if not isinstance(raw, dict) or raw.get("kind") not in FIELDS or not isinstance(raw.get("site"), str):
        raise PlanError(
            f"An edit is malformed: {str(raw)[:80]}", fix=f'An edit has "kind" ({", ".join(FIELDS)}) and "site".'
        )
    unknown = set(raw) - FIELDS[raw["kind"]]
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
    if "shape" in values or "matrix" in values:
        values["shape"] = _matrix_shape(values)
    return Edit(**values)


def _matrix_shape(values: dict[str, Any]) -> tuple[int, int]:
    """The checked shape of an edit with a matrix, or of one whose matrix was left out."""
    shape: Any = values.get("shape")
    text, site = values.get("matrix", ""), values["site"]
    whole = isinstance(shape, list) and len(shape) == 2 and all(type(v) is int for v in shape)
    if not whole or shape[0] < 1 or shape[1] != shape[0] + 1:
        raise PlanError(f"The shape of the matrix of '{site}' is not [D, D + 1]: {shape}", fix="Fit the plan again.")
    if not isinstance(text, str):
        raise PlanError(f"The matrix of '{site}' is no text", fix="Fit the plan again.")
    try:
        if "matrix" in values:
            decode(text, (shape[0], shape[1]))
    except ValueError as error:
        raise PlanError(f"The matrix of '{site}' is damaged", why=str(error), fix="Fit the plan again.") from error
    return shape[0], shape[1]


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
