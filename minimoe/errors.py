"""What a user can get wrong, as one clear line: the command line prints it without a traceback and exits with the code."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake that whoever started minimoe can mend; the message says what is wrong and what would be right."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A configuration that is not possible."""


class CheckpointError(UserError):
    """A checkpoint or run that is missing, damaged, or of another configuration."""


class Diverged(UserError):
    """Training met ten non-finite steps in a row; the last good state is kept."""

    exit_code = 3


class Interrupted(Exception):
    """A signal asked a run to stop, and its state was saved. `exit_code`: 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}; the state was saved: minimoe resume goes on")
        self.exit_code = 128 + number


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'adamw'?)`, or the list where nothing is near."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    shown = names[:12] + ([f"and {len(names) - 12} more"] if len(names) > 12 else [])
    return f" (known: {', '.join(shown)})"
