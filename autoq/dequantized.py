"""The weight of a quantized layer under an adapter: to be read, never written.

Only the packed weight counts, and what is written to a dequantized copy is lost. PEFT's ``merge_and_unload`` adds the
adapter to the base layer's weight in place and then throws it away: without a refusal nobody would notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autoq.errors import ModelError

# In-place by their names, but what they write is no value of the weight.
_HARMLESS = frozenset({"requires_grad_", "share_memory_", "detach_", "rename_"})
_OPERATORS = frozenset(
    f"__{name}__"
    for name in (
        *("setitem", "iadd", "isub", "imul", "itruediv", "idiv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)


def guarded(weight: Tensor) -> Tensor:
    """The same values, as a tensor that refuses to be written to; as they are where a graph is traced.

    Args:
        weight: dequantized, and nobody else's.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or type(weight) is not Tensor:
        return weight
    return weight.as_subclass(DequantizedWeight)


class DequantizedWeight(Tensor):
    """A dequantized weight. What is computed from it are ordinary tensors; writing to it is refused."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do what was asked for, unless it writes to the weight.

        Raises:
            ModelError: if it would.
        """
        given = dict(kwargs or {})
        if _written(func, args, given):
            raise ModelError(
                "an adapter is merged before its layer is quantized: the packed weight cannot be added to",
                got=f"{_name(func)} on a dequantized copy of it",
                fix="Merge adapters (merge_and_unload) into the float model, and quantize that; autoq.restore(model) "
                "brings it back where the plan was applied with keep_float=True.",
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **given)
        if func == _DATA.__get__:  # the same memory
            found = found.as_subclass(cls)
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as an ordinary tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copied as an ordinary tensor."""
        memo[id(self)] = copy = self.detach().clone()
        return copy


_DATA: Any = Tensor.data


def _name(func: Callable[..., Any]) -> str:
    return "an assignment to .data" if func == _DATA.__set__ else str(getattr(func, "__name__", func))


def _written(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function writes to the weight: in place, as its ``out``, or as its ``data``."""
    if isinstance(kwargs.get("out"), DequantizedWeight) or func == _DATA.__set__:
        return True
    name = str(getattr(func, "__name__", ""))
    in_place = name in _OPERATORS or (name.endswith("_") and not name.endswith("__"))
    first = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
    return in_place and name not in _HARMLESS and isinstance(first, DequantizedWeight)
