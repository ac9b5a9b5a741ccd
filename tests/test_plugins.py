"""Schemes of other packages: the example is really installed and used, and every kind of broken one is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import autoq
from autoq import candidates, numerics, plugins
from autoq.candidates import AffineCandidate
from autoq.errors import CandidateError, InputError, PlanError
from autoq.plan import Plan
from autoq.scheme import FIELDS, Scheme
from autoq.testing import Conformance, IndependentRows, NearestCodes

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "plugin"
CHOSEN = "int4wo-clip(group_size=64)"

# What a user of the plugin does; its plan has to save memory, and no other scheme is offered.
USE = """
import sys
from pathlib import Path
import torch
from torch import nn
import autoq

folder = Path(sys.argv[1])

def build():
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).eval()

torch.manual_seed(0)
model, batches = build(), list(torch.randn(3, 16, 128))
print(*autoq.candidates.installed())
result = autoq.tune(
    model, batches, candidates=[sys.argv[2]], objective="memory", max_increase=0.5, n_trials=2,
    cache_dir=folder / "cache",
)
result.plan.save(folder / "plan.json")
report = autoq.apply(model, autoq.Plan.load(folder / "plan.json"))
print(*report.applied)
autoq.save_quantized(model, folder / "model")
loaded = autoq.load_quantized(build, folder / "model")
print(torch.equal(loaded(batches[0]), model(batches[0])))
"""


def python(*arguments, site, cwd):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the example."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(EXAMPLE, source)  # building leaves files behind
    site = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--no-deps", "--no-build-isolation", "--target", str(site), str(source)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return site


@pytest.fixture(scope="module")
def used(site, tmp_path_factory):
    """The folder that ``USE`` wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("used")
    return folder, python("-c", USE, folder, CHOSEN, site=site, cwd=folder)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes an installed package with one module and entry points; the module's name is the package's."""

    def make(name, text, points, version="1.0"):
        folder = tmp_path / name
        about = folder / f"{name}-{version}.dist-info"
        about.mkdir(parents=True)
        (folder / f"{name}.py").write_text(text)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"{key} = {target}" for key, target in points.items()]
        (about / "entry_points.txt").write_text("\n".join(["[autoq.candidates]", *lines, ""]))
        monkeypatch.syspath_prepend(str(folder))

    plugins.load.cache_clear()
    yield make
    plugins.load.cache_clear()


def module(key="their-int4", fields="group_size: int = 64", choices="{'group_size': (64,)}", extra=""):
    return f"""
from dataclasses import dataclass
from typing import ClassVar
from autoq.candidates import AffineCandidate

{extra}
@dataclass(frozen=True, slots=True, kw_only=True)
class Theirs(AffineCandidate):
    key: ClassVar[str] = {key!r}
    choices: ClassVar = {choices}
    {fields}

    @property
    def code_bits(self):
        return 4
