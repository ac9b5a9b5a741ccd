"""Times: of single layers, of whole models, and the model that predicts the latter from the former."""

from autoq.profiler.checking import Remeasured, remeasure, usable
from autoq.profiler.end_to_end import EndToEnd, PhaseInputs
from autoq.profiler.isolated import Shape, measure_shape, read_bandwidth_gb_s
from autoq.profiler.latency import LatencyModel, fit_latency, isolated_times
from autoq.profiler.profiling import profile, shapes_of
from autoq.profiler.timing import Timing, interleaved

__all__ = [
    "EndToEnd",
    "LatencyModel",
    "PhaseInputs",
    "Remeasured",
    "Shape",
    "Timing",
    "fit_latency",
    "interleaved",
    "isolated_times",
    "measure_shape",
    "profile",
    "read_bandwidth_gb_s",
    "remeasure",
    "shapes_of",
    "usable",
]
