"""The engines in PyTorch: how each makes the logits of a prompt's last token, and of one token after another.

Shapes: B rows, T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoq.errors import InputError
from autoq.own_code import with_own_code
from autoq.shadow import has_arithmetic, multiplied_in_float

if TYPE_CHECKING:
    from autoq.attention import KVPrecision
    from autoq.decoding import Decoder

CACHE_TOKENS = 1024  # of the static cache, where the model has as many positions


class TorchEngine(ABC):
    """One model in one way of running it.

    Args:
        model: a transformers causal language model in eval mode, quantized and with its attention chosen.
        max_length: tokens that a cache holds.
        note: for people.
    """

    def __init__(self, model: nn.Module, *, max_length: int = CACHE_TOKENS, note: str | None = None) -> None:
        self.model: Any = model
        self.note = note
        longest = getattr(self.model.config, "max_position_embeddings", None)
        self.max_length = min(max_length, longest) if isinstance(longest, int) else max_length
        self._prompt: Tensor | None = None
        self._first: Tensor | None = None

    @abstractmethod
    def _fill(self, tokens: Tensor) -> Tensor:
        """``prefill``, whatever it keeps."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after one more token [B, 1]."""

    @abstractmethod
    def rewind(self, length: int) -> None:
        """Forget what came after the first ``length`` tokens."""

    def advance(self, tokens: Tensor) -> Tensor:
        """The most likely tokens [B, 1] after one more token [B, 1]."""
        return self.step(tokens).argmax(dim=-1, keepdim=True)

    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] of the last of the tokens [B, T], from an empty cache."""
        self._prompt = None
        self._first = self._fill(tokens)
        self._prompt = tokens
        return self._first

    def ready(self, tokens: Tensor) -> Tensor:
        """Put a prompt [B, T] into the cache, and give the token [B, 1] that follows it greedily.

        A prompt that is there already is only rewound to.
        """
        if self._prompt is None or self._first is None or not torch.equal(self._prompt, tokens):
            logits = self.prefill(tokens)
        else:
            self.rewind(tokens.shape[1])
            logits = self._first
        return logits.argmax(dim=-1, keepdim=True)

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of all the tokens [B, T], not compiled.

        Products that this CPU has no arithmetic for are made in float32: the same up to the order of summation.
        """
        with _float_products(self.model):
            found: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return found

    def kv_bytes_per_token(self) -> int | None:
        """Of one row's cache."""
        config: Any = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = next(self.model.parameters()).dtype
        return int(2 * config.num_hidden_layers * heads * size * dtype.itemsize)


class Eager(TorchEngine):
    """transformers as it comes: not compiled, a cache that grows."""

    _cache: Any = None

    def _fill(self, tokens: Tensor) -> Tensor:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)
        return self._run(tokens)

    def step(self, tokens: Tensor) -> Tensor:
        """As ``TorchEngine`` says."""
        return self._run(tokens)

    def _run(self, tokens: Tensor) -> Tensor:
        found = self.model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return _last(found)

    def rewind(self, length: int) -> None:
        """As ``TorchEngine`` says."""
        beyond = self._cache.get_seq_length() - length
        if beyond:
            self._cache.crop(-beyond)


