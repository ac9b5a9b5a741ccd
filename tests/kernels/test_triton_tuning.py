"""Storing and choosing of GPU kernels, with told results and times: the facts that need no GPU."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest
import torch

from autoq_kernels import layout, ops
from autoq_kernels.layout import Kind
from autoq_kernels.tolerance import TOLERANCE
from autoq_kernels.triton import configs, device, launching, products, register, tuning
from autoq_kernels.triton.configs import Config
from autoq_kernels.triton.device import Device
from autoq_kernels.triton.products import Choice
from autoq_kernels.triton.store import Product, Record, Store, Trial
from autoq_kernels.triton.tuning import Tuner, TuningError
from autoq_kernels.triton.weight import Weights

# -- storing -----------------------------------------------------------------------------------------------------------

DEVICE = Device(
    name="NVIDIA H100 80GB HBM3", architecture="sm_90", l2_bytes=50 << 20, pytorch="2.13.0", runtime="cuda 13.0",
    driver="580.65", triton="3.7.1", kernels="0123456789abcdef",
)  # fmt: skip
PRODUCT = Product(
    kind="AFFINE", bits=4, group_size=64, minimum=True, row_scale=True, column_scale=False, dynamic=False, n=4096,
    k=4096, m=1, dtype="bfloat16",
)  # fmt: skip
GEMV = Choice(method=products.GEMV, config=Config(family="gemv", block_m=1, block_n=8, block_k=4096, warps=2))


def record(choice=GEMV, us=12.5):
    trials = (
        Trial(choice=choice.label, status="ok", error=1e-3, median_us=us, repeats=40),
        Trial(choice="another", status="error", reason="OutOfResources: shared memory"),
    )
    return Record(choice=choice.to_json(), median_us=us, repeats=40, trials=trials, date="2026-01-01T00:00:00+00:00")


def other(value):
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else f"{value}x"


@pytest.mark.parametrize("part", [one.name for one in fields(Product)])
def test_a_product_that_differs_in_one_part_has_a_file_of_its_own(tmp_path, part):
    changed = replace(PRODUCT, **{part: other(getattr(PRODUCT, part))})
    Store(tmp_path, DEVICE).write(PRODUCT, record())
    assert changed.file_name != PRODUCT.file_name
    assert Store(tmp_path, DEVICE).read(PRODUCT) == record()
    assert Store(tmp_path, DEVICE).read(changed) is None


@pytest.mark.parametrize("part", [one.name for one in fields(Device)])
def test_a_device_or_version_that_differs_in_one_part_has_a_folder_of_its_own(tmp_path, part):
    changed = replace(DEVICE, **{part: other(getattr(DEVICE, part))})
    Store(tmp_path, DEVICE).write(PRODUCT, record())
    assert changed.key != DEVICE.key
    assert Store(tmp_path, changed).read(PRODUCT) is None


def form(kind=Kind.AFFINE, bits=4, group_size=64, activation_bits=0, m_switch=0, column=False, n=96, k=320):
    data = layout.allocate(
        kind=kind, bits=bits, n=n, k=k, group_size=group_size, activation_bits=activation_bits, m_switch=m_switch,
        has_column_scale=column,
    )  # fmt: skip
    return layout.header(data)


def product(m=1, dtype=torch.bfloat16, column=False, **how):
    return Product.of(form(column=column, **how), m, dtype, has_column_scale=column)


def test_a_product_is_known_by_the_form_of_weight_and_activation():
    every = [
        product(), product(bits=3), product(group_size=32), product(column=True), product(dtype=torch.float16),
        product(n=97), product(k=321), product(m=2), product(activation_bits=8),
        product(kind=Kind.INT8, bits=8, group_size=0), product(kind=Kind.FP6_E3M2, bits=6, group_size=0),
        product(kind=Kind.FP6_E2M3, bits=6, group_size=0),
    ]  # fmt: skip
    assert len({one.file_name for one in every}) == len(every)
    assert product(m=17) == product(m=32) != product(m=33)
    mix = {"activation_bits": 8, "m_switch": 24}  # within one bucket, on either side of the switch
    assert [product(m=m, **mix).dynamic for m in (17, 23, 24, 32)] == [False, False, True, True]
    assert product(m=23, **mix) != product(m=24, **mix)


def test_device_and_product_lie_in_clear_beside_the_value(tmp_path):
    kept = Store(tmp_path, DEVICE)
    kept.write(PRODUCT, record())
    folder = kept.path(PRODUCT).parent
    assert sorted(one.name for one in folder.iterdir()) == sorted(["device.json", PRODUCT.file_name])
    assert json.loads((folder / "device.json").read_text()) == asdict(DEVICE)
    value = json.loads(kept.path(PRODUCT).read_text())
    assert value["product"] == asdict(PRODUCT)
    assert value["choice"] == GEMV.to_json()
    assert [(one["status"], one["reason"]) for one in value["trials"]] == [
        ("ok", ""),
        ("error", "OutOfResources: shared memory"),
    ]


def cut(path, whole):
    path.write_bytes(whole[: len(whole) // 2])


def with_field(name, value):
    def damage(path, whole):
        path.write_text(json.dumps(json.loads(whole) | {name: value}))

    return damage


DAMAGES = {
    "cut": cut,
    "empty": lambda path, whole: path.write_bytes(b""),
    "not text": lambda path, whole: path.write_bytes(b"\xff\xfe\x00{"),
    "not an object": lambda path, whole: path.write_text("[1, 2]"),
    "another schema": with_field("schema", 99),
    "another product's": with_field("product", asdict(replace(PRODUCT, n=8))),
    "an unknown field": with_field("surprise", 1),
    "no choice": with_field("choice", None),
    "trials of another form": with_field("trials", [{"label": "x"}]),
    "a folder": lambda path, whole: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_counts_as_absent_aloud(tmp_path, caplog, damage):
    Store(tmp_path, DEVICE).write(PRODUCT, record())
    path = Store(tmp_path, DEVICE).path(PRODUCT)
    DAMAGES[damage](path, path.read_bytes())
    kept = Store(tmp_path, DEVICE)
    assert kept.read(PRODUCT) is None
    assert kept.read(PRODUCT) is None
    (message,) = [one.getMessage() for one in caplog.records]
    assert str(path) in message
    assert Tuner(kept).tuned(form(n=4096, k=4096), 1, torch.bfloat16, False) is None
    if path.is_file():
        kept.write(PRODUCT, record(us=3.0))
        assert Store(tmp_path, DEVICE).read(PRODUCT).median_us == 3.0


def test_a_choice_this_build_does_not_know_counts_as_absent_aloud(tmp_path, caplog):
    whole = form(n=4096, k=4096)
    mine = Product.of(whole, 1, torch.bfloat16, has_column_scale=False)
    Store(tmp_path, DEVICE).write(mine, replace(record(), choice={"method": "triton.gemv", "config": {"block": 1}}))
    tuner = Tuner(Store(tmp_path, DEVICE))
    assert tuner.tuned(whole, 1, torch.bfloat16, False) is None
    assert tuner.tuned(whole, 1, torch.bfloat16, False) is None
    (message,) = [one.getMessage() for one in caplog.records]
    assert mine.file_name in message


def test_a_folder_that_cannot_be_written_costs_only_the_file(tmp_path, caplog):
    (tmp_path / "taken").write_text("")
    kept = Store(tmp_path / "taken", DEVICE)
    kept.write(PRODUCT, record())
    assert kept.read(PRODUCT) == record()
    assert "cannot be written" in caplog.text


def test_timing_storing_and_profiling_are_imported_without_triton():
    names = "autoq.profiler, autoq.cache, " + ", ".join(
        f"autoq_kernels.triton.{name}" for name in ("configs", "device", "store", "timing", "weight")
    )
    hidden = f"import sys; sys.modules['triton'] = None; import {names}"
    subprocess.run([sys.executable, "-c", hidden], check=True)


def test_what_another_process_stored_is_seen_after_forgetting(tmp_path):
    mine = Store(tmp_path, DEVICE)
    assert mine.read(PRODUCT) is None
    Store(tmp_path, DEVICE).write(PRODUCT, record())
    assert mine.read(PRODUCT) is None
    mine.forget()
    assert mine.read(PRODUCT) == record()


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from autoq_kernels.triton.device import Device
from autoq_kernels.triton.store import Product, Record, Store, Trial
import json
device, product, number, rounds = json.loads(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
store = Store(Path(sys.argv[1]), Device(**device))
trials = tuple(Trial(choice=str(number), status="ok", reason="x" * 200 * number) for _ in range(50 * number))
record = Record(choice={"writer": number}, median_us=float(number), repeats=number, trials=trials, date=str(number))
for _ in range(rounds):
    store.write(Product(**product), record)
"""


