"""A tuned model for the lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from autoq.errors import InputError
from autoq.modules import unwrap


def lm_eval_model(model: nn.Module, tokenizer: Any, *, batch_size: int = 1, max_length: int | None = None) -> Any:
    """The model as the harness takes it: ``lm_eval.simple_evaluate(model=lm_eval_model(model, tokenizer), …)``.

    Scores are the harness's own, computed as for the float model: tasks, prompts and metrics are its business.

    Args:
        model: a transformers model for text, quantized or not; a compiled one is evaluated uncompiled, since its
            inputs have a different length each time.
        tokenizer: the model's.
        batch_size: requests at once. Where the tokenizer pads, more than one changes the last digits.
        max_length: longest input in tokens; None takes the model's.

    Returns:
        An ``lm_eval.models.huggingface.HFLM``.

    Raises:
        InputError: if the harness is not installed, or this is no transformers model.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "lm_eval_model needs the lm-evaluation-harness",
            got="it is not installed",
            fix="Run: pip install 'autoq[hf,eval]'",
        )
    import transformers
    from lm_eval.models.huggingface import HFLM

    inner = unwrap(model)
    if not isinstance(inner, transformers.PreTrainedModel):
        raise InputError("the harness evaluates transformers models", got=type(inner).__name__)
    inner.train(False)
    return HFLM(pretrained=inner, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
