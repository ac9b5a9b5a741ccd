"""What counts as a linear layer: ``nn.Linear``, and transformers' ``Conv1D`` (GPT-2), whose weight lies transposed.

Shapes: N outputs, K inputs.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["bias_of", "has_own_forward", "is_linear", "size_of", "weight_of"]


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer that is not empty; a subclass with a forward of its own is one too."""
    if isinstance(module, nn.Linear):
        return module.in_features > 0 and module.out_features > 0
    return _conv1d(module) is not None


def size_of(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return int(module.__dict__["nf"]), int(module.__dict__["nx"])


def weight_of(module: nn.Module) -> Tensor:
    """The weight [N, K] of a linear layer: the parameter, or the transposed view of a ``Conv1D``'s [K, N]."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # for the type checker: linear layers have one
    return weight if isinstance(module, nn.Linear) else weight.t()


def bias_of(module: nn.Module) -> nn.Parameter | None:
    """The bias [N] of a linear layer, or None."""
    return module._parameters.get("bias")


def has_own_forward(module: nn.Module) -> bool:
    """Whether the class of a linear layer computes something else than the class it inherits from."""
    base = nn.Linear if isinstance(module, nn.Linear) else _conv1d(module)
    return base is None or type(module).forward is not base.forward


def _conv1d(module: nn.Module) -> type[nn.Module] | None:
    """The module's class in transformers, by name: importing transformers takes seconds."""
    kinds = type(module).__mro__
    return next(
        (one for one in kinds if f"{one.__module__}.{one.__name__}" == "transformers.pytorch_utils.Conv1D"), None
    )
