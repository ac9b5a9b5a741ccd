import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autoq import candidates
from autoq.cache import Fingerprint
from autoq.candidates import Candidate
from autoq.errors import CacheError, InputError
from autoq.profiler import EndToEnd, Timing, fit_latency, interleaved, isolated_times, profile, shapes_of
from autoq.profiler import end_to_end as end_to_end_module
from autoq.profiler import gpu as gpu_module
from autoq.profiler import isolated as isolated_module
from autoq.profiler.end_to_end import UNQUANTIZED, device_wait, repeated_blocks
from autoq.profiler.gpu import Gpu, bandwidth_gb_s
from autoq.scheme import Scheme
from autoq.shadow import PackedStore
from autoq.workload import LayerInfo, LinearCall, Phase, PhaseInfo, Workload
from autoq_kernels.tolerance import TOLERANCE

NONE, INT8 = candidates.parse("none"), candidates.parse("int8wo")
SCHEMES = [NONE.scheme, INT8.scheme]
HERE = Fingerprint.current()


def workload(phases=("prefill", "decode")):
    layer = {"dtype": "bfloat16", "device": "cpu", "bias": False}
    return Workload(
        layers=(
            LayerInfo(name="a", k=64, n=64, **layer),
            LayerInfo(name="b", k=64, n=64, **layer),
            LayerInfo(name="never", k=32, n=32, **layer),
            LayerInfo(name="left", k=64, n=64, reason="left alone", **layer),
        ),
        calls=tuple(
            LinearCall(layer=name, phase=phase, m=16 if phase == "prefill" else 1, dtype="bfloat16", count=1)
            for phase, name in itertools.product(phases, ("a", "b", "left"))
        ),
        phases=tuple(PhaseInfo(name=phase, calls=1 if phase == "prefill" else 10) for phase in phases),
    )


def test_quantiles_are_of_the_measurements():
    timing = Timing.of([float(one) for one in range(1, 12)])
    assert (timing.median_us, timing.low_us, timing.high_us, timing.repeats) == (6, 2, 10, 11)
    with pytest.raises(InputError):
        Timing.of([])


def test_rounds_are_interleaved_and_the_first_is_not_counted():
    order = []
    found = interleaved(
        {name: lambda name=name: order.append(name) for name in "ab"}, budget_s=0, min_rounds=3, prepare=None
    )
    assert order == list("ab" * 4)
    assert {name: timing.repeats for name, timing in found.items()} == {"a": 3, "b": 3}


def test_each_shape_is_measured_once():
    assert [(one.m, one.k, one.n) for one in shapes_of(workload())] == [(1, 64, 64), (16, 64, 64)]


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(isolated_module, "_SECONDS_PER_SHAPE", 0.0)
    monkeypatch.setattr(isolated_module, "_MAX_COPIES", 2)


def test_a_profile_has_one_row_per_shape_and_scheme_and_measures_nothing_twice():
    kept = []
    rows = profile(workload(), [NONE, INT8], fingerprint=HERE, keep=kept.append)
    assert len(rows) == 4
    assert {row["status"] for row in rows} == {"ok"}
    int8 = next(row for row in rows if row["scheme"] == "int8wo" and row["m"] == 1)
    assert int8["weight_bytes"] == 64 * 64 + 64 * 4
    assert 0 < int8["time_low_us"] <= int8["time_us"] <= int8["time_high_us"]
    assert int8["ratio"] == pytest.approx(int8["time_us"] / int8["baseline_us"])
    assert int8["error"] < TOLERANCE[torch.bfloat16]
    assert "int8" in int8["kernel"]
    assert len(kept) == 2  # one call per finished shape
    kept.clear()
    again = profile(workload(), [NONE, INT8], fingerprint=HERE, known=rows, keep=kept.append)
    assert kept == []
    assert again == rows
    profile(workload(), [NONE, INT8], fingerprint=replace(HERE, torch="another"), known=rows, keep=kept.append)
    assert len(kept) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_none_is_measured_in_the_kernel_it_runs_beside_the_stock_layer(dtype):
    recorded = workload()
    typed = {
        "layers": tuple(replace(layer, dtype=dtype) for layer in recorded.layers),
        "calls": tuple(replace(call, dtype=dtype) for call in recorded.calls),
    }
    rows = profile(replace(recorded, **typed), [NONE, INT8], fingerprint=HERE)
    found = [row for row in rows if row["scheme"] == "none"]
    assert len(found) == 2
    for row in found:
        assert row["status"] == "ok"
        assert row["weight_bytes"] == 64 * 64 * getattr(torch, dtype).itemsize
        assert row["ratio"] == row["time_us"] / row["baseline_us"]
        if dtype == "float32":
            assert (row["kernel"], row["ratio"], row["error"]) == ("stock", 1.0, 0.0)
        else:
            short = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
            assert row["kernel"].endswith(f".{short}.gemv")
            assert 0 < row["error"] < {"bfloat16": 3e-3, "float16": 4e-4}[dtype]


