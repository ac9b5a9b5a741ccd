"""A tiny language model in a module, one run of it in real processes, and workers that answer without a model."""

import sys

import pytest
import torch

pytest.importorskip("transformers")

from autoq.loading import load_model
from autoq.model_bench import Engine, Job, Missing, own_engines, run

TOY = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def make():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=160, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )
    rows = torch.randint(0, 160, (6, 40), generator=torch.Generator().manual_seed(1))
    return LlamaForCausalLM(config).eval(), rows
"""
FAKE = """
import json, os, sys

for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    with open({log!r}, "a") as log:
        log.write({name!r} + " " + do + chr(10))
    if do == {dies!r}:
        os.write(2, b"out of luck" + bytes([10]))
        os._exit(7)
    answers = {{
        "load": {{"version": "fake 1", "weight_bytes": 1000, "kv_bytes_per_token": 10, "isa": None, "note": None}},
        "prefill": {{"seconds": 0.02}},
        "decode": {{"seconds": [{step}] * request.get("steps", 0), "tokens": []}},
        "losses": {{"losses": [1.0, 3.0]}},
        "memory": {{"peak_growth_bytes": 2000000}},
    }}
    print(json.dumps({{"error": "no"}} if do == {refuses!r} else answers[do]), flush=True)
"""


@pytest.fixture
def fake(tmp_path):
    """Makes an engine whose worker answers at once, dies at a request or refuses it; with the file of its requests."""

    def make(name, dies="", refuses="", step=0.001):
        code = FAKE.format(log=str(tmp_path / "log"), name=name, dies=dies, refuses=refuses, step=step)
        return Engine(name=name, plan="fake", command=(sys.executable, "-c", code), own=False)

    return make


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The working folder of a run: its module ``autoq_bench_toy`` makes the model and its rows."""
    folder = tmp_path_factory.mktemp("model_bench")
    (folder / "autoq_bench_toy.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delitem(sys.modules, "autoq_bench_toy", raising=False)
        return folder, load_model("autoq_bench_toy:make")


@pytest.fixture(scope="session")
def ran(toy):
    """The report of the eager and the compiled model, and of a plan, in processes of their own."""
    _, loaded = toy
    engines, _ = own_engines("autoq_bench_toy:make", plans={"int8wo": None})
    names = ("bf16-eager", "bf16-compiled", "autoq-int8wo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(toy[0])
        job = Job(
            engines=[one for one in engines if one.name in names],
            missing=[Missing(name="llamacpp-Q4_0", reason="make peers")],
            prompts={2: loaded.batches[:2, :24].tolist()},
            rows=loaded.batches.tolist(),
            steps=3,
            rounds=2,
            threads=1,
            passes=2,
            facts={"model": loaded.source},
        )
        return job, run(job)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
