"""One process at a time makes a folder: it holds a lock beside it, which ends with the process.

So a folder under a hidden name whose lock is free was left behind. Where a file system has no locks, several processes may make the same
folder side by side; the first to rename its own wins.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from minimoe.data.progress import say
from minimoe.files import HIDDEN, NO_LOCKS, hidden_sibling, is_at, lock_in_kernel

PAUSE = 0.1  # seconds between two tries
SUFFIX = ".lock"


@contextmanager
def alone(place: Path, name: str) -> Iterator[None]:
    """Hold the lock of a folder that is to be made from `name`; wait for the process that holds it. Raises `OSError`."""
    told, lock = False, None
    try:
        while (lock := _lock(place)) is None:
            if not told:
                say(f"{name}: another process prepares it: waiting (ctrl-C stops)")
                told = True
            time.sleep(PAUSE)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        if lock is not None:
            _release(place, lock)


def remove_unfinished(folder: Path) -> int:
    """Remove what processes that ended left in a folder: hidden ones, and locks.   -> the bytes that this frees"""
    freed = 0
    for path in list(folder.iterdir()):
        match = HIDDEN.fullmatch(path.name)
        if match is None and path.suffix != SUFFIX:
            continue
        place = folder / match["target"] if match else path.with_suffix("")
        with suppress(OSError):  # there are no locks, or the disk is full
            lock = _lock(place)
            if lock is not None:
                freed += folder_size(path)
                if match:
                    shutil.rmtree(path, ignore_errors=True)
                _release(place, lock)
    return freed


def _lock(place: Path) -> BinaryIO | None:
    """Take the lock of a folder.   -> None if another has it. Raises `OSError` of `NO_LOCKS` where the file system has none."""
    path = _lock_of(place)
    file = open(path, "ab")  # noqa: SIM115 - it stays open while the lock is held
    try:
        lock_in_kernel(file.fileno())
        if is_at(file, path):
            return file
    except (BlockingIOError, PermissionError):
        pass
    except OSError:
        file.close()
        path.unlink(missing_ok=True)
        raise
    file.close()  # another has it, or had it and removed it
    return None


def _release(place: Path, lock: BinaryIO) -> None:
    with suppress(OSError):  # Windows removes no file that is open
        _lock_of(place).unlink(missing_ok=True)
    lock.close()


def _lock_of(place: Path) -> Path:
    return place.with_name(f"{place.name}{SUFFIX}")


def remove_folder(place: Path) -> int:
    """Remove a folder in one step; a process that has its files mapped keeps them.   -> the bytes that this frees. Raises `OSError`."""
    freed, hidden = folder_size(place), hidden_sibling(place, "old")
    os.rename(place, hidden)
    shutil.rmtree(hidden)
    return freed


def folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder, or of a file."""
    found = 0
    for path in (folder, *folder.rglob("*")):
        with suppress(OSError):
            found += 0 if path.is_dir() else path.lstat().st_size
    return found
