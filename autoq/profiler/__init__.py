"""Times: of single layers, of whole models, and the model that predicts the latter from the former."""

from autoq.profiler.end_to_end import EndToEnd, PhaseInputs
from autoq.profiler.isolated import Shape, profile, read_bandwidth_gb_s, shapes_of
from autoq.profiler.latency import LatencyModel, fit_latency, isolated_times
from autoq.profiler.timing import Timing, interleaved

__all__ = [
    "EndToEnd",
    "LatencyModel",
    "PhaseInputs",
    "Shape",
    "Timing",
    "fit_latency",
    "interleaved",
    "isolated_times",
    "profile",
    "read_bandwidth_gb_s",
    "shapes_of",
]
