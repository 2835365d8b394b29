"""`minimoe backends`, `minimoe backends check` and `minimoe backends new`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from minimoe.cli import completion
from minimoe.cli.completion import completing
from minimoe.cli.options import json_option, option, print_json
from minimoe.hints import command, quoted


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def backends(ctx: click.Context, as_json: bool) -> None:
    """Show the installed backends; check one, or start a new one."""
    if ctx.invoked_subcommand is not None:
        return
    from minimoe.study.backends import backends_report, show_backends

    if as_json:
        print_json(backends_report())
    else:
        show_backends()


@backends.command(name="check")
@click.argument("name", shell_complete=completing(completion.backends, files=False))
@option("--level", metavar="L", help="only the cases of one level: array layer, kernels, gradients, ...")
@option("--kernel", metavar="K", help="only the cases of one kernel, or of one part of the array layer")
@option("--quick", is_flag=True, help="a few examples of each kernel in one dtype: for a backend that compiles each shape")
@option("--timeout", type=click.FloatRange(0), default=60.0, metavar="SECONDS", help="limit for each case (default: 60); 0: none")
@json_option
def check_backend(name: str, level: str | None, kernel: str | None, quick: bool, timeout: float, as_json: bool) -> None:
    """Run the conformance suite on a backend, and explain what fails.

    The cases run in a separate process. A case that takes longer than --timeout is ended and counts as failed, as does one that
    crashes; the others still run. With --timeout 0 all cases run in this process without a limit, as a debugger needs.

    Exit codes: 0 it conforms, 1 it does not, 2 a mistake in the command or a backend that cannot be loaded, 130 interrupted (the
    results so far are printed).
    """
    from minimoe.cli.checking import show_check

    sys.exit(show_check(name, {"level": level, "kernel": kernel, "quick": quick}, timeout, as_json))


KINDS = {
    "mutable": "a library whose arrays can be written, such as PyTorch",
    "immutable": "a library whose arrays cannot be written, such as JAX",
    "kernels": "your kernels over the arrays of a backend that exists",
    "device": "a device with a compiler of its own",
}


class WithKinds(click.Command):
    """A command whose help explains the kinds of backends."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Kinds"):
            formatter.write_dl(list(KINDS.items()))


@backends.command(name="new", cls=WithKinds)
@click.argument("name")
@option("--kind", type=click.Choice(list(KINDS)), required=True, help="what it is built on (see below)")
@option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="the folder to write (default: minimoe-NAME)")
def new_backend(name: str, kind: str, out: Path | None) -> None:
    """Write a package with a new backend, which works as it is, so that you can replace it function by function."""
    from minimoe.study.new_backend import KINDS as STARTS
    from minimoe.study.new_backend import new_backend as write

    folder = write(name, kind, out)
    click.echo(f"{folder}: {STARTS[kind]}")
    click.echo(f"next: pip install -e {quoted(folder)}")
    click.echo(f"      {command('backends', 'check', name, '--quick')}")
    click.echo(f"      {command('train', 'tiny-moe', '--backend', name, '--steps', 20)}")
