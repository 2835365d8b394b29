"""`minimoe inspect`, `convert`, `diff`, `config` and `verify`: models, runs and presets, without training."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from minimoe.cli import completion
from minimoe.cli.completion import completing, configurations, presets
from minimoe.cli.options import json_option, option, print_json, set_option
from minimoe.errors import UserError, printable


@click.command()
@click.argument("what", metavar="RUN|FOLDER|CONFIG|PRESET", shell_complete=completing(configurations, completion.runs))
@set_option
@json_option
def inspect(what: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Count parameters, FLOPs and memory.

    Shows parameters (total and active) and FLOPs part by part, and memory in total; allocates nothing. For a run it also shows the load
    of its experts; for a model folder, which experts were used.
    """
    from minimoe.study.inspect import inspect as inspect_model

    report = inspect_model(what, overrides)
    if as_json:
        print_json(report.to_dict())
    else:
        report.show()


@click.command()
@click.argument("source", metavar="RUN|FOLDER", shell_complete=completing(completion.runs))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@option("--dtype", metavar="TYPE", help="dtype of the file: float32, bfloat16, float16, float64 (default: that of the weights)")
@option("--upcycle", type=click.IntRange(2), metavar="N", help="make a routed run from a dense model, with N copies of each dense layer")
@set_option
def convert(source: str, target: Path, dtype: str | None, upcycle: int | None, overrides: tuple[str, ...]) -> None:
    """Write a model as a folder that transformers opens.

    With --upcycle, write a dense model as a routed run, which resume trains; --set then changes its configuration.
    """
    from minimoe.study import convert as conversion

    if upcycle is None:
        if overrides:
            raise UserError("--set needs --upcycle: a model that is only converted keeps its configuration")
        click.echo(conversion.convert(source, target, dtype))
        return
    if dtype is not None:
        raise UserError("--dtype is for a model folder: a run keeps float32 weights (--set train.dtype)")
    click.echo(conversion.upcycle(source, target, upcycle, overrides))


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@json_option
def diff(a: str, b: str, as_json: bool) -> None:
    """Show what differs between two runs or configurations.

    Compares configuration, data, the start (where the first weights came from), environment and results; of damaged runs what can be read.
    Ends with exit code 0 if the first three are the same, else 1.
    """
    from minimoe.study.diff import diff as find_differences
    from minimoe.study.tables import show

    found = find_differences(a, b)
    if as_json:
        print_json(found.to_dict())
    else:
        show(found.table())
        for problem in found.problems:
            click.echo(printable(f"not compared: {problem}"))
        click.echo(found.verdict)
    sys.exit(0 if found.same else 1)


@click.command()
@click.argument("preset", required=False, shell_complete=completing(presets, files=False))
@json_option
def config(preset: str | None, as_json: bool) -> None:
    """Print a preset as commented TOML.

    Use it as the start of your own configuration. Without a name, list the presets, with what each is.
    """
    from minimoe.config import load_config, preset_about, preset_names, preset_text, to_tables

    if preset is not None:
        text = preset_text(preset)
        print_json(to_tables(load_config(preset))) if as_json else click.echo(text, nl=False)
        return
    presets = {name: preset_about(name) for name in preset_names()}
    if as_json:
        print_json([{"name": name, "about": about} for name, about in presets.items()])
        return
    width = max(map(len, presets))
    click.echo("\n".join(f"{name:<{width}}  {about}" for name, about in presets.items()))


@click.command()
@click.argument("what", metavar="RUN|FOLDER", shell_complete=completing(completion.runs))
@json_option
def verify(what: str, as_json: bool) -> None:
    """Check that a run or a model folder is whole.

    Reads everything in it and changes nothing. Says of each thing whether it is whole, and ends with exit code 0 if all is, else 1.
    """
    from minimoe.cli.verifying import show_verification

    sys.exit(show_verification(what, as_json))
