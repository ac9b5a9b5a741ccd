"""Functions for ``torch.compile`` that share no compiled code with others."""

from __future__ import annotations

import types
from typing import Any


def with_own_code(function: Any, name: str) -> Any:
    """The function with a code object of its own, so that Dynamo's cache for it starts empty.

    Args:
        function: of Python; its closure and defaults stay.
        name: of the code, which Dynamo also tells functions apart by.
    """
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
