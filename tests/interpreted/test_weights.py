"""The registry of packed weights: every head finds its own weight, and dead ones are forgotten."""

import gc

import pytest
import torch

from autoq import candidates
from autoq_kernels import layout
from autoq_kernels.triton.weight import Weights, arguments, stand_in


def packed(text, n=8, k=96, *, scale=1.0):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) * scale
    return candidates.parse(text).pack(w)


def test_a_head_gives_its_header_and_the_power_of_its_largest_column_scale():
    weights = Weights()
    for text in ("int8wo", "sinq(bits=3,group_size=32)", "fp6(format=e2m3)", "int4mix(group_size=64,method=sinq)"):
        p = packed(text, n=32)
        weight = weights.of(p.head)
        assert weight.form == layout.header(p.data)
        assert weight.head.data_ptr() == p.data.data_ptr()
        if p.column_scale is None:
            assert weight.column_power == 0
        else:
            largest = float(p.column_scale.max())
            assert 2.0 ** (weight.column_power - 1) <= largest <= 2.0**weight.column_power
        assert weights.of(p.head).prepared is weight.prepared
    assert len(weights) == 1  # the last one; the others are gone


def test_another_weight_in_reused_memory_is_never_taken_for_the_first():
    weights, seen, addresses = Weights(), 0, set()
    texts = ("int4wo-hqq(group_size=32)", "int4dq(group_size=32)", "int4mix(group_size=32)")  # of one size
    for turn in range(60):
        p = packed(texts[turn % 3])
        seen += p.data.data_ptr() in addresses
        addresses.add(p.data.data_ptr())
        assert weights.of(p.head).form == layout.header(p.data)
        del p
    assert seen > 0  # else nothing was reused and the test says nothing


def test_weights_at_other_places_of_one_storage_are_told_apart():
    parts = [packed("int8wo").data, packed("int8dq").data, packed("fp6(format=e3m2)").data]
    data, weights = torch.cat(parts), Weights()
    start = 0
    for part in parts * 2:
        start %= len(data)
        assert weights.of(data[start : start + 128]).form == layout.header(part)
        start += len(part)
    assert len(weights) == 1


def test_dead_storages_are_forgotten():
    weights = Weights()
    alive = [packed("int8wo", n=n) for n in range(8, 12)]
    for p in alive:
        weights.of(p.head)
    assert len(weights) == 4
    head = alive[0].head
    del alive[:2], p
    gc.collect()
    assert len(weights) == 3  # a head keeps its storage
    assert weights.of(head).form.n == 8
    del head, alive[:]
    assert len(weights) == 0


@pytest.mark.parametrize("wrong", ["copied", "zero", "short", "magic"])
def test_what_is_no_weight_is_refused_and_not_remembered(wrong):
    data = packed("int4wo-hqq(group_size=64)").data
    head = {
        "copied": data[:128].clone(),
        "zero": torch.zeros(4096, dtype=torch.uint8),
        "short": data[:64].clone(),
        "magic": torch.full((128,), 65, dtype=torch.uint8),
    }[wrong]
    weights = Weights()
    for _ in range(2):
        with pytest.raises(layout.LayoutError):
            weights.of(head)
    head = data[:128]
    assert weights.of(head).form.total_bytes == len(data)


def test_a_stand_in_has_the_form_and_no_memory():
    form = layout.header(packed("sinq(bits=5,group_size=64)").data)
    weight = stand_in(form, column_power=3)
    assert weight.head.is_meta
    assert (weight.form, weight.column_power, len(weight.head)) == (form, 3, 128)
    assert arguments(weight)["high_offset"] == form.codes_offset + form.n * form.k_padded // 2


def test_a_weight_that_was_written_over_is_read_again_after_forget():
    seen = Weights()
    first, second = (candidates.parse(text).pack(torch.randn(16, 64)).data for text in ("int8wo", "fp6"))
    data = torch.zeros(max(len(first), len(second)), dtype=torch.uint8)
    data[: len(first)] = first
    assert seen.of(data[:128]).form == layout.header(first)
    data[: len(second)] = second
    seen.forget(data[:128])
    assert seen.of(data[:128]).form == layout.header(second)
