"""docs/reference is what the docstrings say, and they say what the signatures have."""

import importlib.util
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
make_reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_reference)


@pytest.fixture(scope="module")
def pages():
    return make_reference.pages()


def functions():
    """(where, function) of everything that is called: functions, methods, constructors that are written out."""
    for path, _ in make_reference.MODULES.values():
        module = importlib.import_module(path)
        for name in make_reference.public(module):
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                yield f"{path}.{name}", thing, thing.__doc__
            elif inspect.isclass(thing):
                for member, one in make_reference.members(thing):
                    function = getattr(one, "__func__", one)
                    if inspect.isfunction(function):
                        yield f"{path}.{name}.{member}", function, function.__doc__


def test_the_pages_are_those_of_the_docstrings(pages):
    folder = ROOT / "docs" / "reference"
    assert {path.name for path in folder.iterdir()} == set(pages)
    stale = [name for name, text in pages.items() if (folder / name).read_text(encoding="utf-8") != text]
    assert not stale, "run: python docs/make_reference.py"


def test_every_public_name_has_an_entry_and_the_index_leads_to_it(pages):
    for name, (path, _) in make_reference.MODULES.items():
        for one in make_reference.public(importlib.import_module(path)):
            assert f"\n## `{one}`\n" in pages[f"{name}.md"], f"{path}.{one}"
            assert f"- [`{one}`]({name}.md#{one.lower()})" in pages["README.md"], f"{path}.{one}"


def test_documented_arguments_are_those_of_the_signature():
    wrong = {}
    for where, function, doc in functions():
        known = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
        for title, text in make_reference.sections(doc):
            if title == "Args":
                told = [name.strip(" *") for names in make_reference.entries(text) for name in names.split(",")]
                if told != known:
                    wrong[where] = (told, known)
    assert wrong == {}


def test_a_docstring_becomes_markdown():
    def example(a: "int", *rest: "str", b: "float" = 0.5) -> "bool":
        """Whether ``a`` is :class:`~autoq.Plan`'s.

        More text.

        Args:
            a: the first,
                told in two lines.
            rest: others.
            b: the last: with a colon.

        Returns:
            Always True.

        Raises:
            ValueError: never.
        """

    assert "\n\n".join(make_reference.entry("example", example)) == (
        "## `example`\n\n"
        "```py\nexample(a: int, *rest: str, b: float = 0.5) -> bool\n```\n\n"
        "Whether `a` is `autoq.Plan`'s.\n\nMore text.\n\n"
        "**Args**\n\n- `a`: the first, told in two lines.\n- `rest`: others.\n- `b`: the last: with a colon.\n\n"
        "**Returns**\n\nAlways True.\n\n**Raises**\n\n- `ValueError`: never."
    )
