"""The documentation's links lead somewhere, and its commands, code and names are of this version."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

import autoq
from autoq.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "RESULTS.md"})
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def commands():
    """Every line of a shell block that calls autoq, as (page, words)."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"(?:^|[\s/])autoq ([a-z].*)", line.split(" #")[0])
                if found and "…" not in line and "|" not in line and not line.lstrip().startswith(("#", "cd", "_")):
                    yield str(page.relative_to(ROOT)), tuple(shlex.split(found[1]))


COMMANDS = sorted(set(commands()))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):  # a pattern in code may look like a link
        if re.match(r"[a-z+]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_are_python_and_name_what_exists(page):
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "autoq":
                getattr(autoq, node.attr)


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)}" for page, words in COMMANDS])
def test_commands_are_understood(page, words):
    """The verb and its options exist, and no argument is missing; nothing runs."""
    context = click.Context(cli)
    command, rest = cli, list(words)
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(context, rest)
        context = click.Context(command, parent=context, info_name=name)
    command.make_parser(context).parse_args(rest)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 15


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in LINK.findall(index)}
    pages = {page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "reference"}
    assert pages - linked == {ROOT / "docs" / "README.md"}