"""


# -- the example -------------------------------------------------------------------------------------------------------


def test_the_documentation_shows_the_example_as_it_is():
    text = (ROOT / "docs" / "plugins.md").read_text()
    for name in ("autoq_clip.py", "pyproject.toml", "test_autoq_clip.py"):
        language = "toml" if name.endswith("toml") else "python"
        assert f"```{language}\n{(EXAMPLE / name).read_text()}```" in text, name


def test_the_example_tunes_applies_saves_and_loads(used):
    folder, printed = used
    variants = " ".join(f"int4wo-clip(group_size={size})" for size in (32, 64, 128))
    assert printed == [variants, "0 2", "True"]
    plan = json.loads((folder / "plan.json").read_text())
    scheme = {"scheme": "int4wo-clip", "group_size": 64}
    assert plan["layers"] == {"0": scheme, "2": scheme}
    assert plan["provenance"]["plugins"] == {"int4wo-clip": "autoq-clip 0.1.0"}


def test_what_is_remembered_of_losses_depends_on_the_plugins_source(used):
    folder, _ = used
    source = plugins.hashlib.sha256((EXAMPLE / "autoq_clip.py").read_bytes()).hexdigest()[:8]
    kept = [json.loads(path.read_text()) for path in folder.glob("cache/sensitivity/*/key.json")]
    wanted = json.dumps({"int4wo-clip": f"autoq-clip 0.1.0, source {source}"})
    assert [one.get("plugins") for one in kept if "device" not in one] == [wanted]


def test_the_example_passes_its_own_tests(site, tmp_path):
    (tmp_path / "test_autoq_clip.py").write_text((EXAMPLE / "test_autoq_clip.py").read_text())
    printed = python("-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path, site=site, cwd=tmp_path)
    assert re.fullmatch(r"150 passed in .*", printed[-1]), printed[-1]  # 50 of each variant


def test_the_example_is_better_than_rounding_and_does_not_use_the_compiled_rounding(site, monkeypatch, package):
    monkeypatch.syspath_prepend(str(site))
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    errors = {}
    for key, bits in (
        ("int4wo-clip", ""),
        ("int4wo-hqq", ""),
        ("sinq", "bits=4,"),
    ):  # SINQ rounds such weights to nearest
        one = candidates.parse(f"{key}({bits}group_size=128)")
        errors[key] = numerics.relative_rms(one.unpack(one.pack(w)), w)
    assert errors == pytest.approx({"int4wo-clip": 0.0944, "int4wo-hqq": 0.0970, "sinq": 0.0997}, rel=1e-3)


# -- without the package -----------------------------------------------------------------------------------------------


def test_a_plan_of_a_missing_plugin_names_scheme_and_package(used):
    with pytest.raises(PlanError) as found:
        Plan.load(used[0] / "plan.json")
    assert str(found.value) == (
        f'{used[0] / "plan.json"}: $.layers["0"].scheme is one of {", ".join(FIELDS)}, or of an installed plugin; '
        "got 'int4wo-clip'. The plan was made with the package 'autoq-clip 0.1.0': install it, if you trust it."
    )


def test_a_checkpoint_of_a_missing_plugin_names_scheme_and_package(used):
    with pytest.raises(PlanError, match=r"got 'int4wo-clip'.*the package 'autoq-clip 0\.1\.0': install it"):
        autoq.load_quantized(lambda: nn.Sequential(nn.Linear(128, 256)), used[0] / "model")


def test_a_hand_written_plan_of_an_unknown_scheme_names_the_schemes():
    rule = r"scheme is one of none, int8wo, .*or of an installed plugin; got 'int5wo'"
    with pytest.raises(PlanError, match=rule + r"\. Correct or restore the file, or tune again\.$"):
        Plan.from_json({"schema": 2, "layers": {"fc": {"scheme": "int5wo"}}})


def test_a_class_that_is_not_installed_is_refused_before_anything_is_measured():
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Sinq(AffineCandidate):
        key: ClassVar[str] = "sinq"

        @property
        def code_bits(self):
            return 4

    with pytest.raises(CandidateError, match=r"'sinq'|the scheme sinq is .*got autoq\.candidates\.sinq\.Sinq"):
        autoq.tune(nn.Linear(64, 64), torch.randn(4, 64), candidates=[Sinq()], max_increase=1.0)


# -- packages that do not work -----------------------------------------------------------------------------------------

WORKING = {"their-int4": "theirs:Theirs"}


def test_a_working_package_is_found_by_its_key(package):
    package("theirs", module(), WORKING)
    (plugin,) = plugins.installed()
    assert (str(plugin), plugin.package) == ("theirs 1.0, entry point their-int4 = theirs:Theirs", "theirs 1.0")
    assert "theirs" not in sys.modules  # listing imports nothing
    assert [str(one) for one in candidates.installed()] == ["their-int4(group_size=64)"]
    plan = Plan.from_json({"schema": 2, "layers": {"fc": {"scheme": "their-int4", "group_size": 64}}})
    assert plan.layers["fc"] == candidates.parse("their-int4").scheme
    with pytest.raises(PlanError, match=r'\$\.layers\["fc"\]\.group_size is one of 64; got 32'):
        Plan.from_json({"schema": 2, "layers": {"fc": {"scheme": "their-int4", "group_size": 32}}})
    with pytest.raises(CandidateError, match="group_size is one of 64; got 32"):
        candidates.parse("their-int4(group_size=32)")
    del sys.modules["theirs"]


@pytest.mark.parametrize(
    ("text", "target", "said"),
    [
        ("import no_such_module", "theirs:Theirs", "can be imported; got ModuleNotFoundError: No module named 'no_su"),
        ("def f(:", "theirs:Theirs", "can be imported; got SyntaxError"),
        ("raise RuntimeError('no GPU')", "theirs:Theirs", "can be imported; got RuntimeError: no GPU"),
        (module(), "theirs:Other", "can be imported; got AttributeError: module 'theirs' has no attribute 'Other'"),
        (module(), "nothing:Theirs", "can be imported; got ModuleNotFoundError: No module named 'nothing'"),
        ("Theirs = 7", "theirs:Theirs", "a plugin is a dataclass; got 7"),
        (module(key="other"), "theirs:Theirs", "has its entry point's name as key; got key = 'other'"),
        (module(choices="{}"), "theirs:Theirs", "have the values of each field: group_size; got {}"),
        (
            module(choices="{'bits': (4,)}"),
            "theirs:Theirs",
            r"the values of each field: group_size; got {'bits': (4,)}",
        ),
        (module(choices="{'group_size': ()}"), "theirs:Theirs", "choices['group_size'] is a tuple of values; got ()"),
        (module(choices="{'group_size': [64]}"), "theirs:Theirs", "is a tuple of values; got [64]"),
        (module(choices="{'group_size': (None,)}"), "theirs:Theirs", "named numbers, booleans or words"),
        (module(choices="{'group_size': (32,)}"), "theirs:Theirs", "group_size is one of 32; got 64"),
        (module().replace("code_bits", "bits"), "theirs:Theirs", "Can't instantiate abstract class Theirs"),
        (
            "from dataclasses import dataclass\n@dataclass\nclass Theirs:\n    key = 'their-int4'\n    choices = {}\n",
            "theirs:Theirs",
            "a plugin's class is a subclass of autoq.candidates.Candidate; got Theirs",
        ),
    ],
)
def test_what_is_wrong_with_a_package_is_said_by_its_name(package, text, target, said):
    package("theirs", text, {"their-int4": target})
    with pytest.raises(CandidateError) as found:
        candidates.parse("their-int4")
    message = str(found.value)
    assert message.startswith(f"theirs 1.0, entry point their-int4 = {target}: ")
    assert said in message
    assert message.endswith("Repair or uninstall theirs.")
    sys.modules.pop("theirs", None)


def test_a_plan_of_a_broken_package_says_where_and_what(package):
    package("theirs", "import no_such_module", WORKING)
    with pytest.raises(PlanError) as found:
        Plan.from_json({"schema": 2, "layers": {"fc": {"scheme": "their-int4"}}}, where="plan.json")
    message = str(found.value)
    assert message.startswith('plan.json: $.layers["fc"].scheme is one of none,')
    assert "theirs 1.0, entry point their-int4 = theirs:Theirs: a plugin can be imported" in message


def test_two_packages_with_one_key_are_refused(package):
    package("theirs", module(), WORKING)
    package("ours", module(), {"their-int4": "ours:Theirs"})
    for use in (lambda: candidates.parse("their-int4"), plugins.installed):
        with pytest.raises(CandidateError) as found:
            use()
        message = str(found.value)
        assert "theirs 1.0, entry point their-int4 = theirs:Theirs" in message
        assert "ours 1.0, entry point their-int4 = ours:Theirs" in message
        assert "a key is offered once; got 2 entry points their-int4" in message


def test_a_key_of_autoqs_own_stays_its_own_and_is_refused_when_plugins_are_listed(package):
    package("theirs", module(key="int8wo"), {"int8wo": "theirs:Theirs"})
    assert type(candidates.parse("int8wo")).__module__ == "autoq.candidates.int8"
    with pytest.raises(CandidateError, match=r"theirs 1\.0, entry point int8wo.*none of autoq's own; got int8wo"):
        plugins.installed()


def test_a_plan_imports_nothing_but_the_entry_point_of_its_key(package):
    package("theirs", module(), WORKING)
    for key in ("theirs", "theirs:Theirs", "os", "their-int4:Theirs", "../theirs"):
        with pytest.raises(PlanError, match=r"\$\.layers\[\"fc\"\]\.scheme is one of"):
            Plan.from_json({"schema": 2, "layers": {"fc": {"scheme": key}}})
    assert "theirs" not in sys.modules


# -- the suite ---------------------------------------------------------------------------------------------------------


class Rounding(AffineCandidate):
    """Rounds to nearest, as the suite wants it; what is wrong with it, ``broken`` adds."""

    key: ClassVar[str] = "int4wo-hqq"

    @property
    def code_bits(self):
        return 4

    def quantize_groups(self, w):
        return numerics.rtn(w, 4)


@dataclass(frozen=True, kw_only=True)
class Forgetful(Rounding):
    """Its codes are one too high, its bytes too few."""

    def quantize_groups(self, w):
        grid = super().quantize_groups(w)
        return numerics.Grid((grid.codes + 1).clamp(max=15), grid.scale, grid.minimum)

    def weight_bytes_for(self, n, k):
        return n * k // 2


def test_the_suite_finds_what_is_wrong():
    suite, wrong = Conformance(), Forgetful()
    with pytest.raises(AssertionError, match=r"weight_bytes_for\(5, 100\) is 380; got 250"):
        suite.test_bytes_are_those_predicted(wrong, (5, 100))
    with pytest.raises(AssertionError, match=r"is its package installed\?\); got <class 'autoq.*Int4Hqq'>"):
        suite.test_its_name_gives_it_back(wrong)
    with pytest.raises(AssertionError, match=r"beyond that of the nearest code is at most 1e-06; got 0\.[0-9]+"):
        NearestCodes().test_every_code_is_the_nearest(wrong)


def broken(**parts):
    return dataclass(frozen=True, kw_only=True)(type("Broken", (Rounding,), parts))()


def at_random(self, w):
    found = numerics.rtn(w, 4)
    return numerics.Grid((found.codes + torch.randint_like(found.codes, 2)).clamp(max=15), found.scale, found.minimum)


def too_coarse(self, w):
    found = numerics.rtn(w, 4)
    return numerics.Grid(found.codes // 4 * 4, found.scale, found.minimum)


def clipped_by_all_rows(self, w):
    return numerics.rtn(w.clamp(max=float(w.max()) / 2), 4)


FLOAT32 = torch.float32
# What a scheme gets wrong → the tests of the suite, with their cases, that have to say so.
BROKEN = {
    "random codes": (
        {"quantize_groups": at_random},
        {"packing_is_deterministic_and_leaves_the_weight_alone": ()},
    ),
    "coarse codes": ({"quantize_groups": too_coarse}, {"products_of_odd_shapes": ((5, 100), 1)}),
    "a grid that knows other rows": (
        {"quantize_groups": clipped_by_all_rows},
        {"rows_are_packed_alike_in_any_chunk": (), "constant_rows": (0.437,)},
    ),
    "another weight unpacked": (
        {"unpack": lambda self, p: AffineCandidate.unpack(self, p) * 1.001},
        {"unpack_is_what_the_kernels_multiply_with": (), "input_gradient_is_that_of_the_unpacked_weight": ()},
    ),
    "a reference without bias": (
        {"reference": lambda self, x, p, bias=None: AffineCandidate.reference(self, x, p)},
        {"products_of_odd_shapes": ((5, 100), 1), "activations_of_any_dtype_shape_and_stride": (FLOAT32,)},
    ),
    "activations said to be rounded": ({"activation_bits": 8}, {"products_of_odd_shapes": ((40, 64), 5)}),
    "float32 products": (
        {"linear": lambda self, x, p, bias=None: AffineCandidate.linear(self, x, p, bias).float()},
        {"activations_of_any_dtype_shape_and_stride": (torch.bfloat16,)},
    ),
    "columns scaled by a factor with a floor": (
        {"column_scale": lambda self, w: w.float().abs().amax(0).clamp_min(1e-6).sqrt()},
        {"error_does_not_depend_on_the_magnitude": (-60,), "bytes_are_those_predicted": ((48, 128),)},
    ),
    "every header taken": ({"fits": lambda self, form: True}, {"its_headers_are_its_own": ()}),
    "nothing refused": (
        {"why_not": lambda self, op: None},
        {"what_cannot_run_is_refused_with_the_reason": ()},
    ),
    "everything refused": ({"why_not": lambda self, op: "no"}, {"ordinary_layers_are_not_refused": (FLOAT32,)}),
}


@pytest.mark.parametrize(("parts", "tests"), BROKEN.values(), ids=BROKEN)
def test_the_suite_catches_each_mistake(parts, tests):
    for name, case in tests.items():
        kind = next(one for one in (Conformance, NearestCodes, IndependentRows) if hasattr(one, f"test_{name}"))
        test = getattr(kind(), f"test_{name}")
        test(broken(), *case)
        with pytest.raises(AssertionError, match="; got "):
            test(broken(**parts), *case)


def test_a_suite_without_schemes_is_refused():
    with pytest.raises(InputError, match="Conformance: candidates names the schemes to test; got none"):
        Conformance.pytest_generate_tests(None)


def test_variants_are_every_combination_of_the_fields_values():
    found = [str(one) for one in type(candidates.parse("sinq")).variants()]
    assert len(found) == 15
    assert found[:2] == ["sinq(bits=3,group_size=32)", "sinq(bits=3,group_size=64)"]
    assert Scheme.parse("none") == type(candidates.parse("none")).variants()[0].scheme
