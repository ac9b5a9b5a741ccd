"""The command line. The only module that prints, and the only one that reads environment variables.

Exit codes: 0 done; 1 autoq refused, with the reason on stderr; 2 wrong usage; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from autoq import __version__
from autoq.errors import AutoqError
from autoq.leases import PATIENCE

if TYPE_CHECKING:
    from rich.table import Table

    from autoq.evaluation import Difference
    from autoq.loading import Loaded
    from autoq.plan import Plan
    from autoq.quantizing import Measured
    from autoq.terminal import Progress

_Command = Callable[..., Any]
_WIDTH = 120  # of tables where stdout is no terminal


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


def _example(*lines: str) -> str:
    """An epilog whose lines click leaves as they are."""
    return "\n".join(("\b", "Example:", *(f"  {line}" for line in lines)))


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_example("autoq tune smollm2 --max-degradation 0.05 --output out", "autoq show out/plan.json"),
)
@click.version_option(__version__, prog_name="autoq")
def cli() -> None:
    """Find, measure and apply the fastest quantization of a PyTorch model within the accuracy you allow."""


def _text_option(command: _Command) -> _Command:
    return click.option(
        "--text",
        type=click.Path(path_type=Path),
        help="UTF-8 text that accuracy is judged by, in rows of 512 tokens. Default: English text that ships with "
        "Python.",
    )(command)


def _rows_option(command: _Command) -> _Command:
    return click.option(
        "--rows", type=click.IntRange(min=1), default=32, show_default=True, help="Rows of 512 tokens to use."
    )(command)


def _json_option(command: _Command) -> _Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of tables.")(
        command
    )


def _cache_option(command: _Command) -> _Command:
    return click.option(
        "--cache-dir",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="AUTOQ_CACHE_DIR",
        show_envvar=True,
        help="Where measurements are kept. Default: ~/.cache/autoq.",
    )(command)


def _limit_options(command: _Command) -> _Command:
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


@cli.command(epilog=_example("autoq tune smollm2 --max-degradation 0.05 --text wiki.txt --output out"))
@click.argument("model")
@_limit_options
@_text_option
@_cache_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("autoq-out"),
    show_default=True,
    help="Folder for plan.json, front.parquet, report.html and front.png.",
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
@_rows_option
@_json_option
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
        with _progress() as progress:
            loaded, batches, source = _prepared(model, text, rows, progress)
            result = find_plan(loaded.model, batches, cache_dir=folder, progress=progress, **options)
            progress("report", str(output), 0, 1)
            files = write_files(result, output)
            progress("report", str(output), 1, 1)
    except KeyboardInterrupt:
        raise Stopped(
            f"Stopped. All measurements so far are kept in {folder}; the same command goes on there."
        ) from None
    if as_json:
        _print_json({"text": source, "files": files, **_plan_json(result.plan), "notes": list(result.notes)})
        return
    _print_table(terminal.summary(result.plan, title=f"{loaded.source}, judged by {source}"))
    _print_notes(result.notes)
    click.echo(f"Written: {', '.join(files.values())}")


@cli.command(epilog=_example("autoq worker smollm2 --storage postgresql+psycopg://autoq@db/autoq --wait 3600"))
@click.argument("model")
@click.option("--storage", required=True, help="The Optuna storage URL, or journal:PATH, that tune was given.")
@click.option("--study", help="The study's name. Default: the newest unfinished one for this model and text.")
@_text_option
@_rows_option
@click.option("--wait", type=click.FloatRange(min=0), default=0.0, help="Seconds to wait for tune to publish a study.")
@click.option(
    "--patience",
    type=click.IntRange(min=2),
    default=PATIENCE,
    show_default=True,
    help="Seconds without a sign of life after which another worker counts as dead and its plan is measured again.",
)
@_json_option
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
        with _progress() as progress:
            loaded, batches, _ = _prepared(model, text, rows, progress)
            found = work(
                loaded.model, batches, storage=storage, study=study, wait_s=wait, patience=patience, progress=progress
            )
    except KeyboardInterrupt:
        raise Stopped("Stopped. What was measured is kept in the study; its other workers go on.") from None
    if as_json:
        _print_json({"study": found.study_name, "plans": len(found.points), "evaluations": found.evaluations})
        return
    click.echo(f"{found.study_name}: {len(found.points)} plans measured in all, {found.evaluations} evaluations here.")


@cli.command(epilog=_example("autoq apply smollm2 out/plan.json --output smollm2-quantized"))
@click.argument("model")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to make.")
@click.option("--strict", is_flag=True, help="Refuse a plan that does not fit the model exactly.")
@_json_option
def apply(*, model: str, plan: Path, output: Path, strict: bool, as_json: bool) -> None:
    """Quantize MODEL as PLAN says, and save it as safetensors.

    Nothing is measured.

    MODEL is a Hugging Face folder, a .gguf file, module:function or smollm2.
    """
    from autoq.applying import apply as apply_plan
    from autoq.checkpoint import save_quantized
    from autoq.plan import Plan

    wanted = Plan.load(plan)
    with _progress() as progress:
        loaded = _loaded(model, progress)
        report = apply_plan(loaded.model, wanted, strict=strict, progress=progress)
        progress("save", str(output), 0, 1)
        save_quantized(loaded.model, output)
        progress("save", str(output), 1, 1)
    if as_json:
        _print_json(
            {
                "output": str(output),
                "applied": {name: scheme.to_json() for name, scheme in report.applied.items()},
                "unquantized": list(report.unquantized),
                "skipped": {one.name: one.reason for one in report.skipped},
                "unmatched": list(report.unmatched),
                "missing": list(report.missing),
            }
        )
        return
    click.echo(str(report))
    click.echo(f"Written: {output}")


@cli.command("eval", epilog=_example("autoq eval smollm2 out/plan.json --text test.txt --rows 16"))
@click.argument("model")
@click.argument("plan", required=False, type=click.Path(path_type=Path))
@_text_option
@_rows_option
@_json_option
def evaluate(*, model: str, plan: Path | None, text: Path | None, rows: int, as_json: bool) -> None:
    """Measure the loss of MODEL, and of MODEL under PLAN.

    Both on the same text, with the interval of their difference.

    MODEL is a Hugging Face folder, a .gguf file, module:function or smollm2.
    """
    from autoq import terminal
    from autoq.plan import Plan

    wanted = None if plan is None else Plan.load(plan)
    with _progress() as progress:
        loaded, batches, source = _prepared(model, text, rows, progress)
        found = _losses(loaded, wanted, batches, progress)
    if as_json:
        _print_json({"text": source, **found})
        return
    _print_table(terminal.losses(found, title=f"{loaded.source}, on {source}"))


@cli.command(epilog=_example("autoq show out/plan.json --layers"))
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="List every layer with its scheme.")
@_json_option
def show(*, plan: Path, layers: bool, as_json: bool) -> None:
    """Show what PLAN chooses and what was measured."""
    from autoq import terminal
    from autoq.plan import Plan

    found = Plan.load(plan)
    if as_json:
        _print_json(_plan_json(found) | ({"layers": found.to_json()["layers"]} if layers else {}))
        return
    _print_table(terminal.summary(found, title=f"{plan} ({found.hash})"))
    _print_table(terminal.origin(found))
    if layers:
        _print_table(terminal.layers(found))
    _print_notes(found.provenance.get("notes") or ())


@cli.command(epilog=_example("autoq bench smollm2 out/plan.json --text test.txt --rows 16"))
@click.argument("model")
@click.argument("plan", type=click.Path(path_type=Path))
@_text_option
@_rows_option
@_json_option
def bench(*, model: str, plan: Path, text: Path | None, rows: int, as_json: bool) -> None:
    """Measure MODEL under PLAN end to end, compiled.

    Loss and time, interleaved with the unquantized model.

    MODEL is a Hugging Face folder, a .gguf file, module:function or smollm2.
    """
    from autoq import terminal
    from autoq.plan import Plan
    from autoq.quantizing import measure

    wanted = Plan.load(plan)
    with _progress() as progress:
        loaded, batches, source = _prepared(model, text, rows, progress)
        progress("measure", "compiling and timing", 0, 1)
        measured = measure(loaded.model, wanted, batches)
        progress("measure", "", 1, 1)
    found = _measured_plan(wanted, measured)
    if as_json:
        _print_json({"text": source, **_plan_json(found)})
        return
    _print_table(terminal.summary(found, title=f"{loaded.source} under {plan}, on {source}"))


@cli.command(epilog=_example("autoq doctor"))
@_cache_option
@_json_option
def doctor(*, cache_dir: Path | None, as_json: bool) -> None:
    """Tell what autoq finds on this machine, and what to repair."""
    from dataclasses import asdict

    from autoq import terminal
    from autoq.diagnosis import diagnose

    facts = diagnose(cache_dir)
    if as_json:
        _print_json({fact.name: asdict(fact) for fact in facts})
        return
    _print_table(terminal.diagnosis(facts))


def _progress() -> Progress:
    from rich.console import Console

    from autoq.terminal import Progress

    return Progress(Console(stderr=True))


def _loaded(name: str, progress: Progress) -> Loaded:
    from autoq.loading import load_model

    progress("load", name, 0, 1)
    loaded = load_model(name)
    progress("load", name, 1, 1)
    return loaded


def _prepared(name: str, text: Path | None, rows: int, progress: Progress) -> tuple[Loaded, Any, str]:
    """The model, its batches, and what they are."""
    from autoq.loading import inputs

    loaded = _loaded(name, progress)
    batches, source = inputs(loaded, text, rows=rows)
    return loaded, batches, source


def _losses(loaded: Loaded, plan: Plan | None, batches: Any, progress: Progress) -> dict[str, Any]:
    """Mean loss before and, with a plan, after, with the paired difference's interval."""
    from autoq.evaluation import largest
    from autoq.quantizing import loss_meter

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
        found |= _loss_figures(largest(changes))
        if meter.forms.differ(plan.layers):
            found["phases"] = {name: _loss_figures(change) for name, change in changes.items()}
        found["quantized_layers"] = sum(str(scheme) != "none" for scheme in plan.layers.values())
    progress("evaluate", "", 1, 1)
    return found


