"""Finds the user's cache folder and what minimoe keeps there, and tells whether other users can write to a folder.

Compiled kernels are code: whoever can write to the folder that they are read from can run code as the user who reads them. So they are
read only from folders and files that no other user can write to.
"""

import importlib.util
import os
import stat
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

TOKENS = "data"  # the folder of the tokens of large texts
KEPT = (
    (TOKENS, "tokens of large texts"), ("minimoe_numba_*", "compiled kernels"), ("*-sm_*-*.cubin", "compiled kernels"),
    ("*-sm_*-*.json", "compiled kernels"), ("jax", "compiled steps of JAX"), ("touched", "which experts were used"),
    ("nvrtc", "compilers that tests fetched"),
)  # fmt: skip
"""What is kept in the user's cache, by name; what else lies there, as where MINIMOE_CACHE_DIR names a shared folder, is not minimoe's."""
COMPILED = ("*.nbi", "*.nbc")  # kernels that Numba has compiled, beside their source


def user_caches() -> Iterator[Path]:
    """Yield the folders that may be the user's cache, the best first; none of them needs to exist.

    The first is MINIMOE_CACHE_DIR if it is set, else `minimoe` in XDG_CACHE_HOME or ~/.cache. The last is a folder of the user's own in the
    system's temporary folder, for users whose home is missing or read-only.
    """
    named, home = os.environ.get("MINIMOE_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if named:
        yield Path(named)
    elif not home.startswith("~"):  # as it does where the system knows no home
        yield Path(home) / "minimoe"
    try:
        own = Path(tempfile.gettempdir()) / (f"minimoe-{os.getuid()}" if hasattr(os, "getuid") else "minimoe")
    except FileNotFoundError:  # no folder for temporary files
        return
    if not own.is_symlink() and not (own.exists() and open_to_others(own)):
        yield own


def private_folder(name: str, make: bool = True) -> Path | None:
    """Return the folder of that name in the user's cache, made for this user alone if it is missing; None where there can be none.

    With make = False, None too where there is none yet.
    """
    for parent in user_caches():
        folder = parent / name
        if not make and not folder.is_dir():
            continue
        if can_be_written(folder, 0o700) and not open_to_others(folder):
            return folder
    return None


def kept_files() -> Iterator[tuple[str, Path]]:
    """Yield all that minimoe has written outside of runs, a file or a folder at a time, each with what it is."""
    for cache in user_caches():
        for pattern, what in KEPT:
            yield from ((what, path) for path in sorted(cache.glob(pattern)))
    named = os.environ.get("NUMBA_CACHE_DIR")
    if named:
        yield from (("compiled kernels", path) for path in sorted(Path(named).glob("minimoe_numba_*")))
    found = importlib.util.find_spec("minimoe_numba")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for pattern in COMPILED:
            yield from (("compiled kernels", path) for path in sorted(Path(folder, "__pycache__").glob(pattern)))


def can_be_written(folder: Path, mode: int = 0o755) -> bool:
    """Return True if a file can be written into the folder, which is made with this mode if it is missing."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=mode)
        folder.mkdir(exist_ok=True, mode=mode)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def open_to_others(folder: Path, trusted: Collection[int] = ()) -> bool:
    """Return True if another user could put a file into this folder, or another folder in its place. Raises `OSError`.

    trusted: users, by number, who may, beside this one and root.
    """
    above = os.stat(folder.parent)
    replaceable = written_by_others(above, trusted) and not (above.st_mode & stat.S_ISVTX and above.st_uid in (0, os.geteuid()))
    return replaceable or written_by_others(os.stat(folder), trusted)


def written_by_others(found: os.stat_result, trusted: Collection[int] = ()) -> bool:
    """Return True if a file or folder is another user's, or others may write it. Always False on Windows, which has no such bits."""
    if os.name == "nt":
        return False
    if found.st_uid not in {0, os.geteuid(), *trusted}:
        return True
    by_group = found.st_mode & stat.S_IWGRP and not _is_of_one(found.st_gid)
    return bool(found.st_mode & stat.S_IWOTH or by_group)


def _is_of_one(group: int) -> bool:
    """Return True for a group that has this user's name and no other member. Where each user has one, new files are writable by it."""
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_uid != 0 and user.pw_gid == group and found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}
