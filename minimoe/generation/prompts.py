"""Prompts from files and from standard input: UTF-8 text, of which one line end at the very end is left out.

Editors and `echo` write that line end, and a model would take it for a part of the text that it continues.
"""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from minimoe.data.pipes import read_pipe
from minimoe.errors import UserError
from minimoe.untrusted import Malformed, decode_text

MOST_PROMPT = 10_000_000  # bytes: far more than any context holds
STANDARD_INPUT = "standard input"


def prompt_of_file(path: Path) -> str:
    """Return the text of a file or a pipe. Raises `UserError` for anything else, and for what is empty, too large or not UTF-8."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode):
            return _text(read_pipe(path, MOST_PROMPT), str(path))
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device"
            raise UserError(f"{path}: {kind}: a prompt is read from a text file, a pipe or, as -, standard input")
        with open(path, "rb") as file:
            return _text(file.read(MOST_PROMPT + 1), str(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def prompt_of_input() -> str:
    """Return all that comes through standard input. Raises `UserError` as above."""
    return _text(sys.stdin.buffer.read(MOST_PROMPT + 1), STANDARD_INPUT)


def lines_of_input() -> Iterator[str]:
    """Yield each line of standard input as it comes, without empty ones. Raises `UserError` as above."""
    found = False
    for number, line in enumerate(iter(lambda: sys.stdin.buffer.readline(MOST_PROMPT + 1), b""), 1):
        if line.strip():
            found = True
            yield _text(line, f"{STANDARD_INPUT}, line {number}")
    if not found:
        raise UserError(f"{STANDARD_INPUT}: empty: each line of it is a prompt")


def _text(data: bytes, what: str) -> str:
    if len(data) > MOST_PROMPT:
        raise UserError(f"{what}: more than {MOST_PROMPT:,} bytes: too large for a prompt, of which a model reads the last part alone")
    try:
        text = decode_text(data)
    except Malformed as error:
        raise UserError(f"{what}: {error}") from None
    text = text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")
    if not text:
        raise UserError(f"{what}: empty: a prompt has at least one character")
    return text
