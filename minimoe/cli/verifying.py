"""What `minimoe verify` prints: a line for each thing that it has checked, and while that takes long, what is being read."""

from __future__ import annotations

import shutil
import sys
import textwrap
from time import monotonic as now

import click

from minimoe.cli.options import print_json
from minimoe.cli.streams import redraws
from minimoe.study.verify import Check, verify

COLUMNS = 80  # at most
PATIENCE = 2.0  # seconds before the first word about what is being read
PAUSE = 10.0  # seconds between two such lines where they cannot replace each other


def show_verification(what: str, as_json: bool) -> int:
    """Verify a run or a folder, and print what was found.   -> 0 if all of it is whole, else 1"""
    waiting = Waiting()
    path, kind, checks, width = verify(what, waiting.tell)
    found: list[Check] = []
    for check in checks:
        found.append(check)
        waiting.clear()
        if not as_json:
            click.echo(shown(check, width))
    waiting.clear()
    problems = sum(check.state == "problem" for check in found)
    if as_json:
        listed = [check._asdict() for check in found]
        print_json({"path": str(path), "kind": kind, "whole": not problems, "problems": problems, "checks": listed})
    else:
        click.echo(verdict(found, problems))
    return 1 if problems else 0


def shown(check: Check, width: int) -> str:
    """Return a check's line: what, state, text. A text that is too long for it goes on below itself."""
    before = f"{check.what:<{width}}  {check.state:<7}  "
    room = max(24, columns() - len(before))
    lines = textwrap.wrap(check.text, room, break_on_hyphens=False) or [""]
    return "\n".join([before + lines[0], *(" " * len(before) + line for line in lines[1:])])


def columns() -> int:
    """Return how many columns a line may have."""
    return min(COLUMNS, shutil.get_terminal_size((COLUMNS, 24)).columns)


def verdict(found: list[Check], problems: int) -> str:
    """Return the last line."""
    if problems:
        return f"{problems} problem{'s' if problems > 1 else ''}"
    missed = sum(check.state == "skipped" for check in found)
    return f"whole, but for {missed} thing{'s' if missed > 1 else ''} that could not be checked" if missed else "whole"


class Waiting:
    """Says on standard error what is being read, from the third second on: on a terminal in one line that disappears."""

    def __init__(self) -> None:
        self.last = now()
        self.pause = PATIENCE
        self.drawn = False

    def tell(self, text: str) -> None:
        """Say it, if it is time."""
        if now() - self.last < self.pause:
            return
        self.last = now()
        if redraws(sys.stderr):
            self.pause, self.drawn = 0.1, True
            click.echo("\r\x1b[K" + f"reading {text}"[: columns() - 1], err=True, nl=False)
        else:
            self.pause = PAUSE
            click.echo(f"reading {text}", err=True)

    def clear(self) -> None:
        """Remove the line, since another one follows."""
        if self.drawn:
            click.echo("\r\x1b[K", err=True, nl=False)
            self.drawn = False
