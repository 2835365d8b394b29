"""`minimoe cache`: all that minimoe writes outside of runs."""

from __future__ import annotations

import click

from minimoe.cli.options import json_option, option, print_json


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def cache(ctx: click.Context, as_json: bool) -> None:
    """Show what minimoe keeps outside of runs, where, and how large it is; clear removes it.

    These are the tokens of large texts, compiled kernels, and notes. All of it is made again when it is needed.
    """
    if ctx.invoked_subcommand is None:
        _show(as_json)


@cache.command()
@option("--dry-run", is_flag=True, help="only show what would be removed")
def clear(dry_run: bool) -> None:
    """Remove all that minimoe keeps outside of runs, and say how much that frees."""
    from minimoe.errors import notice
    from minimoe.figures import file_size
    from minimoe.study.cached import clear as clear_all

    if dry_run:
        _show(as_json=False)
        return
    freed, kept = clear_all()
    for problem in kept:
        notice(problem)
    click.echo(f"{file_size(freed)} freed")


def _show(as_json: bool) -> None:
    from minimoe.figures import file_size
    from minimoe.study.cached import cached
    from minimoe.study.tables import cache_table, show

    found = cached()
    if as_json:
        print_json([one._asdict() for one in found])
    elif not found:
        click.echo("nothing is kept outside of runs")
    else:
        show(cache_table(found))
        click.echo(f"{file_size(sum(one.size for one in found))} in all; minimoe cache clear removes it")
