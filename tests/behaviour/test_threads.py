"""One tuned model called from several threads, and a waiting one whose first calls come at once."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import autoq
from autoq import quantizing
from autoq.modules import unwrap
from autoq.results import TuneResult

THREADS, CALLS = 2, 30


def in_threads(work):
    """Run ``work(number)`` in threads that begin together; their results."""
    barrier = threading.Barrier(THREADS)

    def run(number):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return [done.result() for done in [pool.submit(run, number) for number in range(THREADS)]]


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("m", [1, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_get_the_outputs_that_one_gets(tuned, how, m, dtype):
    model = tuned().to(dtype)
    call = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    inputs = [torch.randn(m, 64, generator=torch.Generator().manual_seed(one)).to(dtype) for one in range(THREADS)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]

    def work(number):
        with torch.no_grad():  # modes belong to a thread
            return [call(inputs[number]) for _ in range(CALLS)]

    for number, outputs in enumerate(in_threads(work)):
        assert all(torch.equal(y, wanted[number]) for y in outputs)


@pytest.fixture
def tunings(monkeypatch, plan):
    """Tuning that only counts, and fails the first time if told."""
    made = {"calls": 0, "fail": 0}

    def tune(model, batches, **arguments):
        made["calls"] += 1
        if made["calls"] <= made["fail"]:
            raise KeyboardInterrupt
        return TuneResult(
            plan=plan, workload=None, notes=(), front_rows=[], measurement_rows=[], sensitivity_rows=[],
            problem=None, budget=None, scale=None, metric="", baseline_loss=0.0,
        )  # fmt: skip

    monkeypatch.setattr(quantizing, "tune", tune)
    return made


@pytest.mark.parametrize("how", ["plain", "wrapped", "in place"])
def test_calls_during_the_tuning_wait_and_all_get_the_tuned_models_answer(net, tuned, x, tunings, monkeypatch, how):
    started, counted = threading.Event(), quantizing.tune

    def tune(model, batches, **arguments):
        started.set()
        unwrap(model)(x)  # as recording does
        assert not tunings["calls"]
        time.sleep(0.3)  # the other thread's call comes now
        return counted(model, batches, **arguments)

    monkeypatch.setattr(quantizing, "tune", tune)
    model = torch.compile(net(), backend="eager") if how == "wrapped" else net()
    if how == "in place":
        model.compile(backend="eager")
    autoq.autoquant(model)

    def work(number):
        assert number == 0 or started.wait(60)
        with torch.no_grad():
            return model(x)

    with torch.no_grad():
        wanted = tuned()(x)
    assert all(torch.equal(y, wanted) for y in in_threads(work))
    assert tunings["calls"] == 1


def test_a_waiting_model_may_be_compiled(net, tuned, x, tunings, monkeypatch):
    counted = quantizing.tune

    def tune(model, batches, **arguments):
        with torch.compiler.set_stance("force_eager"):  # as recording does; refused in compiled code
            return counted(model, batches, **arguments)

    monkeypatch.setattr(quantizing, "tune", tune)
    model = torch.compile(autoq.autoquant(net()), backend="aot_eager")
    with torch.no_grad():
        assert all(torch.equal(model(x), tuned()(x)) for _ in range(2))
    assert tunings["calls"] == 1


@pytest.mark.parametrize("manual", [False, True])
def test_a_tuning_that_was_interrupted_is_taken_up_at_the_next_call(net, tuned, x, tunings, manual):
    tunings["fail"] = 1
    model = autoq.autoquant(torch.compile(net(), backend="eager"), manual=manual)
    with torch.no_grad():
        if manual:
            model(x)
        with pytest.raises(KeyboardInterrupt):
            model.finalize_autoquant() if manual else model(x)
        if manual:
            model.finalize_autoquant()
        assert torch.equal(model(x), tuned()(x))
    assert tunings["calls"] == 2
    assert not model._orig_mod._forward_pre_hooks
    assert "finalize_autoquant" not in model.__dict__


def test_tuning_sees_the_inputs_as_the_user_passed_them(net, x, tunings, monkeypatch):
    """A pre-hook of the user's runs again when the inputs are replayed, so it must not have run on them already."""
    seen, tune = [], quantizing.tune
    monkeypatch.setattr(quantizing, "tune", lambda model, given, **more: (seen.extend(given), tune(model, given))[1])
    model = net()
    model.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    autoq.autoquant(model)
    with torch.no_grad():
        model(x)
    assert torch.equal(seen[0].args[0], x)


def test_each_module_keeps_its_own_mode(net, x, tunings):
    model = net().train()
    model.down.eval()
    autoq.autoquant(model, x)
    assert [one.training for one in (model, model.up, model.down, model.head)] == [True, True, False, True]
