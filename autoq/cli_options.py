"""What the verbs of the command line share: options, examples in the help, and how results are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

Command = Callable[..., Any]
_WIDTH = 120  # of tables where stdout is no terminal


def example(*lines: str) -> str:
    """An epilog whose lines click leaves as they are."""
    return "\n".join(("\b", "Example:", *(f"  {line}" for line in lines)))


def json_option(command: Command) -> Command:
    """``--json``, as the argument ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of tables.")(
        command
    )


def cache_option(command: Command) -> Command:
    """``--cache-dir``."""
    return click.option(
        "--cache-dir",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="AUTOQ_CACHE_DIR",
        show_envvar=True,
        help="Where measurements are kept. Default: ~/.cache/autoq.",
    )(command)


def print_table(table: Table) -> None:
    """As wide as the terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)


def print_json(value: Mapping[str, Any]) -> None:
    """One object."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))
