"""The worker of OpenVINO: run by path with the Python of a side environment that has openvino and optimum-intel.

The exported graph is stepped with the plain runtime, over its own key-value cache (the graph's state).
"""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from worker_loop import serve
from worker_losses import LOSS_TOKENS, nll

Request = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
GRAPH = "openvino_model.xml"
FIRST = "first_logits"  # the input added to the graph: the position from which logits are computed
GROUP_SIZES = (128, 64, 32)  # 128 is optimum-intel's default; every layer's inputs must be a multiple


def only_some_logits(model: ov.Model) -> None:
    """Compute logits from the position in a new input on, as OpenVINO GenAI does for the last token.

    Raises:
        ValueError: if the logits do not come from a matrix product.
    """
    node = model.outputs[0].get_node()
    while node.get_type_name() in {"Result", "Convert", "Add"}:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul":
        raise ValueError(f"the logits come from {node.get_type_name()}, not from a MatMul")
    first = ops.parameter([1], np.int64)
    first.output(0).get_tensor().set_names({FIRST})
    end, one = np.array([np.iinfo(np.int64).max]), np.array([1])
    some = ops.slice(node.input_value(0), first, ops.constant(end), ops.constant(one), ops.constant(one))
    node.input(0).replace_source_output(some.output(0))
    model.add_parameters([first])
    model.validate_nodes_and_infer_types()


class Engine:
    """An exported causal language model, compiled for the CPU.

    Args:
        folder: what ``convert`` wrote.
        threads: threads that compute.
    """

    def __init__(self, folder: Path, *, threads: int) -> None:
        model = ov.Core().read_model(folder / GRAPH)
        only_some_logits(model)
        names = {name for one in model.inputs for name in one.get_names()}
        self._with_positions = "position_ids" in names
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self.compiled = ov.compile_model(model, "CPU", settings)
        self._request = self.compiled.create_infer_request()
        self._inputs: dict[str, Array] = {}

    def pass_over(self, tokens: Array, start: int, *, every: bool = False) -> Array:
        """Compute tokens int64 [rows, tokens] that stand at position ``start`` on.

        Returns:
            Logits of the last tokens, float32 [rows, 1, vocabulary], or of ``every`` one; the next pass overwrites it.
        """
        rows, count = tokens.shape
        inputs = {
            "input_ids": tokens,
            "attention_mask": np.ones((rows, start + count), np.int64),
            "beam_idx": np.arange(rows, dtype=np.int32),
            FIRST: np.array([0 if every else count - 1]),
        }
        if self._with_positions:
            inputs["position_ids"] = np.tile(np.arange(start, start + count), (rows, 1))
        # Not infer(inputs), which takes 0.3 ms longer; the tensors are views, so the arrays must live on.
        self._inputs = inputs
        for name, value in inputs.items():
            self._request.set_tensor(name, ov.Tensor(value, shared_memory=True))
        self._request.start_async()
        self._request.wait()
        logits: Array = self._request.get_output_tensor(0).data
        return logits

    def prefill(self, tokens: Array) -> Array:
        """Empty the cache and fill it with tokens int64 [rows, tokens]; logits of the last, [rows, 1, vocabulary]."""
        self._request.reset_state()
        return self.pass_over(tokens, 0)

    def losses(self, row: list[int]) -> Array:
        """Loss of each token after the first, float64 [tokens - 1] in nats."""
        tokens = np.array(row)
        self._request.reset_state()
        parts = []
        for start in range(0, len(row), LOSS_TOKENS):
            part, following = tokens[start : start + LOSS_TOKENS], tokens[start + 1 : start + 1 + LOSS_TOKENS]
            logits = self.pass_over(part[None], start, every=True)[0, : len(following)]
            parts.append(nll(logits, following))
        return np.concatenate(parts)

    def cache_bytes_per_token(self) -> int:
        """Of keys and values after a pass, without the scales of a quantized cache."""
        shapes = [one.state.shape for one in self._request.query_state()]  # [rows, heads, tokens, head's size]
        return sum(int(shape[1] * shape[3]) for shape in shapes) * int(self.cache_type().size)

    def cache_type(self) -> ov.Type:
        """Of keys and values."""
        return self.compiled.get_property("KV_CACHE_PRECISION")


