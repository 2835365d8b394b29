"""How data are named, in a configuration and by --data: SRC, SRC:COLUMN for a file of rows, and either with =WEIGHT in a mixture.

    notes.jsonl        notes.jsonl:summary        'corpus/*.txt'        notes.jsonl:summary=0.3

A file of the whole name comes first, so that names with these characters can be given.
"""

import os
import re
from pathlib import Path

BUILT_IN = ("python-docs", "python-code", "python-mix", "digits")  # not paths
WEIGHT = re.compile(r"(.+)=([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", re.DOTALL)
COLUMN = re.compile(r"(.+):([^:/\\]+)", re.DOTALL)
PATTERN = re.compile(r"[*?\[]")


def split_weight(name: str) -> tuple[str, float | None]:
    """Return a source and the weight that follows it: "b.txt=0.3" -> "b.txt", 0.3."""
    found = None if _exists(Path(), name) else WEIGHT.fullmatch(name)
    return (name, None) if found is None else (found[1], float(found[2]))


def split_column(source: str, base: Path = Path()) -> tuple[str, str | None]:
    """Return a path or a pattern and the column that follows it: "notes.jsonl:text" -> "notes.jsonl", "text"."""
    found = None if _exists(base, source) else COLUMN.fullmatch(source)
    return (source, None) if found is None or len(found[1]) == 1 else (found[1], found[2])  # C:file has a drive


def is_pattern(source: str, base: Path = Path()) -> bool:
    """Return True if a source (without its column) is a pattern of file names, and no file is called that."""
    return PATTERN.search(source) is not None and not _exists(base, source)


def with_absolute_path(source: str) -> str:
    """Return a source whose path, if it names anything, starts at the root; a column stays behind it."""
    path, column = split_column(source)
    if source in BUILT_IN:
        return source
    if is_pattern(path):
        path = os.path.abspath(os.path.expanduser(path))
    elif _exists(Path(), path):
        path = str(Path(path).resolve())
    else:
        return source
    return path if column is None else f"{path}:{column}"


def _exists(base: Path, name: str) -> bool:
    try:
        return (base / os.path.expanduser(name)).exists()
    except (OSError, ValueError):  # not a path: it has a NUL, or is longer than the system allows
        return False
