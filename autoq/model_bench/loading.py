"""Makes an engine of PyTorch from a request's fields, and counts its bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from autoq.applying import apply
from autoq.candidates import parse
from autoq.candidates.base import load_kernels
from autoq.errors import InputError
from autoq.fusing import fuse
from autoq.loading import load_model
from autoq.model_bench.engine import OWN_ATTENTION
from autoq.model_bench.torch_engines import Decoding, Eager, NoCache, Static, TorchEngine
from autoq.modules import find_linears
from autoq.plan import Plan
from autoq.quant_linear import QuantLinear
from autoq.sharing import share_embedding

_GROUPS = (128, 64, 32)  # of torchao's 4-bit weights, the fewest bytes first
_KINDS: dict[str, type[TorchEngine]] = {"eager": Eager, "static": Static, "nocache": NoCache, "decoder": Decoding}


def engine_of(
    *,
    model: str,
    kind: str,
    attention: str,
    plan_file: str | None = None,
    scheme: str | None = None,
    torchao: str | None = None,
    bits: int = 8,
    **settings: Any,
) -> TorchEngine:
    """The engine that a request asks for.

    Args:
        model: the argument of ``autoq.loading.load_model``.
        kind: ``eager``, ``static``, ``nocache`` or ``decoder``.
        attention: as transformers calls it, or ``autoq``.
        plan_file: the plan that is applied.
        scheme: the scheme that every quantizable layer gets instead.
        torchao: folder with the package that quantizes instead.
        bits: of torchao's weights, 8 or 4.
        settings: of the engine's class.

    Raises:
        InputError: if there is no such engine.
        AutoqError: if the model or the plan is refused.
    """
    if kind not in _KINDS:
        raise InputError(f"an engine of PyTorch is one of {', '.join(_KINDS)}", got=kind)
    found, notes = load_model(model).model, []
    tied = _tied(found)
    if plan_file is not None:
        apply(found, Plan.load(plan_file))
    elif scheme is not None:
        layers = [site.name for site in find_linears(found) if site.reason is None]
        apply(found, Plan(layers=dict.fromkeys(layers, parse(scheme).scheme)))
    elif torchao is not None:
        notes.append(_by_torchao(found, torchao, bits))
    if kind == "decoder" and (plan_file or scheme):
        notes += _put_together(found, tied)
    if attention == OWN_ATTENTION:
        import autoq.attention  # noqa: F401  (registers it)

        load_kernels(torch.device("cpu"))
    set_attention: Any = getattr(found, "set_attn_implementation")  # noqa: B009  (transformers has no types)
    set_attention(attention)
    return _KINDS[kind](found, note="; ".join(notes) or None, **settings)


def _tied(model: Any) -> bool:
    """Whether the head and the input embedding have one weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _put_together(model: Any, tied: bool) -> list[str]:
    """Fuse siblings, and give a tied embedding and head one table; says what was done."""
    report = fuse(model)
    notes = [f"{sum(map(len, report.fused))} layers fused into {len(report.fused)}"]
    if tied and isinstance(model.get_output_embeddings(), QuantLinear):
        share_embedding(model)
        notes.append("the embedding reads the head's packed weight")
    return notes


def _by_torchao(model: nn.Module, folder: str, bits: int) -> str:
    """Quantize all linear layers as torchao does, with its recommended settings; says how."""
    if str(Path(folder).absolute()) not in sys.path:
        sys.path.append(str(Path(folder).absolute()))
    import torchao
    from torchao import quantization as api

    version = torchao.__version__
    if bits == 8:
        api.quantize_(model, api.Int8WeightOnlyConfig())
        return f"torchao {version}, Int8WeightOnlyConfig"
    narrowest = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    groups = [group for group in _GROUPS if not any(size % group for size in narrowest)]
    if not groups:
        raise InputError(f"torchao's 4-bit groups of {_GROUPS} divide every layer's inputs", got=sorted(set(narrowest)))
    from torchao.prototype.quantization.int4 import inference_workflow as int4

    choose = int4.Int4ChooseQParamsAlgorithm.HQQ
    api.quantize_(model, int4.PrototypeInt4WeightOnlyConfig(group_size=groups[0], int4_choose_qparams_algorithm=choose))
    return f"torchao {version}, 4-bit weights for CPUs by HQQ, groups of {groups[0]}"


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers; memory that several share counts once."""
    return sum(_storages(model).values())


def read_bytes(model: nn.Module) -> int:
    """What a decode step reads of the weights: all but an embedding table that nothing else reads."""
    get: Any = getattr(model, "get_input_embeddings")  # noqa: B009  (transformers has no types)
    table = get()
    return sum(_storages(model, without=table).values())


def _storages(model: nn.Module, without: nn.Module | None = None) -> dict[int, int]:
    """Address → bytes of the storages."""
    found: dict[int, int] = {}
    for module in model.modules():
        if module is without:
            continue
        for one in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            for part in _plain(one):
                found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return found


def _plain(tensor: Any) -> list[Tensor]:
    """The tensors that a wrapper (torchao's) consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    wrapper: Any = tensor
    names, _ = wrapper.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(tensor, name))]


def isa_of() -> str:
    """The instruction sets of autoq's kernels here; empty without a compiler."""
    from autoq_kernels.cpu import build

    return build.status().isa or ""
