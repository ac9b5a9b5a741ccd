import itertools

import pytest
import torch
from torch import nn

from autoq.errors import InputError, ModelError
from autoq.recorder import Recorder, record
from autoq.workload import LinearCall, Phase, PhaseInfo


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """One layer called twice, one once, one never."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)
        self.unused = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        x = self.down(self.up(x))
        return self.up(x) * scale


def state(model):
    """Everything a recording could leave behind."""
    return {
        name: (
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            len(module._forward_hooks_always_called),
            type(module._parameters),
            list(module._parameters),
            module.training,
            sorted(module.__dict__),
        )
        for name, module in model.named_modules()
    }


def calls(workload):
    return {(one.layer, one.phase, one.m): one.count for one in workload.calls}


# --- what is counted -------------------------------------------------------------------------------------------------


def test_every_call_is_counted_by_layer_and_shape():
    workload = record(Net(), [torch.randn(3, 8), torch.randn(2, 5, 8), torch.randn(3, 8)]).workload
    assert calls(workload) == {
        ("up", "forward", 3): 4,
        ("down", "forward", 3): 2,
        ("up", "forward", 10): 2,
        ("down", "forward", 10): 1,
    }
    assert workload.phases == (PhaseInfo(name="forward"),)
    assert [(one.name, one.k, one.n, one.dtype, one.device, one.bias) for one in workload.layers] == [
        ("up", 8, 16, "float32", "cpu", True),
        ("down", 16, 8, "float32", "cpu", False),
        ("unused", 4, 4, "float32", "cpu", True),
    ]
    assert [one.name for one in workload.quantizable] == ["up", "down"]


@pytest.mark.parametrize(("shape", "m"), [((8,), 1), ((7, 8), 7), ((2, 3, 8), 6), ((2, 3, 4, 8), 24), ((0, 8), 0)])
def test_rows_are_the_product_of_the_leading_dimensions(shape, m):
    model = nn.Sequential(nn.Linear(8, 8))
    with Recorder(model) as recorder, torch.no_grad():
        model(torch.randn(shape))
    recording = recorder.recording()
    assert recording.workload.calls == (LinearCall(layer="0", phase="forward", m=m, dtype="float32", count=1),)
    assert [one.shape for one in recording.samples.get("0", {}).values()] == [(m, 8)] * (m > 0)


def test_aliases_ties_and_dtype():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.fc = nn.Linear(8, 8)
            self.alias = self.fc
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.alias(self.fc(self.embed(tokens))))

    workload = record(Tied().bfloat16(), torch.zeros(2, 3, dtype=torch.long)).workload
    assert [(one.name, one.aliases, one.tied_to, one.dtype) for one in workload.layers] == [
        ("fc", ("alias",), None, "bfloat16"),
        ("head", (), "embed.weight", "bfloat16"),
    ]
    assert calls(workload) == {("fc", "forward", 6): 2, ("head", "forward", 6): 1}
    assert {one.dtype for one in workload.calls} == {"bfloat16"}


def test_under_autocast_the_dtype_is_the_one_multiplied_in():
    model = Net()
    with Recorder(model) as recorder, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(torch.randn(2, 8))
    recording = recorder.recording()
    assert {one.dtype for one in recording.workload.calls} == {"bfloat16"}
    assert recording.samples["up"]["forward"].dtype == torch.bfloat16


def test_phases_have_names_weights_and_their_own_calls():
    phases = {"decode": Phase(torch.randn(1, 8), 128), "prefill": Phase([torch.randn(5, 8)] * 2, synthesised=True)}
    workload = record(Net(), phases=phases).workload
    assert workload.phases == (
        PhaseInfo(name="decode", calls=128),
        PhaseInfo(name="prefill", calls=1, synthesised=True),
    )
    assert calls(workload) == {
        ("up", "decode", 1): 2,
        ("down", "decode", 1): 1,
        ("up", "prefill", 5): 4,
        ("down", "prefill", 5): 2,
    }


# --- how inputs are given --------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, pair, *, extra=None):
        (a, (b, c)) = pair
        return self.fc(a + b) + c["x"] + (0 if extra is None else extra)


def test_nested_inputs_and_keyword_only_arguments():
    x = torch.randn(2, 4)
    pair = (x, (x, {"x": x}))
    assert calls(record(Nested(), (pair,)).workload) == {("fc", "forward", 2): 1}
    assert calls(record(Nested(), [(pair,), {"pair": pair, "extra": x}]).workload) == {("fc", "forward", 2): 2}


def test_batches_may_be_any_iterable():
    assert calls(record(Net(), (torch.randn(one, 8) for one in (1, 2))).workload).keys() == {
        ("up", "forward", 1),
        ("down", "forward", 1),
        ("up", "forward", 2),
        ("down", "forward", 2),
    }


def test_a_phase_can_make_its_batch_anew():
    phases = {"step": Phase(lambda: {"x": torch.randn(1, 8), "scale": 2.0})}
    assert calls(record(Net(), phases=phases).workload) == {("up", "step", 1): 2, ("down", "step", 1): 1}


def test_inputs_are_not_changed_even_by_a_model_that_writes_to_them():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, cache):
            cache["seen"].append(x.shape[0])
            return self.fc(x.add_(1))

    x, cache = torch.zeros(2, 4), {"seen": []}
    record(InPlace(), {"x": x, "cache": cache})
    assert torch.equal(x, torch.zeros(2, 4))
    assert cache == {"seen": []}


def test_inputs_made_in_inference_mode_and_a_call_inside_it():
    class InPlace(nn.Sequential):
        def forward(self, x):
            return super().forward(x.mul_(2))

    with torch.inference_mode():
        x = torch.ones(2, 8)
        recording = record(InPlace(nn.Linear(8, 8)), x)
        model = Net()
        with Recorder(model) as recorder:
            model(x)
    assert torch.equal(x, torch.ones(2, 8))
    for sample in (recording.samples["0"]["forward"], recorder.recording().samples["down"]["forward"]):
        assert not sample.is_inference()
        assert sample.shape[0] == 2


@pytest.mark.parametrize("batches", [[], (), iter([]), [torch.zeros(0, 8)]], ids=["list", "tuple", "iterator", "rows"])
def test_empty_batches_are_an_error(batches):
    with pytest.raises(InputError):
        record(Net(), batches)


def test_batches_and_phases_exclude_each_other():
    with pytest.raises(InputError, match="neither"):
        record(Net())
    with pytest.raises(InputError, match="both"):
        record(Net(), torch.zeros(1, 8), phases={"p": Phase(torch.zeros(1, 8))})
    with pytest.raises(InputError, match=r"phases\['p'\].*at least one sample"):
        record(Net(), phases={"p": Phase([])})


def test_a_model_without_linear_layers_is_an_error_that_names_what_it_has():
    with pytest.raises(ModelError, match="convolution"):
        record(nn.Conv2d(1, 1, 3), torch.zeros(1, 1, 8, 8))


# --- what is left behind ---------------------------------------------------------------------------------------------


def test_nothing_is_left_behind_and_modes_come_back():
    model = Net()
    model.up.eval()
    before = state(model)
    record(model, torch.randn(2, 8))
    assert state(model) == before


def test_nothing_is_left_behind_after_an_exception():
    model = Net()
    before = state(model)
    with pytest.raises(RuntimeError, match="shapes"):
        record(model, torch.randn(2, 9))
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt), Recorder(model):
        raise KeyboardInterrupt
    assert state(model) == before


def test_parameters_assigned_while_recording_stay():
    model = Net()
    new = nn.Parameter(torch.zeros(16, 8))
    with Recorder(model):
        model.up.weight = new
        assert model.up.weight is new
    assert model.up.weight is new
    assert type(model.up._parameters) is dict


def test_a_recorder_starts_once_and_resumes():
    model = Net()
    recorder = Recorder(model)
    recorder.start()
    with pytest.raises(InputError, match="once at a time"):
        recorder.start()
    model(torch.randn(1, 8))
    recorder.stop()
    model(torch.randn(1, 8))
    recorder.stop()
    with recorder:
        model(torch.randn(1, 8))
    assert calls(recorder.recording().workload) == {("up", "forward", 1): 4, ("down", "forward", 1): 2}
    assert recorder.recording().workload.layers[0].reason is None


@pytest.mark.parametrize("how", ["wrapped", "in place", "inner", "wrapped and run before"])
def test_compiled_models_are_recorded_uncompiled_and_compile_afterwards(how):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    inner = Net()
    model, x = nn.Sequential(inner), torch.randn(2, 8)
    if how == "in place":
        model.compile(backend=backend)
        called = model
    elif how == "inner":
        called = model = nn.Sequential(torch.compile(inner, backend=backend))
    else:
        called = torch.compile(model, backend=backend)
    if how.endswith("before"):
        called(x)
    seen = len(graphs)
    before = state(model)
    with Recorder(called) as recorder:
        called(x)
    assert len(graphs) == seen
    assert calls(recorder.recording().workload) == {("0.up", "forward", 2): 2, ("0.down", "forward", 2): 1}
    assert calls(record(called, x).workload) == calls(recorder.recording().workload)
    assert len(graphs) == seen
    assert state(model) == before
    called(x)
    assert len(graphs) == 1


# --- layers whose weight is read ------------------------------------------------------------------------------------


def test_a_layer_whose_weight_is_read_elsewhere_is_found_and_left_alone():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.read = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(self.fc(x), self.read.weight) + self.read(x)

    recording = record(Reader(), [torch.randn(2, 8)] * 2)
    assert [(one.name, one.reason) for one in recording.workload.layers] == [
        ("fc", None),
        ("read", "its weight is read outside its own forward"),
    ]
    assert list(recording.samples) == ["fc"]


# --- samples ---------------------------------------------------------------------------------------------------------


def test_few_rows_are_kept_as_they_came():
    x = torch.randn(3, 8).bfloat16()
    recording = record(Net().bfloat16(), [x, x + 1])
    model_rows = recording.samples["up"]["forward"]
    assert model_rows.dtype == torch.bfloat16
    assert torch.equal(model_rows[:3], x)
    assert model_rows.shape == (12, 8)  # two calls on each of two batches


def test_samples_are_bounded_uniform_and_reproducible():
    model = nn.Sequential(nn.Linear(1, 1))
    batches = list(torch.arange(4000.0).view(-1, 1).split([1, 3, 996, 2000, 1000]))
    recording = record(model, batches, samples_per_layer=200, seed=1)
    rows = recording.samples["0"]["forward"].flatten()
    assert rows.shape == (200,)
    assert rows.unique().numel() == 200
    counts = torch.histc(rows, bins=4, min=0, max=4000)
    assert counts.min() >= 30  # 50 expected, standard deviation 6
    again = record(model, batches, samples_per_layer=200, seed=1).samples["0"]["forward"].flatten()
    assert torch.equal(rows, again)
    other = record(model, batches, samples_per_layer=200, seed=2).samples["0"]["forward"].flatten()
    assert not torch.equal(rows, other)


def test_every_row_is_equally_likely():
    hits = torch.zeros(40)
    model = nn.Sequential(nn.Linear(1, 1))
    for seed in range(60):
        rows = record(model, list(torch.arange(40.0).view(4, 10, 1)), samples_per_layer=10, seed=seed)
        hits[rows.samples["0"]["forward"].long().flatten()] += 1
    assert hits.sum() == 600
    assert abs(hits.view(4, 10).sum(dim=1) - 150).max() < 50  # standard deviation about 9


def test_no_samples_when_asked_for_none():
    assert record(Net(), torch.randn(2, 8), samples_per_layer=0).samples == {}


# --- language models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("compiled", [False, True])
def test_generate_is_split_into_prefill_and_decode(language_model, compiled):
    model = torch.compile(language_model) if compiled else language_model
    with Recorder(model) as recorder:
        model.generate(torch.ones(2, 5, dtype=torch.long), max_new_tokens=4, do_sample=False, pad_token_id=0)
    found = calls(recorder.recording().workload)
    layer = "model.layers.0.mlp.up_proj"
    assert {key: count for key, count in found.items() if key[0] == layer} == {
        (layer, "prefill", 10): 1,
        (layer, "decode", 2): 3,
    }
    assert {key: count for key, count in found.items() if key[0] == "lm_head"} == {
        ("lm_head", "prefill", 2): 1,
        ("lm_head", "decode", 2): 3,
    }
    assert recorder.recording().workload.layer("lm_head").tied_to == "model.embed_tokens.weight"
    assert not any(module._forward_pre_hooks for module in language_model.modules())


def test_a_single_token_without_a_cache_is_prefill(language_model):
    workload = record(language_model, {"input_ids": torch.ones(1, 1, dtype=torch.long)}).workload
    assert {one.phase for one in workload.calls} == {"prefill"}


def test_a_given_phase_wins_and_a_users_cache_is_not_filled(language_model):
    with torch.no_grad():
        cache = language_model(torch.ones(1, 3, dtype=torch.long), use_cache=True).past_key_values
    step = {"input_ids": torch.ones(1, 1, dtype=torch.long), "past_key_values": cache}
    assert {one.phase for one in record(language_model, [step]).workload.calls} == {"decode"}
    workload = record(language_model, phases={"next": Phase([step, step])}).workload
    assert {one.phase for one in workload.calls} == {"next"}
    assert cache.get_seq_length() == 3


def test_the_language_model_inside_a_larger_module_is_found(language_model):
    class Pipeline(nn.Module):
        def __init__(self, lm):
            super().__init__()
            self.lm = lm

        def forward(self, tokens):
            return self.lm.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)

    workload = record(Pipeline(language_model), torch.ones(1, 4, dtype=torch.long)).workload
    assert [phase.name for phase in workload.phases] == ["prefill", "decode"]
    assert {one.layer.split(".")[0] for one in workload.calls} == {"lm"}
    assert list(itertools.islice((one.m for one in workload.calls if one.phase == "decode"), 1)) == [1]
