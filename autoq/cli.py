"""The command line. Its modules (cli…) are the only ones that print, and that read environment variables.

Exit codes: 0 done; 1 autoq refused, with the reason on stderr; 2 wrong usage; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from autoq import __version__
from autoq.cli_cache import cache_group
from autoq.cli_models import prepared, rows_option, shown_progress, text_option
from autoq.cli_options import Command, cache_option, example, json_option, print_json, print_table
from autoq.cli_plans import apply, bench, diff, plan_json, print_notes, show
from autoq.errors import AutoqError
from autoq.leases import PATIENCE

if TYPE_CHECKING:
    from autoq.loading import Loaded
    from autoq.plan import Plan
    from autoq.terminal import Progress


class Stopped(click.ClickException):
    """Ctrl-C, with what is kept."""

    exit_code = 130

    def show(self, file: Any = None) -> None:
        """One line, without the word Error."""
        click.echo(self.message, file=file or sys.stderr)


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
    try:
        code = cli.main(args=None if arguments is None else list(arguments), prog_name="autoq", standalone_mode=False)
    except click.ClickException as problem:
        problem.show()
        return problem.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped; nothing was written.", err=True)
        return 130
    except AutoqError as problem:
        click.echo(f"Error: {problem}", err=True)
        return 1
    return code if isinstance(code, int) else 0


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example("autoq tune smollm2 --max-degradation 0.05 --output out", "autoq show out/plan.json"),
)
@click.version_option(__version__, prog_name="autoq")
def cli() -> None:
    """Find, measure and apply the fastest quantization of a PyTorch model within the accuracy you allow."""


for verb in (apply, show, diff, bench, cache_group):
    cli.add_command(verb)


def _limit_options(command: Command) -> Command:
    options = [
        click.option(
            "--max-degradation",
            type=click.FloatRange(min=0),
            default=0.01,
            show_default=True,
            help="Largest relative rise of the metric; for a language model, of its perplexity.",
        ),
        click.option("--max-increase", type=float, help="The same, absolute in the metric's unit."),
        click.option(
            "--objective",
            type=click.Choice(["latency", "memory", "loss"]),
            default="latency",
            show_default=True,
            help="What is minimised.",
        ),
        click.option("--max-latency-us", type=float, help="Longest request, in microseconds."),
        click.option("--max-weight-bytes", type=int, help="Most bytes of weights."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command(epilog=example("autoq tune smollm2 --max-degradation 0.05 --text wiki.txt --output out"))
@click.argument("model")
@_limit_options
@text_option
@cache_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("autoq-out"),
    show_default=True,
    help="Folder for plan.json, front.parquet, report.html and front.png.",
)
@click.option(
    "--profile-from", metavar="KEY", help="Predict what is not measured here from another device's profile (cache ls)."
)
@click.option("--n-trials", type=click.IntRange(min=1), help="Most plans whose loss is measured.")
@click.option("--storage", help="Optuna storage URL, or journal:PATH. Default: a journal in the cache folder.")
@click.option(
    "--tie",
    "ties",
    multiple=True,
    help="Layers that get one scheme: 'siblings' (q, k, v; gate, up; experts), or a pattern of names. Repeatable.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed and measurements, the same plan.")
@rows_option
@json_option
def tune(
    *, model: str, text: Path | None, rows: int, output: Path, cache_dir: Path | None, as_json: bool, **options: Any
) -> None:
    """Find MODEL's fastest plan on this machine, within the budget.

    MODEL is a Hugging Face folder, a .gguf file, module:function or smollm2.
    """
    from autoq import terminal
    from autoq.cache import default_folder
    from autoq.pipeline import tune as find_plan
    from autoq.reporting import write_files

    folder = cache_dir or default_folder()
    try:
        with shown_progress() as progress:
            loaded, batches, source = prepared(model, text, rows, progress)
            result = find_plan(loaded.model, batches, cache_dir=folder, progress=progress, **options)
            progress("report", str(output), 0, 1)
            files = write_files(result, output)
            progress("report", str(output), 1, 1)
    except KeyboardInterrupt:
        raise Stopped(
            f"Stopped. All measurements so far are kept in {folder}; the same command goes on there."
        ) from None
    if as_json:
        print_json({"text": source, "files": files, **plan_json(result.plan), "notes": list(result.notes)})
        return
    print_table(terminal.summary(result.plan, title=f"{loaded.source}, judged by {source}"))
    print_notes(result.notes)
    click.echo(f"Written: {', '.join(files.values())}")


@cli.command(epilog=example("autoq worker smollm2 --storage postgresql+psycopg://autoq@db/autoq --wait 3600"))
@click.argument("model")
@click.option("--storage", required=True, help="The Optuna storage URL, or journal:PATH, that tune was given.")
@click.option("--study", help="The study's name. Default: the newest unfinished one for this model and text.")
@text_option
@rows_option
@click.option("--wait", type=click.FloatRange(min=0), default=0.0, help="Seconds to wait for tune to publish a study.")
@click.option(
    "--patience",
    type=click.IntRange(min=2),
    default=PATIENCE,
    show_default=True,
    help="Seconds without a sign of life after which another worker counts as dead and its plan is measured again.",
)
@json_option
def worker(
    *,
    model: str,
    storage: str,
    study: str | None,
    text: Path | None,
    rows: int,
    wait: float,
    patience: int,
    as_json: bool,
) -> None:
    """Help a search on this machine: measure plans of MODEL until it is done.

    Nothing is profiled and nothing is written but the study in the storage.

    MODEL is a Hugging Face folder, a .gguf file, module:function or smollm2; the same as tune's, with the same text.
    """
    import signal

    from autoq.workers import work

    # As Ctrl-C does, hand the plan back at once: clusters end processes so.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with shown_progress() as progress:
            loaded, batches, _ = prepared(model, text, rows, progress)
            found = work(
                loaded.model, batches, storage=storage, study=study, wait_s=wait, patience=patience, progress=progress
            )
    except KeyboardInterrupt:
        raise Stopped("Stopped. What was measured is kept in the study; its other workers go on.") from None
    if as_json:
        print_json({"study": found.study_name, "plans": len(found.points), "evaluations": found.evaluations})
        return
    click.echo(f"{found.study_name}: {len(found.points)} plans measured in all, {found.evaluations} evaluations here.")


@cli.command("eval", epilog=example("autoq eval smollm2 out/plan.json --text test.txt --rows 16"))
@click.argument("model")
@click.argument("plan", required=False, type=click.Path(path_type=Path))
@text_option
@rows_option
@json_option
def evaluate(*, model: str, plan: Path | None, text: Path | None, rows: int, as_json: bool) -> None:
    """Measure the loss of MODEL, and of MODEL under PLAN.

    Both on the same text, with the interval of their difference.

    MODEL is a Hugging Face folder, a .gguf file, module:function or smollm2.
    """
    from autoq import terminal
    from autoq.plan import Plan

    wanted = None if plan is None else Plan.load(plan)
    with shown_progress() as progress:
        loaded, batches, source = prepared(model, text, rows, progress)
        found = _losses(loaded, wanted, batches, progress)
    if as_json:
        print_json({"text": source, **found})
        return
    print_table(terminal.losses(found, title=f"{loaded.source}, on {source}"))


@cli.command(epilog=example("autoq doctor"))
@cache_option
@json_option
def doctor(*, cache_dir: Path | None, as_json: bool) -> None:
    """Tell what autoq finds on this machine, and what to repair."""
    from dataclasses import asdict

    from autoq import terminal
    from autoq.diagnosis import diagnose

    facts = diagnose(cache_dir)
    if as_json:
        print_json({fact.name: asdict(fact) for fact in facts})
        return
    print_table(terminal.diagnosis(facts))


def _losses(loaded: Loaded, plan: Plan | None, batches: Any, progress: Progress) -> dict[str, Any]:
    """Mean loss before and, with a plan, after, with the paired difference's interval."""
    from autoq.evaluation import largest
    from autoq.quantizing import loss_meter
    from autoq.remeasuring import loss_figures

    meter = loss_meter(loaded.model, plan, batches)
    progress("evaluate", "unquantized", 0, 1 if plan is None else 2)
    before = meter.baseline()
    found: dict[str, Any] = {
        "metric": meter.metric.name,
        "unit": meter.metric.unit,
        "samples": before.numel(),
        "baseline_loss": float(before.double().mean()),
    }
    if plan is not None:
        progress("evaluate", "under the plan", 1, 2)
        changes = meter.by_phase(plan.layers)
        found |= loss_figures(largest(changes))
        if meter.forms.differ(plan.layers):
            found["phases"] = {name: loss_figures(change) for name, change in changes.items()}
        found["quantized_layers"] = sum(str(scheme) != "none" for scheme in plan.layers.values())
    progress("evaluate", "", 1, 1)
    return found