class Handlers:
    """Answers the requests; one engine at a time."""

    def __init__(self) -> None:
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The one that is loaded."""
        if self._engine is None:
            raise ValueError("an engine is loaded before it is measured")
        return self._engine

    def load(self, request: Request) -> Request:
        """Open a ``folder`` that ``convert`` wrote."""
        begin, folder = time.perf_counter(), Path(request["folder"])
        self._engine = engine = Engine(folder, threads=int(request["threads"]))
        seconds = time.perf_counter() - begin
        engine.prefill(np.zeros((1, 1), np.int64))
        get = engine.compiled.get_property
        group = get("DYNAMIC_QUANTIZATION_GROUP_SIZE")
        isa = str(get("RUNTIME_REQUIREMENTS")).rpartition("isa=")[2]
        return {
            "version": f"openvino {ov.__version__.split('-')[0]}",
            "weight_bytes": (folder / GRAPH).with_suffix(".bin").stat().st_size,
            "kv_bytes_per_token": engine.cache_bytes_per_token(),
            "load_s": seconds,
            "isa": isa or None,
            "note": f"plain runtime; {engine.cache_type().to_string()} keys and values; activations quantized at run "
            f"time in groups of {group} where the instruction set has it; {weights_of(folder)}",
        }

    def prefill(self, request: Request) -> Request:
        """One timed pass over the prompts."""
        begin = time.perf_counter()
        self.engine.prefill(np.array(request["tokens"]))
        return {"seconds": time.perf_counter() - begin}

    def decode(self, request: Request) -> Request:
        """Greedy steps after the prompts, each timed alone; the cache cannot be rewound and is filled each time."""
        engine, tokens = self.engine, np.array(request["tokens"])
        following = engine.prefill(tokens).argmax(axis=2)
        seconds, found = [], []
        for step in range(int(request["steps"])):
            begin = time.perf_counter()
            following = engine.pass_over(following, tokens.shape[1] + step).argmax(axis=2)
            seconds.append(time.perf_counter() - begin)
            found.append(following)
        return {"seconds": seconds, "tokens": np.concatenate(found, axis=1).tolist() if found else []}

    def losses(self, request: Request) -> Request:
        """Mean loss of each row of tokens."""
        return {"losses": [float(self.engine.losses(row).mean()) for row in request["rows"]]}

    def convert(self, request: Request) -> Request:
        """Export a Hugging Face folder and compress its weights to ``bits``: 8, 4, or None to leave them."""
        begin, source, target = time.perf_counter(), Path(request["source"]), Path(request["target"])
        settings = compression(json.loads((source / "config.json").read_text()), request["bits"])
        part = target.with_name(f"{target.name}.part")
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as aside:  # its memory is none of the engine's
            aside.submit(export, source, part, settings).result()
        (part / "weights.json").write_text(json.dumps(settings))
        part.replace(target)
        size = (target / GRAPH).with_suffix(".bin").stat().st_size
        return {"seconds": time.perf_counter() - begin, "bytes": size}


def compression(config: Request, bits: int | None) -> Request:
    """Arguments of optimum-intel's weight compression, its defaults but for groups that the model's widths allow.

    Args:
        config: the model's.
        bits: of a weight, or None for no compression.

    Raises:
        ValueError: if no group size fits.
    """
    if bits is None:
        return {}
    if bits == 8:
        return {"bits": 8, "sym": False}
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    widths = (config["hidden_size"], config["intermediate_size"], heads * size)
    fitting = [group for group in GROUP_SIZES if not any(width % group for width in widths)]
    if not fitting:
        raise ValueError(f"no group size of {GROUP_SIZES} divides the widths {widths}")
    return {"bits": bits, "sym": False, "group_size": fitting[0], "ratio": 1.0}


def export(source: Path, target: Path, settings: Request) -> None:
    """Write OpenVINO's form of a Hugging Face folder; without settings with float32 weights."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    chosen = {"quantization_config": OVWeightQuantizationConfig(**settings)} if settings else {"load_in_8bit": False}
    model = OVModelForCausalLM.from_pretrained(
        source, export=True, compile=False, local_files_only=True, trust_remote_code=False, **chosen
    )
    model.save_pretrained(target)


def weights_of(folder: Path) -> str:
    """How ``convert`` stored the weights, for people."""
    file = folder / "weights.json"
    settings = json.loads(file.read_text()) if file.is_file() else None
    if settings is None:
        return "weights as found"
    if not settings:
        return "weights not compressed"
    groups = f"groups of {settings['group_size']}" if "group_size" in settings else "per channel"
    return f"NNCF int{settings['bits']} asymmetric, {groups}"


def main() -> None:
    """Serve the parent's requests."""
    handlers = Handlers()
    names = ("load", "prefill", "decode", "losses", "convert")
    serve({name: getattr(handlers, name) for name in names})


if __name__ == "__main__":
    main()
