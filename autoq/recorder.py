"""Records what a model's linear layers see: which run, on how many rows, how often, and samples of their inputs.

Shapes: M rows of an activation (the product of its leading dimensions), K input features.
"""

from __future__ import annotations

import copy
import zlib
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import InputError, ModelError
from autoq.linear_layers import bias_of, size_of
from autoq.losses import Batch, as_batches, is_causal_lm
from autoq.modules import FilterFn, LinearSite, evaluating, find_linears, unwrap
from autoq.other_weights import other_weights
from autoq.siblings import Inputs, siblings
from autoq.workload import LayerInfo, LinearCall, Phase, PhaseInfo, Workload

FORWARD = "forward"
PREFILL = "prefill"
DECODE = "decode"
_DIRECT_READ = "its weight is read outside its own forward"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What was recorded.

    Attributes:
        workload: layers, calls, phases and siblings.
        samples: layer → phase → rows [at most ``samples_per_layer``, K] of the activations that entered the layer, on
            the CPU in the dtype they are multiplied in, drawn uniformly from all rows of the phase. Only of layers that
            may be quantized.
    """

    workload: Workload
    samples: Mapping[str, Mapping[str, Tensor]]


def record(
    model: nn.Module,
    batches: Any = None,
    *,
    phases: Mapping[str, Phase] | None = None,
    filter_fn: FilterFn | None = None,
    samples_per_layer: int = 256,
    seed: int = 0,
) -> Recording:
    """Run a model on some inputs and record every linear layer's calls.

    The model runs uncompiled, in eval mode and without gradients, on copies of the inputs; afterwards it is as before.

    Args:
        model: plain, compiled or wrapped.
        batches: one batch or an iterable of batches. A batch is a tensor (the first positional argument), a tuple
            (positional arguments) or a mapping (keyword arguments). The phase of a causal language model's call is
            ``decode`` for a single token after a filled cache, else ``prefill``; of other models' it is ``forward``.
        phases: instead of ``batches``, the inputs of each phase by its name.
        filter_fn: called with a layer's name and module; False leaves the layer alone.
        samples_per_layer: rows of activations kept per layer and phase; 0 keeps none.
        seed: of the rows' choice.

    Raises:
        InputError: if there are no inputs, or both ``batches`` and ``phases``.
        ModelError: if the model has no linear layer.
    """
    if (batches is None) == (phases is None):
        raise InputError("record() takes either batches or phases", got="both" if phases else "neither")
    given = {None: batches} if phases is None else {name: one.inputs for name, one in phases.items()}
    if not given:
        raise InputError("phases names at least one phase", got="{}")
    inputs = {name: _batches(one, name) for name, one in given.items()}
    recorder = Recorder(model, filter_fn=filter_fn, samples_per_layer=samples_per_layer, seed=seed)
    root = unwrap(model)
    # Tensors made in inference mode cannot be written to outside it; the copies can.
    with torch.inference_mode(False), torch.no_grad(), evaluating(root), recorder:
        for name, phase_batches in inputs.items():
            recorder.phase = name
            for batch in phase_batches:
                Batch(batch.given, _private(batch.args), _private(batch.kwargs)).call(root)
    return recorder.recording(phases)


class Recorder:
    """Records the calls of a model's linear layers between ``start`` and ``stop``, or inside a ``with`` block.

    The model may be called in any way, ``generate`` included. Meanwhile everything that ``torch.compile`` compiled in
    this process runs uncompiled, because compiled code does not run hooks; ``stop`` removes every trace.

    Args:
        model: plain, compiled or wrapped.
        filter_fn: called with a layer's name and module; False leaves the layer alone.
        samples_per_layer: rows of activations kept per layer and phase; 0 keeps none.
        seed: of the rows' choice.

    Attributes:
        phase: name given to the calls from now on; None finds it out call by call, as ``record`` describes.

    Raises:
        ModelError: if the model has no linear layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        filter_fn: FilterFn | None = None,
        samples_per_layer: int = 256,
        seed: int = 0,
    ) -> None:
        self.phase: str | None = None
        self._root = unwrap(model)
        self._sites = find_linears(self._root, filter_fn)
        if not self._sites:
            raise _no_linears(self._root)
        self._rows = samples_per_layer
        self._seed = seed
        self._calls: Counter[tuple[str, str, int, str]] = Counter()
        self._inputs = Inputs()
        self._samples: dict[str, dict[str, _Reservoir]] = {}
        self._reads: dict[str, _WatchedParameters] = {}
        self._read_directly: set[str] = set()
        self._language_models = _language_models(self._root)
        self._found_phase = PREFILL if self._language_models else FORWARD
        self._undo = ExitStack()
        self._running = False

    def start(self) -> None:
        """Begin or resume recording.

        Raises:
            InputError: if it is running already.
        """
        if self._running:
            raise InputError("a recorder is started once at a time", fix="Call stop() first.")
        with ExitStack() as undo:
            for module in self._language_models:
                handle = module.register_forward_pre_hook(self._on_language_model, with_kwargs=True, prepend=True)
                undo.callback(handle.remove)
            for site in self._sites:
                self._watch(site, undo)
            undo.enter_context(torch.compiler.set_stance("force_eager"))
            self._undo = undo.pop_all()
        self._running = True

    def stop(self) -> None:
        """End recording; the model is as it was before. Does nothing when not running."""
        self._undo.close()
        self._running = False
        calls: Counter[str] = Counter()
        for (layer, *_), count in self._calls.items():
            calls[layer] += count
        self._read_directly = {name for name, one in self._reads.items() if one.reads > calls[name]}

    def __enter__(self) -> Recorder:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def recording(self, phases: Mapping[str, Phase] | None = None) -> Recording:
        """What was recorded until now.

        Args:
            phases: gives the phases' calls per request; 1 where it is silent.
        """
        names = dict.fromkeys([*(phases or {}), *(phase for _, phase, _, _ in self._calls)])
        weights = {name: (phases or {}).get(name, Phase(None)) for name in names}
        workload = Workload(
            layers=tuple(_layer_info(site, site.name in self._read_directly) for site in self._sites),
            calls=tuple(
                LinearCall(layer=layer, phase=phase, m=m, dtype=dtype, count=count)
                for (layer, phase, m, dtype), count in self._calls.items()
            ),
            phases=tuple(
                PhaseInfo(name=name, calls=one.calls, synthesised=one.synthesised) for name, one in weights.items()
            ),
        )
        workload = replace(workload, siblings=siblings(self._root, workload.quantizable, workload.calls, self._inputs))
        usable = {layer.name for layer in workload.layers if layer.reason is None}
        samples = {
            layer: {phase: reservoir.rows for phase, reservoir in found.items()}
            for layer, found in self._samples.items()
            if layer in usable
        }
        return Recording(workload=workload, samples=samples)

    def _watch(self, site: LinearSite, undo: ExitStack) -> None:
        def on_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._on_linear(site, args[0] if args else next(iter(kwargs.values())))

        handle = site.module.register_forward_pre_hook(on_call, with_kwargs=True)
        undo.callback(handle.remove)
        if site.reason is not None:
            return
        plain = site.module._parameters
        watched = self._reads.setdefault(site.name, _WatchedParameters())
        watched.update(plain)
        site.module._parameters = watched
        undo.callback(_unwatch, site.module, plain)

    def _on_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._found_phase = DECODE if _is_decode(args, kwargs) else PREFILL

    def _on_linear(self, site: LinearSite, x: Tensor) -> None:
        phase = self.phase or self._found_phase
        dtype = x.dtype
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        m = x.shape[:-1].numel()
        self._calls[site.name, phase, m, str(dtype).removeprefix("torch.")] += 1
        self._inputs.add(site.name, x)
        if site.reason is not None or self._rows < 1 or m == 0:
            return
        found = self._samples.setdefault(site.name, {})
        if phase not in found:
            found[phase] = _Reservoir(self._rows, zlib.crc32(f"{self._seed} {site.name} {phase}".encode()))
        with torch.inference_mode(False), torch.no_grad():
            found[phase].add(x.detach().reshape(m, x.shape[-1]), dtype)


