"""`minimoe classify`: what trained classifiers take images for."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from minimoe.cli.completion import completing, runs
from minimoe.cli.options import Count, json_option, open_loaded, option, print_json
from minimoe.errors import UserError

MOST_PIPED = 100_000_000  # bytes of an image that comes through a pipe


@click.command()
@click.argument("run", shell_complete=completing(runs))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=str))
@option("--top", type=Count(1), default=3, metavar="N", show_default=True, help="classes to show for each image")
@json_option
def classify(run: str, images: tuple[str, ...], top: int, as_json: bool) -> None:
    """Show the most likely classes of images, with their probabilities.

    RUN is a run that classifies images (vit-folder, vit-tiny), or a model folder. An image is a file, or - for standard input.
    """
    from minimoe.study.classify import classified
    from minimoe.study.tables import classes_table, show

    loaded = open_loaded(run)
    given: dict[str, Path | bytes] = {name: _piped() if name == "-" else Path(name) for name in images}
    found = dict(zip(given, classified(loaded, given, top), strict=True))
    if as_json:
        print_json([{"image": name, "classes": [guess._asdict() for guess in guesses]} for name, guesses in found.items()])
    else:
        show(classes_table(found))


def _piped() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("-: standard input is a terminal: give the path of an image, or pipe one in")
    data = sys.stdin.buffer.read(MOST_PIPED + 1)
    if len(data) > MOST_PIPED:
        raise UserError(f"-: more than {MOST_PIPED // 10**6} MB on standard input: not an image that can be read")
    return data
