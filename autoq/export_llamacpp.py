"""A plan as ``--tensor-type`` arguments of llama.cpp's ``llama-quantize``, with the tensors' names in GGUF files."""

from __future__ import annotations

import re
from collections.abc import Mapping

from autoq.errors import InputError, PlanError
from autoq.export_rules import check_width, refused
from autoq.plan import Plan
from autoq.plan_text import layer_path
from autoq.scheme import Scheme

_BLOCK = 32  # values under one scale in Q8_0 and Q4_1
_SCHEMES = "none, int8 (as q8_0) and 4-bit HQQ (as q4_1)"
_FLOATS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

_ATTENTION = {f"self_attn.{role}_proj": f"attn_{role}" for role in "qkv"} | {"self_attn.o_proj": "attn_output"}
_GATED = {f"mlp.{role}_proj": f"ffn_{role}" for role in ("gate", "up", "down")}
_EXPERTS = {f"mlp.experts.*.{role}_proj": f"ffn_{role}_exps" for role in ("gate", "up", "down")}
_SHARED = {f"mlp.shared_expert.{role}_proj": f"ffn_{role}_shexp" for role in ("gate", "up", "down")}
_ROUTED = {"mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp"}
_MIXTRAL = _EXPERTS | {"mlp.gate": "ffn_gate_inp"}  # its names in transformers 5; these before
_MIXTRAL |= {f"block_sparse_moe.experts.*.w{n}": f"ffn_{role}_exps" for n, role in enumerate(("gate", "down", "up"), 1)}
# What split_experts makes: two tensors of a GGUF file in one layer.
_SPLIT, _SPLIT_INTO = "mlp.experts.*.gate_up_proj", ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
_ROUTERS = tuple(_ROUTED.values())
_LLAMA = ("model.layers", _ATTENTION | _GATED)
_MOE = ("model.layers", _ATTENTION | _EXPERTS | _SHARED | _ROUTED)
_ROLES_OF_GPT2 = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_ROLES_OF_NEOX = {
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_ROLES_OF_BERT = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
}
_Roles = tuple[str, Mapping[str, str]]
# transformers' model_type → (what numbers the blocks, role in a block → GGUF's name of it)
_MODELS: Mapping[str, _Roles] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3"), _LLAMA
    ),
    "phi3": (
        "model.layers",
        {
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
    ),
    "phi": (
        "model.layers",
        _ATTENTION | {"self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
    ),
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
    "mixtral": ("model.layers", _ATTENTION | _MIXTRAL | {"block_sparse_moe.gate": "ffn_gate_inp"}),
    "gpt2": ("transformer.h", _ROLES_OF_GPT2),
    "gpt_neox": ("gpt_neox.layers", _ROLES_OF_NEOX),
    "bert": ("bert.encoder.layer", _ROLES_OF_BERT),
}
_HEADS = ("lm_head", "embed_out")


def llamacpp(plan: Plan, model_type: str | None) -> tuple[str, list[str]]:
    """The text, an argument a line, and its notes.

    Args:
        plan: what to export.
        model_type: transformers' name of the architecture; None tries those that are known here.

    Raises:
        InputError: if the model type is not known here.
        PlanError: if a scheme is none of GGUF's, a width does not fit, a layer has no name there, or layers that lie in
            one GGUF tensor differ.
    """
    models = _models(model_type)
    tensors: dict[str, tuple[str, str]] = {}  # GGUF tensor → (its type, the layer that said so)
    for layer, scheme in plan.layers.items():
        kind = _type(plan, layer, scheme)
        for name in _tensors(layer, models):
            known, first = tensors.setdefault(name, (kind, layer))
            if known != kind:
                raise PlanError(
                    f"{layer_path(layer)}: layers that are one tensor in a GGUF file have one type",
                    got=f"{kind}, and {known} for {first}",
                    fix="Tune with ties='siblings', or change them with plan.replace().",
                )
    types = {name: kind for name, (kind, _) in tensors.items()}
    lines = [f"--tensor-type ^{pattern}[.]weight$={kind}" for pattern, kind in _patterns(types)]
    routers = any(name.endswith(_ROUTERS) and kind not in _FLOATS.values() for name, kind in types.items())
    return "\n".join(lines) + "\n", _notes(plan, routers=routers)


def _models(model_type: str | None) -> list[_Roles]:
    if model_type is None:
        return list(_MODELS.values())
    if model_type not in _MODELS:
        raise InputError(
            "the model type is one whose GGUF names are known", got=repr(model_type), fix=f"It is {', '.join(_MODELS)}."
        )
    return [_MODELS[model_type]]


def _tensors(layer: str, models: list[_Roles]) -> list[str]:
    """A layer's tensor in GGUF files, without ``.weight``; two of an expert's whose gate and up are one layer."""
    if layer in _HEADS:
        return ["output"]
    for blocks, roles in models:
        first, _, rest = blocks.partition(".")  # a base model's names lack the first word
        found = re.fullmatch(rf"(?:{first}\.)?{re.escape(rest)}\.(\d+)\.(.+)", layer)
        role = "" if found is None else re.sub(r"(?<=\.)\d+(?=\.)", "*", found[2])
        parts = _SPLIT_INTO if role == _SPLIT else (role,)
        if found is not None and all(part in roles for part in parts):
            return [f"blk.{int(found[1])}.{roles[part]}" for part in parts]
    raise PlanError(
        f"{layer_path(layer)}: the layer has a known name in GGUF files",
        got="a layer of none of these roles",
        fix=f"Known are the layers of {', '.join(_MODELS)}. Take it out of the plan, or write its argument by hand.",
    )


def _type(plan: Plan, layer: str, scheme: Scheme) -> str:
    fields = dict(scheme.fields)
    if scheme.name == "none":
        known = plan.provenance.get("model", {}).get("layers", {}).get(layer, {})
        return _FLOATS.get(str(known.get("dtype", "bfloat16")).removeprefix("torch."), "bf16")
    if scheme.name in ("int8wo", "int8dq", "int8mix"):
        kind = "q8_0"
    elif scheme.name == "int4wo-hqq" or (scheme.name in ("int4dq", "int4mix") and fields.get("method") != "sinq"):
        kind = "q4_1"
    elif scheme.name == "fp6":
        refused("llama.cpp", layer, scheme, "has no 6-bit floats (its q6_K is of integers)", _SCHEMES)
    elif "sinq" in (scheme.name, fields.get("method")):
        refused("llama.cpp", layer, scheme, "has no type with SINQ's column factors", _SCHEMES)
    else:
        refused("llama.cpp", layer, scheme, "does not know the scheme", _SCHEMES)
    check_width(plan, "llama.cpp", layer, _BLOCK)
    return kind


def _patterns(types: Mapping[str, str]) -> list[tuple[str, str]]:
    """(pattern, type) of all tensors: one pattern for the blocks in which a role has a type."""
    blocks: dict[tuple[str, str], list[str]] = {}
    for name, kind in types.items():
        found = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        if found is None:
            blocks[name, kind] = []
        else:
            blocks.setdefault((found[2], kind), []).append(found[1])
    return [
        (f"blk[.]({'|'.join(numbers)})[.]{role}" if numbers else role, kind) for (role, kind), numbers in blocks.items()
    ]


def _notes(plan: Plan, *, routers: bool) -> list[str]:
    names = {scheme.name for scheme in plan.layers.values()}
    notes = ["llama.cpp rounds the weights itself, and most of its kernels round activations to int8: measure again."]
    if names & {"int8wo", "int8dq", "int8mix"}:
        notes.append("int8 with a scale per row becomes q8_0, int8 with a scale per 32 values.")
    if names & {"int4wo-hqq", "int4dq", "int4mix"}:
        notes.append("4-bit HQQ becomes q4_1: 4 bits with a scale and a minimum per 32 values, rounded to nearest.")
    if any(head in plan.layers for head in _HEADS):
        notes.append("A file with tied embeddings has no tensor output: give --token-embedding-type instead.")
    if routers:
        notes.append("llama-quantize leaves routers (ffn_gate_inp) as they are, whatever the arguments say.")
    notes.append(
        "Tensors that are not named get the type at the end of llama-quantize's command line. It has to be q8_0: with "
        "a float type there all arguments are ignored, with another quantized one some are."
    )
    return notes
