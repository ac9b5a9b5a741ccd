"""The worker of llama.cpp: run by path with the Python of a side environment that has llama-cpp-python.

The C API is called, not the package's ``Llama``, which copies logits into Python for every token.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
from worker_loop import serve
from worker_losses import LOSS_TOKENS, nll

Request = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
MICRO_BATCH = 512  # tokens computed at once, llama.cpp's default
FLASH = {"prefill": True, "decode": False}  # llama.cpp's fused attention, where it is faster
FILE_TYPES = {
    "Q4_0": api.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q8_0": api.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K_M": api.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


class Model:
    """A loaded GGUF file.

    Args:
        file: the GGUF file.
    """

    def __init__(self, file: str) -> None:
        self.log: list[str] = []
        self._listen = api.llama_log_callback(lambda _level, text, _: self.log.append(text.decode(errors="replace")))
        api.llama_log_set(self._listen, ctypes.c_void_p(0))
        api.llama_backend_init()
        self.handle = api.llama_model_load_from_file(os.fsencode(file), api.llama_model_default_params())
        if not self.handle:
            raise ValueError(f"llama.cpp cannot load {file}: {self.last_words()}")
        self.vocabulary = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.handle)))

    def last_words(self) -> str:
        """What llama.cpp said last."""
        return "".join(self.log[-3:]).strip()


class Context:
    """A cache of keys and values, apart for each sequence of a batch, and what computes with it.

    Args:
        model: a loaded file.
        tokens: that a sequence can hold.
        batch: sequences.
        threads: threads that compute.
        flash: whether attention is llama.cpp's fused one.
    """

    def __init__(self, model: Model, *, tokens: int, batch: int, threads: int, flash: bool) -> None:
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = tokens * batch, batch, tokens * batch
        params.n_ubatch = MICRO_BATCH
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False  # a sequence attends to its own keys only
        params.flash_attn_type = int(flash)
        self.model = model
        self.handle = api.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise ValueError(f"llama.cpp cannot make a context of {batch} x {tokens} tokens: {model.last_words()}")
        self.memory = api.llama_get_memory(self.handle)
        self._batch = api.llama_batch_init(tokens * batch, 0, 1)
        self._prompt: list[list[int]] | None = None
        self._following: Array = np.zeros(0, np.int64)

    def pass_over(self, rows: list[list[int]], start: int, *, every: bool = False) -> None:
        """Compute the tokens of each sequence from position ``start`` on; with logits of the last ones, or of all."""
        batch, at = self._batch, 0
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                batch.token[at], batch.pos[at] = token, start + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = every or offset == len(row) - 1
                at += 1
        batch.n_tokens = at
        code = api.llama_decode(self.handle, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}: {self.model.last_words()}")

    def logits(self, count: int) -> Array:
        """The last pass's logits, float32 [count, vocabulary]; a view that the next pass overwrites."""
        return np.ctypeslib.as_array(api.llama_get_logits(self.handle), (count, self.model.vocabulary))

    def prefill(self, rows: list[list[int]]) -> None:
        """Empty the cache and fill it with the rows."""
        self._prompt = None
        api.llama_memory_clear(self.memory, False)
        self.pass_over(rows, 0)
        self.logits(len(rows))  # waits for the computation

    def rewind_to(self, rows: list[list[int]]) -> Array:
        """Leave just these rows in the cache, and tell the likeliest tokens after them.

        Returns:
            int64 [rows], the tokens that follow.
        """
        length = len(rows[0])
        if rows == self._prompt:
            for sequence in range(len(rows)):
                api.llama_memory_seq_rm(self.memory, sequence, length, -1)
        else:
            self.prefill(rows)
            self._following = self.logits(len(rows)).argmax(axis=1)
            self._prompt = rows
        return self._following

    def losses(self, row: list[int]) -> Array:
        """Loss of each token after the first, float64 [tokens - 1] in nats."""
        self._prompt = None
        api.llama_memory_clear(self.memory, False)
        parts = []
        for start in range(0, len(row), LOSS_TOKENS):
            part = row[start : start + LOSS_TOKENS]
            self.pass_over([part], start, every=True)
            following = np.array(row[start + 1 : start + 1 + len(part)])
            parts.append(nll(self.logits(len(part))[: len(following)], following))
        return np.concatenate(parts)


