"""``autoq bench``: a plan against the unquantized model, or a whole model in several engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoq.cli_measure import bench_plan
from autoq.cli_models import MODEL, loaded_model, shown_progress
from autoq.cli_options import (
    STDOUT,
    Stopped,
    check_writable,
    example,
    json_file_option,
    print_json,
    print_table,
    stopping,
)

if TYPE_CHECKING:
    from autoq.model_bench import Report

KV_CACHES = ("none", "int8", "int4")
_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)


class PlanByDefault(click.Group):
    """``autoq bench MODEL PLAN`` means ``autoq bench plan MODEL PLAN``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """An option as the first word belongs to ``plan``; the group has none but for help."""
        if args and args[0].startswith("-") and args[0] not in self.get_help_option_names(ctx):
            args = ["plan", *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A first word that is no verb is the model of ``plan``."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["plan", *args])


@click.group(
    "bench",
    cls=PlanByDefault,
    short_help="Measure a plan, or a model in several engines.",
    epilog=example("autoq bench smollm2 out/plan.json", "autoq bench model smollm2 --plan mine=out/plan.json"),
)
def bench() -> None:
    """Measure a plan end to end, or a whole model in several engines.

    Without a verb, autoq bench MODEL PLAN is autoq bench plan MODEL PLAN.
    """


def _numbers(_: click.Context, option: click.Parameter, given: Sequence[str]) -> tuple[int, ...]:
    """``--batch 1,8`` and ``--batch 1 --batch 8``."""
    words = [word for one in given for word in one.split(",")]
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise click.BadParameter(f"positive numbers are wanted, got {','.join(words)!r}", param=option)
    return tuple(dict.fromkeys(int(word) for word in words))


def _named(_: click.Context, option: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    """``NAME=PATH``; a path alone is named like its file, and another word alone is a name without a path."""
    found: dict[str, str] = {}
    for one in given:
        name, sign, path = (one, "", "") if "(" in one.partition("=")[0] else one.partition("=")
        if not sign and name.endswith(".json"):
            name, path = Path(name).stem, name
        if not name or (sign and not path) or name in found:
            raise click.BadParameter(f"distinct NAME=PATH are wanted, got {one!r}", param=option)
        found[name] = path
    return found


@bench.command(
    "model",
    short_help="Measure MODEL in several engines.",
    epilog=example("autoq bench model smollm2 --plan mine=out/plan.json --plan int8wo --json rows.json"),
)
@click.argument("model", type=MODEL)
@click.option("--plan", "plans", multiple=True, callback=_named, metavar="NAME=FILE", help="A plan or a scheme.")
@click.option("--text", type=click.Path(path_type=Path), help="UTF-8 text of the prompts and of perplexity.")
@click.option("--rows", type=click.IntRange(min=1), default=32, show_default=True, help="Rows for perplexity.")
@click.option("--context", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of a prompt.")
@click.option("--steps", type=click.IntRange(min=1), default=32, show_default=True, help="Decode steps in a round.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Besides an untimed one.")
@click.option("--batch", "batches", multiple=True, default=["1"], callback=_numbers, help="Prompts at once: 1,8.")
@click.option("--threads", type=click.IntRange(min=1), help="Of each engine. Default: all processors.")
@click.option("--engine", "patterns", multiple=True, help="Only engines whose names fit, such as 'autoq-*'.")
@click.option("--kv-cache", "kv_caches", multiple=True, type=click.Choice(KV_CACHES), help="Of the plans.")
@click.option("--cpp-wrapper", is_flag=True, help="The plans' decode step once more, its kernels called from C++.")
@click.option("--peers", type=_FOLDER, default=Path(".venv/peers"), show_default=True, help="What make peers made.")
@click.option("--torchao", type=_FOLDER, default=Path(".venv/torchao"), show_default=True, help="Folder with torchao.")
@click.option("--gguf", multiple=True, type=_FILE, help="More GGUF files of the model, for llama.cpp.")
@click.option("--openvino", multiple=True, callback=_named, metavar="NAME=FOLDER", help="Folders that OpenVINO reads.")
@click.option("--work", type=_FOLDER, default=Path("autoq-bench"), show_default=True, help="Keeps converted models.")
@click.option("--passes", type=click.IntRange(min=0), default=8, show_default=True, help="Of a breakdown; 0 for none.")
@click.option("--picture", type=_FILE, help="Draw decode time against perplexity: .png or .svg.")
@json_file_option
def bench_model(*, model: str, json_file: Path | None, picture: Path | None, text: Path | None, **options: Any) -> None:
    """Measure MODEL end to end in PyTorch, under plans of autoq, and in other engines.

    Prefill is the logits of the last token only, decode a greedy step after it. Each engine runs in a process of its
    own; all are measured in turn. MODEL is a causal language model.
    """
    from autoq.loading import read_text
    from autoq.model_bench import run
    from autoq.model_bench.picture import check, save
    from autoq.model_bench.preparing import Options, check_plans, job

    for file in (json_file, picture):
        if file not in (None, STDOUT):
            check_writable(file)
    if picture is not None:
        check(picture)
    if text is not None:
        read_text(text)  # refused before a model is downloaded
    wanted = Options(text=text, **options)
    check_plans(wanted.plans)
    with stopping("Nothing was written."), shown_progress() as progress:
        report = run(job(model, loaded_model(model, progress), wanted), progress)
    if json_file == STDOUT:
        print_json(report.to_json())
    elif json_file is not None:
        report.save(json_file)
    if picture is not None:
        save(report, picture)
    if json_file != STDOUT:
        _shown(report)
        for written in (json_file, picture):
            if written is not None:
                click.echo(f"Written: {written}")
    wanted_rounds = report.facts.get("rounds_wanted")
    if wanted_rounds is not None:
        raise Stopped(f"Stopped after {report.facts['rounds']} of {wanted_rounds} rounds, which are reported.")


bench.add_command(bench_plan, "plan")


def _shown(report: Report) -> None:
    from autoq.model_bench import table

    phases = dict.fromkeys((one["phase"], one["batch"]) for one in report.rows)
    for phase, batch in phases:
        print_table(table.measured(report, phase=phase, batch=batch))
    for phase, batch in phases:
        found = table.breakdown(report, phase=phase, batch=batch)
        if found is not None:
            print_table(found)
    absent = table.absent(report)
    if absent is not None:
        print_table(absent)
