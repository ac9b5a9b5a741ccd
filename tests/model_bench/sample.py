"""A report that no run made."""

from autoq.model_bench import Missing, Report

NAMES = {
    "bf16-eager": (95.0, 27.60),
    "bf16-compiled": (49.7, 27.60),
    "bf16-attention": (33.0, 27.60),
    "autoq-int8wo-stock": (26.0, 27.62),
    "autoq-int8wo": (8.9, 27.62),
    "autoq-int8wo-kv-int8": (8.4, 27.63),
    "autoq-fast": (7.4, 28.40),
    "torchao-int8": (36.0, 27.61),
    "torchao-int8-attention": (19.0, 27.61),
    "torchao-int4": (27.0, 29.50),
    "llamacpp-Q4_0": (10.1, 28.90),
    "llamacpp-Q4_1": (10.4, 27.60),
    "llamacpp-Q4_K_M": (10.9, 27.95),
    "llamacpp-Q8_0": (13.0, 27.61),
    "openvino-int8": (12.1, 27.66),
    "openvino-int4": (10.6, 30.10),
}


def row(name, time_ms, perplexity, **changes):
    return {
        "engine": name,
        "plan": "none",
        "phase": "decode",
        "batch": 1,
        "context": 512,
        "time_ms": time_ms,
        "low_ms": 0.95 * time_ms,
        "high_ms": 1.1 * time_ms,
        "measurements": 160,
        "tokens_per_s": 1000 / time_ms,
        "perplexity": perplexity,
        "weight_bytes": 134_000_000,
        "kv_bytes": 11_800_000,
        "peak_mb": 512.0,
        "bandwidth_share": 0.61,
        "version": "1",
        "isa": "avx2",
        "note": None,
    } | changes


def report(**changes):
    facts = {"model": "SmolLM2-135M", "context": 512, "steps": 32, "rounds": 5, "threads": 2, "bandwidth_gb_s": 21.5}
    parts = {"linear int8wo": 4.0, "attention": 2.0, "lm_head int8wo": 1.5, "Python and dispatch": 1.4}
    return Report(
        **{
            "facts": facts,
            "rows": [row(name, *figures) for name, figures in NAMES.items()],
            "breakdowns": [{"engine": "autoq-int8wo", "phase": "decode", "batch": 1, "wall_ms": 8.9, "parts": parts}],
            "missing": [Missing(name="llamacpp-Q2_K", reason="no .venv/peers/bin/python: make peers")],
            "failed": [Missing(name="openvino-int2", reason="load: ValueError: 2 bits")],
        }
        | changes
    )
