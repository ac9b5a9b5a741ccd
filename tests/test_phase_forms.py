from autoq.phase_forms import PhaseForms
from autoq.scheme import Scheme
from autoq.workload import LayerInfo, LinearCall, PhaseInfo, Workload


def workload(*calls):
    names = dict.fromkeys(layer for layer, _, _ in calls)
    phases = dict.fromkeys(phase for _, phase, _ in calls)
    return Workload(
        layers=tuple(LayerInfo(name=n, k=64, n=64, dtype="bfloat16", device="cpu", bias=False) for n in names),
        calls=tuple(LinearCall(layer=n, phase=p, m=m, dtype="bfloat16", count=1) for n, p, m in calls),
        phases=tuple(PhaseInfo(name=p) for p in phases),
    )


# A request of a language model: only the last token's logits are computed.
REQUEST = workload(("up", "decode", 1), ("head", "decode", 1), ("up", "prefill", 512), ("head", "prefill", 1))


def plan(**layers):
    return {layer: Scheme.parse(text) for layer, text in layers.items()}


def test_a_form_follows_each_layers_rows_in_the_phase():
    forms = PhaseForms.of(REQUEST)
    mixed = plan(up="int8mix(m_switch=32)", head="int8mix(m_switch=8)")
    assert forms.form(mixed, "prefill") == plan(up="int8dq", head="int8wo")
    assert forms.form(mixed, "decode") == plan(up="int8wo", head="int8wo")
    assert forms.largest == "prefill"
    assert forms.distinct(mixed) == [
        (("prefill",), plan(up="int8dq", head="int8wo")),
        (("decode",), plan(up="int8wo", head="int8wo")),
    ]


def test_a_plan_without_mixes_has_one_form_itself():
    whole = plan(up="int4dq(group_size=64,method=sinq)", head="none")
    assert PhaseForms.of(REQUEST).distinct(whole) == [(("prefill", "decode"), whole)]
    assert not PhaseForms.of(REQUEST).differ(whole)


def test_the_switch_is_where_the_kernels_switch():
    for m, scheme in ((31, "int4wo-hqq(group_size=128)"), (32, "int4dq(group_size=128,method=hqq)")):
        forms = PhaseForms.of(workload(("up", "forward", m)))
        assert str(forms.scheme("up", Scheme.parse("int4mix(group_size=128)"), "forward")) == scheme


def test_of_several_row_counts_the_most_count_and_an_uncalled_layer_has_those_of_another_phase():
    forms = PhaseForms.of(workload(("up", "text", 8), ("up", "text", 64), ("head", "image", 100)))
    assert forms.rows == {"text": {"up": 64, "head": 100}, "image": {"up": 64, "head": 100}}


def test_without_a_workload_every_mix_is_seen_on_both_sides():
    forms = PhaseForms.extremes(["up"])
    for switch in (8, 128):
        found = forms.distinct(plan(up=f"int8mix(m_switch={switch})"))
        assert found == [(("many rows",), plan(up="int8dq")), (("few rows",), plan(up="int8wo"))]
