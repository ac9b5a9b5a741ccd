"""A plan as arguments of GPTQModel's ``QuantizeConfig``, with its ``dynamic`` map of regular expressions."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from autoq.errors import PlanError
from autoq.export_rules import check_fused, check_names, fused, group_size_of, refused
from autoq.plan import Plan
from autoq.scheme import Scheme

_SCHEMES = "none, int8wo and int4wo-hqq"
_REASONS = {
    "sinq": "has no scheme with SINQ's column factors",
    "fp6": "has integer codes only",
    "int8dq": "keeps activations in 16 bits",
    "int4dq": "keeps activations in 16 bits",
    "int8mix": "keeps activations in 16 bits",
    "int4mix": "keeps activations in 16 bits",
}


def gptqmodel(plan: Plan) -> tuple[str, list[str]]:
    """The text, ``{"bits": …, "group_size": …, "sym": …, "dynamic": {…}}``, and its notes.

    Args:
        plan: what to export. Layers that it does not name are excluded, as those with ``none`` are.

    Raises:
        PlanError: if a scheme is none of GPTQModel's, a width does not fit, fused layers differ, a layer is none of
            its models', or nothing would be quantized.
    """
    check_names(plan, "GPTQModel")
    check_fused(plan, "GPTQModel")
    wanted = {layer: _settings(plan, layer, scheme) for layer, scheme in plan.layers.items()}
    quantized = {layer: settings for layer, settings in wanted.items() if settings is not None}
    if not quantized:
        raise PlanError("GPTQModel quantizes at least one layer", got="a plan that quantizes none")
    # Servers look the layers that they run as one up under a name of their own.
    together = {group.name: quantized[group.layers[0]] for group in fused(plan) if group.layers[0] in quantized}
    # The first pattern that matches counts, and a pattern has to match only the start of a name.
    dynamic: dict[str, dict[str, Any]] = {f"+:^{re.escape(name)}$": one for name, one in (quantized | together).items()}
    dynamic["-:.*"] = {}
    usual = Counter(json.dumps(one, sort_keys=True) for one in quantized.values()).most_common(1)[0][0]
    value = {**json.loads(usual), "dynamic": dynamic}
    if "lm_head" in quantized:
        value["lm_head"] = True
    used = {scheme.name for scheme in plan.layers.values()}
    notes = ["GPTQModel chooses codes itself, with calibration data: the plan's losses do not carry over; measure."]
    if "lm_head" in quantized:
        notes.append("GPTQModel refuses an lm_head that is tied to the embedding: give it the scheme none there.")
    if "int4wo-hqq" in used:
        notes.append("int4wo-hqq becomes 4 bits with a minimum per group (sym=false), which Marlin kernels do not run.")
    return json.dumps(value, indent=1) + "\n", notes


def _settings(plan: Plan, layer: str, scheme: Scheme) -> dict[str, Any] | None:
    if scheme.name == "none":
        return None
    if scheme.name == "int8wo":
        return {"bits": 8, "group_size": -1, "sym": True}
    if scheme.name != "int4wo-hqq":
        refused("GPTQModel", layer, scheme, _REASONS.get(scheme.name, "does not know the scheme"), _SCHEMES)
    group_size = group_size_of(plan, "GPTQModel", layer, scheme)
    return {"bits": 4, "group_size": group_size, "sym": False}
