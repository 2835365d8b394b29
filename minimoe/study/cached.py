"""What minimoe keeps outside of runs, by kind and folder, and its removal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from minimoe.caches import TOKENS, kept_files, user_caches
from minimoe.data.alone import folder_size
from minimoe.data.store import remove_all
from minimoe.files import reason


class Cached(NamedTuple):
    """What is kept of one kind in one folder."""

    what: str
    folder: str
    files: int
    size: int  # bytes


def cached() -> list[Cached]:
    """Return what is kept, by kind and folder."""
    found: dict[tuple[str, str], Cached] = {}
    for what, path in kept_files():
        key = what, str(path if path.is_dir() else path.parent)
        before = found.get(key, Cached(*key, 0, 0))
        found[key] = before._replace(files=before.files + _count(path), size=before.size + folder_size(path))
    return list(found.values())


def _count(path: Path) -> int:
    return sum(not below.is_dir() for below in path.rglob("*")) if path.is_dir() else 1


def clear() -> tuple[int, list[str]]:
    """Remove all of it, except tokens that another process is making.   -> the bytes that this frees, what could not be removed and why"""
    problems: list[str] = []
    freed = sum(_remove(problems))
    for cache in user_caches():
        with suppress(OSError):  # it is missing, or holds what is not minimoe's
            cache.rmdir()
    return freed, problems


def _remove(problems: list[str]) -> Iterator[int]:
    """Remove what is kept, and yield the bytes that each part frees."""
    for _, path in kept_files():
        size = folder_size(path)
        try:
            if path.name == TOKENS:
                yield remove_all()
            elif path.is_dir():
                shutil.rmtree(path)
                yield size
            else:
                path.unlink()
                yield size
        except OSError as error:
            problems.append(f"{path}: cannot be removed: {reason(error)}")
    if any(path.name == TOKENS for _, path in kept_files()):
        problems.append("tokens that another process is making stay")
