"""What a network really costs: parameters, multiply-adds, depth, peak memory, latency."""

from palmette.meter.compute import depth, graph_macs, macs, node_macs, param_bytes, params
from palmette.meter.cost import Cost, measure
from palmette.meter.latency import Latency, hardware, measure_latency
from palmette.meter.memory import live_bytes, peak_bytes
from palmette.meter.running import Packed
from palmette.meter.runtime_executorch import PteModel
from palmette.meter.runtime_onnx import OnnxModel
from palmette.meter.runtimes import RUNTIMES
from palmette.meter.table import CostTable

__all__ = [
    "RUNTIMES",
    "Cost",
    "CostTable",
    "Latency",
    "OnnxModel",
    "Packed",
    "PteModel",
    "depth",
    "graph_macs",
    "hardware",
    "live_bytes",
    "macs",
    "measure",
    "measure_latency",
    "node_macs",
    "param_bytes",
    "params",
    "peak_bytes",
]
