"""Capture, sites, plans, merging, proof and storage: networks as editable graphs."""

from palmette.graph.affine import Affine
from palmette.graph.candidates import Candidate, candidates, edits_of
from palmette.graph.capture import capture, describe, is_captured, make_inputs
from palmette.graph.collapse import collapse
from palmette.graph.dead import DeadRecord, remove_dead_channels
from palmette.graph.io import load, read_plan, save, structure_hash, weights_hash
from palmette.graph.linear_fit import LinearFit, linear_residuals
from palmette.graph.observe import Moments, observe
from palmette.graph.parallel import cross_term, cross_terms
from palmette.graph.plan import Edit, Plan, drop, fit_linear, identity, linearize, parallelize
from palmette.graph.record import CollapseRecord, MergeRecord
from palmette.graph.resize import resize
from palmette.graph.sites import Site, find_sites
from palmette.graph.verify import Verification, verify

__all__ = [
    "Affine",
    "Candidate",
    "CollapseRecord",
    "DeadRecord",
    "Edit",
    "LinearFit",
    "MergeRecord",
    "Moments",
    "Plan",
    "Site",
    "Verification",
    "candidates",
    "capture",
    "collapse",
    "cross_term",
    "cross_terms",
    "describe",
    "drop",
    "edits_of",
    "find_sites",
    "fit_linear",
    "identity",
    "is_captured",
    "linear_residuals",
    "linearize",
    "load",
    "make_inputs",
    "observe",
    "parallelize",
    "read_plan",
    "remove_dead_channels",
    "resize",
    "save",
    "structure_hash",
    "verify",
    "weights_hash",
]