class NoCache(TorchEngine):
    """Compiled, and without a cache: prompts only."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._call = _compiled(lambda tokens: _last(model(input_ids=tokens, use_cache=False, logits_to_keep=1)))

    def _fill(self, tokens: Tensor) -> Tensor:
        return self._call(tokens)

    def step(self, tokens: Tensor) -> Tensor:
        """Refused."""
        raise InputError("an engine without a cache only reads prompts")

    def rewind(self, length: int) -> None:
        """Refused."""
        raise InputError("an engine without a cache only reads prompts")


class Static(TorchEngine):
    """Compiled, over transformers' static cache."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._caches: dict[int, Any] = {}
        self._call = _compiled(self._forward)
        self._rows = self._length = 0

    def _forward(self, tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
        arguments = {"position_ids": positions, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        return _last(self.model(input_ids=tokens, **arguments))

    def _fill(self, tokens: Tensor) -> Tensor:
        self._rows = tokens.shape[0]
        self._check(tokens.shape[1])
        if self._rows not in self._caches:
            self._caches[self._rows] = self._empty(tokens[:, :1])
        self.rewind(0)
        return self._run(tokens)

    def _empty(self, token: Tensor) -> Any:
        """A cache whose tensors are there already: compiled code must not find them missing once."""
        from transformers import StaticCache

        cache = StaticCache(config=self.model.config, max_cache_len=self.max_length)
        self.model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def step(self, tokens: Tensor) -> Tensor:
        """As ``TorchEngine`` says."""
        self._check(self._length + 1)
        return self._run(tokens)

    def _run(self, tokens: Tensor) -> Tensor:
        rows, count = tokens.shape
        positions = torch.arange(self._length, self._length + count).expand(rows, count)
        self._length += count
        return self._call(tokens, positions, self._caches[rows])

    def _check(self, length: int) -> None:
        if length > self.max_length:
            raise InputError("the context fits the cache", got=f"{length} tokens of {self.max_length}")

    def rewind(self, length: int) -> None:
        """As ``TorchEngine`` says."""
        for layer in self._caches[self._rows].layers:
            layer.cumulative_length.fill_(length)
        self._length = length


class Decoding(TorchEngine):
    """autoq's decode step and prompts, both compiled.

    Args:
        model: as in ``TorchEngine``.
        kv_cache: how keys and values are stored: ``none``, ``int8`` or ``int4``.
        cpp_wrapper: whether the step of one prompt calls its kernels from C++.
        settings: as in ``TorchEngine``.
    """

    def __init__(
        self, model: nn.Module, *, kv_cache: KVPrecision = "none", cpp_wrapper: bool = False, **settings: Any
    ) -> None:
        super().__init__(model, **settings)
        self._kv_cache = kv_cache
        self._cpp_wrapper = cpp_wrapper
        self._decoders: dict[int, Decoder] = {}
        self._now = self._decoder(1)

    def _fill(self, tokens: Tensor) -> Tensor:
        self._now = self._decoder(tokens.shape[0])
        return self._now.prefill(tokens)

    def _decoder(self, rows: int) -> Decoder:
        from autoq.decoding import Decoder  # needs transformers

        if rows not in self._decoders:
            self._decoders[rows] = Decoder(
                self.model,
                batch=rows,
                max_length=self.max_length,
                kv_cache=self._kv_cache,
                compiled=True,
                compiled_prefill=True,
                cpp_wrapper=self._cpp_wrapper and rows == 1,
            )
        return self._decoders[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """As ``TorchEngine`` says."""
        return self._now.step(tokens)

    def advance(self, tokens: Tensor) -> Tensor:
        """As ``TorchEngine`` says; the choice is part of the compiled step."""
        return self._now.advance(tokens)

    def rewind(self, length: int) -> None:
        """As ``TorchEngine`` says."""
        self._now.rewind(length)

    def logits(self, tokens: Tensor) -> Tensor:
        """As ``TorchEngine`` says, with keys and values rounded as the cache rounds them."""
        from autoq.attention import using

        with using(self.model, self._kv_cache):
            return super().logits(tokens)

    def kv_bytes_per_token(self) -> int | None:
        """As ``TorchEngine`` says."""
        return self._decoder(1).kv_bytes // self.max_length


def _last(outputs: Any) -> Tensor:
    found: Tensor = outputs.logits[:, -1]
    return found


@contextmanager
def _float_products(model: nn.Module) -> Iterator[None]:
    """Layers with weights of torchao's, or of a dtype without arithmetic here, multiply in float32 inside."""
    weights: dict[nn.Module, Tensor] = {}
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        weight: Any = module.weight
        if hasattr(weight, "__tensor_flatten__"):  # a wrapper of torchao's
            weight = weight.dequantize()
        elif has_arithmetic(weight):
            continue
        weights[module] = weight
    with multiplied_in_float(weights):
        yield


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One graph without breaks for each shape; a recompilation limit is an error."""
    import torch._dynamo.config as dynamo

    def call(*args: Any) -> Tensor:
        return function(*args)

    fresh: Callable[..., Tensor] = with_own_code(call, f"call_{id(function):x}")
    compiled = torch.compile(fresh, fullgraph=True, dynamic=False)

    def run(*args: Any) -> Tensor:
        with dynamo.patch(fail_on_recompile_limit_hit=True):
            found: Tensor = compiled(*args)
            return found

    return run