class _WatchedParameters(dict[str, nn.Parameter | None]):
    """A module's parameters, counting how often its weight is looked up by name; ``forward`` does so once a call."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __getitem__(self, name: str) -> nn.Parameter | None:
        self.reads += name == "weight"
        return super().__getitem__(name)


def _unwatch(module: nn.Module, plain: dict[str, nn.Parameter | None]) -> None:
    watched = module._parameters
    plain.clear()
    plain.update(watched)  # keeps what was assigned while recording
    module._parameters = plain


class _Reservoir:
    """A uniform sample of the rows seen: every row gets a random key, and those with the largest keys stay."""

    def __init__(self, limit: int, seed: int) -> None:
        self._limit = limit
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)
        self.rows = torch.empty(0)

    def add(self, x_MK: Tensor, dtype: torch.dtype) -> None:
        """Offer rows; at most ``limit`` of all rows offered are held, in the order they came."""
        keys = torch.rand(x_MK.shape[0], generator=self._generator, dtype=torch.float64)
        chosen = keys.topk(min(self._limit, keys.numel())).indices
        if self._keys.numel() == self._limit:
            chosen = chosen[keys[chosen] > self._keys.min()]
        if chosen.numel() == 0:
            return
        chosen = chosen.sort().values
        rows = x_MK.index_select(0, chosen.to(x_MK.device)).to("cpu", dtype)
        if self._keys.numel():
            rows = torch.cat([self.rows, rows])
        keys = torch.cat([self._keys, keys[chosen]])
        if keys.numel() > self._limit:
            kept = keys.topk(self._limit).indices.sort().values
            rows, keys = rows[kept], keys[kept]
        self.rows, self._keys = rows, keys


def _batches(inputs: Any, phase: str | None) -> list[Batch]:
    try:
        # A tuple is one batch of positional arguments; a list or another iterable holds batches.
        return as_batches([inputs] if isinstance(inputs, tuple) and inputs else inputs)
    except InputError as problem:
        where = f"phases[{phase!r}]" if phase else "batches"
        raise InputError(problem.rule, where=where, got=problem.got, fix=problem.fix) from problem


def _private(value: Any) -> Any:
    """A copy that the model may write to: tensors cloned, containers rebuilt, other objects (caches) deep-copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_private(one) for one in value))
    if type(value) in (list, tuple):
        return type(value)(_private(one) for one in value)
    if type(value) is dict:
        return {name: _private(one) for name, one in value.items()}
    if isinstance(value, nn.Module) or callable(value):
        return value
    return copy.deepcopy(value)


