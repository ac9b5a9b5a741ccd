"""The verbs of the command line that measure a plan on a model: eval and bench plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoq.cli_models import MODEL, PLAN, prepared, rows_option, shown_progress, text_option
from autoq.cli_options import check_writable, example, json_option, print_json, print_table, stopping
from autoq.cli_plans import plan_json

if TYPE_CHECKING:
    from autoq.loading import Loaded
    from autoq.plan import Plan
    from autoq.progress_bars import Progress


@click.command("eval", epilog=example("autoq eval smollm2 out/plan.json --text test.txt --rows 16"))
@click.argument("model", type=MODEL)
@click.argument("plan", required=False, type=PLAN)
@text_option
@rows_option
@json_option
def evaluate(*, model: str, plan: Path | None, text: Path | None, rows: int, as_json: bool) -> None:
    """Measure the loss of MODEL, and of MODEL under PLAN.

    Both on the same text, with the interval of their difference.

    MODEL is a Hugging Face folder or name, a .gguf file, module:function or smollm2; without PLAN also a folder that
    apply wrote of a model of transformers.
    """
    from autoq import terminal
    from autoq.plan import Plan

    wanted = None if plan is None else Plan.load(plan)
    with stopping("Nothing was written."), shown_progress() as progress:
        loaded, batches, source = prepared(model, text, rows, progress, quantized=wanted is None)
        found = _losses(loaded, wanted, batches, progress)
    if as_json:
        print_json({"text": source, **found})
        return
    print_table(terminal.losses(found, title=f"{loaded.source}, on {source}"))


def _losses(loaded: Loaded, plan: Plan | None, batches: Any, progress: Progress) -> dict[str, Any]:
    """Mean loss before and, with a plan, after, with the paired difference's interval."""
    from autoq.evaluation import largest
    from autoq.quantizing import loss_meter
    from autoq.remeasuring import loss_figures

    meter = loss_meter(loaded.model, plan, batches)
    steps = 1 if plan is None else 2
    progress("evaluate", "the model as it is", 0, steps)
    before = meter.baseline()
    found: dict[str, Any] = {
        "metric": meter.metric.name,
        "unit": meter.metric.unit,
        "samples": before.numel(),
        "baseline_loss": float(before.double().mean()),
    }
    if plan is not None:
        progress("evaluate", "under the plan", 1, steps)
        changes = meter.by_phase(plan.layers)
        found |= loss_figures(largest(changes))
        if meter.forms.differ(plan.layers):
            found["phases"] = {name: loss_figures(change) for name, change in changes.items()}
        found["quantized_layers"] = sum(str(scheme) != "none" for scheme in plan.layers.values())
    progress("evaluate", "", steps, steps)
    return found


@click.command(
    "plan",
    short_help="Measure MODEL under PLAN.",
    epilog=example("autoq bench plan smollm2 out/plan.json --text test.txt --output here.json"),
)
@click.argument("model", type=MODEL)
@click.argument("plan", type=PLAN)
@text_option
@rows_option
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the plan with the new figures.")
@json_option
def bench_plan(*, model: str, plan: Path, text: Path | None, rows: int, output: Path | None, as_json: bool) -> None:
    """Measure MODEL under PLAN end to end, compiled.

    Loss and time, interleaved with the unquantized model.

    MODEL is a Hugging Face folder or name, a .gguf file, module:function or smollm2.
    """
    from autoq import terminal
    from autoq.modules import device_of
    from autoq.plan import Plan
    from autoq.quantizing import measure
    from autoq.remeasuring import check_phases, measured_plan, own_phases

    wanted = Plan.load(plan)
    if output is not None:
        check_writable(output)
    with stopping("Nothing was written."), shown_progress() as progress:
        loaded, batches, source = prepared(model, text, rows, progress)
        phases = own_phases(loaded.model, batches)
        if output is not None:
            check_phases(wanted, phases)
        measured = measure(loaded.model, wanted, batches, phases=phases, progress=progress)
    found = measured_plan(wanted, measured, device_of(loaded.model))
    if output is not None:
        found.save(output)
    if as_json:
        print_json({"text": source, "output": None if output is None else str(output), **plan_json(found)})
        return
    print_table(terminal.summary(found, title=f"{loaded.source} under {plan}, on {source}"))
    if output is not None:
        click.echo(f"Written: {output}")
