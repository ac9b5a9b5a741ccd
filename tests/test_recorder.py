import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from autoq.errors import InputError, ModelError
from autoq.recorder import Recorder, record
from autoq.workload import LinearCall, Phase, PhaseInfo, Workload


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


def test_siblings_of_a_language_model_are_q_k_v_and_gate_up(language_model):
    with Recorder(language_model) as recorder:
        language_model.generate(torch.ones(2, 5, dtype=torch.long), max_new_tokens=4, do_sample=False, pad_token_id=0)
    block = "model.layers.0"
    assert recorder.recording().workload.siblings == (
        tuple(f"{block}.self_attn.{name}_proj" for name in "qkv"),
        tuple(f"{block}.mlp.{name}_proj" for name in ("gate", "up")),
    )


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


# --- siblings --------------------------------------------------------------------------------------------------------


def grouped(model, *batches):
    return {frozenset(group) for group in record(model, list(batches)).workload.siblings}


class Wired(nn.Module):
    """Layers q, k, v, o and a function that calls them."""

    def __init__(self, call):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.call = call

    def forward(self, x):
        return self.call(self, x)


def in_place(m, x):
    m.q(x)
    x.add_(1)
    return m.k(x) + m.v(x)


def at_the_same_address(m, x):
    """The allocator gives freed memory out again: other values at the address of q's input."""
    for layer in (m.q, m.k, m.v):
        layer(x + 1)
    return m.o(x)


def of_parts(m, x):
    halves = torch.cat([x, x], dim=-1)
    m.v(x.view(-1, 8))
    return m.q(halves[..., :8]) + m.k(halves[..., 8:]) + m.o(x)


@pytest.mark.parametrize(
    ("call", "groups"),
    [
        (lambda m, x: m.o(m.q(x) + m.k(x) + m.v(x)), ["qkv"]),
        (lambda m, x: m.o(m.q(x) + m.k(x[:]) + m.v(x.detach())), ["qkv"]),
        (lambda m, x: m.o(m.k(m.v(m.q(x)))), []),
        (lambda m, x: m.q(x) + m.k(x.clone()) + m.v(x) + m.o(x.clone()), ["qv"]),
        (lambda m, x: m.q(x) + m.k(x) + m.k(x + 1), []),
        (lambda m, x: m.q(x) + m.k(x) + (m.k(x) if x.shape[0] == 3 else 0), ["qk"]),
        (lambda m, x: m.q(x) + m.k(x if x.shape[0] == 3 else x + 1), []),
        (lambda m, x: m.q(x) + (m.k(x) if x.shape[0] == 3 else 0), []),
        (in_place, ["kv"]),
        (at_the_same_address, []),
        (of_parts, []),
    ],
)
def test_siblings_always_see_the_same_inputs(call, groups):
    model = Wired(call)
    assert grouped(model, torch.randn(3, 2, 8), torch.randn(2, 2, 8)) == {frozenset(one) for one in groups}


def test_no_input_is_kept_and_a_model_called_for_long_costs_nothing():
    kept = []

    def call(m, x):
        y = m.q(x) + m.k(x)
        kept.append(weakref.ref(x.untyped_storage()))
        return m.o(y)

    model = Wired(call)
    with torch.no_grad(), Recorder(model) as recorder:
        for _ in range(5):
            model(torch.randn(2, 8))
        assert not any(ref() is not None for ref in kept)
    assert recorder.recording().workload.siblings == (("q", "k"),)


def test_inputs_without_a_version_are_never_the_same():
    model = Wired(lambda m, x: m.o(m.q(x) + m.k(x)))
    with torch.inference_mode(), Recorder(model) as recorder:
        model(torch.randn(2, 8))
    assert recorder.recording().workload.siblings == ()


def test_siblings_have_one_owner_even_where_one_tensor_enters_every_block():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(8, 8)
            self.k, self.v = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))  # wrapped one by one

        def forward(self, x, context):
            return self.q(x) + self.k(context) + self.v(context)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Cross(), Cross()])
            self.shifts = nn.ModuleList([nn.ModuleDict({"time": nn.Linear(8, 8)}) for _ in range(2)])

        def forward(self, x):
            for block, shift in zip(self.blocks, self.shifts, strict=True):
                x = block(x + 1, self.context) + shift["time"](self.context)
            return x

    model = Decoder()
    model.context = torch.randn(2, 8)
    assert grouped(model, torch.randn(2, 8)) == {
        frozenset({"blocks.0.k.0", "blocks.0.v.0"}),
        frozenset({"blocks.1.k.0", "blocks.1.v.0"}),
        frozenset({"shifts.0.time", "shifts.1.time"}),
    }


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x) * self.gate(x))


class Routed(nn.Module):
    """A block with experts, of which each sees the rows that are routed to it."""

    def __init__(self, name, sizes):
        super().__init__()
        self.router = nn.Linear(8, len(sizes))
        setattr(self, name, nn.ModuleList(Expert() for _ in sizes))
        self.name, self.sizes = name, sizes

    def forward(self, x):
        self.router(x)
        parts = x.split(self.sizes)
        return torch.cat(
            [expert(part) for expert, part in zip(getattr(self, self.name), parts, strict=True) if len(part)]
        )


@pytest.mark.parametrize(
    ("name", "sizes", "tied"), [("experts", [2, 2, 2], True), ("parts", [1, 2, 3], True), ("parts", [2, 2, 2], False)]
)
def test_experts_of_a_block_are_siblings_role_by_role(name, sizes, tied):
    """Up and gate of one expert have the same input, so those of all experts are one group."""
    model = nn.Sequential(Routed(name, sizes), Routed(name, sizes))
    found = grouped(model, torch.randn(6, 8))
    pairs = [{f"{b}.{name}.{e}.{role}" for role in ("up", "gate")} for b in range(2) for e in range(3)]
    if not tied:
        assert found == set(map(frozenset, pairs))
        return
    for block in range(2):
        both = frozenset().union(*pairs[3 * block : 3 * block + 3])
        assert {both, frozenset(f"{block}.{name}.{e}.down" for e in range(3))} <= found
    assert len(found) == 4


def test_blocks_in_sequence_are_no_experts_whatever_experts_they_have():
    stage = nn.Module()
    stage.blocks = nn.ModuleList([Routed("experts", [1, 2, 3]), Routed("experts", [3, 2, 1])])
    stage.forward = lambda x: stage.blocks[1](stage.blocks[0](x))
    found = grouped(nn.Sequential(stage), torch.randn(6, 8))
    assert {len({name.split(".")[2] for name in group}) for group in found} == {1}
    assert not any("router" in name for group in found for name in group)


def test_an_expert_that_was_not_called_is_no_sibling():
    model = nn.Sequential(Routed("experts", [2, 0, 4]))
    found = grouped(model, torch.randn(6, 8))
    assert frozenset({"0.experts.0.down", "0.experts.2.down"}) in found


def test_siblings_are_kept_in_the_file_and_files_without_them_are_read(tmp_path):
    workload = record(Wired(lambda m, x: m.o(m.q(x) + m.k(x))), torch.randn(2, 8)).workload
    assert workload.siblings == (("q", "k"),)
    workload.save(tmp_path / "workload.json")
    assert Workload.load(tmp_path / "workload.json") == workload
    old = workload.to_json()
    del old["siblings"]
    assert Workload.from_json(old) == replace(workload, siblings=())
    for wrong in ([["q"]], [["q", "nowhere"]], [["q", "k"], ["k", "o"]], [3]):
        with pytest.raises(InputError):
            Workload.from_json(old | {"siblings": wrong})
