"""`minimoe data`: the tokens of large texts, which are made once and kept in the user's cache."""

from __future__ import annotations

import click

from minimoe.cli.options import json_option, option, print_json, set_option
from minimoe.errors import UserError, notice, printable


@click.group()
def data() -> None:
    """Prepare large texts, and list or remove what is kept of them.

    The tokens of a large text are made once and kept in the cache, named by the SHA-256 of the text and of the tokenizer.
    """


@data.command()
@click.argument("source", metavar="SRC")
@option("--tokenizer", default=None, metavar="T", help="byte, char, or the path of a tokenizer.json (default: byte)")
@set_option
@option("--verify", is_flag=True, help="read the text and all kept tokens anew, even if no file seems to have changed")
@json_option
def prepare(source: str, tokenizer: str | None, overrides: tuple[str, ...], verify: bool, as_json: bool) -> None:
    """Make the tokens of a text ahead of training.

    SRC is what train takes as --data. A text that is quickly made tokens is not kept.
    """
    from msgspec.structs import replace

    from minimoe.config import load_config
    from minimoe.data.preparing import prepare as prepare_source
    from minimoe.figures import file_size

    if any(not text.startswith("data.") for text in overrides):
        raise UserError("data prepare --set: only keys of [data] matter here, such as data.tokenizer")
    settings = replace(load_config("tiny-moe", overrides).data, source=source)
    found = prepare_source(settings if tokenizer is None else replace(settings, tokenizer=tokenizer), verify=verify)
    for text in found.notes:
        notice(text)
    if as_json:
        fields = {**found.__dict__, "path": None if found.path is None else str(found.path)}
        print_json(fields)
        return
    kept = "made at each start, not kept" if found.path is None else f"{file_size(found.size)} in {found.path}"
    click.echo(printable(f"{source}: {file_size(found.text_bytes)} of text, SHA-256 {found.sha256[:12]}"))
    click.echo(printable(f"{found.tokens:,} tokens ({found.tokenizer}): {kept}"))


@data.command(name="list")
@json_option
def list_kept(as_json: bool) -> None:
    """List the tokens that are kept, and their sizes."""
    from minimoe.data.store import stored_folders
    from minimoe.study.tables import show, tokens_table

    found = stored_folders()
    if as_json:
        print_json([one.to_dict() for one in found])
    elif not found:
        click.echo("no tokens are kept: minimoe data prepare SRC makes those of a large text")
    else:
        show(tokens_table(found))


@data.command()
@click.argument("names", nargs=-1, metavar="NAME...")
@option("--all", "everything", is_flag=True, help="remove all tokens, and what was noted of the texts")
def rm(names: tuple[str, ...], everything: bool) -> None:
    """Remove tokens by their names in the list, or by the beginnings of these.

    A run that needs them makes them again. One that has them open goes on.
    """
    from minimoe.data.store import remove_all, remove_stored
    from minimoe.figures import file_size

    if bool(names) == everything:
        raise UserError("data rm: give the names of what to remove (minimoe data list shows them), or --all")
    freed = remove_all() if everything else sum(one.size for one in remove_stored(names))
    click.echo(f"{file_size(freed)} freed")