def _language_models(root: nn.Module) -> tuple[nn.Module, ...]:
    """The causal language models in a model: itself, or else all those inside it."""
    if is_causal_lm(root):
        return (root,)
    return tuple(module for module in root.modules() if is_causal_lm(module))


def _is_decode(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a causal language model's call has one token per sequence and a cache with something in it."""
    given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
    tokens = next((one for one in given if isinstance(one, Tensor)), None)
    if tokens is None or tokens.dim() < 2 or tokens.shape[1] != 1:
        return False
    cache = kwargs.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    return bool(length() if length is not None else cache)


def _layer_info(site: LinearSite, read_directly: bool) -> LayerInfo:
    module = site.module
    weight = getattr(module, "weight", None)
    n, k = size_of(module)
    return LayerInfo(
        name=site.name,
        k=k,
        n=n,
        dtype=str(weight.dtype).removeprefix("torch.") if isinstance(weight, Tensor) else "unknown",
        device=weight.device.type if isinstance(weight, Tensor) else "unknown",
        bias=bias_of(module) is not None,
        aliases=site.aliases,
        tied_to=site.tied_to,
        reason=site.reason or (_DIRECT_READ if read_directly else None),
    )


def _no_linears(root: nn.Module) -> ModelError:
    others = ", ".join(sorted({one.kind for one in other_weights(root)}))
    return ModelError(
        "the model has linear layers (nn.Linear, or Conv1D of transformers)",
        got=f"none{f', only {others}' if others else ''}",
        fix="autoq quantizes linear layers only; a quantized model is tuned again after autoq.restore(model).",
    )
