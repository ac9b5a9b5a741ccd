"""The least time a product can take: its weight's bytes at the machine's bandwidth, or its multiply-adds at a rate.

A row is a mapping with the columns listed in ``measure.COLUMNS``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
U8S8 = "u8s8"


def rate_name(dtype: str, *, int8: bool) -> str:
    """The oneDNN product whose rate bounds a scheme: of the activation's dtype, or u8s8 where it is int8."""
    return U8S8 if int8 else SHORT[dtype]


def roofline_us(weight_bytes: int, multiply_adds: int, *, bandwidth_gb_s: float, rate_gmac_s: float) -> float:
    """max(bytes / bandwidth, multiply-adds / rate).

    Args:
        weight_bytes: codes and scales.
        multiply_adds: M·N·K.
        bandwidth_gb_s: read bandwidth, 10⁹ bytes a second.
        rate_gmac_s: 10⁹ multiply-adds a second.

    Returns:
        Microseconds.
    """
    return max(weight_bytes / bandwidth_gb_s, multiply_adds / rate_gmac_s) / 1e3


def fill(rows: Iterable[Row], rates: Mapping[str, Mapping[str, float]]) -> None:
    """Write ``roofline_us`` into the rows that have a time.

    Args:
        rows: with ``bandwidth_gb_s`` of their own window.
        rates: threads (a string, as in JSON) → name → 10⁹ multiply-adds a second; without the one a row
            needs its roofline is None.
    """
    for row in rows:
        rate = rates.get(str(row["threads"]), {}).get(row.get("rate", ""))
        if row.get("time_us") is None or rate is None:
            row["roofline_us"] = None
            continue
        row["roofline_us"] = roofline_us(
            row["weight_bytes"],
            row["m"] * row["n"] * row["k"],
            bandwidth_gb_s=row["bandwidth_gb_s"],
            rate_gmac_s=rate,
        )