def test_none_is_the_stock_layer_without_a_compiler(monkeypatch):
    monkeypatch.setattr("autoq.candidates.none.load_cpu_kernels", lambda: False)
    rows = profile(workload(("decode",)), [NONE], fingerprint=HERE)
    assert [(row["kernel"], row["ratio"]) for row in rows] == [("stock", 1.0)]


def test_a_mix_is_measured_on_the_recorded_rows_by_the_kernel_of_its_side():
    """Row counts are never rounded: 16 rows are below a switch at 32 and not below one at 16."""
    names = ("int8wo", "int8dq", "int8mix(m_switch=16)", "int8mix(m_switch=32)")
    rows = profile(workload(("prefill",)), [candidates.parse(name) for name in names], fingerprint=HERE)
    found = {row["scheme"]: (row["m"], row["status"], row["error"], row["kernel"]) for row in rows}
    assert found["int8mix(m_switch=16)"] == found["int8dq"]
    assert found["int8mix(m_switch=32)"] == found["int8wo"]
    assert found["int8wo"][:2] == found["int8dq"][:2] == (16, "ok")
    assert found["int8wo"][2:] != found["int8dq"][2:]


class Broken(type(INT8)):
    key = "broken"

    def linear(self, x, p, bias=None):
        return 2 * super().linear(x, p, bias)


class Crashing(type(INT8)):
    key = "crashing"

    def linear(self, x, p, bias=None):
        raise RuntimeError("no such kernel")


class Unable(type(INT8)):
    key = "unable"

    def why_not(self, op):
        return "not today"


@pytest.mark.parametrize(
    ("candidate", "status", "reason"),
    [
        (Broken(), "wrong", "relative RMS"),
        (Crashing(), "error", "no such kernel"),
        (Unable(), "unsupported", "not today"),
    ],
)
def test_a_failure_is_a_row_with_its_reason_and_no_time(candidate: Candidate, status, reason):
    rows = profile(workload(("decode",)), [NONE, candidate], fingerprint=HERE)
    row = next(row for row in rows if row["scheme"] == candidate.key)
    assert row["status"] == status
    assert reason in row["reason"]
    assert "time_us" not in row or row["time_us"] is None
    times = isolated_times(workload(("decode",)), rows, [NONE.scheme, candidate.scheme])
    assert {scheme for _, scheme, _ in times} == {NONE.scheme}


def measured(base=100.0, ratio=0.5, none_ratio=1.0):
    shared = {"k": 64, "n": 64, "dtype": "bfloat16", "bias": False, "status": "ok"}
    return [
        shared | {"m": m, "scheme": str(scheme), "time_us": base * m * r, "baseline_us": base * m, "ratio": r}
        for m, (scheme, r) in itertools.product((1, 16), zip(SCHEMES, (none_ratio, ratio), strict=True))
    ]


@pytest.mark.parametrize("none_ratio", [1.0, 0.75])
def test_isolated_times_are_ratios_on_one_baseline(none_ratio):
    """The stock layer's time, whatever kernel ``none`` runs in."""
    times = isolated_times(workload(), measured(none_ratio=none_ratio), SCHEMES)
    assert times["a", INT8.scheme, "decode"] == 50
    assert times["b", NONE.scheme, "prefill"] == 1600 * none_ratio
    assert not [name for name, _, _ in times if name in ("never", "left")]
    with pytest.raises(CacheError, match="no row"):
        isolated_times(workload(), measured()[:2], SCHEMES)
    failed = [row | {"status": "wrong", "reason": "it is off"} for row in measured()]
    with pytest.raises(CacheError, match="it is off"):
        isolated_times(workload(), failed, SCHEMES)


