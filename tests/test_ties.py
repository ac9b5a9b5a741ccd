"""Units: which layers get one scheme together, from the recorded siblings or the user's patterns, up to the plan."""

import copy
import json

import pytest
import torch
from torch import nn

import autoq
from autoq import candidates
from autoq.candidates import Packed
from autoq.errors import InputError, PlanError
from autoq.knapsack_problem import Option, Problem, Unit
from autoq.modules import quantized_layers
from autoq.profiler import isolated as isolated_module
from autoq.results import Settings
from autoq.ties import checked, tied, units
from autoq.workload import LayerInfo, LinearCall, PhaseInfo, Workload

SCHEMES = tuple(candidates.parse(name) for name in ("none", "int8wo", "int4wo-hqq(group_size=128)"))
QKV = r"(.*)\.(?:q|k|v)"


def workload(*names, siblings=(), k=None, reasons=()):
    """Layers of 128 x 128 (``k``: other widths by name), each called once."""
    return Workload(
        layers=tuple(
            LayerInfo(
                name=name, k=(k or {}).get(name, 128), n=128, dtype="float32", device="cpu", bias=False,
                reason="left alone" if name in reasons else None,
            )
            for name in names
        ),
        calls=tuple(LinearCall(layer=name, phase="forward", m=4, dtype="float32", count=1) for name in names),
        phases=(PhaseInfo(name="forward"),),
        siblings=siblings,
    )  # fmt: skip


BLOCKS = [f"blocks.{i}.{name}" for i in range(2) for name in ("q", "k", "v", "o")]
WORKLOAD = workload(*BLOCKS, "head", siblings=tuple(tuple(BLOCKS[4 * i : 4 * i + 3]) for i in range(2)))


# --- what ties may be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, ()),
        ("layers", ()),
        (["layers"], ()),
        ([], ()),
        ("siblings", ("siblings",)),
        (QKV, (QKV,)),
        ([QKV, "siblings", QKV], (QKV, "siblings")),
    ],
)
def test_ties_have_one_form(given, found):
    assert checked(given) == found
    assert checked(checked(given)) == found


@pytest.mark.parametrize("given", ["(", ["ok", "a**"], ["layers", "siblings"], [3], [["a"]]])
def test_ties_that_are_no_patterns_are_refused(given):
    with pytest.raises(InputError, match=r"tie"):
        checked(given)


# --- units -----------------------------------------------------------------------------------------------------------


def test_without_ties_every_layer_decides_alone():
    assert units(WORKLOAD, (), SCHEMES) == {name: (name,) for name in [*BLOCKS, "head"]}


def test_siblings_and_a_pattern_that_says_the_same_give_the_same_units():
    found = units(WORKLOAD, ("siblings",), SCHEMES)
    assert found == {
        "blocks.0.q+k+v": ("blocks.0.q", "blocks.0.k", "blocks.0.v"),
        "blocks.0.o": ("blocks.0.o",),
        "blocks.1.q+k+v": ("blocks.1.q", "blocks.1.k", "blocks.1.v"),
        "blocks.1.o": ("blocks.1.o",),
        "head": ("head",),
    }
    assert list(found) == ["blocks.0.q+k+v", "blocks.0.o", "blocks.1.q+k+v", "blocks.1.o", "head"]
    assert units(WORKLOAD, (QKV,), SCHEMES) == found


def test_patterns_tie_by_what_they_capture_and_by_whole_names():
    across = units(WORKLOAD, (r"blocks\.\d\.(q|k)", r"blocks\.\d\.o"), SCHEMES)
    assert [group for group in across.values() if len(group) > 1] == [
        ("blocks.0.q", "blocks.1.q"),
        ("blocks.0.k", "blocks.1.k"),
        ("blocks.0.o", "blocks.1.o"),
    ]
    with pytest.raises(InputError, match=r"'q'.*none of 9 layers, such as blocks\.0\.q"):
        units(WORKLOAD, ("q",), SCHEMES)


def test_patterns_go_before_siblings_and_can_free_a_layer():
    found = units(WORKLOAD, ("siblings", r"(.*\.v)"), SCHEMES)
    assert [group for group in found.values() if len(group) > 1] == [
        ("blocks.0.q", "blocks.0.k"),
        ("blocks.1.q", "blocks.1.k"),
    ]
    assert found["blocks.0.v"] == ("blocks.0.v",)


@pytest.mark.parametrize(
    ("ties", "says"),
    [
        ((QKV, r"blocks\..\.(v|o)"), r"blocks\\\\\..*v\|o.*blocks\.0\.v, which .*q\|k\|v.* matches too"),
        ((r"(.*)",), r"'\(\.\*\)'.*same groups from two layers.*9 different matches"),
        (("nothing",), r"'nothing'.*none of 9"),
    ],
)
def test_patterns_that_overlap_or_tie_nothing_are_refused_by_name(ties, says):
    with pytest.raises(InputError, match=says):
        units(WORKLOAD, ties, SCHEMES)


