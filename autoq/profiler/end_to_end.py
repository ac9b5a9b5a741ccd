"""End-to-end times of plans, compiled as a user would compile them, phase by phase.

The unquantized model is compiled as it is. All plans share one compiled shadow: its layers' packed buffers are swapped
between the timed calls, which costs no compilation. A phase whose pass is long against the dispatch of a compiled
block (a prompt) is compiled block by block, since the blocks of a model share one graph; a short one (a decode step)
as a whole.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoq.errors import InputError
from autoq.losses import Batch
from autoq.own_code import with_own_code
from autoq.profiler.timing import Timing, interleaved
from autoq.scheme import Scheme
from autoq.shadow import PackedStore, Shadow, share_weights
from autoq.workload import Phase

_log = logging.getLogger(__name__)
Assignment = Mapping[str, Scheme]
Progress = Callable[[str, int, int], None]

UNQUANTIZED = ""  # the label of the user's own model
_BLOCKWISE_ABOVE_S = 0.3  # a pass this long hides the dispatch of its blocks (about 0.1 ms each)


@dataclass(frozen=True, slots=True)
class PhaseInputs:
    """The inputs of one phase, in a form that can be called again and again.

    Args:
        phase: as the user or autoq gave it.
    """

    phase: Phase

    def batches(self) -> list[Batch]:
        """The batches of one pass; a function among the inputs is called for a fresh one."""
        inputs = self.phase.inputs
        found = list(inputs) if isinstance(inputs, list) else [inputs]
        if not found:
            raise InputError("a phase has at least one batch of inputs")
        return [Batch.of(one) for one in found]

    def run(self, model: Callable[..., object]) -> None:
        """One pass."""
        for batch in self.batches():
            model(*batch.args, **batch.kwargs)


class EndToEnd:
    """Times assignments of one model end to end.

    Args:
        model: the unquantized model, not compiled; only a structure copy of it is compiled.
        store: packed weights of the layers that can change.
        phases: what is timed.
        compile_arguments: passed to ``torch.compile`` (mode, backend, dynamic), as the user's own compilation had them.
        progress: called with (text, done, total) while compiling.
    """

    def __init__(
        self,
        model: nn.Module,
        store: PackedStore,
        phases: Mapping[str, Phase],
        *,
        compile_arguments: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.phases = {name: PhaseInputs(phase) for name, phase in phases.items()}
        self._synchronize = device_wait(model)
        self.how: dict[str, str] = {}  # phase → whole, blocks, with a note when the graph breaks
        self._calls: dict[tuple[str, bool], Callable[..., object]] = {}
        self._shadows: dict[str, Shadow] = {}
        arguments = dict(compile_arguments or {})
        total = 2 * len(self.phases)
        for number, (name, inputs) in enumerate(self.phases.items()):
            if progress is not None:
                progress(f"{name}, unquantized", 2 * number, total)
            blockwise = _seconds(model, inputs, self._synchronize) > _BLOCKWISE_ABOVE_S
            stock, self.how[name] = _compiled(share_weights(model), inputs, arguments, blockwise)
            if progress is not None:
                progress(f"{name}, quantized", 2 * number + 1, total)
            self._shadows[name] = Shadow(model, store)
            shadow, how = _compiled(self._shadows[name].model, inputs, arguments, blockwise)
            self._calls[name, False], self._calls[name, True] = stock, shadow
            if how != self.how[name]:
                self.how[name] = f"{self.how[name]}; quantized: {how}"
        if progress is not None:
            progress("", total, total)

    def time(
        self,
        plans: Mapping[str, Assignment],
        *,
        others: Mapping[str, Mapping[str, Callable[[], None]]] | None = None,
        budget_s: float = 2.0,
        min_rounds: int = 3,
    ) -> dict[str, dict[str, Timing]]:
        """Time plans interleaved with each other and with the unquantized model.

        Args:
            plans: label → assignment; the label ``UNQUANTIZED`` is added for the model itself.
            others: phase → label → another pass to time with them.
            budget_s: per plan and phase, at most about this long.
            min_rounds: rounds taken in any case.

        Returns:
            Label → phase → timing of one pass.
        """
        result: dict[str, dict[str, Timing]] = {label: {} for label in (UNQUANTIZED, *plans)}
        for phase, inputs in self.phases.items():
            beside = {} if others is None else others.get(phase, {})
            found = self._time_phase(phase, inputs, plans, beside, budget_s, min_rounds)
            for label, timing in found.items():
                result.setdefault(label, {})[phase] = timing
        return result

    def _time_phase(  # noqa: PLR0917 (all of one phase)
        self,
        phase: str,
        inputs: PhaseInputs,
        plans: Mapping[str, Assignment],
        others: Mapping[str, Callable[[], None]],
        budget_s: float,
        min_rounds: int,
    ) -> dict[str, Timing]:
        shadow = self._shadows[phase]

        def prepare(label: str) -> None:
            if label in plans:
                shadow.assign(plans[label])

        def runner(label: str) -> Callable[[], None]:
            call = self._calls[phase, label != UNQUANTIZED]
            return lambda: inputs.run(call)

        runs = {label: runner(label) for label in (UNQUANTIZED, *plans)} | dict(others)
        with torch.no_grad(), _strict():
            return interleaved(
                runs,
                budget_s=budget_s * len(runs),
                min_rounds=min_rounds,
                max_rounds=40,
                prepare=prepare,
                synchronize=self._synchronize,
            )


def device_wait(model: nn.Module) -> Callable[[], None] | None:
    """What waits for all the work that the model's GPUs were given; None where it has none.

    A pass queues kernels on a GPU and returns before they ran: without waiting, only the queueing is timed.
    """
    gpus = sorted({one.device.index or 0 for one in model.parameters() if one.device.type == "cuda"})
    if not gpus:
        return None

    def wait() -> None:
        for gpu in gpus:
            torch.cuda.synchronize(gpu)

    return wait


def _seconds(model: nn.Module, inputs: PhaseInputs, synchronize: Callable[[], None] | None) -> float:
    wait = synchronize or (lambda: None)
    with torch.no_grad():
        wait()
        begin = time.perf_counter()
        inputs.run(model)
        wait()
        return time.perf_counter() - begin


@contextmanager
def _strict() -> Iterator[None]:
    """Dynamo stops at its recompile limit instead of running the rest uncompiled in silence."""
    import torch._dynamo.config as dynamo

    with dynamo.patch(fail_on_recompile_limit_hit=True):
        yield


def _compiled(
    model: nn.Module, inputs: PhaseInputs, arguments: Mapping[str, Any], blockwise: bool
) -> tuple[Callable[..., object], str]:
    """Compile and warm up; returns the callable and how it was compiled."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

    options = {**arguments, "fullgraph": True}
    blocks = repeated_blocks(model) if blockwise else []
    with torch.no_grad(), _strict():
        if blocks:
            try:
                for block in blocks:
                    block.compile(**options)
                return _warm(model, inputs), f"{len(blocks)} blocks"
            except (FailOnRecompileLimitHit, Unsupported) as problem:
                _log.warning("blocks do not share a graph, compiling the whole model: %s", _first_line(problem))
                for block in blocks:
                    block._compiled_call_impl = None
        try:
            return _warm(torch.compile(_fresh(model), **options), inputs), "whole"
        except Unsupported as problem:
            _log.warning("the model has graph breaks, which cost time: %s", _first_line(problem))
            return _warm(
                torch.compile(_fresh(model), **(options | {"fullgraph": False})), inputs
            ), "whole, graph breaks"


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def _warm(call: Callable[..., object], inputs: PhaseInputs) -> Callable[..., object]:
    for _ in range(2):
        inputs.run(call)
    return call


def _fresh(model: nn.Module) -> Callable[..., object]:
    """A function with a code object of its own, so that Dynamo's cache for it starts empty."""

    def call(*args: Any, **kwargs: Any) -> object:
        return model(*args, **kwargs)

    found: Callable[..., object] = with_own_code(call, f"call_{id(model):x}")
    return found


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of the longest ``nn.ModuleList`` whose members are all of one class; empty if there is none.

    Lists of experts do not count, which run side by side.
    """
    best: list[nn.Module] = []
    for name, module in model.named_modules():
        if "expert" in name.rpartition(".")[2].lower():
            continue
        if isinstance(module, nn.ModuleList) and len(module) > max(1, len(best)):
            members = list(module)
            if len({type(member) for member in members}) == 1 and any(members[0].children()):
                best = members
    return best
