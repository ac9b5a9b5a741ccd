"""Every malicious file is refused by name, in bounded memory, without running anything of it."""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def outcomes(report_of):
    """Attack → how it ended, all run by one child process."""
    return report_of(HERE / "run.py")


def test_every_attack_is_refused(outcomes):
    assert {name: one["fault"] for name, one in outcomes.items() if one["fault"]} == {}


def test_the_attacks_are_as_many_as_the_documentation_says(outcomes):
    assert sum(1 for name in outcomes if "untouched" not in name) >= 550


def test_every_refusal_says_where_and_what_to_do_and_is_short(outcomes):
    refused = {name: one for name, one in outcomes.items() if one["how"] != "read"}
    nameless = {name: one["message"] for name, one in refused.items() if not one["where"]}
    assert nameless == {}
    assert {name: one["message"] for name, one in refused.items() if not one["fix"]} == {}
    assert {name: one["message"] for name, one in refused.items() if len(one["message"]) >= 2000} == {}


def test_the_samples_themselves_are_read(outcomes):
    untouched = {name: one["how"] for name, one in outcomes.items() if name.endswith(": untouched")}
    assert set(untouched.values()) == {"read"}
    assert len(untouched) == 12


# -- nothing in the package could run a file's content -----------------------------------------------------------------

_RUNS = {"eval", "exec", "compile", "__import__", "breakpoint"}
_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy", "code", "xml", "imp"}
# Where a module is imported by a name, and what the name is.
_IMPORTS = {
    ("autoq/__init__.py", "import_module"),  # the package's own names, from a table in the source
    ("autoq/hf.py", "import_module"),  # the word "transformers"; the package's own names, from a table in the source
    ("autoq/loading.py", "import_module"),  # the words "transformers", "gguf"; module:function of the command line
}
# What loads a library: those that autoq compiled itself, and the C library.
_LIBRARIES = {
    ("kernels/cpu/build.py", "load_library"),
    ("kernels/cpu/build.py", "CDLL"),
    ("kernels/cpu/memory.py", "CDLL"),
    ("autoq/folders.py", "CDLL"),
}

# Where installed packages are looked up, and whether by the group of autoq alone.
_PLUGINS = ("autoq/plugins.py", True)


def _sources():
    return sorted([*(ROOT / "autoq").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def _name(node):
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_evaluates_or_imports_what_a_file_says(path):
    where = str(path.relative_to(ROOT))
    tree = ast.parse(path.read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert not imported & _MODULES
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, text = _name(node.func), ast.unparse(node)
        plain = isinstance(node.func, ast.Name)
        assert not (plain and name in _RUNS), text
        assert not (name == "load" and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load")), text
        assert name != "import_module" or (where, name) in _IMPORTS, text
        assert name != "entry_points" or (where, text.startswith("entry_points(group=GROUP")) == _PLUGINS, text
        assert name not in ("load_library", "CDLL", "LoadLibrary", "dlopen") or (where, name) in _LIBRARIES, text
        if name == "from_pretrained" and where.startswith("autoq/"):
            given = {one.arg: ast.unparse(one.value) for one in node.keywords}
            assert given.get("trust_remote_code") == "False", text
