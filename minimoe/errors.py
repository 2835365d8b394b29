"""Errors that a user can cause, and notices: the command line prints each as one line, without a traceback; an error has an exit code."""

import math
import re
import signal
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

MOST_MESSAGE = 2000  # characters
MOST_NAME = 100  # characters; of a longer unknown name only the beginning is compared
MOST_NAMES = 12  # in a list of the known ones
NEAR = 0.7  # difflib's ratio: one slip in three letters, two in seven


class UserError(Exception):
    """A mistake that the user can fix; the message says what is wrong and what would be right.

    Messages quote what others wrote, so what a terminal would obey is escaped, and the middle of a long one is left out.
    """

    exit_code = 2

    def __str__(self) -> str:
        text = printable(super().__str__(), keep="\n")
        return text if len(text) <= MOST_MESSAGE else f"{text[: MOST_MESSAGE - 500]} ... {text[-400:]}"


class ConfigError(UserError, ValueError):
    """A configuration that is invalid or cannot be trained."""


class CheckpointError(UserError):
    """A checkpoint or run that is missing, damaged, or belongs to another configuration."""


class Diverged(UserError):
    """Ten steps in a row had a non-finite loss or gradient, or a run ended without a finite one; the last good state is kept."""

    exit_code = 3


class Interrupted(Exception):
    """A signal stopped a run; `text` says what is saved. `exit_code`: 128 plus the signal's number."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"stopped by {signal_name(number)}; {text}")
        self.exit_code = 128 + number


def signal_name(number: int) -> str:
    """Return SIGTERM, SIGHUP or, for the signal that a user sends with two keys, Ctrl-C."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Notice(UserWarning):
    """A warning that a user should see; the command line prints it as one line on standard error."""


def notice(text: str) -> None:
    """Warn with a `Notice`, as from the caller's caller."""
    warnings.warn(text, Notice, stacklevel=3)


def printable(text: str, keep: str = "") -> str:
    """Return a text in which what a terminal would obey is escaped, but for the characters to keep: others may have written it."""
    return text if text.isprintable() else "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)


def nearest(name: str, known: Iterable[str], instead: str = "") -> str:
    """Return a hint for an unknown name: ` (did you mean 'adamw'?)`, or where none is near, the list of known names.

    `instead`: what to say in place of a list that is longer than a line holds.
    """
    names = sorted(known)
    close = near(name, names)
    if close:
        return f" (did you mean {one_of(close)}?)"
    if instead and len(names) > MOST_NAMES:
        return f" ({instead})"
    shown = names[:MOST_NAMES] + ([f"and {len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else [])
    return f" (known: {', '.join(shown)})"


def near(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that this one may stand for: the few that begin with it, else the one that differs by a slip; often none."""
    written, spelled = _spelling(name[:MOST_NAME]), {_spelling(known): known for known in names}
    begun = [known for spelling, known in spelled.items() if len(written) > 2 and spelling.startswith(written)]
    if 0 < len(begun) <= 3 and written not in spelled:
        return begun
    swapped = [spelling for spelling in spelled if sorted(spelling) == sorted(written)]  # sdg: two of its three letters
    return [spelled[spelling] for spelling in swapped[:1] or get_close_matches(written, spelled, n=1, cutoff=NEAR)]


def one_of(names: Iterable[str]) -> str:
    """Return `'a'`, `'a' or 'b'`, or `'a', 'b' or 'c'`."""
    *before, last = map(repr, names)
    return f"{', '.join(before)} or {last}" if before else last


def _spelling(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


BOOLEANS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}


def with_toml(message: str, value: object) -> str:
    """Return `expected float, got str` with the text itself and the TOML that was meant, if it is clear: `got '.001': write 0.001`."""
    expected = re.fullmatch(r"expected (int|float|bool), got str", message)
    if expected is None or not isinstance(value, str):
        return message
    text, kind = value.strip(), expected[1]
    meant = BOOLEANS.get(text.lower()) if kind == "bool" else _number(text, kind)
    return message if meant is None else f"expected {kind}, got {value!r}: write {meant}"


def _number(text: str, kind: str) -> str | None:
    """Return a number that Python reads, or one with a decimal comma, as TOML writes it; None for anything else."""
    if re.fullmatch(r"[+-]?\d+,(\d{1,2}|\d{4,})", text):  # not 1,000, which may mean a thousand
        text = text.replace(",", ".")
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number) or (kind == "int" and not number.is_integer()):
        return None
    return str(int(number)) if kind == "int" else repr(number)
