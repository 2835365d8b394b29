"""Runs `minimoe backends check`: shows its progress, and prints its report at the end."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from time import monotonic as now
from typing import Any

import click

from minimoe.cli.options import print_json
from minimoe.cli.streams import redraws
from minimoe.errors import Interrupted, printable
from minimoe.figures import duration
from minimoe.testing.report import Report
from minimoe.testing.results import Listed, Result, check_here
from minimoe.testing.watched import Begun, Printed, check_watched
from minimoe.training.surroundings import stop_signals

COLUMNS = 80
OFTEN = 10.0  # seconds between two lines where they cannot replace each other


def show_check(name: str, selection: dict[str, Any], limit: float, as_json: bool) -> int:
    """Check a backend and print what was found, also if it was interrupted.   -> 0 if it conforms, else 1

    `selection`: the arguments of `minimoe.testing.cases`. `limit`: seconds for each case; 0 runs all in this process, without a limit.
    Raises `UserError` for a mistake of the user, `Interrupted` after a signal.
    """
    report, progress = Report(name, selection), Progress(name, shown=not as_json)
    began = now()
    try:
        if limit:
            _watch(report, progress, limit)
        else:
            for event in here(name, selection):
                note(report, progress, event)
    finally:
        progress.clear()
        report.seconds = now() - began
        if report.results or report.not_run or sys.exc_info()[0] is None:
            print_json(report.to_dict()) if as_json else click.echo(report.text())
    return 0 if report.conforms else 1


def _watch(report: Report, progress: Progress, limit: float) -> None:
    """Run the cases in a separate process, which ends with this one."""
    with stop_signals(lambda: None) as stops, closing(check_watched(report.backend, report.selection, limit)) as events:
        for event in events:
            note(report, progress, event)
            if stops:
                raise Interrupted(stops[0], f"{report.not_run} of {len(report.cases)} cases were not run")


def here(name: str, selection: dict[str, Any]) -> Iterator[Begun | Result]:
    """Run the cases in this process."""
    from minimoe import backend
    from minimoe.testing.cases import cases
    from minimoe.testing.results import listed

    loaded = backend.load(name)
    chosen = cases(loaded, **selection)
    found = [listed(loaded, case) for case in chosen]
    for number, result in check_here(loaded, chosen):
        yield Begun(number, found) if result is None else result


def note(report: Report, progress: Progress, event: Begun | Result | Printed | None) -> None:
    """Add an event to the report, and show it."""
    if isinstance(event, Begun):
        report.cases = event.cases
        progress.begin(event.number, event.cases)
    elif isinstance(event, Result):
        report.results.append(event)
        progress.bad = len(report.bad)
    elif isinstance(event, Printed):
        progress.say(event.text)
    progress.draw()


class Progress:
    """The case under way: on a terminal in one line that is drawn again, elsewhere in a line every ten seconds."""

    def __init__(self, name: str, shown: bool) -> None:
        self.name, self.shown, self.began = name, shown, now()
        self.live = shown and redraws(sys.stderr)
        self.drawn, self.last = False, self.began
        self.case: Listed | None = None
        self.number = self.count = self.bad = 0
        self.case_began = self.began

    def begin(self, number: int, cases: list[Listed]) -> None:
        self.case, self.number, self.count, self.case_began = cases[number], number + 1, len(cases), now()

    def text(self) -> str:
        """Return name, time so far, number of the case, failures, the case, and for how long it has been running."""
        text = f"{self.name}  {duration(now() - self.began)}"
        if self.case is None:
            return f"{text}  loading"
        text += f"  {self.number}/{self.count}" + (f"  {self.bad} failed" if self.bad else "")
        spent = now() - self.case_began
        return f"{text}  {self.case}" + (f"  {spent:.0f} s" if spent >= 2.0 else "")

    def draw(self) -> None:
        """Draw the line again, unless that was done a moment ago."""
        pause = 0.1 if self.live else OFTEN
        if not self.shown or now() - self.last < pause:
            return
        self.last = now()
        with suppress(OSError):
            if self.live:
                width = min(COLUMNS, shutil.get_terminal_size().columns) - 1
                click.echo(f"\r\x1b[K{shortened(printable(self.text()), width)}", err=True, nl=False)
                self.drawn = True
            else:
                click.echo(printable(self.text()), err=True)

    def say(self, text: str) -> None:
        """Print a line of the backend's, above the case under way."""
        self.clear()
        with suppress(OSError):
            click.echo(printable(text), err=True)

    def clear(self) -> None:
        """Remove the line, since another one follows."""
        if self.drawn:
            with suppress(OSError):
                click.echo("\r\x1b[K", err=True, nl=False)
            self.drawn = False


def shortened(text: str, width: int) -> str:
    """Return a text without its middle if it is longer than the width."""
    return text if len(text) <= width else f"{text[: width - 23]}...{text[-20:]}"
