"""Tags of a run: words of the user's, by which `minimoe runs --tagged` finds it. They are kept in `tags.txt`, a line each, sorted."""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from minimoe.errors import UserError
from minimoe.files import write_atomically
from minimoe.runs.records import read_regular, writing
from minimoe.untrusted import Malformed

NAME = "tags.txt"
TAG = re.compile(r"\w[\w.+=-]{0,39}")


def read_tags(run: Path) -> list[str]:
    """Return the tags of a run, sorted; lines that are no tags, and a file that cannot be read, count as none."""
    with suppress(OSError, Malformed, UnicodeDecodeError):
        return sorted({line for line in read_regular(run / NAME).decode().splitlines() if TAG.fullmatch(line)})
    return []


def change_tags(run: Path, add: Iterable[str] = (), remove: Iterable[str] = ()) -> list[str]:
    """Add tags to a run, and remove some; without any the file is removed.   -> the tags that it has now

    Raises `UserError` for a tag that `check_tag` refuses, `CheckpointError` if the file cannot be written.
    """
    tags = sorted({check_tag(tag) for tag in (*read_tags(run), *add)} - set(remove))
    with writing(run / NAME):
        if tags:
            write_atomically(run / NAME, "".join(f"{tag}\n" for tag in tags))
        else:
            (run / NAME).unlink(missing_ok=True)
    return tags


def check_tag(tag: str) -> str:
    """Return a tag. Raises `UserError` if it is none: up to 40 letters, digits and . + = - _, the first a letter or digit."""
    if TAG.fullmatch(tag) is None:
        raise UserError(f"{tag!r} is no tag: a tag is one word of up to 40 letters, digits and . + = - _ (baseline, lr=1e-3)")
    return tag
