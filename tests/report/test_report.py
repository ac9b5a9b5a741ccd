"""The report is one file: what it has, what it does not have, and what it does with hostile names."""

import base64
import contextlib
import hashlib
import itertools
import json
import math
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from autoq import tables
from autoq.errors import InputError, PlanError
from autoq.plan import Plan
from autoq.report import page, report_tables
from autoq.reporting import write_files, write_report
from autoq.summary import summary_rows

FILES = [
    "plan.json", "workload.json", "front.parquet", "costs.parquet", "measurements.parquet", "sensitivity.parquet",
    "report.html", "front.png",
]  # fmt: skip
VOID = ("meta", "link", "wbr")


class Reader(HTMLParser):
    """Headings, texts, links, scripts and what was left open."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.titles, self.tips, self.ids = [], [], [], [], set()
        self.scripts, self.texts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.found += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.tips += [attributes["data-tip"]] if "data-tip" in attributes else []
        self.ids |= {attributes["id"]} if "id" in attributes else set()
        assert not [name for name in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


@pytest.fixture(scope="module")
def text(sample):
    return page(sample.result())


@pytest.fixture(scope="module")
def read(text):
    return Reader(text)


def test_it_is_one_file_that_needs_no_network(text, read):
    assert read.open == []
    assert all(link.startswith(("data:", "#")) for link in read.found)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("// ", ""))


def test_its_sections_are_reached_by_links(read):
    assert read.titles == [
        "Before and after", "Trade-off", "What was chosen", "Why this plan", "Where each scheme hurts",
        "How long layers take", "Predicted and measured", "Memory", "Refusals", "Notes", "Every layer", "Provenance",
    ]  # fmt: skip
    links = [link for link in read.found if link.startswith("#")]
    assert len(links) == len(read.titles)
    assert {link[1:] for link in links} <= read.ids


def test_only_its_own_script_may_run(text, read):
    data, script = read.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy == (
        "default-src &#x27;none&#x27;; style-src &#x27;unsafe-inline&#x27;; img-src data:; "
        f"script-src &#x27;sha256-{digest}&#x27;"
    ).replace("&#x27;", "'")
    assert len(json.loads(data)) == 1 + 3  # what was chosen, and a panel per scheme


def test_names_of_layers_are_text_wherever_they_stand(text, read, sample):
    assert "<script>alert(1)" not in text
    assert sample.ODD in read.texts
    assert "it is read <directly>" in read.texts
    assert "No phases were given <b>." in read.texts


def test_hostile_names_stay_text_in_every_picture(sample):
    odd = 'model.layers.0."><img src=x onerror=alert(1)></script>'
    names = dict.fromkeys(sample.LAYERS, None) | {sample.LAYERS[0]: odd}
    renamed = {name: other or name for name, other in names.items()}
    rows = [row | {"layer": renamed[row["layer"]], "unit": renamed[row["unit"]]} for row in sample.cost_rows()]
    made = sample.result(Plan(layers={renamed[k]: v for k, v in sample.CHOSEN.items()}), costs=rows)
    made.workload = replace(
        made.workload,
        layers=tuple(replace(one, name=renamed.get(one.name, one.name)) for one in made.workload.layers),
        calls=tuple(replace(one, layer=renamed[one.layer]) for one in made.workload.calls),
    )
    read = Reader(page(made))
    assert read.open == []
    assert len(read.scripts) == 2
    assert any(odd in row for panel in json.loads(read.scripts[0]) for line in panel["t"] for row in line)


def test_a_mark_says_what_plan_is_behind_it(read):
    (chosen,) = {tip for tip in read.tips if tip.startswith("chosen plan")}
    assert chosen.splitlines() == [
        "chosen plan, from Optuna",
        "perplexity +2.00% [+1.80%, +2.20%]",
        "request 0.500 × the unquantized model's time (measured)",
        "weights 1 MB",
        "within the budget",
        "attention: int4wo-hqq(group_size=64) ×2, int8wo ×1",
        "mlp: int4wo-hqq(group_size=64) ×3",
        "lm_head: int8wo ×1",
    ]
    assert any(tip.startswith("fp6(format=e2m3) on every layer\nperplexity +1118.25%") for tip in read.tips)


def test_a_cell_says_what_the_scheme_would_do_instead(read):
    panel = json.loads(read.scripts[0])[3]  # fp6
    assert panel["t"][0][0].splitlines() == [
        "model.layers.0.self_attn.q_proj",
        "fp6(format=e2m3)",
        "instead: -100 µs a request, -1.02 kB",
        "loss +0.0009 [+0.00039, +0.0019]",
        "predicted to gain within the limits; not measured",
    ]
    assert panel["t"][2][1:] == ["", ""]  # the head has one block


def test_times_are_ratios_to_the_layer_unquantized(text, read):
    assert "decode, 128 passes a request" in read.texts
    cells = re.findall(r'<td class="v(\d+)" data-tip="self_attn.q_proj[^"]*">([0-9.]+)</td>', text)
    assert cells == [("15", "0.60"), ("0", "0.40"), ("8", "0.50")]


def test_memory_adds_up_to_what_was_measured(read):
    bars = [tip.splitlines() for tip in read.tips if " of 250 MB" in tip or " of 100 MB" in tip]
    assert bars[0] == ["attention", "24.6 kB, 0% of 250 MB"]  # three layers of 64 × 64 in bfloat16
    assert ["lm_head", "0 B, 0% of 250 MB"] in bars  # its weight is the embedding's
    assert ["unchanged", "250 MB, 100% of 250 MB"] in bars


def test_colours_of_schemes_have_letters(text):
    assert re.findall(r'<i class="swatch c\d">(.)</i>(\S+) ×(\d)', text) == [
        ("a", "int4wo-hqq(group_size=64)", "5"),
        ("b", "int8wo", "2"),
    ]
    cells = re.findall(r'class="letter on-c(\d)">(.)</text>', text)
    assert sorted(cells) == [("0", "a")] * 5 + [("1", "b")] * 2


def test_every_axis_has_its_unit(text):
    labels = re.findall(r'class="label">([^<]*)</text>', text)
    assert set(labels) == {
        "perplexity increase over the unquantized model (%)",
        "request time / unquantized (lower is faster)",
        "block",
        "predicted (loss increase, %)",
        "measured (loss increase, %)",
        "predicted (time / unquantized)",
        "measured (time / unquantized)",
        "predicted (loss, nats per token)",
        "measured (loss, nats per token)",
    }


def test_provenance_and_refusals_are_there(read):
    for wanted in (
        "2026-11-22T04:00:00+00:00",
        "device: name",
        "a CPU",
        "unsupported: K is odd",
        "M=1 K=63 N=64 bfloat16",
    ):
        assert wanted in read.texts


def test_tables(sample):
    made = {table.title: table for table in report_tables(sample.result())}
    assert list(made) == ["Before and after", "Uniform plans", "Predicted and measured", "Refusals"]
    assert [row[0] for row in made["Uniform plans"].rows] == ["none", "int8wo", "fp6(format=e2m3)"]
    assert made["Uniform plans"].rows[1][2] == "0.700 (predicted)"
    assert made["Predicted and measured"].rows[0] == ["decode, ms a pass", "4.90", "5.00", "4.0%"]
    # 690 of 1100 ms predicted, 700 of 1400 measured.
    relative = ["request, relative to none on every layer", "0.627", "0.500", "25.5%"]
    assert relative in made["Predicted and measured"].rows
    assert made["Refusals"].rows[0] == [sample.ODD, "every scheme", "it is read <directly>"]


def test_one_reason_is_one_row(sample):
    made = sample.result()
    rows = [row | {"m": m} for m in range(1, 6) for row in sample.MEASUREMENTS[1:]]
    made.measurements = tables.frame(rows, tables.MEASUREMENTS)
    (others,) = [row for row in report_tables(made)[-1].rows if row[0] == "weights that no plan can quantize"]
    assert others[2] == "experts (3-D parameters): 125 MB in 2, 50.0% of the model's bytes"
    (refused,) = [row for row in report_tables(made)[-1].rows if row[1] == sample.FP6]
    assert refused[0].startswith("M=1 K=63 N=64 bfloat16, M=2")
    assert refused[0].endswith(" and 2 more")


def test_without_costs_it_says_so(sample):
    read = Reader(page(sample.result(costs=[])))
    assert "The costs of single layers were not recorded, so that nothing is told of them." in read.texts
    assert "Memory" not in read.titles


def test_a_model_of_one_layer_and_losses_of_zero_is_drawn(sample):
    rows = [
        row | {"loss": 0.0, "loss_low": 0.0, "loss_high": 0.0}
        for row in sample.cost_rows()
        if row["layer"] == "lm_head"
    ]
    made = sample.result(Plan(layers={"lm_head": "int8wo"}), costs=rows)
    made.front = made.front[made.front["label"] == "none"]
    assert "Where each scheme hurts" not in Reader(page(made)).titles


def test_a_slow_plan_does_not_squeeze_the_others(sample):
    rows = [sample.front_row("none", "uniform", 0.0, 10_000.0)]
    rows += [sample.front_row("", "local", 0.001 * i, 1000.0 + i) for i in range(3)]
    made = sample.result()
    made.front = tables.frame(rows, tables.FRONT)
    assert "none (1.00 ×)" in Reader(page(made)).texts


def test_write_files_writes_all(sample, tmp_path):
    files = write_files(sample.result(), tmp_path / "out")
    assert list(files) == FILES
    assert Plan.load(files["plan.json"]).hash == sample.PLAN.hash
    assert tables.read(files["costs.parquet"], tables.COSTS).num_rows == len(sample.LAYERS) * len(sample.SCHEMES)
    head = (tmp_path / "out" / "front.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:24])) > 400
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["schema"] == 2


def test_a_saved_plan_gives_the_same_tables_in_the_same_order(sample, tmp_path):
    """A plan file has its phases sorted; a plan in memory as they were given."""
    measured = sample.MEASURED | {"phases": {"prefill": sample.PHASE | {"calls": 1.0}, "decode": sample.PHASE}}
    predicted = sample.PREDICTED | {"phases": {"prefill": 5000.0, "decode": 4900.0}}
    provenance = sample.PLAN.provenance | {"measured": measured, "predicted": predicted}
    plan = Plan(layers=sample.CHOSEN, phases={"prefill": 1.0, "decode": 128.0}, provenance=provenance)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert report_tables(sample.result(plan)) == report_tables(sample.result(loaded))
    assert summary_rows(plan) == summary_rows(loaded)


def test_the_folder_gives_the_same_report_again(written, tmp_path):
    again = write_report(written, tmp_path / "again.html")
    assert again == tmp_path / "again.html"
    assert again.read_text() == (written / "report.html").read_text()


def test_unwritable_report_names_the_file(sample, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"report\.html"):
        write_report(sample.result(), tmp_path / "file" / "report.html")
    with pytest.raises(PlanError, match=r"plan\.json"):
        write_files(sample.result(), tmp_path / "file" / "out")


def test_times_that_are_no_json_are_refused(sample):
    rows = sample.cost_rows()
    rows[5]["phases_us"] = "[1]"
    with pytest.raises(InputError, match="phases_us is an object"):
        page(sample.result(costs=rows))
    rows[5]["phases_us"] = '{"decode": NaN}'
    with pytest.raises(InputError, match=r"\$.decode is a finite number") as problem:
        page(sample.result(costs=rows))
    assert problem.value.where == f"costs: {rows[5]['layer']}, {rows[5]['scheme']}"


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', "[" * 10_000, "{"])
def test_assignments_that_are_none_are_refused(sample, text):
    made = sample.result()
    made.front = made.front.assign(assignment=text)
    with pytest.raises(InputError, match="an assignment") as problem:
        page(made)
    assert problem.value.where.startswith("front: plan ")


def test_columns_without_a_value_are_empty(sample):
    made = sample.result()
    none = dict.fromkeys(
        ("label", "source", "assignment", "chosen", "pareto", "weight_bytes", "loss_low", "latency_low_us")
    )
    rows = [sample.front_row("none", "uniform", 0.0, 1000.0), sample.front_row("", "local", 0.01, 500.0) | none]
    made.front = tables.frame(rows, tables.FRONT)
    (tip,) = [tip for tip in Reader(page(made)).tips if "0.500 ×" in tip and "request" in tip][::2]
    assert tip.splitlines()[0] == "a plan"


def test_a_figure_that_is_missing_is_refused(sample):
    rows = sample.cost_rows()
    rows[5]["loss_low"] = math.nan
    with pytest.raises(InputError, match="has its loss_low") as problem:
        page(sample.result(costs=rows))
    assert problem.value.where == f"costs: {rows[5]['layer']}, {rows[5]['scheme']}"


STRANGE = [None, math.inf, -math.inf, math.nan, 0.0, -1.0, 1e308, -1e308, 5e-324]


@pytest.mark.parametrize("name", ["front", "costs", "sensitivity"])
def test_strange_figures_are_drawn_left_out_or_refused(sample, name):
    """Column by column: nothing but an AutoqError is raised, and what is drawn is a number."""
    schema = getattr(tables, name.upper())
    rows = tables.rows(tables.table(schema, getattr(sample.result(), name).to_dict("records")))
    values = itertools.cycle(STRANGE)
    for column in [field.name for field in schema if str(field.type) == "double"]:
        for changed in (rows[1:2], rows):
            made, value = sample.result(), next(values)
            strange = [row | ({column: value} if row in changed else {}) for row in rows]
            setattr(made, name, tables.frame(strange, schema))
            with contextlib.suppress(InputError):
                assert not re.search(r'(?:\b[xyd]|cx|cy|width|points)[12]?="[^"]*(?:nan|inf)', page(made)), (
                    column,
                    value,
                )
