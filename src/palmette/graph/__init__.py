"""Capture, sites, plans, merging, proof and storage: networks as editable graphs."""

from palmette.graph.affine import Affine
from palmette.graph.candidates import Candidate, candidates
from palmette.graph.capture import capture, describe, is_captured, make_inputs
from palmette.graph.collapse import CollapseRecord, MergeRecord, collapse
from palmette.graph.io import load, read_plan, save, structure_hash, weights_hash
from palmette.graph.observe import Moments, observe
from palmette.graph.plan import Edit, Plan, drop, linearize
from palmette.graph.sites import Site, find_sites
from palmette.graph.verify import Verification, verify

__all__ = [
    "Affine",
    "Candidate",
    "CollapseRecord",
    "Edit",
    "MergeRecord",
    "Moments",
    "Plan",
    "Site",
    "Verification",
    "candidates",
    "capture",
    "collapse",
    "describe",
    "drop",
    "find_sites",
    "is_captured",
    "linearize",
    "load",
    "make_inputs",
    "observe",
    "read_plan",
    "save",
    "structure_hash",
    "verify",
    "weights_hash",
]
