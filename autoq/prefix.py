"""A model run from one of its blocks on: the outputs of the block before are stored, the earlier ones are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from autoq.errors import InputError
from autoq.losses import Batch, tensor_of
from autoq.modules import evaluating
from autoq.plan import plain_name

_LIMIT_BYTES = 1 << 30
_LEAVES = (Tensor, bool, int, float, str, type(None))
# What a model that needs its first blocks after all may raise without them.
_FAILURES = (InputError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError)


class Prefix:
    """Stored outputs of a model's blocks, so that a change in a late block does not rerun the blocks before it.

    Only for models whose blocks run once each per forward pass, in order, and hand on what they compute in their
    outputs alone: both are checked while capturing, and ``reason`` says what is wrong where they are not.

    Args:
        model: runs uncompiled; captured as it is now, so the blocks before the first changed one must stay so.
        blocks: the model's repeated blocks, in order (``profiler.end_to_end.repeated_blocks``).
        batches: what it will be run on.
        limit_bytes: kept at most; where it does not suffice, of every 2nd, 4th, … block only.
        seen: called with each batch's number and the model's outputs on it.

    Attributes:
        reason: why nothing is skipped; empty where blocks are.
        stride: of the blocks whose outputs are kept.
        blocks_run: passes through a block since the capture, over all batches: what was really computed.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        batches: Sequence[Batch],
        *,
        limit_bytes: int = _LIMIT_BYTES,
        seen: Callable[[int, Any], None] | None = None,
    ) -> None:
        self.model = model
        self.blocks = list(blocks)
        self.reason = "" if len(self.blocks) > 1 else "the model has no repeated blocks"
        self.stride = 1
        self.blocks_run = 0
        self._limit = limit_bytes
        self._kept: dict[tuple[int, int], Any] = {}  # (batch, blocks skipped) → output of the last one skipped
        self._bytes = 0
        self._first: dict[str, int] = {}
        with evaluating(model), torch.no_grad():
            for index, batch in enumerate(batches):
                outputs = batch.call(model) if self.reason else self._capture(index, batch)
                if index == 0 and not self.reason:
                    self._check(batch, outputs)
                if seen is not None:
                    seen(index, outputs)
        if self.reason:
            self._kept.clear()

    def start(self, layer: str) -> int:
        """How many blocks may be skipped when only this layer is changed: those that ran before its first call."""
        return 0 if self.reason else self._first.get(layer, 0)

    def skipped(self, block: int) -> int:
        """How many blocks ``from_block`` really skips."""
        return 0 if self.reason else min(block, len(self.blocks)) // self.stride * self.stride

    @contextmanager
    def from_block(self, block: int, batch: int) -> Iterator[None]:
        """While it lasts, the model may be called on that batch, and starts at ``block`` or somewhat before.

        Args:
            block: the first block that must run; the number of blocks for what comes after all of them.
            batch: its position in the captured batches.
        """
        count = self.skipped(block)
        stored = self._kept.get((batch, count))
        skipped = self.blocks[:count] if stored is not None else []

        def stub(*_args: Any, **_kwargs: Any) -> Any:
            return tree_map(_copied, stored)

        before = [one.__dict__.get("forward") for one in skipped]
        try:
            for one in skipped:
                one.__dict__["forward"] = stub
            yield
        finally:
            self.blocks_run += len(self.blocks) - len(skipped)
            for one, forward in zip(skipped, before, strict=True):
                one.__dict__.pop("forward", None)
                if forward is not None:
                    one.__dict__["forward"] = forward

    def _capture(self, index: int, batch: Batch) -> Any:
        """Run the model once and keep what its blocks return; the first time, watch what they read."""
        flow = _Flow()
        done = 0  # blocks finished

        def enter(number: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if number != done or flow.inside:
                    self.reason = self.reason or f"block {number} runs after {done} blocks"
                flow.inside = True

            return hook

        def leave(number: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                nonlocal done
                done = number + 1
                flow.finish(output)
                self._keep(index, done, output)

            return hook

        def called(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self._first[name] = min(done, self._first.get(name, done))

            return hook

        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                stack.callback(module.register_forward_pre_hook(called(plain_name(name))).remove)
            for number, block in enumerate(self.blocks):
                stack.callback(block.register_forward_pre_hook(enter(number)).remove)
                stack.callback(block.register_forward_hook(leave(number)).remove)
            if index == 0:
                stack.enter_context(flow)
            outputs = batch.call(self.model)
        if done != len(self.blocks):
            self.reason = self.reason or f"{done} of {len(self.blocks)} blocks run"
        self.reason = self.reason or flow.reason
        return outputs

    def _keep(self, index: int, count: int, output: Any) -> None:
        """Keep what the last of the first ``count`` blocks returned, as far as there is room."""
        strange = next((type(one).__name__ for one in tree_leaves(output) if not isinstance(one, _LEAVES)), "")
        if strange:
            self.reason = self.reason or f"a block returns a {strange}"
        if self.reason or count % self.stride:
            return
        self._kept[index, count] = tree_map(_copied, output)
        self._bytes += _bytes(output)
        while self._bytes > self._limit and self.stride <= len(self.blocks):
            self.stride *= 2
            self._kept = {key: one for key, one in self._kept.items() if key[1] % self.stride == 0}
            self._bytes = sum(map(_bytes, self._kept.values()))

    def _check(self, batch: Batch, expected: Any) -> None:
        """Whether skipping all that can be skipped changes nothing at all."""
        try:
            with self.from_block(len(self.blocks), 0):
                same = torch.equal(tensor_of(expected), tensor_of(batch.call(self.model)))
        except _FAILURES as problem:
            self.reason = f"the model fails without its first blocks: {type(problem).__name__}"
            return
        finally:
            self.blocks_run = 0
        if not same:
            self.reason = "the model computes something else without its first blocks"


class _Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch annotates it only in part
    """Watches which block's values each operation reads: the block just before, its own, and no others.

    Attributes:
        reason: the first violation, or empty.
        inside: whether a block is running.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.reason = ""
        self.inside = False
        self._done = 0
        self._maker: dict[int, int] = {}  # address of a storage → number of the block that made it, from 1

    def finish(self, output: Any) -> None:
        """A block ended; what it returns counts as its own."""
        self._done += 1
        self.inside = False
        for one in tree_leaves(output):
            if isinstance(one, Tensor):
                self._maker[_address(one)] = self._done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        fresh = func is torch.ops.aten.lift_fresh.default  # of a tensor just made, perhaps where another one was
        makers = set() if fresh else {maker for one in tensors if (maker := self._maker.get(_address(one), 0))}
        now = self._done + 1 if self.inside else self._done
        old = makers - {now, self._done}
        if old and not self.reason:
            self.reason = f"what block {min(old) - 1} computes is read after block {self._done - 1}"
        result = func(*args, **(kwargs or {}))
        made = now if self.inside else max(makers, default=0)
        for one in tree_leaves(result):
            if isinstance(one, Tensor):
                self._maker[_address(one)] = made
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _copied(leaf: Any) -> Any:
    """A copy, since what runs next may change its input in place."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _bytes(tree: Any) -> int:
    return sum(one.nbytes for one in tree_leaves(tree) if isinstance(one, Tensor))
