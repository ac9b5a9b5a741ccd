"""The Triton kernels compile for GPUs that are not here, and what is read from the result is right."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autoq_kernels.triton.launching import Launch

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

KERNELS = """
import triton
import triton.language as tl


@triton.jit
def scaled(x, head, bias, y, n, one, big, factor, codes_offset, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    code = tl.load(head + codes_offset + at)
    value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32) * code.to(tl.float32) * factor
    if bias is not None:
        value += bias
    tl.store(y + at + one + big, value)


@triton.jit
def spread(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    square = tl.load(x + i[:, None] * N + i[None, :]).to(tl.float32)
    tl.store(y + i[:, None] + N * i[None, :], tl.exp(square) + tl.sum(square, axis=0)[None, :])


@triton.jit
def dotted(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    square = tl.load(x + i[:, None] * N + i[None, :])
    tl.store(y + i[:, None] * N + i[None, :], tl.dot(square, square))
"""

PTX = """
	.file	1 "/somewhere" "kernel.py"
	.loc	1 7 3
	// begin inline asm
	.loc	1 7 3
	mov.u32 %r1, 0x0;
	.loc	1 8 3
	@%p1 ld.global.L1::evict_first.L2::cache_hint.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ], %rd2;
	// end inline asm
	.loc	1 9 5
	cp.async.cg.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x10, %r6;
	cp.async.ca.shared.global.L2::cache_hint [ %r5 + 0 ], [ %rd3 + 0 ], 0x8, %r6, %rd7;
	ld.global.b16 	%rs1, [%rd4];
	ld.param.b64 	%rd5, [kernel_param_0];
	ld.shared.v4.b32 {%r7, %r8, %r9, %r10}, [%r11];
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1}, %rd8, %rd9;
"""

AMD = """
	.file	1 "/somewhere" "kernel.py"
kernel:
	.loc	1 7 3
	s_load_dwordx4 s[4:7], s[0:1], 0x0
.LBB0_1:
	buffer_load_dwordx4 v[2:5], v7, s[4:7], 0 offen
	global_load_ushort v1, v[2:3], off
	v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
	s_cbranch_scc1 .LBB0_1
	s_endpgm
	.section	.rodata,"a",@progbits
    .private_segment_fixed_size: 8
    .sgpr_spill_count: 2
    .vgpr_count:     133
    .vgpr_spill_count: 5
"""

SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.EF.128 R4, [R2.64] ;
        /*0020*/              @!P0 STL [R1], R4 ;
        /*0030*/                   LDL R5, [R1] ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
        /*0070*/                   NOP;
"""

TTGIR = """
#loc = loc("/a/kernel.py":5:1)
  tt.func public @k(%x: !tt.ptr<bf16> loc("x"(#loc)), %head: !tt.ptr<i8> loc("h"(#loc)), %codes_offset: i32) {
    %base = tt.addptr %head, %codes_offset : !tt.ptr<i8>, i32 loc(#loc4)
    %scale = tt.addptr %head, %c0 : !tt.ptr<i8>, i32 loc(#loc4)
    %acc:2 = scf.for %i = %c0 to %n step %c1 iter_args(%sum = %zero, %at = %base) -> (f32, !tt.ptr<i8>)  : i32 {
      %place = tt.splat %at : !tt.ptr<i8> -> tensor<8x!tt.ptr<i8>> loc(#loc4)
      %w = tt.load %place : tensor<8x!tt.ptr<i8>> loc(#loc3)
      %late = tt.addptr %x, %w : !tt.ptr<bf16>, i32 loc(#loc4)
      %v = tt.load %late : tensor<8x!tt.ptr<bf16>> loc(#loc4)
      %s = tt.load %scale : tensor<8x!tt.ptr<i8>> loc(#loc4)
    } loc(#loc4)
#loc1 = loc("/a/decode.py":31:12)
#loc2 = loc("/a/kernel.py":7:3)
#loc3 = loc(callsite(#loc5 at #loc2))
#loc4 = loc("/a/kernel.py":9:5)
#loc5 = loc("w"(#loc1))
"""


