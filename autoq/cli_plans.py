"""The verbs of the command line that take a plan and measure no loss: apply, show and diff."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoq.cli_models import MODEL, PLAN, loaded_model, prepared, shown_progress
from autoq.cli_options import check_writable, example, json_option, print_json, print_table, stopping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autoq.plan import Plan


@click.command(epilog=example("autoq apply smollm2 out/plan.json --output smollm2-quantized"))
@click.argument("model", type=MODEL)
@click.argument("plan", type=PLAN)
@click.option("--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to make.")
@click.option("--strict", is_flag=True, help="Refuse a plan that does not fit the model and the device exactly.")
@click.option("--rebase", is_flag=True, help="Accept layers whose names have one prefix more or less in MODEL.")
@click.option(
    "--remeasure", is_flag=True, help="Time the plan on this device first; the saved plan has the new times. Minutes."
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="With --remeasure: UTF-8 text of the prompt. Default: English text that ships with Python.",
)
@json_option
def apply(
    *,
    model: str,
    plan: Path,
    output: Path,
    strict: bool,
    rebase: bool,
    remeasure: bool,
    text: Path | None,
    as_json: bool,
) -> None:
    """Quantize MODEL as PLAN says, and save it as safetensors.

    Nothing is measured but the times that --remeasure asks for.

    MODEL is a Hugging Face folder or name, a .gguf file, module:function or smollm2.
    """
    from autoq import remeasuring
    from autoq.applying import apply as apply_plan
    from autoq.checkpoint import save_quantized
    from autoq.plan import Plan

    if text is not None and not remeasure:
        raise click.UsageError("--text is the text to time on: it goes with --remeasure.")
    wanted = Plan.load(plan)
    check_writable(output)
    with stopping("Nothing was written."), shown_progress() as progress:
        if remeasure:
            loaded, batches, _ = prepared(model, text, 2, progress)
        else:
            loaded = loaded_model(model, progress)
        wanted = wanted.rebase(loaded.model) if rebase else wanted
        if remeasure:
            wanted = remeasuring.remeasure(loaded.model, wanted, batches, strict=strict, progress=progress)
        report = apply_plan(loaded.model, wanted, strict=strict, progress=progress)
        progress("save", str(output), 0, 1)
        save_quantized(loaded.model, output, tokenizer=loaded.tokenizer)
        progress("save", str(output), 1, 1)
    if as_json:
        print_json(
            {
                "output": str(output),
                "applied": {name: scheme.to_json() for name, scheme in report.applied.items()},
                "unquantized": list(report.unquantized),
                "skipped": {one.name: one.reason for one in report.skipped},
                "unmatched": list(report.unmatched),
                "missing": list(report.missing),
                "stale": list(report.stale),
                "slow": list(report.slow),
                "others": [asdict(one) for one in report.others],
            }
        )
        return
    click.echo(str(report))
    click.echo(f"Written: {output}")


@click.command(epilog=example("autoq show out/plan.json --layers"))
@click.argument("plan", type=PLAN)
@click.option("--layers", is_flag=True, help="List every layer with its scheme.")
@json_option
def show(*, plan: Path, layers: bool, as_json: bool) -> None:
    """Show what PLAN chooses and what was measured."""
    from autoq import terminal
    from autoq.plan import Plan

    found = Plan.load(plan)
    if as_json:
        print_json(plan_json(found) | ({"layers": found.to_json()["layers"]} if layers else {}))
        return
    print_table(terminal.summary(found, title=f"{plan} ({found.hash})"))
    print_table(terminal.origin(found))
    if layers:
        print_table(terminal.layers(found))
    print_notes(found.provenance.get("notes") or ())


@click.command(epilog=example("autoq diff out/plan.json other/plan.json"))
@click.argument("plan", type=PLAN)
@click.argument("other", type=PLAN)
@click.option("--layers", is_flag=True, help="List every layer and every kernel that differs.")
@json_option
def diff(*, plan: Path, other: Path, layers: bool, as_json: bool) -> None:
    """Show what is different in OTHER, compared with PLAN.

    Schemes by family, layers in one of them only, budgets, figures, devices, versions and kernels.
    """
    from autoq import terminal
    from autoq.plan import Plan
    from autoq.plan_diff import compare

    found = compare(Plan.load(plan), Plan.load(other))
    if as_json:
        print_json(found.to_json())
        return
    if found.same:
        click.echo("The plans are the same.")
        return
    for table in terminal.differences(found, names=(str(plan), str(other)), layers=layers):
        print_table(table)


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan's summary for ``--json``."""
    from autoq.summary import family_schemes

    kept = {key: plan.provenance.get(key) for key in ("budget", "measured", "predicted") if key in plan.provenance}
    schemes = {name: dict(counts) for name, counts in family_schemes(plan).items()}
    return {"plan": plan.hash, "phases": dict(plan.phases), "schemes": schemes, **kept}


def print_notes(notes: Sequence[str]) -> None:
    """A line each."""
    for note in notes:
        click.echo(f"Note: {note}")
