"""The verb ``export``: a plan as the settings of another program."""

from __future__ import annotations

from pathlib import Path

import click

from autoq.cli_models import PLAN
from autoq.cli_options import check_writable, example, json_option, print_json

TARGETS = ("torchao", "gptqmodel", "llama.cpp")


@click.command(epilog=example("autoq export out/plan.json --to torchao --output torchao.json"))
@click.argument("plan", type=PLAN)
@click.option("--to", required=True, type=click.Choice(TARGETS), help="The program.")
@click.option("--model-type", help="The model's model_type in its config.json, where layers' names do not tell.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write. Default: stdout.")
@json_option
def export(*, plan: Path, to: str, model_type: str | None, output: Path | None, as_json: bool) -> None:
    """Write PLAN as the settings of another program.

    Refused are schemes that it does not have, and layers with different schemes that it fuses; the message names what
    to tie (autoq tune --tie). Where its numbers differ from autoq's, a note on stderr says so.
    """
    from autoq._files import write_atomic
    from autoq.errors import PlanError
    from autoq.exporting import export as exported
    from autoq.plan import Plan

    wanted = Plan.load(plan)
    if output is not None:
        check_writable(output)
    made = exported(wanted, to, model_type=model_type)
    if output is not None:
        write_atomic(output, lambda temporary: temporary.write_text(made.text, encoding="utf-8"), PlanError)
    for note in made.notes:
        click.echo(f"Note: {note}", err=True)
    if as_json:
        known = {"to": to, "filename": made.filename, "text": made.text, "notes": list(made.notes)}
        print_json(known | {"output": None if output is None else str(output)})
    elif output is None:
        click.echo(made.text)
    else:
        click.echo(f"Written: {output}")
