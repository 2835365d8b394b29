"""The list of commands, in the order in which `minimoe --help` shows them.

The commands import what they need when they run, so that --help answers at once.
"""

from __future__ import annotations

from typing import Any

import click

from minimoe import __version__
from minimoe.cli.about import show_help, version
from minimoe.cli.backends import backends
from minimoe.cli.cache import cache
from minimoe.cli.classifying import classify
from minimoe.cli.comparison import bench, compare
from minimoe.cli.data import data
from minimoe.cli.help import in_whole_words
from minimoe.cli.inspection import config, convert, diff, inspect, verify
from minimoe.cli.managing import runs
from minimoe.cli.plotting import plot
from minimoe.cli.training import resume, train
from minimoe.cli.use import evaluate, fill, generate
from minimoe.errors import nearest


class UnexpectedEnd(Exception):
    """Carries an EOFError, its cause, past click."""


class Commands(click.Group):
    """Commands in the order in which they were added; for an unknown name the nearest is suggested."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line first
            raise click.Abort from None
        except EOFError as error:  # click would take it for an interrupt
            raise UnexpectedEnd from error

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(f"no command {args[0]!r}{nearest(args[0], self.commands, 'minimoe help lists them')}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="minimoe %(version)s")
def cli() -> None:
    """Transformers and Mixtures of Experts from scratch: train, compare, sample and inspect toy models.

    `minimoe train` trains a Mixture-of-Experts language model on Python's own documentation.
    """


for command in (
    train, resume, generate, fill, classify, evaluate, inspect, convert, compare, runs, diff, plot, data, verify, config, backends, bench,
    cache, show_help, version,
):  # fmt: skip
    cli.add_command(command)
in_whole_words(cli)