def _loss_figures(change: Difference) -> dict[str, float]:
    return {"loss_delta": change.mean, "loss_low": change.low, "loss_high": change.high}


def _measured_plan(plan: Plan, measured: Measured) -> Plan:
    """The plan with fresh figures in place of those it was saved with."""
    changes, calls = measured.phase_differences, {name: plan.phases.get(name, 1.0) for name in measured.phases}
    times, base, none = measured.phases, measured.baseline_phases, measured.none_phases
    figures = {
        **_loss_figures(measured.difference),
        "samples": measured.difference.samples,
        "baseline_loss": measured.baseline_loss,
        "latency_us": sum(count * times[name].median_us for name, count in calls.items()),
        "baseline_latency_us": sum(count * base[name].median_us for name, count in calls.items()),
        **({"none_latency_us": sum(count * none[name].median_us for name, count in calls.items())} if none else {}),
        "weight_bytes": measured.weight_bytes,
        "baseline_weight_bytes": measured.baseline_weight_bytes,
        "phases": {
            name: {
                "time_us": times[name].median_us,
                "low_us": times[name].low_us,
                "high_us": times[name].high_us,
                "baseline_us": base[name].median_us,
                "baseline_low_us": base[name].low_us,
                "baseline_high_us": base[name].high_us,
                **({"none_us": none[name].median_us} if none else {}),
                "calls": count,
                **(_loss_figures(changes[name]) if changes else {}),
            }
            for name, count in calls.items()
        },
    }
    budget = dict(plan.provenance.get("budget") or {}) | {"metric": measured.metric}
    return replace(plan, phases=calls, provenance={"budget": budget, "measured": figures})


def _plan_json(plan: Plan) -> dict[str, Any]:
    from autoq.summary import family_schemes

    kept = {key: plan.provenance.get(key) for key in ("budget", "measured", "predicted") if key in plan.provenance}
    schemes = {name: dict(counts) for name, counts in family_schemes(plan).items()}
    return {"plan": plan.hash, "phases": dict(plan.phases), "schemes": schemes, **kept}


def _print_table(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        click.echo(f"Note: {note}")


def _print_json(value: Mapping[str, Any]) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))
