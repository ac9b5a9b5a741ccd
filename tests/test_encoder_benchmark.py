"""The arithmetic of benchmarks/encoder.py: embeddings, cosines, ratios and the table. No times, no model."""

import sys
from pathlib import Path

import pytest
import torch

from autoq.profiler.timing import Timing


@pytest.fixture(scope="module")
def bench():
    """The benchmark, found in its folder."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import encoder
    finally:
        sys.path.remove(folder)
    return encoder


def test_pooling_leaves_padding_out(bench):
    hidden = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [100.0, -100.0]]])
    found = bench.pooled(hidden, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8]], dtype=torch.float64))


def test_cosines_are_of_pairs(bench):
    one = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(bench.cosines(one, torch.tensor([[0.0, 1.0], [0.6, 0.8]])), torch.tensor([0.0, 1.0]))


def test_paragraphs_are_neither_empty_nor_headings(bench):
    assert bench.paragraphs(" = Title = \n \n A line . \n = = Part = = \n Another . \n") == ["A line .", "Another ."]


def test_engines_are_stock_and_quantized_with_both_attentions(bench):
    found = [str(one) for one in bench.engines(["none", "int8dq"], ["bfloat16"])]
    assert found == [
        "none, float32, sdpa",
        "none, float32, autoq",
        "none, bfloat16, sdpa",
        "none, bfloat16, autoq",
        "int8dq, bfloat16, sdpa",
        "int8dq, bfloat16, autoq, fused",
    ]


def test_ratios_are_over_stock_attention(bench):
    times = {
        name: Timing.of([us])
        for name, us in {"none, float32, sdpa": 90.0, "none, bfloat16, sdpa": 150.0, "x": 60.0}.items()
    }
    assert bench.ratios(times, "x") == {"over_bfloat16": 2.5, "over_faster": 1.5}


def test_the_table_has_a_line_per_engine(bench):
    row = {
        "scheme": "int8dq", "dtype": "float32", "attention": "autoq", "fused": True, "time_ms": 60.0, "low_ms": 59.0,
        "high_ms": 61.0, "over_bfloat16": 2.5, "over_faster": 1.5, "cosine": 0.9991, "least_cosine": 0.998,
    }  # fmt: skip
    lines = bench.table([row, row]).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == [
        "int8dq,",
        "float32,",
        "autoq,",
        "fused",
        "60.0",
        "(59.0-61.0)",
        "2.50",
        "1.50",
        "0.99910",
        "0.99800",
    ]
