"""The loop of `minimoe generate --interactive` and of a conversation: a line is read, its answer is shown as it is drawn, and so on.

On a terminal a line that begins with / is a command, lines are edited by readline where Python has it, and Ctrl-C stops the answer, not the
program. Without a terminal each line of standard input is a prompt, whatever it begins with, and an error ends the program.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import click

from minimoe.cli.streams import tell, write_all
from minimoe.errors import UserError
from minimoe.generation.continuation import Continuation
from minimoe.generation.prompts import lines_of_input

SIGN, GOES_ON = ">>> ", "... "  # before a line, and before one that belongs to the line before
QUIT = ("/quit", "/exit", "/bye")
HELP = """\
/help    show this list
/reset   begin anew: forget what was said so far
/quit    end, as Ctrl-D does
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one. A line that begins with // is a text that begins with /."""


class Answers(Protocol):
    """What the loop talks to."""

    def ask(self, question: str) -> Continuation: ...

    def reset(self) -> None: ...


def talk(answers: Answers, about: str) -> None:
    """Read prompts and show answers until the input ends; `about` says to whom the user talks."""
    if not sys.stdin.isatty():
        for line in lines_of_input():
            write_all(answers.ask(line))
            click.echo()
        return
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - `input` edits lines with it from now on
    tell(f"{about}; /help lists the commands, /quit or Ctrl-D ends")
    while True:
        try:
            text = _read()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            tell("/quit or Ctrl-D ends")
            continue
        except UnicodeDecodeError as error:
            tell(f"this line is not {error.encoding.upper()} text")
            continue
        if text.strip().lower() in QUIT:
            return
        if text.startswith("/") and not text.startswith("//"):
            _obey(text.strip().lower(), answers)
        elif text.strip():
            _answer(answers, text.removeprefix("/") if text.startswith("//") else text)


def _read() -> str:
    """Read a prompt of one line or, with \\ at the ends of lines, of several. Raises `EOFError` at the end of the input."""
    lines = [_line(SIGN)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(_line(GOES_ON))
    return "\n".join(lines)


def _line(sign: str) -> str:
    if sys.stdout.isatty():
        return input(sign)
    print(sign, end="", file=sys.stderr, flush=True)  # the output is a file or a pipe, which gets the answers alone
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _obey(command: str, answers: Answers) -> None:
    if command == "/reset":
        answers.reset()
        tell("begun anew")
    elif command == "/help":
        tell(HELP)
    else:
        tell(f"no command {command}: /help lists them; a text that begins with / is written with //")


def _answer(answers: Answers, text: str) -> None:
    """Show the answer, up to a Ctrl-C; say what is wrong with a prompt that has none."""
    try:
        with _interrupts() as stopped:
            answer = answers.ask(text)
            write_all(_until(answer, stopped))
            click.echo()
            answer.stop()
    except UserError as error:
        tell(f"minimoe: {error}")
        return
    except KeyboardInterrupt:
        click.echo()
    if stopped:
        tell("(stopped)")


def _until(pieces: Iterator[str], stopped: list[int]) -> Iterator[str]:
    for piece in pieces:
        yield piece
        if stopped:
            return


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Yield a list to which SIGINT appends its number, so that the token under way is finished; a second one stops at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
