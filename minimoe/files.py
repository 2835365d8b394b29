"""Durable writes: a file is whole or absent, whenever the process ends. Locks that end with the process."""

import errno
import json
import os
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

# `.step-000300.tmp-1a2b3c4d`: being written or being removed. `.step-000300.old-...`: counts as step-000300 until that exists again.
HIDDEN = re.compile(r"\.(?P<target>.+)\.(?P<kind>tmp|old)-[0-9a-f]{8}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: readers see the old content or the new, also after a kill. A text is UTF-8. Raises `OSError`."""
    temporary = hidden_sibling(path, "tmp")
    try:
        write_synced(temporary, content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, data: bytes, mode: str = "wb") -> None:
    """Write (`wb`), append (`ab`) or create (`xb`) a file; returns when the bytes are on the disk. Raises `OSError`."""
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, if the system can: Windows and some file systems cannot."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def to_json(value: Mapping[str, Any]) -> str:
    """Return JSON with sorted keys; NumPy's numbers and arrays become plain ones."""
    return json.dumps(value, indent=2, sort_keys=True, default=lambda other: other.tolist()) + "\n"


def reason(error: OSError) -> str:
    """Return the system's message without number and path: `No space left on device`."""
    return error.strerror or str(error)


def hidden_sibling(path: Path, kind: str) -> Path:
    """Return a new name that matches `HIDDEN`, in the same folder."""
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(4)}")


# ---- locks -----------------------------------------------------------------------------------------------------------------------

NO_LOCKS = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL})

if sys.platform == "win32":
    import msvcrt

    def lock_in_kernel(descriptor: int, shared: bool = False) -> None:
        """Lock a file at once. Raises `PermissionError` if another has it. One byte far behind the text: a locked one cannot be read."""
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def lock_in_kernel(descriptor: int, shared: bool = False) -> None:
        """Lock a file at once. Raises `BlockingIOError` if another has it, `OSError` of `NO_LOCKS` if the file system has no locks."""
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def is_at(file: BinaryIO, path: Path) -> bool:
    """Return True if an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
