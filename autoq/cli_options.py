"""What the verbs of the command line share: options, how results are printed, and how errors and Ctrl-C end a verb."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoq.errors import AutoqError, PlanError

if TYPE_CHECKING:
    from rich.table import Table

Command = Callable[..., Any]
STDOUT = Path("-")
OUTPUT = Path("autoq-out")  # where tune writes and others read unless told otherwise
REFUSED, STOPPED = 1, 130  # exit codes besides 0 and click's 2
_WIDTH = 120  # of tables where stdout is no terminal
_JSON = "autoq.json"  # in click's context: whether --json was given


class Stopped(click.ClickException):
    """Ctrl-C; its message says what is kept."""

    exit_code = STOPPED


class Verbs(click.Group):
    """A group whose verbs end with autoq's exit codes, and with ``--json`` tell errors on stdout too."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they were added, which is the order of use."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; a refusal becomes exit code 1, and Ctrl-C a ``Stopped`` that says so."""
        try:
            return super().invoke(ctx)
        except AutoqError as problem:
            parts = {name: getattr(problem, name) for name in ("where", "rule", "got", "fix")}
            given = {name: str(value) for name, value in parts.items() if value not in (None, "")}
            self._tell(ctx, str(problem), {"kind": type(problem).__name__, **given})
            click.echo(f"Error: {problem}", err=True)
            ctx.exit(REFUSED)
        except Stopped as stop:
            self._tell(ctx, stop.message, {"kind": "Stopped"})
            raise
        except KeyboardInterrupt:
            self._tell(ctx, "Stopped.", {"kind": "Stopped"})
            raise Stopped("Stopped.") from None

    @staticmethod
    def _tell(ctx: click.Context, message: str, parts: Mapping[str, str]) -> None:
        if ctx.meta.get(_JSON):
            print_json({"error": {"message": message, **parts}})


@contextmanager
def stopping(kept: str) -> Iterator[None]:
    """Ctrl-C inside ends the verb with the word of what is kept.

    Args:
        kept: a sentence.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"Stopped. {kept}") from None


def example(*lines: str) -> str:
    """An epilog whose lines click leaves as they are."""
    return "\n".join(("\b", "Example:", *(f"  {line}" for line in lines)))


def json_option(command: Command) -> Command:
    """``--json``, as the argument ``as_json``."""

    def noted(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
        ctx.meta[_JSON] = value
        return value

    return click.option(
        "--json", "as_json", is_flag=True, callback=noted, help="Print one JSON object on stdout instead of tables."
    )(command)


def json_file_option(command: Command) -> Command:
    """``--json FILE``, as the argument ``json_file``: None, a file, or ``STDOUT``."""

    def noted(ctx: click.Context, _: click.Parameter, value: Path | None) -> Path | None:
        ctx.meta[_JSON] = value == STDOUT
        return value

    kind = click.Path(path_type=Path, dir_okay=False, allow_dash=True)
    return click.option(
        "--json",
        "json_file",
        type=kind,
        callback=noted,
        help="Write the rows to a file; - prints them instead of tables.",
    )(command)


def cache_option(command: Command) -> Command:
    """``--cache-dir``."""
    return click.option(
        "--cache-dir",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="AUTOQ_CACHE_DIR",
        show_envvar=True,
        help="Where measurements are kept. Default: ~/.cache/autoq.",
    )(command)


def check_writable(output: Path) -> None:
    """Refuse, before anything is loaded or measured, a file or folder that cannot be written.

    Args:
        output: the file, or the folder that is made.

    Raises:
        PlanError: naming it.
    """
    near = next(one for one in output.absolute().parents if one.exists())
    if not near.is_dir() or not os.access(near, os.W_OK):
        raise PlanError(
            "the output must be writable",
            where=str(output),
            got=f"{near}, {'which cannot be written' if near.is_dir() else 'which is no folder'}",
            fix="Choose another folder, or free permissions there.",
        )


def print_table(table: Table) -> None:
    """As wide as the terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)


def print_json(value: Mapping[str, Any]) -> None:
    """One object; a number that is not finite, which JSON does not have, is null."""
    click.echo(json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
