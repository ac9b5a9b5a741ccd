"""A compiled decode step over a static KV cache, for transformers decoders.

Legend: B sequences, T tokens of a prompt, V words.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoq.attention import KVPrecision, using
from autoq.errors import InputError
from autoq.kv_cache import KVCache
from autoq.modules import device_of, unwrap
from autoq.own_code import with_own_code

_Step = Callable[..., tuple[Tensor, Tensor]]
# A step's own kernels handle a few hundred numbers each: another thread would cost more than it gives. torch takes some
# out of what it is given.
_STEP_OPTIONS: dict[str, Any] = {
    "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
    "size_asserts": False,
    "alignment_asserts": False,
    "cpp.min_chunk_size": 1 << 14,
}

_CPP_WRAPPER = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}


class Decoder:
    """Runs a transformers decoder token by token, with autoq's attention over a static cache.

    The step is compiled once, without graph breaks, and serves any number of tokens in the cache. Its guards are not
    evaluated: a changed model needs another decoder, which `fits` tells. The model is not kept alive.

    Args:
        model: a transformers causal language model whose layers attend to all tokens, tuned by autoq or not.
        batch: sequences B.
        max_length: tokens that the cache holds of each.
        kv_cache: what keys and values are rounded to, per head and token: ``"none"``, ``"int8"`` or ``"int4"``.
        compiled: whether the step is compiled.
        compiled_prefill: whether prompts run compiled, too, one graph for all lengths.
        cpp_wrapper: whether the step calls its kernels from C++ instead of Python, which saves microseconds a layer and
            takes minutes to compile.

    Raises:
        InputError: another kind of model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch: int = 1,
        max_length: int = 1024,
        kv_cache: KVPrecision = "none",
        compiled: bool = True,
        compiled_prefill: bool = False,
        cpp_wrapper: bool = False,
    ) -> None:
        root = unwrap(model)
        config: Any = getattr(root, "config", None)
        if config is None or not hasattr(root, "set_attn_implementation"):
            raise InputError("autoq's decode loop serves models of transformers", got=type(root).__name__)
        self.batch, self.max_length, self.kv_cache = batch, max_length, kv_cache
        self.compiled, self.compiled_prefill, self.cpp_wrapper = compiled, compiled_prefill, cpp_wrapper
        with torch.inference_mode(False):  # its tensors are written to outside of that mode, too
            self.cache = KVCache(
                config,
                batch=batch,
                max_length=max_length,
                dtype=next(one.dtype for one in root.parameters() if one.is_floating_point()),
                device=torch.device(device_of(root)),
                kv_cache=kv_cache,
            )
        self._model = weakref.ref(root)
        self._structure = _structure(root)
        device = self.cache.device
        with torch.inference_mode(False):
            self._pads = torch.zeros(batch, dtype=torch.long, device=device)
            self._seen = torch.zeros(batch, 1, 1, max_length, dtype=torch.bool, device=device)
        self._filled = 0
        self._compiled_step: _Step | None = None
        self._compiled_prompt: _Step | None = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._filled

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache."""
        return self.cache.nbytes

    def fits(self, model: nn.Module, *, batch: int, max_length: int, kv_cache: KVPrecision, compiled: bool) -> bool:
        """Whether this decoder serves the model as it is now, and a cache of that size."""
        root = unwrap(model)
        return (
            (self.batch, self.kv_cache, self.compiled) == (batch, kv_cache, compiled)
            and self.max_length >= max_length
            and self._model() is root
            and self._structure == _structure(root)
        )

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Empty the cache and read a prompt.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T], 0 on padding, which is on the left; None without padding.

        Returns:
            The last token's logits, [B, V].

        Raises:
            InputError: another batch, padding elsewhere, or more tokens than the cache holds.
        """
        self._check(input_ids)
        pads, mask = _padding(input_ids, attention_mask)
        self.rewind(0)
        self._pads.copy_(torch.zeros_like(self._pads) if pads is None else pads)
        tokens = input_ids.shape[1]
        self._seen[:, 0, 0, :tokens] = True if mask is None else mask
        run = _read
        if self.compiled_prefill and tokens > 1:
            if self._compiled_prompt is None:
                self._compiled_prompt = torch.compile(with_own_code(_read, f"prompt_{id(self):x}"), fullgraph=True)
            run = self._compiled_prompt
            input_ids = input_ids.view(input_ids.shape)  # the mark is an attribute, and not for the caller's tensor
            torch._dynamo.mark_dynamic(input_ids, 1)
            if mask is not None:
                torch._dynamo.mark_dynamic(mask, 1)
        with using(self._root(), self.kv_cache):
            return self._run(run, input_ids, pads, mask)[0]

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each sequence.

        Args:
            tokens: int64 [B, 1].

        Returns:
            The logits of what follows, [B, V], valid until the next step.

        Raises:
            InputError: another batch, or a full cache.
        """
        return self._step(tokens)[0]

    def advance(self, tokens: Tensor) -> Tensor:
        """Read one token of each sequence, [B, 1], and give the most likely next ones, [B, 1]. Raises as `step`."""
        return self._step(tokens)[1]

    def rewind(self, length: int) -> None:
        """Forget all tokens from number ``length`` on."""
        self._seen[..., length:] = False
        self._filled = length
        self.cache.rewind(length)

    def _step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self._check(tokens)
        if self._filled == self.max_length:
            raise InputError(f"the cache holds {self.max_length} tokens", got="one more")
        self._seen[..., self._filled] = True
        if self._compiled_step is not None:
            return self._run(self._compiled_step, tokens, self._pads, self._seen)
        run = _read
        if self.compiled:
            options = _STEP_OPTIONS | (_CPP_WRAPPER if self.cpp_wrapper else {})
            run = self._compiled_step = torch.compile(
                with_own_code(_read, f"step_{id(self):x}"), fullgraph=True, options=options
            )
        with using(self._root(), self.kv_cache):
            return self._run(run, tokens, self._pads, self._seen)

    def _run(self, run: _Step, tokens: Tensor, pads: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        self._filled += tokens.shape[1]
        with torch.inference_mode():
            return run(self._root(), self.cache, tokens, pads, mask)

    def _root(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise InputError("the decoder's model still exists", fix="Keep it, or make another decoder.")
        return model

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[0] != self.batch or tokens.shape[1] == 0 or tokens.dtype != torch.long:
            raise InputError(
                f"the decoder takes int64 tokens [{self.batch}, any]", got=f"{tokens.dtype} {list(tokens.shape)}"
            )
        if tokens.shape[1] > self.max_length:
            raise InputError(f"the cache holds {self.max_length} tokens", got=f"a prompt of {tokens.shape[1]}")


def _read(
    model: Any, cache: KVCache, tokens: Tensor, pads: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits [B, V] after the last token, and the largest's number [B, 1]."""
    positions = (cache.length + torch.arange(tokens.shape[1], device=tokens.device))[None]
    if pads is not None:
        positions = (positions - pads[:, None]).clamp_min(0)
    logits = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits, logits.argmax(dim=-1, keepdim=True)


def _padding(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """How many tokens of each row are padding, [B], and which are none, [B, T]; None without padding."""
    if attention_mask is None or bool(attention_mask.all()):
        return None, None
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has the prompt's shape {list(input_ids.shape)}", got=list(attention_mask.shape)
        )
    seen = attention_mask.bool()
    if not bool(seen[:, -1].all()) or bool((seen[:, :-1] & ~seen[:, 1:]).any()):
        raise InputError("padding is on the left", got="padding elsewhere", fix='Set padding_side="left".')
    return (~seen).sum(dim=1), seen


def _structure(model: nn.Module) -> tuple[object, ...]:
    """What a traced graph takes for granted: the modules, their hooks, their tensors' form, and whether they train."""
    found: list[object] = []
    for module in model.modules():
        forms = [
            (name, one.shape, one.dtype, one.device) for name, one in module._parameters.items() if one is not None
        ]
        hooks = (*module._forward_pre_hooks, *module._forward_hooks)
        found.append((id(module), type(module), module.training, tuple(forms), hooks))
    return tuple(found)
