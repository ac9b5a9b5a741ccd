"""Plans as settings of other programs: torchao, GPTQModel, llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass

from autoq.errors import InputError
from autoq.export_gptqmodel import gptqmodel
from autoq.export_llamacpp import llamacpp
from autoq.export_torchao import torchao
from autoq.plan import Plan

__all__ = ["TARGETS", "Export", "export"]

TARGETS = ("torchao", "gptqmodel", "llama.cpp")
_FILES = {"torchao": "torchao.json", "gptqmodel": "gptqmodel.json", "llama.cpp": "tensor-types.txt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A plan in another program's words.

    Attributes:
        text: what to give to the program: JSON, or an argument a line.
        notes: where its numbers differ from autoq's, and what it needs, in sentences.
        filename: a name for a file with the text.
    """

    text: str
    notes: tuple[str, ...]
    filename: str


def export(plan: Plan, to: str, *, model_type: str | None = None) -> Export:
    """Write a plan as another program's settings. The assignment goes over, the packed weights do not.

    A scheme is mapped only to one of the same numerics (codes of as many bits, under scales and minima of rows or
    groups); the notes say what is left of a difference.

    Args:
        plan: what to export.
        to: ``torchao``: its ``FqnToConfig`` as JSON, for ``torchao.core.config.config_from_dict``. ``gptqmodel``:
            arguments of ``QuantizeConfig`` as JSON, with the map ``dynamic``. ``llama.cpp``: ``--tensor-type``
            arguments of ``llama-quantize``.
        model_type: ``model_type`` of the model's ``config.json``, for the names in GGUF files; by default the one that
            fits the layers' names.

    Raises:
        InputError: if the program or the model type is unknown.
        PlanError: naming the layer, if the program lacks its scheme, or runs layers with different schemes as one.
    """
    if to == "torchao":
        text, notes = torchao(plan)
    elif to == "gptqmodel":
        text, notes = gptqmodel(plan)
    elif to == "llama.cpp":
        text, notes = llamacpp(plan, model_type)
    else:
        raise InputError("a plan is exported to a known program", got=repr(to), fix=f"Choose {', '.join(TARGETS)}.")
    return Export(text=text, notes=tuple(notes), filename=_FILES[to])
