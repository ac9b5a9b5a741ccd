"""The arithmetic of benchmarks/kernels.py: rooflines, figures, order and budget. No times."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def bench():
    """The parts of the benchmark, found beside its script."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        from kernel_bench import figures, measure, report, roofline, shapes
    finally:
        sys.path.remove(folder)
    return {"figures": figures, "measure": measure, "report": report, "roofline": roofline, "shapes": shapes}


def row(scheme="int8wo", engine="autoq", n=4096, k=4096, m=1, dtype="bfloat16", **values):
    return {
        "scheme": scheme, "engine": engine, "kernel": "", "m": m, "k": k, "n": n, "dtype": dtype, "threads": 2,
        "time_us": 1000.0, "mad_us": 1.0, "roofline_us": 900.0, "gbps": 18.0, "status": "ok", "reason": "",
        "layers": [], "bits": 8, "rate": "bf16", "weight_bytes": 16_793_600, "bandwidth_gb_s": 20.0, "error": 1e-3,
        "rounds": 5, "burst": 1,
    } | values  # fmt: skip


def document(*rows, **machine):
    about = {"name": "cpu", "isa": "", "caches": "", "torch": "", "date": "", "int32_exact": True}
    return {"machine": about | machine, "command": "", "rows": list(rows)}


def verdicts(bench, data):
    return {(one.line, one.scheme): one.verdict for one in bench["figures"].judge(data)}


def test_roofline_is_the_slower_of_reading_and_multiplying(bench):
    # int8, 4096 x 4096 with one float32 scale a row at 43 GB/s: 16793600 / 43e9 s = 390.5 µs of reading;
    # 16777216 multiply-adds a row at 300e9 a second: 55.9 µs each.
    of = bench["roofline"].roofline_us
    limits = {"bandwidth_gb_s": 43.0, "rate_gmac_s": 300.0}
    assert of(16_793_600, 16_777_216, **limits) == pytest.approx(390.5488, rel=1e-6)
    assert of(16_793_600, 8 * 16_777_216, **limits) == pytest.approx(447.3924, rel=1e-6)


def test_rows_get_the_roofline_of_their_own_rate_and_window(bench):
    reading = row(m=1, bandwidth_gb_s=20.0)
    multiplying = row("int8dq", m=512, rate="u8s8")
    without = row(m=1, rate="fp16")
    failed = row(status="wrong", time_us=None)
    bench["roofline"].fill([reading, multiplying, without, failed], {"2": {"bf16": 100.0, "u8s8": 400.0}})
    assert reading["roofline_us"] == pytest.approx(839.68)
    assert multiplying["roofline_us"] == pytest.approx(512 * 4096**2 / 400e9 * 1e6)
    assert without["roofline_us"] is None
    assert failed["roofline_us"] is None


def test_int8_activations_are_held_against_u8s8(bench):
    assert bench["roofline"].rate_name("bfloat16", int8=True) == "u8s8"
    assert bench["roofline"].rate_name("bfloat16", int8=False) == "bf16"
    assert bench["roofline"].rate_name("float32", int8=False) == "fp32"


def test_bandwidth_figure_counts_the_worst_shape(bench):
    line = "M = 1, large: int8wo, share of the read bandwidth"
    good = row(gbps=18.0)  # 0.90 of 20
    assert verdicts(bench, document(good))[line, "int8wo"] == "met"
    bad = row(n=11008, gbps=16.8)  # 0.84
    assert verdicts(bench, document(good, bad))[line, "int8wo"] == "MISSED"
    assert verdicts(bench, document())[line, ""] == "not measured"


def test_ratios_are_taken_within_one_cell(bench):
    line = "M = 64, large: weight-only over bf16 oneDNN"
    stock = row("none", "aten.linear", m=64, time_us=1000.0)
    elsewhere = row("none", "aten.linear", m=64, n=11008, time_us=1.0)
    assert verdicts(bench, document(row(m=64, time_us=1149.0), stock, elsewhere))[line, "int8wo"] == "met"
    assert verdicts(bench, document(row(m=64, time_us=1151.0), stock, elsewhere))[line, "int8wo"] == "MISSED"


def test_int4dq_is_judged_by_its_group(bench):
    line = "M = 512, large: int4dq over int8dq"
    base = row("int8dq", m=512, time_us=1000.0)
    rows = [row(f"int4dq(group_size={g},method=hqq)", m=512, time_us=1180.0) for g in (32, 64, 128)]
    found = verdicts(bench, document(base, *rows))
    assert [found[line, one["scheme"]] for one in rows] == ["met", "met", "MISSED"]


def test_small_shapes_are_held_against_atens_best_of_the_same_bits(bench):
    line = "M = 1, small: time over ATen's best for the same bits"
    ours = row(n=576, k=576, time_us=10.4)
    slow = row("int8wo", "aten._weight_int8pack_mm", n=576, k=576, time_us=20.0)
    best = row("int8dq", "aten._int_mm", n=576, k=576, time_us=10.0)
    other_bits = row("int4wo(group_size=64)", "aten._weight_int4pack_mm_for_cpu", n=576, k=576, time_us=1.0, bits=4)
    assert verdicts(bench, document(ours, slow, best, other_bits))[line, "int8wo"] == "met"
    assert verdicts(bench, document(ours | {"time_us": 10.6}, slow, best, other_bits))[line, "int8wo"] == "MISSED"


