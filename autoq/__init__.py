"""autoq: the fastest quantization scheme for every linear layer, within the accuracy you allow, by measurement.

    import autoq
    model = autoq.autoquant(torch.compile(model))

Names are loaded when first used, so that ``import autoq`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoq import candidates, hf
    from autoq.applying import ApplyReport, apply, plan_of, restore
    from autoq.checkpoint import load_quantized, save_quantized
    from autoq.errors import AutoqError
    from autoq.experts import split_experts
    from autoq.explaining import Explanation, explain
    from autoq.losses import perplexity
    from autoq.pipeline import record, tune
    from autoq.plan import Plan
    from autoq.quantizing import Measured, autoquant, measure
    from autoq.remeasuring import remeasure
    from autoq.results import TuneResult
    from autoq.scheme import Scheme
    from autoq.workload import Phase, Workload

__version__ = "0.1.0"

_HOMES = {
    "ApplyReport": "applying",
    "AutoqError": "errors",
    "Explanation": "explaining",
    "Measured": "quantizing",
    "Phase": "workload",
    "Plan": "plan",
    "Scheme": "scheme",
    "TuneResult": "results",
    "Workload": "workload",
    "apply": "applying",
    "autoquant": "quantizing",
    "explain": "explaining",
    "load_quantized": "checkpoint",
    "measure": "quantizing",
    "perplexity": "losses",
    "plan_of": "applying",
    "record": "pipeline",
    "remeasure": "remeasuring",
    "restore": "applying",
    "save_quantized": "checkpoint",
    "split_experts": "experts",
    "tune": "pipeline",
}

__all__ = [
    "ApplyReport",
    "AutoqError",
    "Explanation",
    "Measured",
    "Phase",
    "Plan",
    "Scheme",
    "TuneResult",
    "Workload",
    "apply",
    "autoquant",
    "candidates",
    "explain",
    "hf",
    "load_quantized",
    "measure",
    "perplexity",
    "plan_of",
    "record",
    "remeasure",
    "restore",
    "save_quantized",
    "split_experts",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in ("candidates", "hf"):
        return import_module(f"autoq.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'autoq' has no attribute {name!r}")
    return getattr(import_module(f"autoq.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
