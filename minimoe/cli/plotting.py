"""`minimoe plot`: pictures of runs, and their metrics as CSV."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from minimoe.cli.options import Decorator, option
from minimoe.errors import UserError

FORMATS = (".png", ".svg", ".pdf")


def csv_option(what: str) -> Decorator:
    """Return the option --csv FILE."""
    return option("--csv", metavar="FILE", help=f"{what}; -: to standard output")


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@option("--load", is_flag=True, help="also draw the load of each expert over the steps")
@option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="a .png, .svg or .pdf (default: plot.png)")
@csv_option("write the metrics of every step as CSV, and draw only with --out")
def plot(runs: tuple[str, ...], load: bool, out: Path | None, csv: str | None) -> None:
    """Draw the losses of runs.

    The newest run is the default. Needs matplotlib (the extra plot), except for --csv.
    """
    if csv is not None and load and out is None:
        raise UserError("--load is for a picture, and --csv draws none: give --out too (the CSV has the load of every expert)")
    if out is not None and out.suffix.lower() not in FORMATS:
        raise UserError(f"{out}: a picture is a {', '.join(FORMATS[:-1])} or {FORMATS[-1]}: --out plot.png")
    metrics = _metrics(runs)
    if csv is not None:
        from minimoe.runs.tabular import metrics_csv

        write_lines(csv, metrics_csv(metrics))
    if csv is None or out is not None:
        from minimoe.runs.plots import draw, render

        path = out or Path("plot.png")
        _write(path, render(draw(metrics, load), path.suffix.lower().removeprefix(".")))
        click.echo(path, err=csv == "-")


def write_lines(target: str, lines: Iterable[str]) -> None:
    """Write the lines of a text to a file, or to standard output if its name is `-`. Raises `UserError` as `_write` does."""
    if target == "-":
        sys.stdout.writelines(lines)
    else:
        _write(Path(target), "".join(lines).encode())


def _write(path: Path, data: bytes) -> None:
    """Write a file, whose earlier bytes stay if that fails, or into a pipe or a device. Raises `UserError` if it cannot be."""
    from minimoe.files import reason, write_atomically

    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            write_atomically(path.resolve(), data)  # what a link leads to, not the link
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error


def _metrics(names: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """Return the metrics of runs by their names, or by their folders where two have the same name; damaged lines are left out, and said."""
    from minimoe.runs.finding import folder_to_read
    from minimoe.runs.run import RUNS, Run

    folders = list({folder.absolute(): folder for folder in (folder_to_read(name, RUNS) for name in names or (None,))}.values())
    found = {}
    for folder in folders:
        run = Run(folder)
        unique = sum(Run(other).name == run.name for other in folders) == 1
        rows, damaged = run.metrics_file.readable_rows()
        if damaged:
            click.echo(f"damaged: {run.metrics_file.path}: {damaged} line{'s' if damaged > 1 else ''} left out", err=True)
        found[run.name if unique else str(folder)] = rows
    return found
