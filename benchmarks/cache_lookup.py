"""How long the profile cache takes to look up what it knows.

    python benchmarks/cache_lookup.py [--rows 10000] [--repeats 20] [--json FILE]

Fills a cache in a temporary folder with the rows of that many products (12 schemes a shape), appended shape by shape
as ``tune`` does, then times ``ProfileCache.rows`` for one shape, for the 24 shapes of a small language model, and for
all rows. Each time is the median of the repeats in milliseconds, files read from the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autoq.cache import Fingerprint, ProfileCache

SCHEMES = 12
MODEL_SHAPES = 24
FILL = 20  # shapes appended at once


def shapes(count: int) -> list[tuple[int, int, int, str, bool]]:
    return [(1 << (i % 8), 64 * (1 + i // 8), 128, "bfloat16", False) for i in range(count)]


def measurements(shape: tuple[int, int, int, str, bool], fingerprint: Fingerprint) -> Iterator[dict[str, Any]]:
    m, k, n, dtype, bias = shape
    for i in range(SCHEMES):
        time_us = 10.0 + i + k / 64
        yield {
            **{"m": m, "k": k, "n": n, "dtype": dtype, "bias": bias},
            **{"scheme": f"int4wo-hqq(group_size={16 << i})", "kernel": "avx2.int4.gemv", "status": "ok"},
            **{"reason": "", "time_us": time_us, "time_low_us": time_us, "time_high_us": time_us},
            **{"baseline_us": 20.0, "ratio": time_us / 20, "bandwidth_gb_s": 25.0, "error": 1e-3},
            **{"weight_bytes": k * n // 2, "repeats": 30, "device": fingerprint.device_key, "origin": ""},
            **fingerprint.conditions("avx2.int4.gemv"),
        }


def median_ms(function: Callable[[], Any], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    here = Fingerprint.current()
    wanted = shapes(-(-arguments.rows // SCHEMES))
    with tempfile.TemporaryDirectory() as folder:
        cache = ProfileCache(Path(folder), here)
        for i in range(0, len(wanted), FILL):
            cache.append(row for shape in wanted[i : i + FILL] for row in measurements(shape, here))
        files = list(Path(folder).rglob("part-*.parquet"))
        known = cache.rows()
        found = {
            "rows": len(known),
            "parts": len(files),
            "bytes": sum(path.stat().st_size for path in files),
            "one_shape_ms": median_ms(lambda: cache.rows(wanted[:1]), arguments.repeats),
            "one_model_ms": median_ms(lambda: cache.rows(wanted[:MODEL_SHAPES]), arguments.repeats),
            "all_rows_ms": median_ms(cache.rows, arguments.repeats),
        }
    for name, value in found.items():
        print(f"{name:>14}  {value:,.1f}" if isinstance(value, float) else f"{name:>14}  {value:,}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found | {"device": here.to_json()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
