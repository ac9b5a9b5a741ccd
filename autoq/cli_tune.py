"""The verbs of the command line that search: tune, and worker, which helps it from other machines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from autoq.cli_models import MODEL, prepared, rows_option, shown_progress, text_option
from autoq.cli_options import (
    OUTPUT,
    Command,
    cache_option,
    check_writable,
    example,
    json_option,
    print_json,
    print_table,
    stopping,
)
from autoq.cli_plans import plan_json, print_notes
from autoq.leases import PATIENCE


def _limit_options(command: Command) -> Command:
    options = [
        click.option(
            "--max-degradation",
            type=click.FloatRange(min=0),
            default=0.01,
            show_default=True,
            help="Largest relative rise of the metric; for a language model, of its perplexity.",
        ),
        click.option("--max-increase", type=click.FloatRange(min=0), help="The same, absolute in the metric's unit."),
        click.option(
            "--objective",
            type=click.Choice(["latency", "memory", "loss"]),
            default="latency",
            show_default=True,
            help="What is minimised.",
        ),
        click.option("--max-latency-us", type=click.FloatRange(min=0), help="Longest request, in microseconds."),
        click.option("--max-weight-bytes", type=click.IntRange(min=0), help="Most bytes of weights."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(epilog=example("autoq tune smollm2 --max-degradation 0.05 --text wiki.txt --output out"))
@click.argument("model", type=MODEL)
@_limit_options
@text_option
@cache_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=OUTPUT,
    show_default=True,
    help="Folder for the plan, its tables, report.html and front.png; explain and report read it.",
)
@click.option(
    "--candidate",
    "schemes",
    multiple=True,
    metavar="SCHEME",
    help="A scheme to choose from, instead of the default ones, which 'default' adds. Repeatable.",
)
@click.option(
    "--profile-from", metavar="KEY", help="Predict what is not measured here from another device's profile (cache ls)."
)
@click.option(
    "--kv-cache",
    "kv_cache",
    type=click.Choice(("none", "int8", "int4")),
    multiple=True,
    help="A KV cache to try with autoq's attention under the plan; repeatable.",
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
    *,
    model: str,
    text: Path | None,
    rows: int,
    output: Path,
    cache_dir: Path | None,
    schemes: Sequence[str],
    as_json: bool,
    **options: Any,
) -> None:
    """Find MODEL's fastest plan on this machine, within the budget.

    MODEL is a Hugging Face folder or name, a .gguf file, module:function or smollm2.
    """
    from autoq import candidates, terminal
    from autoq.cache import default_folder
    from autoq.pipeline import tune as find_plan
    from autoq.reporting import write_files

    folder = cache_dir or default_folder()
    check_writable(output / "plan.json")
    named = [one for name in schemes for one in (candidates.DEFAULT if name == "default" else [candidates.parse(name)])]
    options |= {"candidates": named or None, "cache_dir": folder}
    with stopping(f"All measurements so far are kept in {folder}."), shown_progress() as progress:
        loaded, batches, source = prepared(model, text, rows, progress)
        result = find_plan(loaded.model, batches, progress=progress, **options)
        progress("report", str(output), 0, 1)
        files = write_files(result, output)
        progress("report", str(output), 1, 1)
    if as_json:
        print_json({"text": source, "files": files, **plan_json(result.plan), "notes": list(result.notes)})
        return
    print_table(terminal.summary(result.plan, title=f"{loaded.source}, judged by {source}"))
    print_notes(result.notes)
    click.echo(f"Written: {', '.join(files.values())}")
    click.echo(f"Why: {shlex.join(['autoq', 'explain', str(output)])}")
    click.echo(f"Use it: {shlex.join(['autoq', 'apply', model, files['plan.json'], '--output', 'quantized'])}")


@click.command(
    short_help="Help a search on this machine.",
    epilog=example("autoq worker smollm2 --storage postgresql+psycopg://autoq@db/autoq --wait 3600"),
)
@click.argument("model", type=MODEL)
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

    MODEL is a Hugging Face folder or name, a .gguf file, module:function or smollm2; the same as tune's, with the same
    text.
    """
    import signal

    from autoq.workers import work

    # As Ctrl-C does, hand the plan back at once: clusters end processes so.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    kept = "What was measured is kept in the study; its other workers go on."
    with stopping(kept), shown_progress() as progress:
        loaded, batches, _ = prepared(model, text, rows, progress)
        found = work(
            loaded.model, batches, storage=storage, study=study, wait_s=wait, patience=patience, progress=progress
        )
    if as_json:
        print_json({"study": found.study_name, "plans": len(found.points), "evaluations": found.evaluations})
        return
    click.echo(f"{found.study_name}: {len(found.points)} plans measured in all, {found.evaluations} evaluations here.")
