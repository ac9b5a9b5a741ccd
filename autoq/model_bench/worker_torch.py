"""The worker of the engines in PyTorch: loads one engine, times it, and tells where its time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoq.cache import Fingerprint
from autoq.errors import InputError
from autoq.model_bench.breakdown import Breakdown, kernel_names
from autoq.model_bench.loading import engine_of, isa_of, read_bytes, weight_bytes
from autoq.model_bench.torch_engines import TorchEngine
from autoq.model_bench.worker_loop import serve
from autoq.profiler import read_bandwidth_gb_s

Request = dict[str, Any]
_LOSS_TOKENS = 128


class Handlers:
    """Answers the requests; one engine at a time."""

    def __init__(self) -> None:
        self._engine: TorchEngine | None = None

    @property
    def engine(self) -> TorchEngine:
        """The one that is loaded.

        Raises:
            InputError: if none is.
        """
        if self._engine is None:
            raise InputError("an engine is loaded before it is measured")
        return self._engine

    def load(self, request: Request) -> Request:
        """Make the engine ready; compilation comes with its first pass."""
        begin = time.perf_counter()
        torch.set_num_threads(int(request.pop("threads")))
        if request.pop("kernel_names", False):
            kernel_names()
        self._engine = None
        self._engine = found = engine_of(**request)
        return {
            "version": f"torch {torch.__version__}",
            "weight_bytes": weight_bytes(found.model),
            "read_bytes": read_bytes(found.model),
            "kv_bytes_per_token": found.kv_bytes_per_token(),
            "load_s": time.perf_counter() - begin,
            "isa": isa_of(),
            "note": found.note,
        }

    def prefill(self, request: Request) -> Request:
        """One timed pass over the prompt."""
        tokens = torch.tensor(request["tokens"])
        begin = time.perf_counter()
        with torch.no_grad():
            self.engine.prefill(tokens)
        return {"seconds": time.perf_counter() - begin}

    def decode(self, request: Request) -> Request:
        """Greedy steps after a prompt, each timed alone."""
        tokens, steps = torch.tensor(request["tokens"]), int(request["steps"])
        seconds, found = [], []
        with torch.no_grad():
            following = self.engine.ready(tokens)
            for _ in range(steps):
                begin = time.perf_counter()
                following = self.engine.advance(following)
                seconds.append(time.perf_counter() - begin)
                found.append(following.clone())
        return {"seconds": seconds, "tokens": torch.cat(found, dim=1).tolist() if found else []}

    def losses(self, request: Request) -> Request:
        """Mean loss of each row of tokens."""
        found: list[float] = []
        with torch.no_grad():
            for row in torch.tensor(request["rows"]):
                found.append(_loss(self.engine.logits(row[None])[0], row))
        return {"losses": found}

    def profile(self, request: Request) -> Request:
        """Where the time of a phase's passes goes; the worker was loaded with ``kernel_names``."""
        tokens = torch.tensor(request["tokens"])
        with torch.no_grad():
            found = Breakdown(self.engine, tokens, phase=request["phase"], passes=int(request["passes"]))
            return found.measured()

    def bandwidth(self, request: Request) -> Request:
        """The memory's read bandwidth, and the machine."""
        torch.set_num_threads(int(request["threads"]))
        here = Fingerprint.current().to_json()
        return {"gb_s": read_bandwidth_gb_s(), "device": here["name"], "isa": here["isa"]}


def _loss(logits: Tensor, row: Tensor) -> float:
    """Mean loss of a row's tokens [T] after the first, from logits [T, V]; few are float32 at once."""
    parts = zip(torch.split(logits[:-1], _LOSS_TOKENS), torch.split(row[1:], _LOSS_TOKENS), strict=True)
    total = sum(float(nn.functional.cross_entropy(one.float(), following, reduction="sum")) for one, following in parts)
    return total / (len(row) - 1)


def main() -> None:
    """Serve the parent's requests."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # here, not in processes that are no part of this one
    handlers = Handlers()
    names = ("load", "prefill", "decode", "losses", "profile", "bandwidth")
    requests: dict[str, Callable[[Request], Request]] = {name: getattr(handlers, name) for name in names}
    serve(requests)


if __name__ == "__main__":
    main()
