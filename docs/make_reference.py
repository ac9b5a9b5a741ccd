"""Writes docs/reference: what the docstrings of the public names say, one page a module.

    python docs/make_reference.py

Needs autoq installed, nothing else. tests/test_reference.py holds the pages against the docstrings.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, ForwardRef, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
WIDTH = 100  # of a signature in one line

# Page → module, and what the index says of it.
MODULES = {
    "autoq": ("autoq", "tune, apply, save, load, measure: all that most programs need"),
    "candidates": ("autoq.candidates", "the quantization schemes"),
    "explaining": ("autoq.explaining", "why a plan is as it is"),
    "reporting": ("autoq.reporting", "the report and the figures"),
    "hf": ("autoq.hf", "Hugging Face models"),
    "exporting": ("autoq.exporting", "plans for other libraries"),
    "plugins": ("autoq.plugins", "schemes of other packages"),
    "testing": ("autoq.testing", "what a scheme must do, as pytest classes"),
    "numerics": ("autoq.numerics", "quantization maths on plain tensors"),
    "errors": ("autoq.errors", "everything that autoq raises on purpose"),
}
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):")
_ROLE = re.compile(r":(?:class|func|meth|mod):`~?([^`]+)`")


class Section(NamedTuple):
    """A part of a docstring.

    Attributes:
        title: ``Args``, ``Returns``, …; empty for the text before them.
        text: without its indentation.
    """

    title: str
    text: str


def sections(doc: str) -> list[Section]:
    """A Google docstring in its parts; what stands before the first titled one has no title."""
    found, title, lines = [], "", []
    for line in inspect.cleandoc(doc).splitlines():
        match = _SECTION.fullmatch(line)
        if match is None:
            lines.append(line)
            continue
        found.append(Section(title, textwrap.dedent("\n".join(lines)).strip()))
        title, lines = match[1], []
    found.append(Section(title, textwrap.dedent("\n".join(lines)).strip()))
    return [one for one in found if one.text]


def entries(text: str) -> dict[str, str]:
    """Name → text of an ``Args``, ``Attributes`` or ``Raises`` section, each in one line."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        match = re.match(r"([\w.*, ]+): (.*)", line)
        if match is not None:
            name = match[1]
            found[name] = match[2]
        elif line.strip():  # goes on with the last one, indented
            found[name] += f" {line.strip()}"
    return found


def public(module: ModuleType) -> list[str]:
    """The names that a module offers, sorted: those of ``__all__``, else those it defines."""
    given = getattr(module, "__all__", None)
    if given is None:
        given = [
            name
            for name, one in vars(module).items()
            if not name.startswith("_") and getattr(one, "__module__", None) == module.__name__
        ]
    return sorted((name for name in given if not inspect.ismodule(getattr(module, name))), key=str.lower)


def members(kind: type, without: Collection[type] = ()) -> Iterator[tuple[str, Any]]:
    """The documented methods and properties of a class, those of its bases in autoq too.

    Args:
        kind: the class.
        without: bases that have entries of their own.
    """
    seen = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("autoq.") or base in without:
            continue
        for name, one in vars(base).items():
            function = getattr(one, "__func__", one)
            documented = isinstance(one, property | cached_property) or inspect.isfunction(function)
            if not name.startswith("_") and name not in seen and documented and one.__doc__:
                seen.add(name)
                yield name, one


def signature(name: str, function: Any, *, bound: bool = False) -> str:
    """The call as it stands in the source: ``name(a: int, *, b: str = '') -> str``.

    Args:
        name: to be shown.
        function: or class.
        bound: whether the first parameter is left out, as it is in a call of a method.
    """
    found = inspect.signature(function)
    parts, named = [], False
    for number, one in enumerate(found.parameters.values()):
        if bound and number == 0:
            continue
        if one.kind is one.KEYWORD_ONLY and not named:
            parts.append("*")
        named = named or one.kind in (one.KEYWORD_ONLY, one.VAR_POSITIONAL)
        parts.append(_parameter(one))
    result = "" if found.return_annotation in (found.empty, None, "None") else f" -> {_type(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){result}"])


