"""Experts as linear layers: transformers holds a block's experts as 3-D parameters, which no plan can quantize.

Shapes: E experts, N outputs, K inputs; T tokens, H hidden features, S experts per token.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.modules import replace_modules, unwrap

# What `transformers.integrations.use_experts_implementation` sets on every module of experts.
_MARKS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "_is_expert_parallel")


class Expert(nn.Module):
    """One expert: the layer into it (gate and up together, if it has a gate), an activation, the layer out of it.

    Args:
        into: its name and the layer.
        down: the layer out of it, called ``down_proj``.
        rule: the module of experts without its weights, whose activation or gate it is.
    """

    def __init__(self, into: tuple[str, nn.Linear], down: nn.Linear, rule: nn.Module) -> None:
        super().__init__()
        self.add_module(*into)
        self.down_proj = down
        self._rule: tuple[Any] = (rule,)  # in a tuple, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        """What the expert makes of tokens [T, H]."""
        into, down = self.children()
        (rule,) = self._rule
        activate = rule._apply_gate if rule.has_gate else rule.act_fn
        y: Tensor = down(activate(into(x)))
        return y


class SplitExperts(nn.ModuleList):
    """The experts of a block, each with linear layers of its own; called as transformers calls its own."""

    # Which experts run depends on the tokens, so that the loop cannot be in a graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' weighted sum [T, H].

        Args:
            hidden_states: [T, H].
            top_k_index: int64 [T, S], each token's experts.
            top_k_weights: [T, S], their weights.
        """
        result = torch.zeros_like(hidden_states)
        for number in sorted(set(top_k_index.flatten().tolist())):
            tokens, places = torch.where(top_k_index == number)
            part = self[number](hidden_states[tokens]) * top_k_weights[tokens, places, None]
            result.index_add_(0, tokens, part.to(result.dtype))
        return result


def split_experts(model: nn.Module) -> nn.Module:
    """Give every expert of a transformers model linear layers of its own, in place, so that plans can quantize them.

    The model computes the same as before, expert by expert as transformers' ``eager`` experts do; its tensors have
    other names (``experts.3.down_proj.weight`` instead of a part of ``experts.down_proj``). Split it before tuning,
    before applying a plan that was tuned so, and in the factory given to ``autoq.load_quantized``. One block's experts
    are held twice while they are copied.

    Args:
        model: plain, compiled or wrapped.

    Returns:
        The same model.

    Raises:
        ModelError: if the model has no such experts.
    """
    root = unwrap(model)
    changes = {module: _split(module) for module in root.modules() if _can_split(module)}
    if not changes:
        raise ModelError(
            "the model has a block's experts as 3-D parameters, in the form that transformers' experts share",
            where=type(root).__name__,
            got="none",
            fix="Experts that are nn.Linear layers are quantized as they are; experts of another form are left alone.",
        )
    replace_modules(root, changes)
    return model


def _can_split(module: nn.Module) -> bool:
    """Whether the module is one of transformers' experts and has nothing besides what ``_split`` takes along."""
    if not all(hasattr(module, mark) for mark in _MARKS):
        return False
    if module.has_post_expert_norm or module._is_expert_parallel:
        return False
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    names += [f"{name}_bias" for name in names] if module.has_bias else []
    weights = [module._parameters.get(name) for name in names]
    others = set(dict(module.named_parameters())) - set(names)
    dense = all(type(one) is nn.Parameter and one.is_floating_point() for one in weights)
    return dense and not others and not any(True for _ in module.buffers())


def _split(module: nn.Module) -> SplitExperts:
    """The module's experts one by one, with copies of their weights."""
    rule = copy.copy(module)
    rule.__dict__["_parameters"] = {}
    into = "gate_up_proj" if module.has_gate else "up_proj"
    experts = SplitExperts(
        Expert((into, _linear(module, into, number)), _linear(module, "down_proj", number), rule)
        for number in range(len(module.get_parameter(into)))
    )
    return experts.train(module.training)


def _linear(module: nn.Module, name: str, number: int) -> nn.Linear:
    """A copy of one expert's layer."""
    weights, biases = module.get_parameter(name), module._parameters.get(f"{name}_bias")
    weight = weights.detach()[number].t() if module.is_transposed else weights.detach()[number]
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=biases is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), weights.requires_grad)
    if biases is not None:
        layer.bias = nn.Parameter(biases.detach()[number].clone(), biases.requires_grad)
    return layer
