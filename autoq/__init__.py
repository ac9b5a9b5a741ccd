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
    from autoq.fusing import FuseReport, fuse, unfuse
    from autoq.generating import generate
    from autoq.losses import perplexity
    from autoq.pipeline import record, tune
    from autoq.plan import Plan
    from autoq.quantizing import Measured, autoquant, measure
    from autoq.remeasuring import remeasure
    from autoq.results import TuneResult
    from autoq.scheme import Scheme
    from autoq.sharing import SharedEmbedding, share_embedding
    from autoq.workload import Phase, Workload

__version__ = "0.1.0"

_HOMES = {
    "ApplyReport": "applying",
    "AutoqError": "errors",
    "Explanation": "explaining",
    "FuseReport": "fusing",
    "Measured": "quantizing",
    "Phase": "workload",
    "Plan": "plan",
    "Scheme": "scheme",
    "SharedEmbedding": "sharing",
    "TuneResult": "results",
    "Workload": "workload",
    "apply": "applying",
    "autoquant": "quantizing",
    "explain": "explaining",
    "fuse": "fusing",
    "generate": "generating",
    "load_quantized": "checkpoint",
    "measure": "quantizing",
    "perplexity": "losses",
    "plan_of": "applying",
    "record": "pipeline",
    "remeasure": "remeasuring",
    "restore": "applying",
    "save_quantized": "checkpoint",
    "share_embedding": "sharing",
    "split_experts": "experts",
    "tune": "pipeline",
    "unfuse": "fusing",
}

__all__ = [
    "ApplyReport",
    "AutoqError",
    "Explanation",
    "FuseReport",
    "Measured",
    "Phase",
    "Plan",
    "Scheme",
    "SharedEmbedding",
    "TuneResult",
    "Workload",
    "apply",
    "autoquant",
    "candidates",
    "explain",
    "fuse",
    "generate",
    "hf",
    "load_quantized",
    "measure",
    "perplexity",
    "plan_of",
    "record",
    "remeasure",
    "restore",
    "save_quantized",
    "share_embedding",
    "split_experts",
    "tune",
    "unfuse",
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