def _parameter(one: inspect.Parameter) -> str:
    star = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
    text = f"{star}{one.name}"
    if one.annotation is not one.empty:
        text += f": {_type(one.annotation)}"
    if one.default is not one.empty:
        plain = isinstance(one.default, str | int | float | bool | tuple | type(None))
        text += f" = {one.default!r}" if plain else " = …"
    return text


def _type(annotation: Any) -> str:
    if isinstance(annotation, ForwardRef):  # of a named tuple
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def prose(text: str) -> str:
    """Text of a docstring as Markdown, with trees as they are drawn."""
    plain = _ROLE.sub(r"`\1`", text).replace("``", "`")
    return "\n\n".join(f"```text\n{part}\n```" if "├──" in part else part for part in plain.split("\n\n"))


def described(doc: str) -> Iterator[str]:
    """A docstring as blocks of Markdown."""
    for title, text in sections(doc):
        if title in ("Args", "Attributes", "Raises"):
            rows = [f"- `{name}`: {prose(one)}" for name, one in entries(text).items()]
            yield "\n".join([f"**{title}**", "", *rows])
        elif title:
            yield f"**{title}**\n\n{prose(text)}"
        else:
            yield prose(text)


def entry(name: str, thing: Any, others: Collection[type] = ()) -> Iterator[str]:
    """A public name as blocks of Markdown.

    Args:
        name: to be shown.
        thing: what it stands for.
        others: the classes of the same page.
    """
    yield f"## `{name}`"
    if not callable(thing):
        yield f"Constant: {', '.join(f'`{one}`' for one in thing) if isinstance(thing, tuple) else f'`{thing!r}`'}"
        return
    protocol = getattr(thing, "_is_protocol", False)
    own = not inspect.isclass(thing) or is_dataclass(thing) or {"__init__", "_fields"} & set(vars(thing))
    if own and not protocol and not inspect.isabstract(thing):
        yield f"```py\n{signature(name, thing)}\n```"
    yield from described(thing.__doc__ or "")
    if not inspect.isclass(thing):
        return
    known = [base for base in thing.__mro__[1:] if base in others]
    if known:
        yield f"Besides, all of {', '.join(f'`{base.__name__}`' for base in known)}."
    for member, one in members(thing, known):
        if isinstance(one, property | cached_property):
            yield f"### `{name}.{member}`"
        else:
            call = signature(member, getattr(one, "__func__", one), bound=not isinstance(one, staticmethod))
            yield f"### `{name}.{member}`\n\n```py\n{call}\n```"
        yield from described(one.__doc__)


def page(module: ModuleType) -> str:
    """The page of a module."""
    first, *rest = sections(module.__doc__ or "")
    blocks = [f"# `{module.__name__}`", prose(first.text), *(prose(one.text) for one in rest)]
    things = {name: getattr(module, name) for name in public(module)}
    classes = [thing for thing in things.values() if inspect.isclass(thing)]
    for name, thing in things.items():
        blocks += entry(name, thing, classes)
    return "\n\n".join(blocks) + "\n"


def pages() -> Mapping[str, str]:
    """File name → content of every page, the index among them."""
    made = {}
    lines = ["# Reference", "", "Made from the docstrings by `python docs/make_reference.py`.", ""]
    for name, (path, what) in MODULES.items():
        module = importlib.import_module(path)
        made[f"{name}.md"] = page(module)
        lines += [f"## [`{path}`]({name}.md): {what}", ""]
        for one in public(module):
            thing = getattr(module, one)
            said = prose(sections(thing.__doc__)[0].text.split("\n\n")[0].replace("\n", " ")) if callable(thing) else ""
            lines.append(f"- [`{one}`]({name}.md#{one.lower()}){': ' if said else ''}{said}")
        lines.append("")
    return {**made, "README.md": "\n".join(lines)}


def main() -> None:
    """Write the pages, and remove those that are no more."""
    REFERENCE.mkdir(exist_ok=True)
    made = pages()
    for name, text in made.items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
    for path in REFERENCE.glob("*.md"):
        if path.name not in made:
            path.unlink()
    sys.stdout.write(f"{len(made)} pages in {REFERENCE.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