def test_errors_and_exact_sums_are_judged(bench):
    found = verdicts(bench, document(row(error=3.1e-3), int32_exact=False))
    assert found["bf16: relative RMS against float64", "int8wo"] == "MISSED"
    assert found["int32 sums are exact", "int8dq"] == "MISSED"
    assert verdicts(bench, document(row()))["bf16: relative RMS against float64", "int8wo"] == "met"


def test_figures_text_names_the_worst_cell_and_a_roofline_that_is_none(bench):
    rates = {"2": {"bf16": 10.0, "fp32": 60.0, "u8s8": 130.0}}
    text = bench["figures"].text(document(row(), row(n=11008, gbps=10.0), rates=rates))
    assert "1/2, 11008x4096 M=1" in text
    assert "bf16 rate is below its fp32 rate" in text


def test_figure_cells_come_first_and_heads_last(bench):
    shapes = bench["shapes"]
    cells = shapes.ordered_cells(shapes.shapes(), shapes.ROWS, ["bfloat16"], [2])
    assert len(cells) == len(set(cells)) == len(shapes.shapes()) * len(shapes.ROWS)
    quick = shapes.quick_cells(["bfloat16"], [2])
    assert set(cells[: len(quick)]) == set(quick)
    assert all(cell.n > 32768 for cell in cells[-3 * len(shapes.ROWS) :])


def test_shapes_are_those_of_the_models(bench):
    shapes = bench["shapes"]
    assert (14336, 4096) in shapes.shapes(["Llama-3-8B"])
    assert len(shapes.shapes(["SmolLM2-135M"])) == 5
    assert shapes.names(576, 576) == ["small square", "SmolLM2-135M q, o"]


def test_what_a_budget_leaves_out_is_listed(bench):
    shapes = bench["shapes"]
    cells = shapes.quick_cells(["bfloat16"], [1])
    ticks = iter((0.0, 0.0, 40.0, 61.0))
    visit = shapes.Visit(cells, 60.0, clock=lambda: next(ticks))
    assert list(visit) == cells[:2]
    assert visit.left_out == cells[2:]
    everything = shapes.Visit(cells, None)
    assert list(everything) == cells
    assert everything.left_out == []


def test_base_schemes_have_every_key_and_every_group_of_int4dq(bench):
    from autoq import candidates

    base = bench["shapes"].base_candidates()
    assert {one.key for one in base} == {one.key for one in candidates.ALL}
    assert len(set(base)) == len(base)
    assert {one.group_size for one in base if one.key == "int4dq"} == {32, 64, 128}


def test_of_a_heads_weight_only_base_schemes_are_measured_and_the_rest_is_listed(bench):
    from autoq import candidates

    shapes = bench["shapes"]
    chosen, left = shapes.candidates_of(shapes.Cell(49152, 576, 1, "bfloat16", 1), candidates.ALL)
    assert {*chosen} == {*shapes.base_candidates()}
    assert {*chosen, *left} == {*candidates.ALL}
    assert shapes.candidates_of(shapes.Cell(4096, 4096, 1, "bfloat16", 1), candidates.ALL)[1] == []


def test_a_rival_stands_in_only_with_as_many_bits_and_no_coarser_activations(bench):
    ours = row("fp6(format=e2m3)", bits=6)
    int4 = row("int4wo(group_size=64)", "aten._weight_int4pack_mm_for_cpu", bits=4, time_us=1.0)
    bare = row("int8dq", "aten._int_mm", rate="u8s8", time_us=2.0)
    int8 = row("int8wo", "aten._weight_int8pack_mm", time_us=3.0)
    stock = row("none", "aten.linear", bits=16, time_us=4.0)
    best = bench["report"].best_rival
    assert best(ours, [ours, int4, bare, int8, stock]) is int8
    assert best(row("int8dq", rate="u8s8"), [int4, bare, int8, stock]) is bare


def test_table_shows_failures_instead_of_times(bench):
    text = bench["report"].table(document(row(), row("sinq(bits=3,group_size=64)", status="wrong", time_us=None)))
    assert "1000 / 1.11" in text
    assert "wrong" in text


class Runner:
    max_burst = 32

    def __init__(self, us, first_us=0.0):
        self.us, self.first_us, self.calls = us, first_us, 0

    def time(self, calls):
        self.calls += calls
        return self.us


def test_rounds_call_fast_engines_in_bursts_and_slow_ones_seldom(bench):
    fast, slow, slower, slowest = Runner(20.0), Runner(1e5), Runner(6e5), Runner(3e6, first_us=2e6)
    times, bursts = bench["measure"].rounds({0: fast, 1: slow, 2: slower, 3: slowest}, budget_s=1.0)
    assert bursts == {0: 15, 1: 1, 2: 1, 3: 1}  # 300 µs
    assert [len(times[key]) for key in range(4)] == [50, 50, 3, 1]
    assert times[3] == [2e6]
    assert slowest.calls == 0
