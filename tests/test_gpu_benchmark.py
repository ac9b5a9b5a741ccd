"""The arithmetic, options and reports of benchmarks/gpu.py, and that it says why where there is no GPU. No times."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoq import candidates

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def bench():
    """The benchmark and its parts, found beside its script."""
    folder = str(SCRIPT.parent)
    sys.path.insert(0, folder)
    try:
        import gpu
        from gpu_bench import published, roofline, roofline_tables, run_checks, run_report, run_rivals, run_timing
    finally:
        sys.path.remove(folder)
    return {
        "gpu": gpu, "published": published, "roofline": roofline, "tables": roofline_tables, "checks": run_checks,
        "report": run_report, "rivals": run_rivals, "timing": run_timing,
    }  # fmt: skip


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environment,
        check=False,
    )


def test_one_row_is_bound_by_reading_or_by_issuing(bench):
    # int8wo 4096 x 4096: 4096² + 4·4096 bytes of weight, 2·(4096 + 4096) of x and y, at 85 % of 2039 GB/s; 4.5
    # instructions for each of 4096² weights on 108·128 lanes at 1.41 GHz, or 4 integer ones on half of those.
    roofline = bench["roofline"]
    int8wo = candidates.parse("int8wo")
    found = roofline.times(roofline.A100, int8wo, (4096, 4096), 1, instructions=roofline.Instructions(4.5, 1.0))
    assert found.read == pytest.approx((16_793_600 + 16_384) / (2039e9 * 0.85) * 1e6) == pytest.approx(9.699, abs=1e-3)
    assert found.issue == pytest.approx(3.873, abs=1e-3)
    assert found.total == found.read
    slow = roofline.times(roofline.A100, int8wo, (4096, 4096), 1, instructions=roofline.Instructions(30.0, 20.0))
    assert slow.total == slow.issue == pytest.approx(3.873 * 2 * 20 / 4.5, abs=1e-2)


def test_instructions_were_counted_for_every_scheme_and_device(bench):
    roofline = bench["roofline"]
    for device in roofline.DEVICES:
        for scheme in roofline.SCHEMES[1:]:
            issued, integer = roofline.instructions_of(device, candidates.parse(scheme))
            assert 1 < issued < 10
            assert 0 < integer < issued
        others = roofline.instructions_of(device, candidates.parse("sinq(bits=3,group_size=32)"))
        assert others == roofline.instructions_of(device, candidates.parse("sinq(bits=4,group_size=64)"))
        mix = roofline.instructions_of(device, candidates.parse("int4mix(group_size=128)"))
        assert mix == roofline.instructions_of(device, candidates.parse("int4wo-hqq(group_size=128)"))


def test_many_rows_are_bound_by_the_matrix_rate_of_their_type(bench):
    # 2·512·4096² operations at 60 % of 312 or 624·10¹² a second; int8 activations are read, written and read again.
    roofline = bench["roofline"]
    wide, narrow = (
        roofline.times(roofline.A100, candidates.parse(scheme), (4096, 4096), 512) for scheme in ("int8wo", "int8dq")
    )
    assert wide.total == wide.multiply == pytest.approx(91.77, abs=1e-2)
    assert narrow.total == narrow.multiply == pytest.approx(45.89, abs=1e-2)
    assert wide.issue == narrow.issue == 0
    more = roofline.work(candidates.parse("int8dq"), 4096, 4096, 512)
    assert more.activation_bytes == 2 * 512 * 8192 + 2 * 512 * 4096
    assert not roofline.work(candidates.parse("int8mix"), 4096, 4096, 1).int8
    assert roofline.work(candidates.parse("int8mix"), 4096, 4096, 32).int8


def test_an_unquantized_layer_has_no_instructions_of_ours(bench):
    roofline = bench["roofline"]
    assert roofline.times(roofline.H100, candidates.parse("none"), (4096, 4096), 1).issue == 0


def test_the_model_is_the_one_that_others_measured(bench):
    # torchao's README lists 15.01, 7.52 and 4.22 GB for bf16, int8wo and int4wo-64.
    published = bench["published"]
    assert published.linear_gb(16) == pytest.approx(15.01, abs=0.005)
    assert published.linear_gb(8) == pytest.approx(7.52, rel=0.003)
    assert published.linear_gb(4.5) == pytest.approx(4.22, abs=0.005)
    assert published.linear_gb(4.5, head_bits=16) == pytest.approx(4.977, abs=0.001)
    assert bench["roofline"].model_ms(bench["roofline"].A100, candidates.parse("none"), 1) == pytest.approx(
        8.66, abs=0.01
    )


def test_the_rest_of_a_token_follows_from_two_rows(bench):
    published, roofline = bench["published"], bench["roofline"]

    def row(name, ms, gigabytes, basis=False):
        return published.Published(
            device=roofline.A100,
            name=name,
            tokens_per_s=1e3 / ms,
            linear_gb=gigabytes,
            scheme="",
            source="",
            basis=basis,
        )

    # 2 ms and 0.6 ms a GB
    assert published.rest_of_two_ms(row("bf16", 11.0, 15.0), row("int8wo", 6.5, 7.5)) == pytest.approx(2.0)
    assert row("", 10.0, 2.039).rest_ms(1.0) == pytest.approx(9.0)
    assert row("", 10.0, 2.039).rest_ms(0.5) == pytest.approx(8.0)


def test_no_published_row_read_faster_than_its_datasheet(bench):
    published = bench["published"]
    for device in bench["roofline"].DEVICES:
        least, most = published.rest_range_ms(device)
        assert 0 < least < most
        shares = [
            row.linear_gb / (row.ms - most) * 1e3 / device.bandwidth_gb_s
            for row in published.PUBLISHED
            if row.device is device
        ]
        assert max(shares) == pytest.approx(1.0)


def test_predictions_are_ranges_and_fewer_bytes_are_faster(bench):
    published, roofline = bench["published"], bench["roofline"]
    order = ("int8wo", "fp6", "int4wo-hqq(group_size=64)", "int4wo-hqq(group_size=128)")
    for device in roofline.DEVICES:
        found = [published.tokens_per_s(device, candidates.parse(scheme)) for scheme in order]
        assert all(slow < fast for slow, fast in found)
        assert found == sorted(found)


def test_devices_go_by_the_names_of_their_driver(bench):
    roofline = bench["roofline"]
    names = {
        "NVIDIA A100-SXM4-80GB": roofline.A100,
        "NVIDIA A100 80GB PCIe": None,
        "NVIDIA H100 80GB HBM3": roofline.H100,
        "NVIDIA H100 PCIe": None,
        "NVIDIA GeForce RTX 4090": roofline.RTX_4090,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    }
    assert {name: roofline.device_named(name) for name in names} == names
    predicted = roofline.predicted_us("NVIDIA A100-SXM4-80GB", "int8wo", (4096, 4096), 1, torch.bfloat16)
    assert predicted == pytest.approx(9.699, abs=1e-3)
    assert roofline.predicted_us("NVIDIA L4", "int8wo", (4096, 4096), 1, torch.bfloat16) is None


def test_the_document_has_the_tables_of_this_code(bench):
    text = (ROOT / "docs" / "gpu.md").read_text()
    assert bench["tables"].put_into(text) == text, "run: python benchmarks/gpu.py --roofline docs/gpu.md"
    with pytest.raises(ValueError, match="no such lines"):
        bench["tables"].put_into("a page")


def test_options_have_defaults_that_depend_on_each_other(bench):
    parse, base = bench["gpu"].parse, [str(one) for one in bench["checks"].BASE]
    everything = parse([])
    assert everything.schemes == [str(one) for one in candidates.ALL]
    assert (everything.timed, everything.dtypes) == (base, ["bf16", "fp16"])
    assert parse(["--quick"]).schemes == base
    assert parse(["--quick"]).dtypes == ["bf16"]
    interpreted = parse(["--device", "cpu", "--check-only"])
    assert (interpreted.schemes, interpreted.dtypes) == (base, ["fp16"])
    named = parse(["--schemes", "fp6", "--shapes", "33x99", "64x128", "--m", "1,3", "--dtypes", "bf16"])
    assert named.schemes == named.timed == ["fp6(format=e3m2)"]
    assert (named.shapes, named.m, named.dtypes) == ([(33, 99), (64, 128)], [1, 3], ["bf16"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "times mean nothing"),
        (["--device", "cpu", "--check-only", "--dtypes", "bf16"], "multiplies bfloat16 wrongly"),
        (["--device", "tpu"], "cuda or cpu"),
        (["--schemes", "int2"], "int2"),
        (["--shapes", "4096"], "invalid"),
        (["--m", "0"], "invalid"),
        (["--dtypes", "fp32"], "invalid"),
    ],
)
def test_options_that_cannot_be_are_refused(bench, capsys, arguments, said):
    with pytest.raises(SystemExit):
        bench["gpu"].parse(arguments)
    assert said in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_what_was_checked_still():
    done = run("--quick", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("Nothing was run: torch ")
    assert "finds no GPU" in line
    assert "has choices" in line


def test_the_cpu_needs_the_interpreter():
    done = run("--check-only", "--device", "cpu", TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr


def test_the_prediction_needs_no_gpu(bench):
    done = run("--roofline", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0
    assert done.stdout == bench["tables"].markdown() + "\n"


def test_checks_run_in_the_interpreter(tmp_path):
    file = tmp_path / "checks.json"
    done = run(
        *("--check-only", "--device", "cpu", "--schemes", "int8wo", "--shapes", "33x99", "--m", "1,5"),
        *("--json", str(file)),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["checks"]
    assert {(row["m"], row["bias"]) for row in rows} == {(1, False), (1, True), (5, True)}
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["kernel"].startswith("triton.") and row["error"] <= 1e-3 for row in rows)
    assert any(row["kernel"].startswith("triton.gemv") for row in rows)


def test_cases_have_every_combination_once_and_a_bias_at_every_m(bench):
    found = bench["checks"].cases(["int8wo", "fp6"], [(64, 64), (33, 99)], (1, 2, 16), ["bf16", "fp16"])
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 5
    assert {case.m for case in found if case.bias} == {1, 2, 16}
    assert {case.m for case in found if not case.bias} == {1, 16}


def test_a_weight_is_repeated_to_its_height(bench):
    split = bench["timing"].split
    assert split(4096) == (4096, 1)
    assert split(28672) == (7168, 4)
    assert split(128256) == (8016, 16)


def test_four_bit_codes_of_rivals_are_near_the_weight(bench):
    rivals = bench["rivals"]
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(8, 256, generator=generator).bfloat16()
    problem = rivals.Problem(x=torch.eye(256).bfloat16(), part=part, times=2)
    codes = rivals._codes(problem, 64)
    assert int(codes.q.min()) == 0
    assert int(codes.q.max()) == 15
    step = codes.scale.double().repeat_interleave(64, 1)
    assert bool(((codes.w - part.double()).abs() <= 0.55 * step + 0.02).all())
    with pytest.raises(ValueError, match="no multiple of 96"):
        rivals._codes(problem, 96)


def test_rivals_that_are_absent_refuse_or_err_have_rows_with_reasons(bench):
    timing, rivals = bench["timing"], bench["rivals"]
    generator = torch.Generator().manual_seed(0)
    x, part = torch.randn(3, 64, generator=generator).half(), torch.randn(16, 64, generator=generator).half()
    problem = rivals.Problem(x=x, part=part, times=2)
    found = {(name, scheme): make for name, scheme, make in rivals.engines(problem)}
    row, call = timing._checked("cuBLAS", "none", found["cuBLAS", "none"])
    assert row["status"] == "ok"
    assert call().shape == (3, 32)
    row, call = timing._checked("tinygemm", "", found["aten._weight_int4pack_mm", "int4wo(group_size=64)"])
    assert (row["status"], row["reason"], call) == ("refused", "bfloat16 only", None)
    row, _ = timing._checked("", "", lambda: rivals.need("a_library_that_nobody_has"))
    assert row["status"] == "absent"
    assert "a_library_that_nobody_has" in row["reason"]
    right = found["cuBLAS", "none"]()
    wrong = dataclasses.replace(right, expected=1.1 * right.expected)
    row, call = timing._checked("", "", lambda: wrong)
    assert (row["status"], call) == ("wrong", None)


def test_a_cell_has_a_row_for_every_engine_and_times_for_those_that_are_right(bench):
    from autoq_kernels.triton.products import Choice

    class Tuner:
        def tune(self, weight, m, dtype, *, budget_s):
            return Choice(method="default")

    def in_turn(calls, *, budget_s, device):
        assert all(call().shape == (2, 96) for call in calls.values())
        return {name: [7.0, 9.0, 8.0] for name in calls}

    timing = bench["timing"]
    cell = timing.Cell(96, 64, 2, "bf16")
    rows = timing.Bench(
        torch.device("cpu"), name="a CPU", schemes=["none", "fp6(format=e3m2)"], tuner=Tuner(), time=in_turn,
        bandwidth_gb_s=1.0, seconds=0.0,
    ).rows(cell)  # fmt: skip
    found = {(row["engine"], row["scheme"]): row for row in rows}
    assert ("autoq, tuned", "none") not in found
    tuned = found["autoq, tuned", "fp6(format=e3m2)"]
    assert (tuned["status"], tuned["kernel"], tuned["time_us"], tuned["mad_us"]) == ("ok", "default", 8.0, 1.0)
    assert tuned["weight_bytes"] == 96 * 64 * 6 // 8 + 96 * 4
    assert tuned["over_cublas"] == 1.0
    assert found["cuBLAS", "none"]["time_us"] == 8.0
    default = found["autoq, default", "fp6(format=e3m2)"]
    assert default["status"] != "ok"  # it needs tensors on a GPU
    assert default["time_us"] is None
    assert {"torchao", "gemlite"} <= {row["engine"].partition(".")[0] for row in rows}


def timed(engine, scheme, time_us, **values):
    return {"engine": engine, "scheme": scheme, "kernel": "k", "status": "ok", "weight_bytes": 16_793_600} | (
        {"time_us": time_us, "mad_us": 0.1, "calls": 9} if time_us else {"status": "absent", "reason": "not installed"}
    ) | values  # fmt: skip


def test_rows_get_rates_and_ratios(bench):
    timing = bench["timing"]
    cell = timing.Cell(4096, 4096, 1, "bf16")
    rows = [timed("cuBLAS", "none", 20.0), timed("autoq, tuned", "int8wo", 10.0), timed("gemlite", "int8wo", None)]
    full = [timing.complete(row, cell, rows, 2000.0, "NVIDIA A100-SXM4-80GB") for row in rows]
    assert all(tuple(row) == timing.COLUMNS for row in full)
    ours = full[1]
    assert ours["gb_s"] == pytest.approx((16_793_600 + 16_384) / 10e-6 / 1e9)
    assert ours["bandwidth_share"] == pytest.approx(ours["gb_s"] / 2000)
    assert ours["over_cublas"] == pytest.approx(0.5)
    assert ours["over_predicted"] == pytest.approx(10 / 9.699, abs=1e-3)
    assert full[2]["time_us"] is None
    unknown = timing.complete(rows[1], cell, rows, 2000.0, "NVIDIA L4")
    assert unknown["over_predicted"] is None


def test_tables_show_times_failures_and_the_model_as_a_whole(bench):
    timing, roofline = bench["timing"], bench["roofline"]
    rows = []
    for layer in roofline.LLAMA_3_8B:
        cell = timing.Cell(layer.n, layer.k, 1, "bf16")
        found = [
            timed("cuBLAS", "none", 100.0),
            timed("autoq, tuned", "int8wo", 50.0),
            timed("gemlite", "int8wo", None),
        ]
        rows += [timing.complete(row, cell, found, 2000.0, "NVIDIA A100-SXM4-80GB") for row in found]
    machine = dict.fromkeys(("name", "architecture", "driver", "runtime", "pytorch", "triton", "date"), "?")
    text = bench["report"].tables({"machine": machine | {"bandwidth_gb_s": 2000.0}, "rows": rows})
    assert "28672x4096 (N x K): gate_up, M=1, bf16" in text
    assert text.count("not measured: gemlite: not installed") == 1
    # 129 products of 50 µs against 4.34 ms on paper
    assert "M=1 bf16, autoq, tuned int8wo: 6.45 ms, predicted 4.34" in text


def test_the_summary_of_checks_counts_and_names_failures(bench):
    case = {"scheme": "fp6(format=e3m2)", "n": 33, "k": 99, "m": 1, "dtype": "fp16", "bias": True}
    rows = [
        case | {"kernel": "triton.gemv m1", "status": "ok", "error": 2e-4, "reason": ""},
        case | {"kernel": "triton.gemv m1", "status": "wrong", "error": 0.5, "reason": "relative RMS 5.00e-01"},
        case | {"kernel": "", "status": "refused", "error": None, "reason": "no"},
    ]
    text = bench["report"].checks(rows)
    assert "WRONG fp6(format=e3m2) 33x99 M=1 fp16 bias triton.gemv m1: relative RMS 5.00e-01" in text
    assert text.splitlines()[1].split() == ["triton.gemv", "1", "1", "0", "0", "5.0e-01"]


def test_what_time_does_not_allow_is_listed(bench):
    options = bench["gpu"].parse(["--minutes", "0"])
    document = bench["gpu"].Run(options, torch.device("cpu"))
    assert not document.in_time("a cell")
    assert document.document["left_out"] == ["a cell"]
