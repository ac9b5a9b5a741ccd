"""The shape of the project: who may import whom, who prints, who reads the environment."""

import ast
from pathlib import Path

import pytest

import autoq

ROOT = Path(autoq.__file__).parent
KERNELS = ROOT.parent / "kernels"

# A unit imports units of lower ranks only; a package's own modules may import each other.
RANKS = {
    0: (
        "own_code",
        "additive",
        "estimates",
        "placement",
        "pictures",
        "errors",
        "_files",
        "_thrift",
        "progress_bars",
        "scheme",
        "knapsack_core",
    ),
    1: (
        "attention",
        "sampling",
        "cli_options",
        "hub",
        "dequantized",
        "linear_layers",
        "plugins",
        "workload",
        "plan",
        "plan_text",
        "plan_schema",
        "plan_names",
        "_parquet",
        "tables",
        "numerics",
        "knapsack_problem",
        "hypervolume",
        "identity",
        "folders",
        "opening",
        "shards",
        "explaining_values",
        "hf_settings",
    ),
    2: (
        "kv_cache",
        "export_rules",
        "result_files",
        "pricing",
        "candidates",
        "cache",
        "losses",
        "summary",
        "knapsack",
        "shard_writing",
        "apply_report",
        "provenance",
    ),
    3: (
        "sections",
        "stacking",
        "quant_linear",
        "fused",
        "quant_embedding",
        "checkpoint_files",
        "ties",
        "figures",
        "search_values",
        "phase_forms",
        "plan_diff",
        "device_check",
        "explaining_text",
        "export_gptqmodel",
        "export_llamacpp",
        "export_torchao",
        "bare_files",
    ),
    4: (
        "exporting",
        "explaining",
        "cost_figures",
        "modules",
        "loss_model",
        "journal",
        "leases",
        "studies",
        "definition",
    ),
    5: (
        "decoding",
        "experts",
        "other_weights",
        "report",
        "installing",
        "stored",
        "hf_marks",
        "hf_quantizer",
        "fitting",
        "siblings",
        "shadow",
        "language",
        "prefix",
        "proposals",
        "trials",
        "waiting",
    ),
    # The stages, which never import each other.
    6: (
        "recorder",
        "profiler",
        "sensitivity",
        "evaluation",
        "search",
        "applying",
        "fusing",
        "sharing",
        "reporting",
        "checkpoint",
        "loading",
        "precise",
        "tuning_inputs",
    ),
    7: (
        "decode_choice",
        "generating",
        "testing",
        "results",
        "verdict",
        "diagnosis",
        "pairs",
        "judging",
        "calibration",
        "costs",
        "hf_evaluating",
    ),
    8: ("tuning", "pipeline"),
    9: ("quantizing", "workers", "hf_tuning"),
    10: ("terminal", "remeasuring", "cli_cache", "hf", "model_bench"),
    11: ("__init__", "cli_models"),
    12: ("cli_plans", "cli_explain", "cli_export"),
    13: ("cli_measure", "cli_tune"),
    14: ("cli_model_bench",),
    15: ("cli",),
    16: ("__main__",),
}
RANK = {unit: rank for rank, units in RANKS.items() for unit in units}
# Modules that are one unit like a package's; each imports only those before it.
TOGETHER = (
    ("_parquet", "tables"),
    ("plugins", "plan_text", "plan_schema", "plan_names", "plan"),
    ("knapsack_problem", "knapsack_core", "knapsack"),
    ("search_values", "loss_model", "journal", "leases", "studies", "definition", "proposals", "trials", "search"),
    ("pairs", "judging"),
    ("tuning", "pipeline"),
    ("sections", "stacking", "quant_linear", "fused", "quant_embedding"),
    ("checkpoint_files", "bare_files"),
    ("installing", "experts", "stored", "hf_quantizer", "hf_marks"),
)
EARLIER = {module: modules[:i] for modules in TOGETHER for i, module in enumerate(modules)}
# scheme and _files raise autoq's errors; the errors import nothing.
EXCEPTIONS = {("scheme", "errors"), ("_files", "errors")}
SOURCES = sorted(ROOT.rglob("*.py"))


def unit_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imported_units(tree, names):
    """Units of autoq that a module imports anywhere, also under TYPE_CHECKING and inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "autoq":
                    yield parts[1] if len(parts) > 1 else "__init__"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            parts = (node.module or "").split(".")
            if parts[0] != "autoq":
                continue
            if len(parts) > 1:
                yield parts[1]
            else:
                yield from (alias.name if alias.name in names else "__init__" for alias in node.names)


def called_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_every_unit_has_a_rank():
    assert {unit_of(path) for path in SOURCES} == set(RANK)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_lower_ranks_only(path):
    unit = unit_of(path)
    for other in imported_units(ast.parse(path.read_text()), RANK):
        if other == unit or (unit, other) in EXCEPTIONS:
            continue
        if unit == "__main__" or RANK[other] < RANK[unit] or other in EARLIER.get(unit, ()):
            continue
        # The version is a plain string of the package itself.
        assert (unit, other) == ("cli", "__init__"), f"{unit} (rank {RANK[unit]}) imports {other} (rank {RANK[other]})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_prints_and_reads_the_environment(path):
    if unit_of(path).startswith("cli"):
        return
    tree = ast.parse(path.read_text())
    assert not {"print", "click.echo", "Console", "sys.stdout.write", "sys.stderr.write"} & set(called_names(tree))
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {"os.environ", "os.getenv", "os.environb"} & attributes


@pytest.mark.parametrize("package", ["", "candidates", "cache", "profiler"])
def test_no_exported_function_shares_its_name_with_a_submodule(package):
    """With lazy imports the second call of such a function would find a module."""
    folder = ROOT / package
    exported = set(autoq.__all__)
    if package:
        tree = ast.parse((folder / "__init__.py").read_text())
        exported = {
            alias.asname or alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names
        }
    submodules = {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    # `autoq.candidates` and `autoq.hf` are meant to be the modules.
    assert not (exported & submodules) - ({"candidates", "hf"} if not package else set())


def test_the_kernels_import_nothing_of_autoq():
    for path in KERNELS.rglob("*.py"):
        assert not list(imported_units(ast.parse(path.read_text()), RANK)), path.name


def test_every_exported_name_exists():
    for name in autoq.__all__:
        assert getattr(autoq, name) is not None
