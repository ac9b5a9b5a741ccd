"""From a model and options to a job: tokens, engines and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from autoq.errors import InputError
from autoq.model_bench.preparing import Options, job, prompt

OPTIONS = Options(
    plans={"int8wo": ""},
    rows=4,
    context=24,
    steps=5,
    passes=2,
    batches=(1, 3),
    threads=1,
    peers=Path("none"),
    torchao=Path("none"),
    openvino={},
    work=Path("work"),
    patterns=("bf16-e*", "autoq-*", "torchao-int8", "openvino-int8"),
)


def test_a_job_has_prompts_rows_and_engines(toy):
    _, loaded = toy
    made = job("autoq_bench_toy:make", loaded, OPTIONS)
    assert [one.name for one in made.engines] == ["bf16-eager", "autoq-int8wo-stock", "autoq-int8wo"]
    assert all(one.load["model"] == "autoq_bench_toy:make" for one in made.engines)
    assert [one.name for one in made.missing] == ["torchao-int8", "openvino-int8"]
    assert made.rows == loaded.batches[:4].tolist()
    assert made.prompts == {batch: prompt(loaded.batches, batch, 24) for batch in (1, 3)}
    assert made.context == 24


def test_prompts_are_the_text_and_its_beginning_again(toy):
    tokens = toy[1].batches
    flat = tokens.flatten().tolist()
    assert prompt(tokens, 2, 30) == [flat[:30], flat[30:60]]
    assert prompt(tokens, 1, 250) == [flat + flat[:10]]


@pytest.mark.parametrize("change", [{"context": 124}, {"context": 120, "steps": 9}, {"passes": 101}])
def test_a_context_beyond_the_models_positions_is_refused(toy, change):
    with pytest.raises(InputError, match=r"fit the model's positions; got .* of 128"):
        job("autoq_bench_toy:make", toy[1], replace(OPTIONS, **change))


def test_a_text_for_a_model_without_a_tokenizer_is_refused(toy):
    with pytest.raises(InputError, match="a text needs a model with a tokenizer"):
        job("autoq_bench_toy:make", toy[1], replace(OPTIONS, text=Path("some.txt")))
