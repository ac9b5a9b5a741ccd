"""A model that will be tuned on what it is called with: at its first call, or when the user says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from autoq.errors import InputError
from autoq.losses import Batch, is_causal_lm
from autoq.modules import unwrap

_KEPT_CALLS = 64  # calls whose inputs manual recording keeps


class Waiting:
    """Watches a model's calls until it is tuned. Until then it runs uncompiled: compiled code would trace the hook.

    An error, or Ctrl-C, while tuning leaves the model waiting, so that it never runs unquantized in silence.

    Args:
        model: plain, compiled or wrapped.
        tune: called with the recorded inputs; tunes the model and changes it.
        manual: keep every call until ``model.finalize_autoquant()``, instead of tuning at the first one.
    """

    def __init__(self, model: nn.Module, tune: Callable[[Any], None], *, manual: bool) -> None:
        self.model = model
        self.root = unwrap(model)
        self.seen: list[Batch] = []
        self._tune = tune
        self._manual = manual
        self._lock = threading.Lock()
        self._tuned = False
        self._handle: Any = None
        self._compiled_call: Any = None
        self._forwards: dict[nn.Module, Any] = {}

    def start(self) -> None:
        """Watch the model's calls from now on."""
        self._compiled_call, self.root._compiled_call_impl = self.root._compiled_call_impl, None
        for wrapper in _compiled_wrappers(self.model):
            self._forwards[wrapper] = wrapper.forward
            wrapper.forward = self.root.__call__
        if self._manual:
            self.model.__dict__["finalize_autoquant"] = self._finalize
        self._watch()

    def _watch(self) -> None:
        action = self._keep if self._manual else self._first
        # Disabled for who compiles the model after autoquant(): tuning must not be traced.
        watch = _Watch(torch.compiler.disable(action))  # type: ignore[no-untyped-call] # torch leaves it unannotated
        # Before the user's own hooks: the inputs are replayed through these.
        self._handle = self.root.register_forward_pre_hook(watch, with_kwargs=True, prepend=True)

    def _first(self, batch: Batch) -> None:
        with self._lock:  # another thread's call waits for the tuned model
            if not self._tuned:
                self._tune_on([batch])

    def _tune_on(self, batches: list[Batch]) -> None:
        inputs = self._inputs(batches)
        self.root._compiled_call_impl = self._gate()
        self._handle.remove()
        try:
            self._tune(inputs)
        except BaseException:
            self._watch()
            self.root._compiled_call_impl = None
            raise
        self._tuned = True
        for wrapper, forward in self._forwards.items():
            wrapper.forward = forward
        self.model.__dict__.pop("finalize_autoquant", None)
        self.root._compiled_call_impl = self._compiled_call

    def _gate(self) -> Callable[..., Any]:
        """How the model is called while it is tuned: by this thread as it is, by others when the tuning has ended.

        It stands where compiled code would, because no copy of a model takes that along.
        """
        tuning, root, lock = threading.get_ident(), self.root, self._lock

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == tuning:
                return root._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call] # as above
            with lock:
                pass
            return root(*args, **kwargs)

        if self._compiled_call is not None:  # how it was compiled is still asked for
            vars(call)["get_compiler_config"] = vars(self._compiled_call)["get_compiler_config"]
        return call

    def _keep(self, batch: Batch) -> None:
        if len(self.seen) < _KEPT_CALLS:
            self.seen.append(_cloned(batch))

    def _finalize(self) -> None:
        """Stop recording, tune on what was recorded, and apply.

        Raises:
            InputError: if the model was not called since.
        """
        if not self.seen:
            raise InputError(
                "manual recording needs at least one call of the model before finalize_autoquant()",
                fix="Call the model on inputs you care about first.",
            )
        with self._lock:
            self._tune_on(self.seen)

    def _inputs(self, batches: list[Batch]) -> Any:
        """The recorded inputs as ``tune`` takes them; a language model's prompts only, without their caches."""
        if not is_causal_lm(self.root):
            return batches
        rows = [tokens for batch in batches if (tokens := _prompt(batch)) is not None]
        if not rows:
            raise InputError("a recorded call of a language model has a prompt of at least two tokens")
        return [_clone(one) for one in rows]


class _Watch:
    """The hook of a waiting model. It belongs to this very model, so copies of both are refused."""

    def __init__(self, action: Callable[[Batch], None]) -> None:
        self._action = action

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._action(Batch(args, args, kwargs))

    def __reduce__(self) -> NoReturn:  # copy.deepcopy calls it too
        raise InputError(
            "a model is copied or pickled before autoquant() or after the tuning",
            got="a model whose tuning waits for its first call",
            fix="Call the model once (or model.finalize_autoquant()) first, or pass batches to autoquant().",
        )


def _compiled_wrappers(model: nn.Module) -> list[nn.Module]:
    """The ``torch.compile`` wrappers around a model's root."""
    root = unwrap(model)
    found = []
    while model is not root:
        if "_orig_mod" in model._modules:
            found.append(model)
        model = next(iter(model.children()))
    return found


def _prompt(batch: Batch) -> Tensor | None:
    tokens = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
    return tokens if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[1] > 1 else None


def _clone(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return tensor.clone()


def _cloned(batch: Batch) -> Batch:
    def copy(value: Any) -> Any:
        return _clone(value) if isinstance(value, Tensor) else value

    args = tuple(copy(one) for one in batch.args)
    return Batch(args, args, {name: copy(one) for name, one in batch.kwargs.items()})
