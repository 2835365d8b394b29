"""`minimoe help` and `minimoe version`."""

from __future__ import annotations

import click

from minimoe import __version__
from minimoe.cli.options import json_option, print_json
from minimoe.errors import UserError, nearest


def complete_command(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the commands that stand below those that are written."""
    here: click.Command | None = ctx.find_root().command
    for name in ctx.params.get("names") or ():
        here = here.commands.get(name) if isinstance(here, click.Group) else None
    return [name for name in here.commands if name.startswith(incomplete)] if isinstance(here, click.Group) else []


@click.command(name="help")
@click.argument("names", nargs=-1, metavar="[COMMAND]...", shell_complete=complete_command)
@click.pass_context
def show_help(ctx: click.Context, names: tuple[str, ...]) -> None:
    """Explain a command, or list the commands."""
    here = ctx.find_root()
    for name in names:
        group = here.command
        known = group.commands if isinstance(group, click.Group) else {}
        if name not in known:
            whose = f" of {here.info_name!r}" if here.parent else ""
            raise click.UsageError(f"no command {name!r}{whose}{nearest(name, known, 'minimoe help lists them') if known else ''}")
        here = known[name].context_class(known[name], info_name=name, parent=here, **known[name].context_settings)
    click.echo(here.get_help())


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Show the versions of minimoe, Python and its libraries, and the backends that run here."""
    from minimoe.backend import available, load
    from minimoe.runs.environment import environment

    def runs_here(name: str) -> bool:
        try:
            load(name)
        except UserError:
            return False
        return True

    facts = environment()
    found = {"minimoe": __version__, **{key: facts[key] for key in ("python", "numpy", "numba", "platform")}}
    backends = [name for name in available() if runs_here(name)]
    if as_json:
        print_json({**found, "backends": backends})
        return
    for name, value in {**found, "backends": ", ".join(backends)}.items():
        click.echo(f"{name:<8}  {value or 'not installed'}")