def test_the_latency_model_meets_uniform_plans_and_interpolates_mixed_ones():
    isolated = isolated_times(workload(), measured(), SCHEMES)

    # Truth: 300 µs outside the layers, and layers that take 0.8 of their isolated time, int8 ones 0.9.
    def truth(plan, phase):
        factors = {NONE.scheme: 0.8, INT8.scheme: 0.9}
        return 300 + sum(
            factors[plan.get(name, NONE.scheme)] * isolated[name, plan.get(name, NONE.scheme), phase] for name in "ab"
        )

    int8 = {"a": INT8.scheme, "b": INT8.scheme}
    plans = [{}, int8]
    model = fit_latency(workload(), isolated, [(p, {x: truth(p, x) for x in ("prefill", "decode")}) for p in plans])
    assert max(model.error.values()) < 1e-9
    mixed = {"a": INT8.scheme}
    for phase in ("prefill", "decode"):
        assert model.pass_us(mixed, "ab", phase) == pytest.approx(truth(mixed, phase), rel=1e-6)
    assert model.request_us({}, "ab") == pytest.approx(truth({}, "prefill") + 10 * truth({}, "decode"))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(10)])
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def layers_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("blockwise", [False, True])
def test_ten_different_plans_are_timed_on_one_compilation(monkeypatch, blockwise):
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    model = Stack().eval()
    monkeypatch.setattr("autoq.profiler.end_to_end._BLOCKWISE_ABOVE_S", -1 if blockwise else 1e9)
    names = layers_of(model)
    timer = EndToEnd(model, PackedStore(model, names), {"forward": Phase(torch.randn(2, 64))})
    assert timer.how == {"forward": "10 blocks" if blockwise else "whole"}
    before = counters["stats"]["unique_graphs"]
    schemes = [Scheme.parse(one) for one in ("int8wo", "int8dq", "int4wo-hqq(group_size=64)", "fp6(format=e3m2)")]
    # More distinct plans, and blocks of more kinds, than Dynamo's recompile limit of eight.
    plans = {
        str(number): {name: schemes[(number + place) % 4] for place, name in enumerate(names) if place != number}
        for number in range(10)
    }
    times = timer.time(plans, budget_s=0.0, min_rounds=1)
    assert counters["stats"]["unique_graphs"] == before
    assert set(times) == {UNQUANTIZED, *plans}
    assert all(timing["forward"].median_us > 0 for timing in times.values())
    assert all(type(model.get_submodule(name)) is nn.Linear for name in names)


def test_blocks_are_the_longest_list_of_one_class():
    model = Stack()
    assert repeated_blocks(model) == list(model.blocks)
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2))) == []


class FakeKernels:
    """Stands for ``autoq_kernels.triton.register``: the calls in order, and a kernel's name for each tuned product."""

    def __init__(self, broken=()):
        self.calls = []
        self.names = {}
        self.broken = broken

    def weights(self):
        return SimpleNamespace(of=lambda head: head)

    def tuner(self, device):
        assert device == torch.device("cpu")
        return self

    def tune(self, head, m, dtype, *, budget_s):
        self.calls.append(f"tune {m}")
        if m in self.broken:
            raise RuntimeError("no choice works")
        self.names[head.data_ptr(), m, dtype] = f"triton.gemv m{m}"

    def kernel_name(self, head, m, dtype):
        return self.names[head.data_ptr(), m, dtype]

    def time(self, functions, *, budget_s, device):
        for function in functions.values():
            function()
        self.calls.append(f"time {' '.join(name or 'stock' for name in functions)}")
        if "copy" in functions:  # 1 GB/s is 1000 bytes a µs
            return {"sum": [bytes_moved() / 2e6, math.inf, 0.0], "copy": [2 * bytes_moved() / 3e6] * 3}
        return {name: [10.0, 12.0, 11.0, 500.0, 9.0] if name else [40.0] * 5 for name in functions}


def bytes_moved():
    return gpu_module._BANDWIDTH_BYTES


@pytest.fixture
def kernels(monkeypatch):
    """A GPU whose tensors lie on the CPU, where the stand-in for its kernels is the CPU's."""
    fake = FakeKernels()
    monkeypatch.setattr(gpu_module, "_BANDWIDTH_BYTES", 1 << 12)
    monkeypatch.setattr(isolated_module, "_device", lambda name: Gpu(torch.device("cpu"), kernels=fake, time=fake.time))
    return fake


def test_on_a_gpu_every_product_is_tuned_then_timed_and_the_row_names_what_ran(kernels):
    rows = profile(workload(), [INT8], fingerprint=HERE, device="cuda")
    one_shape = lambda m: [f"tune {m}", "time sum copy", "time stock int8wo"]  # noqa: E731
    assert kernels.calls == [*one_shape(1), *one_shape(16)]
    for row in rows:
        assert row["kernel"] == f"triton.gemv m{row['m']}"
        assert (row["status"], row["time_us"], row["baseline_us"], row["ratio"]) == ("ok", 11.0, 40.0, 0.275)
        assert row["repeats"] == 5
        assert row["bandwidth_gb_s"] == pytest.approx(3000)
        assert row["error"] < TOLERANCE[torch.bfloat16]


