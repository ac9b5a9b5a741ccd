"""A plan as torchao's ``FqnToConfig``, in the JSON of ``torchao.core.config.config_to_dict``."""

from __future__ import annotations

import json
import re
from typing import Any

from autoq.errors import PlanError
from autoq.export_rules import check_fused, check_names, fused, group_size_of, refused
from autoq.plan import Plan
from autoq.plan_text import layer_path
from autoq.scheme import Scheme

_SCHEMES = "none, int8wo, int8dq and int4wo-hqq"
_REASONS = {
    "sinq": "has no scheme with SINQ's column factors",
    "fp6": "has no 6-bit floats any more",
    "int4dq": "has no HQQ or SINQ codes under int8 activations",
    "int8mix": "has one scheme for all row counts",
    "int4mix": "has one scheme for all row counts",
}
# Names of GPT-2's linear layers, which are transformers' Conv1D; models of GPT-BigCode give them to nn.Linear.
_CONV1D = re.compile(r"(?:.*\.)?h\.\d+\.(?:attn|crossattention|mlp)\.(?:c_attn|q_attn|c_proj|c_fc)")
_LINEAR = "GPTBigCode"


def torchao(plan: Plan) -> tuple[str, list[str]]:
    """The text and its notes.

    Layers that vLLM runs as one stand there under its name for them too: it looks no other name up. (Experts do not:
    the module that holds them is one that torchao finds.)

    Args:
        plan: what to export. Layers that it does not name are not in the text, and stay as they are.

    Raises:
        PlanError: if a scheme is none of torchao's, a width does not fit, fused layers differ, or a layer is one that
            torchao cannot run.
    """
    check_names(plan, "torchao")
    check_fused(plan, "torchao")
    configs = {layer: _config(plan, layer, scheme) for layer, scheme in plan.layers.items()}
    configs |= {group.name: configs[group.layers[0]] for group in fused(plan) if not group.experts}
    value = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": configs}}
    names = {scheme.name for scheme in plan.layers.values()}
    notes = ["Losses are those of autoq's packing; torchao packs the float weights again."]
    if configs.get("lm_head") is not None:
        notes.append("transformers leaves lm_head out, unless TorchAoConfig has include_input_output_embeddings=True.")
    if "int4wo-hqq" in names:
        notes.append("int4wo-hqq becomes torchao's HQQ in the layout of its tinygemm kernels, which needs a CUDA GPU.")
    return json.dumps(value, indent=1) + "\n", notes


def _config(plan: Plan, layer: str, scheme: Scheme) -> dict[str, Any] | None:
    if scheme.name == "none":
        return None
    if _CONV1D.fullmatch(layer) and not str(plan.provenance.get("model", {}).get("class", "")).startswith(_LINEAR):
        raise PlanError(
            f"{layer_path(layer)}: torchao quantizes nn.Linear",
            got="a Conv1D of transformers, whose product its tensors lack (aten.addmm)",
            fix="Give the layer the scheme none, or export to another program.",
        )
    per_row = {"granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}}
    if scheme.name == "int8wo":
        return {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": per_row}
    if scheme.name == "int8dq":
        return {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": per_row}
    if scheme.name != "int4wo-hqq":
        refused("torchao", layer, scheme, _REASONS.get(scheme.name, "does not know the scheme"), _SCHEMES)
    group_size = group_size_of(plan, "torchao", layer, scheme)
    choices = {
        "group_size": group_size,
        "int4_packing_format": {"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"},
        "int4_choose_qparams_algorithm": {"_type": "Int4ChooseQParamsAlgorithm", "_data": "HQQ"},
    }
    return {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": choices}
