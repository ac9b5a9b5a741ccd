"""Every notebook runs from top to bottom, is committed without outputs, and has its rendered copy in docs."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
PUBLIC = {"autoq", "autoq.candidates"}


@pytest.fixture(scope="module")
def make_notebooks():
    spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "docs" / "make_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_there_are_four_notebooks():
    assert NAMES == [
        "01_quickstart",
        "02_accuracy_speed_tradeoffs",
        "03_your_own_model",
        "04_inside_the_schemes",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_has_no_outputs(path):
    assert not [cell for cell in cells(path, "code") if cell.outputs or cell.execution_count]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_imports_public_names_only(path):
    source = "\n".join(cell.source for cell in cells(path, "code"))
    used = set(re.findall(r"^(?:import|from) (autoq[\w.]*)", source, re.MULTILINE))
    assert used
    assert used <= PUBLIC


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_runs(path, make_notebooks):
    executed = make_notebooks.execute(path)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_rendered_copy_is_of_this_notebook(path, make_notebooks):
    """The copy's code is the notebook's; only outputs and pictures may be of another run."""
    text = (ROOT / "docs" / "notebooks" / f"{path.stem}.md").read_text()
    blocks = [
        f"```python\n{source}```" for source in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]
    assert blocks == [make_notebooks.code_block(cell.source) for cell in cells(path, "code")]
    for cell in cells(path, "markdown"):
        assert make_notebooks.linked(cell.source) in text
    pictures = re.findall(r"!\[picture\]\(([^)]+)\)", text)
    assert pictures
    assert all((ROOT / "docs" / "notebooks" / name).stat().st_size < 100_000 for name in pictures)


def test_markdown_of_outputs(make_notebooks):
    output = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell("f()")
    cell.outputs = [
        output("stream", name="stdout", text="one\x1b[31mtwo\x1b[0m\n"),
        output("stream", name="stderr", text="a warning\n"),
        output("execute_result", data={"text/plain": "3"}),
        output("execute_result", data={"text/plain": "x", "text/html": '<style scoped>a</style>\n<table border="1">'}),
        output("display_data", data={"text/plain": "x", "image/png": "AQID"}),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("[next](02_two.ipynb)"), cell])
    kept = []
    text = make_notebooks.markdown(notebook, lambda png: kept.append(png) or "a.png")
    assert text == (
        "[next](02_two.md)\n\n```python\nf()\n```\n\n```text\nonetwo\n```\n\n```text\n3\n```\n\n<table>\n\n![picture](a.png)\n"
    )
    assert kept == [b"\x01\x02\x03"]