def test_of_two_processes_writing_at_once_a_reader_always_sees_one_whole(tmp_path, caplog):
    command = [sys.executable, "-c", WRITER, str(tmp_path), json.dumps(asdict(DEVICE)), json.dumps(asdict(PRODUCT))]
    writers = [subprocess.Popen([*command, str(number), "100"]) for number in (1, 3)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        found = Store(tmp_path, DEVICE).read(PRODUCT)
        if found is None:
            assert not seen
            continue
        number = found.repeats
        assert (found.choice, found.median_us, found.date) == ({"writer": number}, number, str(number))
        assert len(found.trials) == 50 * number
        assert {(one.choice, len(one.reason)) for one in found.trials} == {(str(number), 200 * number)}
        seen.add(number)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {1, 3}
    assert not caplog.records
    assert Store(tmp_path, DEVICE).read(PRODUCT).repeats in (1, 3)
    folder = Store(tmp_path, DEVICE).path(PRODUCT).parent
    assert sorted(one.name for one in folder.iterdir()) == sorted(["device.json", PRODUCT.file_name])


def properties(**more):
    return SimpleNamespace(name="NVIDIA H100 80GB HBM3", L2_cache_size=50 << 20, major=9, minor=0, **more)


def test_a_device_is_described_by_what_the_driver_tells(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    (tmp_path / "version").write_text("580.65.06\n")
    monkeypatch.setattr(device, "_DRIVER_VERSIONS", (str(tmp_path / "none"), str(tmp_path / "version")))
    found = Device.current(0)
    assert (found.name, found.architecture, found.l2_bytes) == ("NVIDIA H100 80GB HBM3", "sm_90", 50 << 20)
    assert (found.driver, found.pytorch) == ("580.65.06", torch.__version__)
    assert found.key.startswith("NVIDIA-H100-80GB-HBM3-sm_90-")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties(gcnArchName="gfx942:sramecc+:xnack-"))
    assert (Device.current(0).architecture, Device.current(0).runtime) == ("gfx942", "hip 6.4")


# -- choosing ----------------------------------------------------------------------------------------------------------


def packed(n=40, k=96, column=True, kind=Kind.AFFINE, **more):
    generator = torch.Generator().manual_seed(0)
    scale = lambda *shape: torch.rand(shape, generator=generator) + 0.5  # noqa: E731
    parts = {"kind": kind, "bits": 8, "n": n, "k": k, **more}
    if kind is Kind.INT8:
        codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        return layout.build(codes=codes, scale=scale(n), **parts)
    bits = more.get("bits", 4)
    width = -(-k // 32) * 32
    codes = torch.randint(0, 1 << bits, (n, width), generator=generator, dtype=torch.uint8)
    if kind is not Kind.AFFINE:
        return layout.build(codes=codes, scale=scale(n), **(parts | {"bits": 6}))
    groups = width // 32
    return layout.build(
        codes=codes, scale=scale(n, groups).half(), minimum=-2 * scale(n, groups).half(), row_scale=scale(n),
        column_scale=scale(k) if column else None, group_size=32, **(parts | {"bits": bits}),
    )  # fmt: skip


@pytest.mark.parametrize(
    "how",
    [
        {"kind": Kind.INT8},
        {"kind": Kind.INT8, "activation_bits": 8},
        {"kind": Kind.FP6_E3M2, "bits": 6, "k": 70},
        {"bits": 3},
        {"bits": 5, "column": False},
        {"bits": 4, "activation_bits": 8},
        {"bits": 6, "activation_bits": 8, "m_switch": 4},
    ],
    ids=str,
)
def test_the_reference_is_the_plain_definition_taken_in_parts(monkeypatch, how):
    weight = Weights().of(packed(**how)[: layout.HEADER_BYTES])
    x = torch.randn(3, weight.form.k, generator=torch.Generator().manual_seed(1))
    whole = ops.linear(x, weight.head, None, 40)
    for rows in (7, 40, 64):
        monkeypatch.setattr(tuning, "_ROWS", rows)
        found = tuning.reference(x, weight)
        assert found.dtype == torch.float32
        assert float((found - whole).norm() / whole.norm()) < 1e-6


class Bench:
    """Choices with results and times as told, and a count of what was run."""

    def __init__(self, monkeypatch, folder, results, times_us):
        self.results, self.times_us = results, times_us
        self.choices = tuple(
            Choice(
                method=products.GEMV, config=Config(family="gemv", block_m=1, block_n=1, block_k=1, warps=number + 1)
            )
            for number in range(len(results))
        )
        self.multiplied, self.timed = [], []
        self.folder = folder
        monkeypatch.setattr(products, "choices", lambda form, m, dtype, *, has_column_scale: self.choices)
        monkeypatch.setattr(products, "multiply", self.multiply)

    def number(self, label):
        return [one.label for one in self.choices].index(label)

    def multiply(self, choice, x, weight, bias):
        number = self.number(choice.label)
        self.multiplied.append(number)
        return self.results[number](ops.linear(x, weight.head, bias, weight.form.n))

    def time(self, functions, *, graphs, **how):
        self.timed.append([self.number(label) for label in functions])
        assert set(graphs) == set(functions)
        for function in functions.values():
            function()
        return {label: [self.times_us[self.number(label)]] * how["min_rounds"] for label in functions}

    def tuner(self):
        return Tuner(Store(self.folder, DEVICE), time=self.time)


def right(y):
    return y


def wrong(y):
    return y * (1 + 2 * TOLERANCE[y.dtype])


def not_finite(y):
    return y * math.nan


def crashing(y):
    raise RuntimeError("out of resource: shared memory\n\nRequired: 300000\n")


def tuned(bench, dtype=torch.bfloat16, m=1):
    weight = Weights().of(packed()[: layout.HEADER_BYTES])
    return bench.tuner().tune(weight, m, dtype, budget_s=0.1), weight


def test_the_fastest_choice_wins_and_the_table_tells_of_all(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, [right, right, right], [30.0, 20.0, 25.5])
    choice, weight = tuned(bench)
    assert choice == bench.choices[1]
    assert bench.timed == [[0, 1, 2], [1]]  # 25.5 is not within a quarter of 20
    found = Store(tmp_path, DEVICE).read(Product.of(weight.form, 1, torch.bfloat16, has_column_scale=True))
    assert (Choice.from_json(found.choice), found.median_us) == (choice, 20.0)
    assert [(bench.number(one.choice), one.median_us) for one in found.trials] == [(1, 20.0), (2, 25.5), (0, 30.0)]
    assert found.repeats == found.trials[0].repeats == tuning._FINAL_ROUNDS[0]
    assert all(one.error < TOLERANCE[torch.bfloat16] for one in found.trials)


def test_the_second_pass_is_of_the_few_near_the_fastest_and_decides(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, [right] * 7, [10.0, 11.0, 12.0, 10.5, 11.5, 12.4, 99.0])
    second = [16.0, 15.0, 0.0, 14.0, 15.5, 0.0, 0.0]  # all slower than choice 2 was in the first pass
    quick = bench.time

    def time(functions, **how):
        result = quick(functions, **how)
        bench.times_us = second
        return result

    weight = Weights().of(packed()[: layout.HEADER_BYTES])
    choice = Tuner(Store(tmp_path, DEVICE), time=time).tune(weight, 1, torch.bfloat16, budget_s=0.1)
    assert bench.timed == [[0, 1, 2, 3, 4, 5, 6], [0, 3, 1, 4]]
    assert choice == bench.choices[3]


@pytest.mark.parametrize("bad", [wrong, not_finite])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_wrong_kernel_never_wins(monkeypatch, tmp_path, caplog, dtype, bad):
    bench = Bench(monkeypatch, tmp_path, [right, bad], [30.0, 1.0])
    choice, weight = tuned(bench, dtype)
    assert choice == bench.choices[0]
    assert bench.timed == [[0]]
    found = Store(tmp_path, DEVICE).read(Product.of(weight.form, 1, dtype, has_column_scale=True))
    trial = found.trials[1]
    assert (bench.number(trial.choice), trial.status, trial.median_us) == (1, "wrong", None)
    assert "relative RMS" in trial.reason
    assert "wrong results" in caplog.text


def test_a_kernel_that_does_not_run_is_a_line_of_the_table(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, [crashing, right], [1.0, 30.0])
    choice, weight = tuned(bench)
    assert choice == bench.choices[1]
    found = Store(tmp_path, DEVICE).read(Product.of(weight.form, 1, torch.bfloat16, has_column_scale=True))
    trial = found.trials[1]
    assert (trial.status, trial.reason) == ("error", "RuntimeError: out of resource: shared memory")


def test_where_nothing_works_the_error_has_every_reason_and_nothing_is_stored(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, [crashing, wrong], [1.0, 1.0])
    with pytest.raises(TuningError, match=r"shared memory.*relative RMS"):
        tuned(bench)
    assert not list(tmp_path.rglob("*.json"))
    assert bench.timed == []


def test_a_stored_product_is_neither_run_nor_timed_again(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, [right, right], [30.0, 20.0])
    choice, weight = tuned(bench)
    bench.multiplied.clear()
    bench.timed.clear()
    tuner = bench.tuner()
    assert tuner.tuned(weight.form, 1, torch.bfloat16, True) == choice
    assert tuner.tune(weight, 1, torch.bfloat16, budget_s=0.1) == choice
    assert bench.multiplied == bench.timed == []
    assert tuner.tuned(weight.form, 1, torch.float16, True) is None
    assert tuner.tuned(weight.form, 2, torch.bfloat16, True) is None


def test_a_tuner_that_looked_before_sees_what_it_tuned_and_after_forgetting_what_others_did(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, [right, right], [30.0, 20.0])
    mine, others = bench.tuner(), bench.tuner()
    weight = Weights().of(packed()[: layout.HEADER_BYTES])
    key = (weight.form, 1, torch.bfloat16, True)
    assert mine.tuned(*key) is others.tuned(*key) is None
    choice = mine.tune(weight, 1, torch.bfloat16, budget_s=0.1)
    assert mine.tuned(*key) == choice
    assert others.tuned(*key) is None
    others.forget()
    assert others.tuned(*key) == choice


def test_tuning_leaves_no_second_copy_of_a_weight_behind_unless_it_won(monkeypatch, tmp_path):
    weight = Weights().of(packed()[: layout.HEADER_BYTES])
    weight.prepared["earlier"] = ()
    bench = Bench(monkeypatch, tmp_path, [right, right], [10.0, 20.0])
    bench.choices = (bench.choices[0], Choice(method=products.INT4PACK))

    def prepare(y):
        weight.prepared["int4pack"] = (y,)
        return y

    bench.results[1] = prepare
    assert bench.tuner().tune(weight, 1, torch.bfloat16, budget_s=0.1) == bench.choices[0]
    assert set(weight.prepared) == {"earlier"}
    bench.times_us = [10.0, 5.0]
    assert bench.tuner().tune(weight, 2, torch.bfloat16, budget_s=0.1) == bench.choices[1]
    assert set(weight.prepared) == {"earlier", "int4pack"}


FORMS = {
    "int8": {"kind": Kind.INT8, "bits": 8, "group_size": 0},
    "int8 dynamic": {"kind": Kind.INT8, "bits": 8, "group_size": 0, "activation_bits": 8},
    "int4": {"bits": 4},
    "int4 dynamic": {"bits": 4, "activation_bits": 8},
    "fp6": {"kind": Kind.FP6_E3M2, "bits": 6, "group_size": 0},
}


@pytest.mark.parametrize("how", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("method", [products.GEMV, products.GEMM, products.INT4PACK, products.INT_MM])
def test_a_method_that_can_run_one_row_count_of_a_bucket_can_run_all(method, how):
    whole = form(n=4096, k=4096, **how)
    by_bucket = {}
    for m in range(1, 130):
        able = products.why_not(method, whole, m, torch.bfloat16) is None
        by_bucket.setdefault(configs.m_bucket(m), set()).add(able)
    assert all(len(found) == 1 for found in by_bucket.values())


@pytest.mark.parametrize("m", [1, 4, 16, 64])
@pytest.mark.parametrize("how", FORMS.values(), ids=FORMS)
def test_every_choice_is_stored_and_read_back(tmp_path, how, m):
    whole = form(n=4096, k=4096, **how)
    offered = products.choices(whole, m, torch.bfloat16, has_column_scale=False)
    assert len({choice.label for choice in offered}) == len(offered)
    mine = Product.of(whole, m, torch.bfloat16, has_column_scale=False)
    for choice in offered:
        Store(tmp_path, DEVICE).write(mine, record(choice))
        assert Tuner(Store(tmp_path, DEVICE)).tuned(whole, m, torch.bfloat16, False) == choice


def test_an_operator_with_a_stored_choice_launches_that_kernel_alone(monkeypatch, tmp_path):
    """One kernel to compile: nothing else of the configuration space is touched."""
    data = packed(n=64, k=1024, kind=Kind.INT8)
    weight = Weights().of(data[: layout.HEADER_BYTES])
    offered = products.choices(weight.form, 1, torch.bfloat16, has_column_scale=False)
    chosen = next(one for one in offered[1:] if one.config is not None and one.config.split_k == 1)
    mine = Product.of(weight.form, 1, torch.bfloat16, has_column_scale=False)
    Store(tmp_path, DEVICE).write(mine, record(chosen))
    tuner = Tuner(Store(tmp_path, DEVICE), time=None)
    monkeypatch.setattr(register, "_choice", lambda of, m, dtype: tuner.tuned(of.form, m, dtype, False))
    launched = []

    def note(launch):
        launched.append(launch)

    monkeypatch.setattr(launching.Launch, "run", note)
    for _ in range(3):
        register.linear(torch.zeros(1, 1024, dtype=torch.bfloat16), data[: layout.HEADER_BYTES], None, 64)
    assert tuner.tune(weight, 1, torch.bfloat16, budget_s=1) == chosen
    compiled = {(one.kernel, tuple(one.constants.items()), one.warps, one.stages) for one in launched}
    assert len(launched) == 3
    assert len(compiled) == 1
    assert launched[0].warps == chosen.config.warps