class Handlers:
    """Answers the requests; one model at a time, with a context for each phase."""

    def __init__(self) -> None:
        self._contexts: dict[str, Context] = {}

    def context(self, phase: str) -> Context:
        """The one that computes a phase."""
        if not self._contexts:
            raise ValueError("an engine is loaded before it is measured")
        return self._contexts[phase]

    def load(self, request: Request) -> Request:
        """Open a GGUF ``file`` for ``batch`` sequences of ``context`` tokens."""
        begin = time.perf_counter()
        model = Model(request["file"])
        threads, tokens, batch = (int(request[name]) for name in ("threads", "context", "batch"))
        self._contexts = {
            phase: Context(model, tokens=tokens, batch=batch, threads=threads, flash=flash)
            for phase, flash in FLASH.items()
        }
        size = api.llama_model_n_embd(model.handle) // api.llama_model_n_head(model.handle)
        values = api.llama_model_n_layer(model.handle) * api.llama_model_n_head_kv(model.handle) * size
        return {
            "version": f"llama.cpp of llama-cpp-python {api.__version__}",
            "weight_bytes": api.llama_model_size(model.handle),
            "kv_bytes_per_token": 2 * 2 * values,
            "load_s": time.perf_counter() - begin,
            "isa": " ".join(instruction_sets()),
            "note": "float16 keys and values; flash attention for prompts and losses, not for decode steps, as is "
            f"fastest; tensors: {', '.join(tensor_types(model.log))}",
        }

    def prefill(self, request: Request) -> Request:
        """One timed pass over the prompts."""
        context = self.context("prefill")
        begin = time.perf_counter()
        context.prefill(request["tokens"])
        return {"seconds": time.perf_counter() - begin}

    def decode(self, request: Request) -> Request:
        """Greedy steps after the prompts, each timed alone."""
        context, rows = self.context("decode"), request["tokens"]
        following = context.rewind_to(rows)
        seconds, found = [], []
        for step in range(int(request["steps"])):
            begin = time.perf_counter()
            context.pass_over([[int(one)] for one in following], len(rows[0]) + step)
            following = context.logits(len(rows)).argmax(axis=1)
            seconds.append(time.perf_counter() - begin)
            found.append(following)
        return {"seconds": seconds, "tokens": np.transpose(found).tolist() if found else []}

    def losses(self, request: Request) -> Request:
        """Mean loss of each row of tokens."""
        context = self.context("prefill")
        return {"losses": [float(context.losses(row).mean()) for row in request["rows"]]}

    def convert(self, request: Request) -> Request:
        """Write a GGUF file of another ``type``; its tensors are dequantized and quantized again."""
        begin, target = time.perf_counter(), Path(request["target"])
        params = api.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = FILE_TYPES[request["type"]], True
        part = target.with_name(f"{target.name}.part")
        code = api.llama_model_quantize(os.fsencode(request["source"]), os.fsencode(part), ctypes.byref(params))
        if code:
            raise RuntimeError(f"llama_model_quantize returned {code}")
        part.replace(target)
        return {"seconds": time.perf_counter() - begin, "bytes": target.stat().st_size}


def instruction_sets() -> Iterator[str]:
    """What llama.cpp was built to use, such as AVX2."""
    for entry in api.llama_print_system_info().decode().split(":", 1)[-1].split("|"):
        name, _, value = entry.partition("=")
        if value.strip() == "1":
            yield name.strip()


def tensor_types(log: list[str]) -> Iterator[str]:
    """How many tensors have which type, from what llama.cpp says on loading."""
    for line in log:
        if "- type" in line:
            kind, count = line.split("- type", 1)[1].split(":", 1)
            yield f"{count.split()[0]} {kind.strip()}"


def main() -> None:
    """Serve the parent's requests."""
    handlers = Handlers()
    names = ("load", "prefill", "decode", "losses", "convert")
    serve({name: getattr(handlers, name) for name in names})


if __name__ == "__main__":
    main()
