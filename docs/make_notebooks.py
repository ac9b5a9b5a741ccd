"""Runs the notebooks and writes them, with their outputs, as Markdown and PNG pictures to docs/notebooks.

    python docs/make_notebooks.py [NAME …]

Needs the extra `dev`. NAME is a notebook without its suffix; the default is all of them. Prints the seconds of each.
"""

from __future__ import annotations

import base64
import io
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
RENDERED = ROOT / "docs" / "notebooks"
COLOURS = 128  # of a picture's palette: a third of the bytes of true colour
NOT_SHOWN = re.compile(r"<style.*?</style>\n?|\s(?:border|class|style)=\"[^\"]*\"", re.DOTALL)

Keep = Callable[[bytes], str]  # keeps a PNG picture and gives its file name


def execute(path: Path) -> Any:
    """A notebook with the outputs of a run from top to bottom, in a folder of its own.

    Args:
        path: the .ipynb file.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def code_block(source: str) -> str:
    """A code cell's source as Markdown has it."""
    return f"```python\n{source}\n```"


def text_block(text: str) -> str:
    """What a cell printed, with tabs and colours taken out."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    return f"```text\n{plain}\n```" if plain else ""


def linked(text: str) -> str:
    """Markdown whose links to other notebooks lead to their copies."""
    return re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.md)", text)


def markdown(notebook: Any, keep: Keep) -> str:
    """An executed notebook as Markdown.

    Args:
        notebook: with outputs.
        keep: called with each picture.
    """
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(linked(cell.source))
        else:
            parts.append(code_block(cell.source))
            parts += [part for part in _outputs(cell.outputs, keep) if part]
    return "\n\n".join(parts) + "\n"


def _outputs(outputs: Any, keep: Keep) -> Iterator[str]:
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stdout":
                yield text_block(output.text)
        elif "image/png" in output.data:
            yield f"![picture]({keep(base64.b64decode(output.data['image/png']))})"
        elif "text/html" in output.data:
            yield NOT_SHOWN.sub("", output.data["text/html"]).strip()
        else:
            yield text_block(output.data["text/plain"])


def _smaller(png: bytes) -> bytes:
    """The same picture with a palette."""
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    # By coverage rather than by area, so that a thin line keeps its colour.
    palette = picture.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def render(path: Path) -> None:
    """Run one notebook and replace its copy in docs/notebooks."""
    pictures: list[bytes] = []

    def keep(png: bytes) -> str:
        pictures.append(_smaller(png))
        return f"{path.stem}_{len(pictures)}.png"

    text = markdown(execute(path), keep)
    RENDERED.mkdir(exist_ok=True)
    for old in RENDERED.glob(f"{path.stem}_*.png"):
        old.unlink()
    for number, png in enumerate(pictures, 1):
        (RENDERED / f"{path.stem}_{number}.png").write_bytes(png)
    note = f"<!-- Made by `make notebooks-docs` from notebooks/{path.name}; do not edit. -->\n\n"
    (RENDERED / f"{path.stem}.md").write_text(note + text)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(one.stem for one in NOTEBOOKS.glob("*.ipynb")):
        begin = time.perf_counter()
        render(NOTEBOOKS / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - begin:.0f} s")
