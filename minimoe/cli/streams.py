"""The standard streams as terminals, pipes and services give them: closed, full, or of an encoding that lacks characters."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from minimoe.errors import printable

CONTROL_CHARACTERS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def prepare_streams() -> None:
    """Open the null device in place of each stream that is closed, and let characters that the output lacks become question marks.

    The null device takes the closed stream's number, so that no file of a run does, into which a library could then print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for as long as the process runs
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and sys.stdout.errors == "strict":
        reconfigure(errors="replace")


@contextmanager
def written_to_the_end() -> Iterator[None]:
    """Raise `OSError` at the end for output that could not be written, instead of Python's complaint after it."""
    try:
        yield
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def redraws(stream: TextIO) -> bool:
    """Return True for a terminal on which a line can be drawn again in its place."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def tell(text: str) -> None:
    """Print a message on standard error, on a terminal with its lines broken between words."""
    from minimoe.study.tables import wrapped

    text = printable(text, keep="\n")
    with suppress(OSError):  # the terminal or the pipe's reader went away, and the command goes on without it
        print(wrapped(text, shutil.get_terminal_size().columns) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def drop_unwritten() -> None:
    """Send what could not be written, and all that follows, to the null device: Python would complain about it when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):  # not a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def write(*pieces: str) -> None:
    """Write the pieces of a text, as `write_all` does."""
    write_all(pieces)


def write_all(pieces: Iterable[str]) -> None:
    """Write each piece of a text at once. A terminal gets no control characters, which a barely trained model may write.

    A line may end in "\\r\\n" there, and a piece between the two; other carriage returns are shown as control characters.
    """
    terminal, held = sys.stdout.isatty(), ""
    for piece in pieces:
        if terminal:
            piece = held + piece
            held = "\r" if piece.endswith("\r") else ""
            piece = piece.removesuffix("\r").replace("\r\n", "\n").translate(CONTROL_CHARACTERS)
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write(held.translate(CONTROL_CHARACTERS))
    sys.stdout.flush()
