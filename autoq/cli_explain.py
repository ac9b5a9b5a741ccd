"""The verbs that read what ``tune`` wrote: explain and report. Neither needs the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoq.cli_models import PLAN
from autoq.cli_options import OUTPUT, check_writable, example, json_option, print_json
from autoq.errors import AutoqError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from autoq.explaining_values import Change

FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=OUTPUT, metavar="[FOLDER]")


class _Layer(click.ParamType[str]):
    """A layer's name; shells complete those of the folder's plan."""

    name = "layer"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        from autoq.plan import Plan

        try:
            names = Plan.load(ctx.params.get("folder", OUTPUT) / "plan.json").layers
        except AutoqError:  # there is nothing to offer, and nowhere to say why
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _moves(ctx: click.Context, param: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for one in given:
        layer, _, pairs[layer] = one.partition("=")
    for layer, scheme in pairs.items():
        if not layer or not scheme:
            raise click.BadParameter(f"LAYER=SCHEME is wanted, such as lm_head=int8wo; got {layer or scheme!r}.")
    return pairs


@click.command(
    epilog=example(
        "autoq explain out",
        "autoq explain out --force 'model.layers.3.mlp.up_proj=int4wo-hqq(group_size=64)'",
    )
)
@FOLDER
@click.option("--layer", "names", multiple=True, type=_Layer(), help="One layer under every scheme. Repeatable.")
@click.option(
    "--force",
    "moves",
    multiple=True,
    metavar="LAYER=SCHEME",
    callback=_moves,
    help="What giving the layer that scheme would save and cost. Repeated, all of them together.",
)
@click.option("--plan", type=PLAN, help="Explain another plan of the same layers instead.")
@json_option
def explain(*, folder: Path, names: Sequence[str], moves: dict[str, str], plan: Path | None, as_json: bool) -> None:
    """Tell why each layer got its scheme.

    What every other scheme would have cost in time, loss and bytes, why schemes were refused, and what forcing a layer
    to another scheme would save or cost. Nothing runs: FOLDER is what tune wrote (default: autoq-out).
    """
    from autoq.explaining import explain as explained
    from autoq.plan import Plan

    found = explained(folder, plan=None if plan is None else Plan.load(plan))
    change = found.force(moves) if moves else None
    if as_json:
        asked: dict[str, Any] = {"layers": [found.choice(name).to_json() for name in names]} if names else {}
        asked |= {} if change is None else {"force": change.to_json()}
        print_json(asked or found.to_json())
        return
    texts = [found.text(name) for name in names] + ([] if change is None else [_sentence(moves, change)])
    click.echo("\n\n".join(texts or [found.text()]))


def _sentence(moves: dict[str, str], change: Change) -> str:
    from autoq.explaining_text import duration, loss_text, weight

    forced = ", ".join(f"{layer} to {scheme}" for layer, scheme in moves.items())
    more = len(change.layers) - len(moves)
    end = f"Then over the limit: {change.over}" if change.over else "Then still within the limits"
    return (
        f"Forcing {forced}{f' (with {more} layers decided together)' if more > 0 else ''}:\n"
        f"  request {duration(change.time_us, sign=True)}, loss {loss_text(change)}, "
        f"weights {weight(change.weight_bytes, sign=True)}; predicted.\n"
        f"  {end}."
    )


@click.command(epilog=example("autoq report out --output report.html"))
@FOLDER
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write. Default: report.html in FOLDER."
)
@json_option
def report(*, folder: Path, output: Path | None, as_json: bool) -> None:
    """Write one HTML file with all figures and tables.

    It needs no network, and can be sent, read on a phone and printed. Nothing runs: FOLDER is what tune wrote (default:
    autoq-out).
    """
    from autoq.reporting import write_report

    target = output or folder / "report.html"
    check_writable(target)
    written = write_report(folder, target)
    if as_json:
        print_json({"output": str(written)})
        return
    click.echo(f"Written: {written}")
