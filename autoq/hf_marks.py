"""Tells transformers who saves a model that autoq quantized."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from autoq.modules import quantized_layers, unwrap
from autoq.stored import CONFIG_KEY, METHOD


def mark(model: nn.Module) -> None:
    """Let ``save_pretrained`` of the transformers models in a model write what is quantized now.

    Those without quantized layers (any more) are saved as transformers saves them. Nothing is imported for a model that
    has no transformers model in it.

    Args:
        model: plain, compiled or wrapped.
    """
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return
    for module in unwrap(model).modules():
        if isinstance(module, library.PreTrainedModel):
            _mark(module)


def _mark(module: Any) -> None:
    if quantized_layers(module):
        from autoq.hf_quantizer import AutoqConfig, AutoqQuantizer

        module.hf_quantizer = AutoqQuantizer(AutoqConfig())
    elif getattr(getattr(module, "hf_quantizer", None), "is_autoq", False):
        del module.hf_quantizer
        if getattr(getattr(module.config, CONFIG_KEY, None), "quant_method", "") == METHOD:
            delattr(module.config, CONFIG_KEY)