def test_on_a_gpu_a_product_that_cannot_be_tuned_is_a_row_with_the_reason(kernels):
    kernels.broken = (16,)
    rows = profile(workload(), [INT8], fingerprint=HERE, device="cuda")
    found = {row["m"]: (row["status"], row["reason"]) for row in rows}
    assert found == {1: ("ok", ""), 16: ("error", "RuntimeError: no choice works")}


def test_on_a_gpu_without_triton_the_plain_operators_are_timed_under_their_name(monkeypatch):
    monkeypatch.setattr(gpu_module, "load_cuda_kernels", lambda: False)
    monkeypatch.setattr(isolated_module, "_device", lambda name: Gpu(torch.device("cpu"), time=FakeKernels().time))
    rows = profile(workload(), [INT8], fingerprint=HERE, device="cuda")
    assert [(row["status"], row["kernel"]) for row in rows] == 2 * [("ok", "default")]


@pytest.mark.parametrize("broken", [2.0, math.nan])
def test_every_repeat_of_a_tall_weight_is_checked(monkeypatch, broken):
    """A weight is packed in part and repeated: a kernel that is wrong in one repeat alone is still found."""
    monkeypatch.setattr(isolated_module, "_PACKED_ROWS", 16)

    class WrongAtTheEnd(type(INT8)):
        key = "wrong-at-the-end"

        def linear(self, x, p, bias=None):
            y = super().linear(x, p, bias)
            y[:, 17] *= broken
            return y

    good, bad = profile(workload(("decode",)), [INT8, WrongAtTheEnd()], fingerprint=HERE)
    assert (good["status"], bad["status"]) == ("ok", "wrong")


def test_bandwidth_is_the_better_of_a_sum_and_a_copy(monkeypatch):
    monkeypatch.setattr(gpu_module, "_BANDWIDTH_BYTES", 4000)

    def times(sum_us, copy_us):
        return lambda functions, **how: {"sum": [sum_us], "copy": [copy_us]}

    assert bandwidth_gb_s("cpu", time=times(2.0, 8.0)) == 2.0  # 4000 bytes in 2 µs
    assert bandwidth_gb_s("cpu", time=times(9.0, 1.0)) == 8.0  # read and written


def test_a_pass_on_a_gpu_is_timed_until_the_device_is_done(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(f"wait {device}"))
    place = lambda kind, index=None: SimpleNamespace(device=SimpleNamespace(type=kind, index=index))  # noqa: E731
    model = lambda *parameters: SimpleNamespace(parameters=lambda: iter(parameters))  # noqa: E731
    assert device_wait(model(place("cpu"), place("meta"))) is None
    assert device_wait(model()) is None
    wait = device_wait(model(place("cuda", 1), place("cpu"), place("cuda", 0), place("cuda", 1)))
    wait()
    assert calls == ["wait 0", "wait 1"]


def test_end_to_end_times_wait_before_and_after_each_pass(monkeypatch):
    events = []
    monkeypatch.setattr(end_to_end_module, "device_wait", lambda model: lambda: events.append("wait"))
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    timer = EndToEnd(model, PackedStore(model, ["0"]), {"forward": Phase(torch.randn(2, 64))})
    assert events == ["wait", "wait"]  # around the pass that decides how to compile
    events.clear()
    timer._calls = {key: lambda *args, key=key: events.append(key[1]) for key in timer._calls}
    timer.time({"int8": {"0": INT8.scheme}}, budget_s=0.0, min_rounds=1)
    assert events == 2 * ["wait", False, "wait", "wait", True, "wait"]


def test_a_gpu_is_known_by_name_architecture_versions_and_cache(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    drivers = iter(["580.65", "580.65", "590.1"])
    monkeypatch.setattr("autoq_kernels.triton.device.driver_version", lambda: next(drivers))
    first, same, later = (Fingerprint.current("cuda") for _ in range(3))
    assert (first.device, first.name, first.caches) == ("cuda", "NVIDIA H100 80GB HBM3 sm_90", "L2 51200K")
    assert first.runtime.endswith(", driver 580.65")
    assert (first.isa, "cores" in first.hardware(), first.conditions()["threads"]) == ("", False, 0)
    assert first.key == same.key != later.key
    assert first.device_key == later.device_key
    assert first.key != Fingerprint.current("cpu").key
