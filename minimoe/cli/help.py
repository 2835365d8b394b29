"""Help pages of any width: the line about a command is never cut off, and no word is divided at a hyphen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

HYPHEN = "\ue000"  # stands for a hyphen while lines are broken


class WholeWords(click.HelpFormatter):
    """Breaks lines between words alone, so that bert-tiny stays on one line."""

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], *arguments: Any, **options: Any) -> None:
        super().write_dl([(first, second.replace("-", HYPHEN)) for first, second in rows], *arguments, **options)

    def write(self, string: str) -> None:
        super().write(string.replace(HYPHEN, "-"))


class HelpContext(click.Context):
    formatter_class = WholeWords


def in_whole_words(command: click.Command) -> click.Command:
    """Let a command, and those below it, have such help pages.   -> the command"""
    command.context_class = HelpContext
    command.short_help = (command.help or "").partition("\n")[0]
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        in_whole_words(below)
    return command
