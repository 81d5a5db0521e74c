"""Supernets: one space of networks, and for each device the best of them that fits."""

from palmette.supernet.resolution import resized
from palmette.supernet.staged import COMPOFA, MOOFA, MOOFA_V1, MOOFA_V2, OFA, Configs, StagedSpace
from palmette.supernet.widths import moofa_widths

__all__ = ["COMPOFA", "MOOFA", "MOOFA_V1", "MOOFA_V2", "OFA", "Configs", "StagedSpace", "moofa_widths", "resized"]
