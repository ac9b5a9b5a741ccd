"""End-to-end times of a causal language model in several engines, each in a process of its own, measured in turn."""

from autoq.model_bench.engine import Engine, Missing, chosen, own_engines
from autoq.model_bench.rows import Report
from autoq.model_bench.running import Job, run

__all__ = ["Engine", "Job", "Missing", "Report", "chosen", "own_engines", "run"]