def test_layers_without_a_common_scheme_are_not_tied():
    """A K below one block of codes allows no scheme; siblings then decide alone, a pattern is an error."""
    odd = workload("a.q", "a.k", "a.o", siblings=(("a.q", "a.k"),), k={"a.k": 16})
    assert units(odd, ("siblings",), SCHEMES) == {name: (name,) for name in ("a.q", "a.k", "a.o")}
    with pytest.raises(InputError, match=r"q\|k.*scheme in common besides none.*a\.q: int4.*a\.k: none"):
        units(odd, (r"(.*)\.(?:q|k)",), SCHEMES)
    with pytest.raises(InputError, match="in common"):
        units(WORKLOAD, (QKV,), SCHEMES[:1])


def test_layers_that_may_not_be_quantized_belong_to_no_unit():
    some = workload(*BLOCKS, siblings=((*BLOCKS[:3],),), reasons=("blocks.0.v", "blocks.1.o"))
    assert units(some, ("siblings",), SCHEMES)["blocks.0.q+k"] == ("blocks.0.q", "blocks.0.k")
    with pytest.raises(InputError, match="none of 6"):
        units(some, (r"blocks\.1\.o",), SCHEMES)


def test_names_of_units_are_short_and_unique():
    names = [f"moe.experts.{i}.{role}" for i in range(4) for role in ("up", "gate")]
    experts = workload(*names, siblings=(tuple(names),))
    assert list(units(experts, ("siblings",), SCHEMES)) == ["moe.experts.0-3.up+gate"]
    crossed = workload("0.a", "0.b", "1.a", "1.b", siblings=(("0.a", "1.b"), ("0.b", "1.a")))
    assert units(crossed, ("siblings",), SCHEMES) == {"0+1.a+b": ("0.a", "1.b"), "0+1.b+a": ("0.b", "1.a")}
    taken = workload("q", "k", "q+k", siblings=(("q", "k"),))
    assert units(taken, ("siblings",), SCHEMES) == {"q+k+": ("q", "k"), "q+k": ("q+k",)}
    depths = workload("a", "b.c", siblings=(("a", "b.c"),))
    assert list(units(depths, ("siblings",), SCHEMES)) == ["a+b.c"]


def test_a_problem_names_its_units_of_several_layers():
    options = (Option(scheme="none", time_us=1.0, loss=0.0, bytes=1),)
    problem = Problem(
        units=(Unit(name="q+k", layers=("q", "k"), options=options), Unit(name="o", layers=("o",), options=options))
    )
    assert tied(problem) == {"q+k": ("q", "k")}


