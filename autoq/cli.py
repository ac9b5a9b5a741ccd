"""The command line. Its modules (cli…) are the only ones that print, and that read environment variables.

Exit codes: 0 done; 1 autoq refused or found a problem, with the reason; 2 wrong usage; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from autoq import __version__
from autoq.cli_cache import cache_group
from autoq.cli_explain import explain, report
from autoq.cli_export import export
from autoq.cli_measure import evaluate
from autoq.cli_model_bench import bench
from autoq.cli_models import shown_progress
from autoq.cli_options import (
    REFUSED,
    STOPPED,
    Stopped,
    Verbs,
    cache_option,
    example,
    json_option,
    print_json,
    print_table,
)
from autoq.cli_plans import apply, diff, show
from autoq.cli_tune import tune, worker


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = cli.main(args=given, prog_name="autoq", standalone_mode=False)
    except Stopped as stop:
        click.echo(f"{stop.message}\nTo go on: {shlex.join(['autoq', *given])}", err=True)
        return STOPPED
    except click.ClickException as problem:
        problem.show()
        return problem.exit_code
    except (click.Abort, KeyboardInterrupt):
        return STOPPED
    return code if isinstance(code, int) else 0


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example("autoq tune smollm2 --max-degradation 0.05 --output out", "autoq explain out"),
)
@click.version_option(__version__, prog_name="autoq")
def cli() -> None:
    """Find, measure and apply the fastest quantization of a PyTorch model within the accuracy you allow."""


@click.command(epilog=example("autoq doctor", "autoq doctor --json"))
@cache_option
@json_option
def doctor(*, cache_dir: Path | None, as_json: bool) -> None:
    """Tell what autoq finds on this machine, and what to repair.

    Measures for a few seconds; compiles the kernels first where they are not in the cache, which takes about a
    minute. Exits with 1 if there is a problem that makes autoq slow or stops it.
    """
    from autoq import terminal
    from autoq.diagnosis import diagnose

    with shown_progress() as progress:
        facts = diagnose(cache_dir, progress)
    problems = [fact.name for fact in facts if fact.problem]
    if as_json:
        print_json({"problems": problems, "facts": {fact.name: fact.to_json() for fact in facts}})
    else:
        print_table(terminal.diagnosis(facts))
        click.echo(f"Problems: {', '.join(problems)}." if problems else "No problems.")
    if problems:
        click.get_current_context().exit(REFUSED)


for verb in (tune, apply, evaluate, bench, show, explain, report, diff, export, cache_group, worker, doctor):
    cli.add_command(verb)
