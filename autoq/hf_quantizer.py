"""autoq as a quantization method of transformers: importing this module registers it.

``from_pretrained`` builds a model without values and then fills it from tensor files by itself. A quantizer is asked
before and after. This one takes the model's content away before, so that there is nothing to fill, and afterwards reads
the files as ``autoq.hf.load`` does: the model is the same to the bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from autoq.bare_files import opened_files
from autoq.checkpoint_files import MANIFEST, opened
from autoq.errors import CheckpointError, InputError
from autoq.installing import install
from autoq.modules import quantized_layers
from autoq.stored import METHOD, config_entry, note_in_files, reshape, stored_tensors

_HELD = ("_modules", "_parameters", "_buffers")


class _EveryName(frozenset[str]):
    """Patterns that match every name; transformers 5.0 adds a list to them, later versions unite sets."""

    def __add__(self, other: list[str]) -> list[str]:
        return [*self, *other]


@register_quantization_config(METHOD)
class AutoqConfig(QuantizationConfigMixin):
    """``quantization_config`` in the ``config.json`` of a model that autoq quantized.

    Everything else (schemes, shapes, the plan) is with the tensors.

    Args:
        autoq: the version that wrote it; empty for this one.
        others: ignored.
    """

    def __init__(self, autoq: str = "", **others: Any) -> None:
        self.__dict__.update(config_entry() | ({"autoq": autoq} if autoq else {}))


@register_quantizer(METHOD)
class AutoqQuantizer(HfQuantizer):
    """Opens and saves models that autoq quantized; ``autoq.apply`` and ``autoq.autoquant`` quantize."""

    requires_calibration = True  # a float model is refused
    is_autoq = True

    def validate_environment(self, *args: Any, device_map: Any = None, **_: Any) -> None:
        """Refuse to spread a model over devices.

        Raises:
            InputError: if the device map names several devices, or the disk.
        """
        places = {str(one) for one in device_map.values()} if isinstance(device_map, dict) else set()
        named = isinstance(device_map, dict) and (len(places) > 1 or places & {"disk", "meta"})
        if named or (isinstance(device_map, str) and device_map != "auto"):
            raise InputError(
                "a quantized model is on one device",
                where="device_map",
                got=device_map,
                fix='Leave it out for the CPU, or pass one device such as "cuda:0".',
            )

    def update_device_map(self, device_map: Any) -> None:
        """Remember the device; transformers itself is told of none, since there is nothing to place yet."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = auto if device_map == "auto" else next(iter((device_map or {"": "cpu"}).values()))

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise InputError(
                "a model that autoq quantized is read from its files",
                where="from_pretrained",
                got="a state_dict",
                fix="Pass the folder alone.",
            )
        self._files = [Path(one) for one in checkpoint_files]
        self._taken = {name: model.__dict__[name] for name in (*_HELD, "all_tied_weights_keys")}
        model.__dict__.update({name: {} for name in self._taken})
        model._keys_to_ignore_on_load_unexpected = _EveryName([""])
        model._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.__dict__.update(self.__dict__.pop("_taken"))
        del model._keys_to_ignore_on_load_unexpected
        wanted = model.config.dtype
        _read(model, self.__dict__.pop("_files"))
        _check_filled(model)
        model.eval()
        dtype = None if model.dtype == wanted else wanted
        return model.to(device=self._device, dtype=dtype)

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works: it does."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the weights can be trained: packed ones cannot."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` works: it does."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` writes: all tensors, tied ones once, and what autoq has to know in the metadata."""
        if getattr(model, "_hf_peft_config_loaded", False) or not quantized_layers(model):
            return None, {}
        tensors, tied = stored_tensors(model)
        model.config.quantization_config = AutoqConfig()
        model._weight_conversions = []  # names are the model's own, not those of an older format
        return {name: one.contiguous() for name, one in tensors.items()}, {METHOD: note_in_files(model, tied)}


def _read(model: nn.Module, files: list[Path]) -> None:
    """Fill a model from a folder of ``save_quantized`` with all hashes, or from what ``save_pretrained`` wrote."""
    manifest = files[0].parent / MANIFEST
    # In the cache of the Hub everything is a link, and the manifest may be absent.
    whole = manifest.is_file() and not manifest.is_symlink()
    with opened(manifest.parent) if whole else opened_files(files) as checkpoint:
        reshape(model, checkpoint)
        install(model, checkpoint)


def _check_filled(model: nn.Module) -> None:
    """Refuse a model that holds tensors elsewhere than in parameters and buffers: those have no values."""
    for path, module in model.named_modules():
        empty = [name for name, one in vars(module).items() if isinstance(one, Tensor) and one.is_meta]
        if empty:
            raise CheckpointError(
                "transformers can build the model without values",
                where=f"{path}.{empty[0]}".lstrip("."),
                got="a tensor that is neither parameter nor buffer",
                fix="Use autoq.hf.load(folder).",
            )
