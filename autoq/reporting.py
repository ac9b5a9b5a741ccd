"""What was found, for people and for later: the report, and the folder of files that explanations start from."""

from __future__ import annotations

from pathlib import Path

from autoq._files import write_atomic
from autoq.errors import InputError
from autoq.figures import front_figure
from autoq.report import page
from autoq.result_files import Result, read_folder, write_tables


def write_report(result: Result | str | Path, output: str | Path) -> Path:
    """Write one HTML file that needs no network: figures, tables, notes and provenance.

    Args:
        result: what ``autoq.tune`` returned, or the folder that ``autoq tune --output`` (``write_files``) wrote.
        output: the file to write, atomically.

    Returns:
        The file's path.

    Raises:
        InputError: if the folder is not complete, or the file cannot be written.
        PlanError: if the folder's plan cannot be read.
    """
    text = page(read_folder(result) if isinstance(result, str | Path) else result)
    write_atomic(Path(output), lambda temporary: temporary.write_text(text, encoding="utf-8"), InputError)
    return Path(output)


def write_files(result: Result, folder: Path) -> dict[str, str]:
    """Write the plan, the workload, the tables, ``report.html`` and ``front.png``, each atomically.

    ``explaining.load`` and ``write_report`` work from the folder alone.

    Returns:
        Name → path.

    Raises:
        InputError: if the folder cannot be written.
        PlanError: the same, for the plan.
    """
    paths = write_tables(result, folder)
    paths.append(write_report(result, folder / "report.html"))
    picture = folder / "front.png"
    figure = front_figure(result.front, result.plan.provenance.get("budget") or {})
    write_atomic(picture, lambda temporary: figure.savefig(temporary, format="png"), InputError)
    return {path.name: str(path) for path in [*paths, picture]}