# --- a whole tuning --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(128, 128, bias=False) for _ in range(4))

    def forward(self, x):
        return x + self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Language(nn.Module):
    """Two attentions between an embedding and a head that is tied to it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.blocks = nn.Sequential(Attention(), Attention())
        self.head = nn.Linear(128, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return {"logits": self.head(self.blocks(self.embed(tokens)))}


def model():
    torch.manual_seed(0)
    return Language().eval()


def inputs():
    torch.manual_seed(1)
    return list(torch.randint(0, 64, (4, 2, 8)))


CHOICES = ["int8wo", "int4wo-hqq(group_size=64)"]


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(isolated_module, "_SECONDS_PER_SHAPE", 0.0)
    monkeypatch.setattr(isolated_module, "_MAX_COPIES", 2)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(result, cache folder) of a tuning for memory with siblings tied."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolated_module, "_SECONDS_PER_SHAPE", 0.0)
        patch.setattr(isolated_module, "_MAX_COPIES", 2)
        result = autoq.tune(
            model(), inputs(), ties="siblings", objective="memory", max_increase=10.0, candidates=CHOICES, n_trials=8,
            cache_dir=folder,
        )  # fmt: skip
    return result, folder


UNITS = {f"blocks.{i}.q+k+v": tuple(f"blocks.{i}.{name}" for name in "qkv") for i in range(2)}


def test_every_plan_of_a_tuning_keeps_its_units_together(tuned):
    result, _ = tuned
    assert tied(result.problem) == UNITS
    assert len(result.problem.units) == 5
    for text in result.front["assignment"]:
        schemes = json.loads(text)
        assert len(schemes) == 9
        assert all(len({schemes[layer] for layer in group}) == 1 for group in UNITS.values())
    assert any("9 layers are decided in 5 units" in note for note in result.notes)


def test_a_unit_costs_what_its_layers_cost(tuned):
    result, folder = tuned
    alone = autoq.tune(
        model(), inputs(), objective="memory", max_increase=10.0, candidates=CHOICES, n_trials=3, cache_dir=folder
    )
    assert tied(alone.problem) == alone.plan.units == {}
    options = {unit.layers: {one.scheme: one for one in unit.options} for unit in alone.problem.units}
    for unit in result.problem.units:
        for option in unit.options:
            single = [options[(layer,)][option.scheme] for layer in unit.layers]
            assert option.bytes == sum(one.bytes for one in single)
            assert option.time_us == pytest.approx(sum(one.time_us for one in single))
    together, apart = (one.front.set_index("label")["loss_predicted"] for one in (result, alone))
    assert together["int8wo"] == pytest.approx(apart["int8wo"])  # no trial has corrected it yet


def test_the_plan_names_its_units_and_takes_them_through_the_file(tuned, tmp_path):
    plan = tuned[0].plan
    assert plan.units == UNITS
    assert plan.provenance["request"]["ties"] == ["siblings"]
    plan.save(tmp_path / "plan.json")
    assert autoq.Plan.load(tmp_path / "plan.json") == plan
    small = tuned[0].retarget(max_increase=0.0)
    assert small.units == UNITS
    assert set(small.counts()) == {"none"}


def test_apply_measure_and_a_replay_take_a_plan_with_units(tuned, tmp_path):
    plan = tuned[0].plan
    plan.save(tmp_path / "plan.json")
    applied, replayed = model(), model()
    report = autoq.apply(applied, plan, keep_float=True)
    assert set(report.applied) == set(plan.layers) - {"head"}  # packed, it would be held beside its embedding
    assert autoq.plan_of(applied).units == UNITS
    autoq.autoquant(
        replayed, plan=tmp_path / "plan.json", ties="siblings", objective="memory", max_increase=10.0,
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(applied(inputs()[0])["logits"], replayed(inputs()[0])["logits"])
    with pytest.raises(PlanError, match=r"ties is \['siblings'\] in the file and \['\(\.\*\).*\] in the call"):
        autoq.autoquant(model(), plan=tmp_path / "plan.json", ties=QKV)
    measured = autoq.measure(model(), plan, inputs())
    assert measured.weight_bytes == plan.provenance["measured"]["weight_bytes"]
    assert measured.difference.mean == pytest.approx(plan.provenance["measured"]["loss_delta"], rel=1e-4)
    assert autoq.restore(applied) == 8


def test_a_layer_that_leaves_its_unit_dissolves_it_on_the_model_too(tuned):
    plan = tuned[0].plan
    first = next(iter(UNITS))
    other = "int8wo" if str(plan.layers["blocks.0.q"]) != "int8wo" else "none"
    changed = plan.replace({"blocks.0.q": other})
    assert changed.units == {name: group for name, group in UNITS.items() if name != first}
    carrying = model()
    autoq.apply(carrying, changed)
    assert autoq.plan_of(carrying).units == changed.units
    lacking = model()
    lacking.blocks[1].v.weight = nn.Parameter(lacking.blocks[1].v.weight.double())  # no scheme: it is left alone
    assert [one.name for one in autoq.apply(lacking, plan).skipped] == ["blocks.1.v"]
    assert list(autoq.plan_of(lacking).units) == [first]


def test_a_tied_head_keeps_the_embedding_and_its_bytes_are_counted(tuned):
    plan = tuned[0].plan
    net = model()
    before = copy.deepcopy(net.embed.weight)
    floats = sum(parameter.nbytes for parameter in net.parameters())
    assert plan.provenance["measured"]["baseline_weight_bytes"] == floats == 4 * (64 * 128 + 8 * 128 * 128)
    assert str(plan.layers["head"]) == "none"
    autoq.apply(net, plan.replace({"head": "int8wo"}))
    assert torch.equal(net.embed.weight, before)
    assert not isinstance(net.head, nn.Linear)
    int8 = tuned[0].problem.bytes(tuned[0].problem.uniform("int8wo"))
    packed = [candidates.parse("int8wo").weight_bytes_for(64 if name == "head" else 128, 128) for name in plan.layers]
    assert int8 == before.nbytes + sum(packed)
    everywhere = model()
    autoq.apply(everywhere, autoq.Plan(layers=dict.fromkeys(plan.layers, "int8wo")))
    held = [one.candidate.weight_bytes(Packed(one.packed)) for one in quantized_layers(everywhere).values()]
    assert int8 == sum(held) + sum(parameter.nbytes for parameter in everywhere.parameters())


def test_a_head_is_tied_to_other_layers_and_still_counted_beside_its_embedding(tmp_path):
    result = autoq.tune(
        model(), inputs(), ties=[r"head|blocks\.1\.o"], objective="memory", max_increase=10.0, candidates=CHOICES,
        n_trials=3, cache_dir=tmp_path,
    )  # fmt: skip
    (unit,) = (unit for unit in result.problem.units if len(unit.layers) > 1)
    assert unit.layers == ("blocks.1.o", "head")
    none, int8 = (next(one for one in unit.options if one.scheme == scheme) for scheme in ("none", "int8wo"))
    assert none.bytes == 4 * 128 * 128  # the head's weight is the embedding's
    parse = candidates.parse("int8wo")
    assert int8.bytes == parse.weight_bytes_for(128, 128) + parse.weight_bytes_for(64, 128)


def test_patterns_that_do_not_fit_the_model_are_refused_before_anything_is_measured(tmp_path):
    stages = []
    with pytest.raises(InputError, match="typo"):
        autoq.tune(
            model(), inputs(), ties=["typo"], cache_dir=tmp_path, progress=lambda stage, *_: stages.append(stage)
        )
    assert set(stages) == {"record"}
    assert Settings().request()["ties"] is None
