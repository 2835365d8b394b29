"""The text file `last`, beside the runs: it names the newest, and follows a run that is renamed or removed."""

import os
from contextlib import suppress
from pathlib import Path

from minimoe.files import write_atomically
from minimoe.runs.finding import MOST_POINTER, run_names
from minimoe.runs.records import read_environment, read_regular, writing
from minimoe.untrusted import Malformed

NAME = "last"


def follow(root: Path, old: Path, new: Path | None) -> None:
    """Let `last` name what a run has become or, if it is gone, the newest run that is left; without one `last` is removed.

    A name that leads nowhere, as a kill may leave it, is mended too. Raises `CheckpointError` if the file cannot be written.
    """
    named = _named(root)
    if named is None or (os.path.abspath(root / named) != os.path.abspath(old) and (root / named).exists()):
        return
    target = newest(root) if new is None else os.path.relpath(new, root).replace(os.sep, "/")
    with writing(root / NAME):
        if target is None:
            (root / NAME).unlink(missing_ok=True)
        else:
            write_atomically(root / NAME, f"{target}\n")


def newest(root: Path) -> str | None:
    """Return the name of the run under a folder that was created last; None if there is none."""
    names = [name for name in run_names(root) if (root / name / "config.toml").is_file()]
    return max(names, key=lambda name: (str(read_environment(root / name).get("created") or ""), name), default=None)


def _named(root: Path) -> str | None:
    with suppress(OSError, Malformed, UnicodeDecodeError):
        return read_regular(root / NAME, MOST_POINTER).decode().strip()
    return None
