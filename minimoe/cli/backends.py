"""`minimoe backends` and `minimoe backends check`."""

from __future__ import annotations

import sys

import click

from minimoe.cli.options import json_option, option, print_json


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def backends(ctx: click.Context, as_json: bool) -> None:
    """Show the backends here, and check them."""
    if ctx.invoked_subcommand is not None:
        return
    from minimoe.study.backends import backends_report, show_backends

    if as_json:
        print_json(backends_report())
    else:
        show_backends()


@backends.command(name="check")
@click.argument("name")
@option("--kernel", metavar="K", help="only the cases of one kernel, or of one part of the array layer")
@json_option
def check_backend(name: str, kernel: str | None, as_json: bool) -> None:
    """Run the conformance suite on a backend, and explain what fails."""
    from minimoe.testing.report import check_backend as check

    sys.exit(check(name, kernel, as_json))