@pytest.fixture(scope="module")
def proof():
    """The parts of the proof, found beside its script."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from gpu_bench import (
            proof_cases,
            proof_checks,
            proof_compile,
            proof_inspect,
            proof_loads,
            proof_pool,
            proof_report,
            proof_targets,
        )
    finally:
        sys.path.remove(str(BENCHMARKS))
    return SimpleNamespace(
        cases=proof_cases, checks=proof_checks, report=proof_report, compile=proof_compile, inspect=proof_inspect,
        loads=proof_loads, pool=proof_pool, targets=proof_targets.ARCHITECTURES,
    )  # fmt: skip


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Small kernels, in a module that a child process can import too."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("under the interpreter there is no compiler")
    (tmp_path / "small_kernels.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "small_kernels", raising=False)
    import small_kernels

    yield small_kernels
    del sys.modules["small_kernels"]


def launch(kernel, arguments, *, warps=4, **constants):
    return Launch(kernel=kernel, grid=(1, 1, 1), arguments=arguments, constants=constants, warps=warps)


def scaled_launch(kernels, **changed):
    bytes_ = torch.empty(1 << 20, dtype=torch.uint8, device="meta")
    arguments = {
        "x": torch.empty(4096, dtype=torch.bfloat16, device="meta"), "head": bytes_, "bias": None,
        "y": torch.empty(4096, dtype=torch.float16, device="meta"), "n": 4095, "one": 1, "big": 1 << 40,
        "factor": 1.0, "codes_offset": 128,
    }  # fmt: skip
    return launch(kernels.scaled, arguments | changed, B=2048)


def results(proof, jobs, tmp_path):
    """What a child process reads from each job, by name."""
    rows = {}
    proof.pool.run(
        [(name, job, True) for name, job in jobs.items()],
        processes=2, cache=None, progress=lambda key, row, kept: rows.update({key: row}),
    )  # fmt: skip
    return rows


def test_a_launch_is_compiled_for_what_the_jit_would_see(proof, kernels):
    job = proof.compile.job(scaled_launch(kernels), proof.targets["sm_80"])
    aligned = [["tt.divisibility", 16]]
    assert job.signature == {
        "x": "*bf16", "head": "*u8", "bias": "constexpr", "y": "*fp16", "n": "i32", "one": "constexpr", "big": "i64",
        "factor": "fp32", "codes_offset": "i32", "B": "constexpr",
    }  # fmt: skip
    assert job.constants == {(2,): None, (5,): 1, (9,): 2048}
    known = {at: value for at, value in job.attributes.items() if value}
    assert known == {(0,): aligned, (1,): aligned, (3,): aligned, (6,): aligned, (8,): aligned}
    assert job.options == {"enable_fp_fusion": True, "num_warps": 4, "num_stages": 1}


def test_a_view_that_starts_between_multiples_of_16_bytes_is_not_taken_for_aligned(proof, kernels):
    shifted = torch.empty(4097, dtype=torch.bfloat16, device="meta")[1:]
    job = proof.compile.job(scaled_launch(kernels, x=shifted), proof.targets["sm_80"])
    assert not job.attributes[0,]


def test_amd_learns_which_tensors_32_bits_can_address(proof, kernels):
    large = torch.empty(1 << 31, dtype=torch.float16, device="meta")
    job = proof.compile.job(scaled_launch(kernels, y=large), proof.targets["gfx942"])
    assert ["tt.pointer_range", 32] in job.attributes[0,]
    assert ["tt.pointer_range", 32] not in job.attributes[3,]


def test_equal_launches_have_one_hash_and_others_another(proof, kernels):
    def key(architecture="sm_80", **changed):
        return proof.compile.job(scaled_launch(kernels, **changed), proof.targets[architecture]).key()

    assert key() == key() == key(n=4097)
    assert len({key(), key(n=4096), key(one=2), key("sm_89"), key(factor=None)}) == 5


def test_loads_in_ptx(proof):
    found = proof.loads.loads(PTX)
    assert found == [
        (16, ("kernel.py", 7, 3)), (16, ("kernel.py", 9, 5)), (8, ("kernel.py", 9, 5)), (2, ("kernel.py", 9, 5)),
    ]  # fmt: skip
    assert proof.loads.widths(found) == {2: 1, 8: 1, 16: 2}
    assert proof.loads.widths(found, frozenset({("kernel.py", 7, 3)})) == {16: 1}


def test_matrix_instructions_by_name(proof):
    assert proof.inspect.matrix_instructions(PTX) == {"wgmma": 1}
    assert proof.inspect.matrix_instructions(AMD) == {"v_mfma": 1}
    assert proof.inspect.matrix_instructions("\tmma.sync.aligned.m16n8k16.row.col.f32\n" * 2) == {"mma.sync": 2}
    assert proof.inspect.matrix_instructions("@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 ]") == {"tcgen05.mma": 1}


def test_amd_assembly(proof):
    assert proof.loads.widths(proof.loads.loads(AMD)) == {2: 1, 16: 1}
    assert proof.inspect.amd_usage(AMD) == {"registers": 133, "spilled": 5, "scalar_spilled": 2, "stack_bytes": 8}
    code = proof.inspect.amd_instructions(AMD)
    assert proof.inspect.counts(code) == {"instructions": 6, "loop_instructions": 4}


def test_sass(proof):
    code = proof.inspect.sass_instructions(SASS)
    assert [name for _, name, _ in code] == ["LDC", "LDG.E.EF.128", "STL", "LDL", "BRA", "EXIT"]
    assert proof.inspect.counts(code) == {"instructions": 6, "loop_instructions": 4}
    usage = "Function k:\n  REG:158 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:976 TEXTURE:0"
    assert proof.inspect.nvidia_usage(usage) == {"registers": 158, "stack_bytes": 24, "scalar_spilled": 0}


def test_weight_loads_are_those_whose_address_depends_on_the_offset(proof):
    """Through a loop's carried pointer; not by way of loaded values, nor by the buffer's other parts."""
    assert proof.loads.places_reading(TTGIR, ("codes_offset",)) == {("decode.py", 31, 12)}
    assert proof.loads.places_reading(TTGIR, ("head",)) == {("decode.py", 31, 12), ("kernel.py", 9, 5)}


def test_what_a_child_process_finds(proof, kernels, tmp_path):
    square = {
        "x": torch.empty(64, 64, dtype=torch.float16, device="meta"),
        "y": torch.empty(64, 64, dtype=torch.float32, device="meta"),
    }
    sm_80, gfx942 = proof.targets["sm_80"], proof.targets["gfx942"]
    job = proof.compile.job
    found = results(
        proof,
        {
            "plain": job(scaled_launch(kernels), sm_80),
            "shifted": job(scaled_launch(kernels, codes_offset=129), sm_80),
            "amd": job(scaled_launch(kernels), gfx942),
            "spilling": job(launch(kernels.spread, square, warps=1, N=64), sm_80, maxnreg=32),
            "dotted": job(launch(kernels.dotted, square, N=64), sm_80),
            "wrong": job(launch(kernels.dotted, square, N=63), sm_80),
        },
        tmp_path,
    )
    assert found["plain"]["weight_loads"] == {16: 1}
    assert found["plain"]["matrix"] == {}
    assert found["plain"]["spilled"] == found["plain"]["stack_bytes"] == 0
    assert found["shifted"]["weight_loads"] == {1: 16}
    assert found["amd"]["weight_loads"] == {16: 1}  # 2048 bytes among 128 threads
    assert 0 < found["amd"]["registers"] < 128
    assert "error" not in found["spilling"], found["spilling"]
    assert found["spilling"]["spilled"] > 0
    assert found["spilling"]["stack_bytes"] > 0
    assert found["dotted"]["matrix"].keys() == {"mma.sync"}
    assert found["dotted"]["shared_bytes"] > 0
    assert "power of 2" in found["wrong"]["error"]


def test_a_compiler_that_ends_its_process_is_a_row_with_a_reason(proof, kernels, tmp_path):
    (tmp_path / "deadly.py").write_text("import os\nos._exit(134)\n")
    good = proof.compile.job(scaled_launch(kernels), proof.targets["sm_80"])
    fields = {name: getattr(good, name) for name in good.__slots__}
    deadly = type(good)(**fields | {"module": "deadly"})
    found = results(proof, {"deadly": deadly, "good": good}, tmp_path)
    assert "134" in found["deadly"]["error"]
    assert "error" not in found["good"]


def test_results_are_kept_and_not_made_again(proof, kernels, tmp_path):
    job = proof.compile.job(scaled_launch(kernels), proof.targets["sm_80"])
    rows = []
    for _ in range(2):
        proof.pool.run(
            [(job.key(), job, False)], processes=1, cache=tmp_path / "kept",
            progress=lambda key, row, kept: rows.append((row["registers"], kept)),
        )  # fmt: skip
    assert [kept for _, kept in rows] == [False, True]
    assert rows[0][0] == rows[1][0]


def row(**changed):
    return {
        "triton": "3.9.0", "architecture": "sm_90", "kernel": "gemm_tile", "family": "gemm", "main": True,
        "default": True, "bits": 4, "k": 4096, "spilled": 0, "stack_bytes": 0, "scalar_spilled": 0,
        "shared_bytes": 1024, "matrix": {"wgmma": 8}, "weight_loads": {"16": 8},
    } | changed  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "check"),
    [
        ({"error": "PTXASError: no"}, "compiles"),
        ({"spilled": 2}, "spills"),
        ({"stack_bytes": 8}, "spills"),
        ({"shared_bytes": 227 * 1024 + 1}, "shared_memory"),
        ({"architecture": "sm_89", "matrix": {"mma.sync": 1}, "shared_bytes": 100 * 1024}, "shared_memory"),
        ({"matrix": {"mma.sync": 16}}, "matrix"),
        ({"matrix": {}}, "matrix"),
        ({"family": "gemv"}, "matrix"),
        ({"main": False}, "matrix"),
        ({"weight_loads": {"8": 8}}, "width"),
        ({"weight_loads": {}}, "width"),
        ({"bits": 8, "weight_loads": {"16": 8, "8": 1}}, "width"),
        ({"bits": 6, "weight_loads": {"16": 8, "8": 9}}, "width"),
    ],
)
def test_every_check_can_fail(proof, changed, check):
    assert [name for name, _ in proof.checks.failures(row(**changed))] == [check]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"default": False, "spilled": 2, "stack_bytes": 8},
        {"scalar_spilled": 3},
        {"family": "gemv", "matrix": {}},
        {"family": "dequantize", "matrix": {}, "weight_loads": {}},
        {"architecture": "gfx942", "matrix": {"v_mfma": 1}},
        {"k": 4099, "weight_loads": {"1": 8}},
        {"bits": 6, "weight_loads": {"16": 8, "8": 8}},
        {"bits": 5, "weight_loads": {"16": 8, "4": 8}},
        {"bits": 3, "weight_loads": {"8": 8, "4": 8}},
    ],
)
def test_what_passes_the_checks(proof, changed):
    assert proof.checks.failures(row(**changed)) == []


def test_a_known_exception_covers_its_own_failure_only(proof):
    excuse = proof.checks.KnownFailure(
        check="matrix", architecture="sm_100", triton="3.9", kernel="gemm_tile", where={"dynamic": True}, reason="why"
    )
    covered = row(architecture="sm_100", dynamic=True, matrix={"mma.sync": 1})
    others = [
        covered | {"dynamic": False},
        covered | {"triton": "3.10.0"},
        covered | {"spilled": 1, "matrix": {"tcgen05.mma": 1}},
    ]
    failed, known = proof.checks.judged([covered, *others], [excuse])
    assert [one for one, _, _ in known] == [covered]
    assert [one for one, _, _ in failed] == others


def test_the_whole_space_of_the_schemes_is_compiled(proof):
    from autoq_kernels.triton import configs

    cases = list(proof.cases.chosen())
    found = {(one.variant.scheme, one.config) for one in cases if one.variant.main and one.dtype == "bf16"}
    main = [one for one in proof.cases.variants() if one.main]
    assert [one.scheme for one in main] == ["int8wo", "int4wo-hqq", "sinq", "fp6-e3m2", "int8dq", "int4dq"]
    wanted = {
        (one.scheme, config)
        for one in main
        for nk in proof.cases.SHAPES_NK
        for m in (1, 2, 4, 5, 16, 17, 64, 100, 256, 512, 2048, 4096)
        for config in configs.space(one.form(*nk), m)
    }
    assert wanted - found == set()


def test_a_sample_depends_on_its_seed_alone(proof):
    def case(m, default):
        job = SimpleNamespace(architecture=SimpleNamespace(name="sm_80"))
        variant = SimpleNamespace(label=f"v{m}", column=False, main=True)
        launch = SimpleNamespace(arguments={})
        one = SimpleNamespace(
            variant=variant, dtype="bf16", n=6144, k=4096, m=m, kernel="k", config="c", default=default, launch=launch
        )
        return job, [one]

    found = {f"{m % 7}{m}": case(m, m == 1) for m in range(1, 40)}
    renamed = dict(reversed([(f"other {key}", value) for key, value in found.items()]))
    first = proof.cases.sampled(found, 5, 0)
    assert first[0] == "11"  # the typical default
    assert len(set(first)) == 6
    assert [f"other {key}" for key in first] == proof.cases.sampled(renamed, 5, 0)
    assert first != proof.cases.sampled(found, 5, 1)


def test_the_report_lists_what_failed_and_shows_both_versions(proof):
    columns = {
        "scheme": "int4wo-hqq b4 g64", "dtype": "bf16", "m": 64, "n": 6144, "config": "gemm m16", "bias": False,
        "registers": 71, "loop_instructions": 512, "step_weights": 8192, "warps": 4, "group": 64, "seconds": 1.0,
    }  # fmt: skip
    old = row(**columns) | {"triton": "3.7.1", "registers": 93, "shared_bytes": 1 << 20}
    document = {"rows": [row(**columns), old], "about": ["All of it."], "date": "2026-01-01", "command": "make x"}
    text = proof.report.report(document)
    assert "Triton 3.9.0 and 3.7.1" in text
    assert "## Failed checks: 1" in text
    assert "1048576 bytes of shared memory, the limit is 232448" in text
    assert "| int4wo-hqq b4 g64 | 64 | m16 | sm_90 | 71 / 93 | 0 | 1.0 / 1024.0 | 8×16 | 8 wgmma | 8.00 |  |" in text


@pytest.mark.slow
def test_default_configurations_and_a_sample_of_the_others(tmp_path):
    command = [
        sys.executable, str(BENCHMARKS / "gpu_proof.py"), "--sample", "24", "--seed", "0", "--jobs", "2",
        "--cache", str(tmp_path / "results"), "--json", str(tmp_path / "rows.json"),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "triton")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    families = {(one["family"], one["architecture"]) for one in rows if one["main"] and one["default"]}
    names = {name for _, name in families}
    assert families == {(family, name) for family in ("gemv", "gemm", "dequantize") for name in names}
    assert len(names) == 6
    assert len(rows) >= 6 * 16 + 24  # the typical defaults of six architectures, and the sample
    assert not all(one["default"] for one in rows)
