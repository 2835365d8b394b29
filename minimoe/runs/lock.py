"""One process at a time trains in a run's folder: it holds `training.lock` from before it reads anything until it ends.

The kernel holds the lock (flock; on Windows msvcrt.locking), so that it ends with the process, however that ends, and holds between
containers that share a folder, where a process's number says nothing. The text in the file names the owner, for messages only.

Where a file system has no such locks, the file itself is the lock. It is made by one process alone, and counts until that process removes
it or is provably dead: gone from the same boot and the same PID namespace. Else a person must remove it, and the message says so.
"""

import contextlib
import os
import platform
import stat
import sys
import time
import weakref
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from minimoe.errors import CheckpointError
from minimoe.files import NO_LOCKS, hidden_sibling, is_at, lock_in_kernel, write_synced
from minimoe.runs.environment import process_identity
from minimoe.runs.records import ProcessNumber, read_regular
from minimoe.untrusted import Malformed

LOCK = "training.lock"
BEGINNING = b'{"pid":'  # of its text
TRIES, PAUSE = 5, 0.02  # seconds; a reader of the state holds a shared lock for a moment


class Owner(Struct):
    """The text of the lock: the process that wrote it."""

    pid: ProcessNumber
    process: str | None  # its `process_identity`
    host: str
    boot: str  # "" if the system does not say
    namespace: str  # of process numbers
    kernel: bool  # whether the kernel holds the lock

    @classmethod
    def here(cls, kernel: bool) -> "Owner":
        """Return this process."""
        return cls(os.getpid(), process_identity(os.getpid()), platform.node(), boot(), namespace(), kernel)

    def same_system(self) -> bool:
        """Return True if it ran under the kernel that runs now, as far as one can know."""
        return self.boot == boot() if self.boot or boot() else self.host == platform.node()

    def is_visible(self) -> bool:
        """Return True if the number means here what it meant for the owner."""
        return self.same_system() and self.namespace == namespace()

    def is_dead(self) -> bool:
        """Return True if the process is gone for certain."""
        return self.is_visible() and process_identity(self.pid) != self.process

    def named(self) -> str:
        """Return a name for a message."""
        if not self.same_system():
            return f"process {self.pid} on host {self.host}"
        if not self.is_visible():
            return f"process {self.pid} of another container (host {self.host})"
        return f"process {self.pid}" if self.pid != os.getpid() else f"this process ({self.pid})"


def boot() -> str:
    """Return the identity of the running kernel; "" if the system does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def namespace() -> str:
    """Return the PID namespace of this process; "" where there are none."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


# ---- taking --------------------------------------------------------------------------------------------------------------------


class Lock:
    """The lock of one folder, held by this process or not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK
        self.turn = folder / f"{LOCK}.turn"  # where the file is the lock, one process at a time replaces that of a dead owner
        self.held = False
        self.file: BinaryIO | None = None  # open while the kernel holds the lock
        self.text = b""
        _locks.add(self)

    def take(self) -> None:
        """Take the lock, or keep it. Raises `CheckpointError` if another process has it, `OSError` if the folder cannot be written."""
        if self.held:
            return
        self._refuse_what_is_no_file()
        kernel = _has_locks(self.folder)
        for rest in reversed(range(TRIES)):
            self.text = msgspec.json.encode(Owner.here(kernel)) + b"\n"
            if self._lock_file() if kernel else self._make_file():
                self.held = True
                return
            if rest:
                time.sleep(PAUSE)
        raise CheckpointError(self._refusal(kernel))

    def _refuse_what_is_no_file(self) -> None:
        """Raise `CheckpointError` for a link, a folder or a device: a folder may come from anywhere, and the lock is written over."""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(self.path.lstat().st_mode):
                raise CheckpointError(f"{self.path}: is not a file that minimoe wrote: remove it, then resume")

    def _lock_file(self) -> bool:
        """Let the kernel lock the file.   -> False if another process has it"""
        file = open(self.path, "a+b", buffering=0, opener=_open_no_link)  # noqa: SIM115  it stays open; programs that are started do not inherit it
        try:
            lock_in_kernel(file.fileno())
            if not is_at(file, self.path) or _counts(self.path):  # its owner removed it meanwhile; or it is locked by its text
                _close(file)
                return False
        except (BlockingIOError, PermissionError):
            _close(file)
            return False
        with contextlib.suppress(OSError):  # the text is for messages alone
            file.truncate(0)
            file.write(self.text)
        self.file = file
        return True

    def _make_file(self) -> bool:
        """Make the file, in the place of one whose owner is dead.   -> False if another process has it"""
        try:
            found = _read(self.path)
            if found is None:
                return _create(self.path, self.text)
            owner = read_owner(self.path)
            if owner is None or not owner.is_dead() or not _create(self.turn, self.text):
                return False
            try:
                if _read(self.path) == found:
                    self.path.unlink()
                return _create(self.path, self.text)
            finally:
                self.turn.unlink()
        except FileNotFoundError:  # another was quicker
            return False

    def _refusal(self, kernel: bool) -> str:
        owner = read_owner(self.path)
        what = f"{self.folder}: {owner.named() if owner else 'another process'} is still training this run"
        by_kernel = kernel and (owner is None or owner.kernel)
        if by_kernel or (owner is not None and owner.is_visible() and not self.turn.exists()):
            return f"{what}: wait for it or stop it, then resume"
        return (
            f"{what}, or was when it ended, which cannot be seen from here: wait for it or stop it; if it is gone for certain, "
            f"remove {self.path}{f' and {self.turn}' if self.turn.exists() else ''}, then resume"
        )

    def release(self) -> None:
        """Give the lock back, if it is held, and remove its file."""
        if not self.held:
            return
        self.held = False
        if sys.platform == "win32" and self.file:  # an open file cannot be removed; if another has it, it stays
            _close(self.file)
        with contextlib.suppress(OSError):
            if self.file is None or self.file.closed or is_at(self.file, self.path):
                self.path.unlink()
        if self.file is not None:
            _close(self.file)
            self.file = None

    def rename_folder(self, new: Path) -> None:
        """Give the folder another name, while the lock is held. Windows renames no folder with an open file: there it is given back before.

        Raises `OSError`.
        """
        if sys.platform == "win32":
            self.release()
        os.rename(self.folder, new)
        self.folder, self.path, self.turn = new, new / self.path.name, new / self.turn.name

    def forget(self) -> None:
        """In a forked process: the lock is its parent's, and must end with that."""
        self.held = False
        if self.file is not None:
            _close(self.file)
            self.file = None


_locks: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_locks):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _has_locks(folder: Path) -> bool:
    """Return True if the file system of a folder has locks that the kernel holds, by trying one."""
    probe = hidden_sibling(folder / LOCK, "tmp")
    with open(probe, "xb") as file:
        try:
            lock_in_kernel(file.fileno())
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
        finally:
            if sys.platform != "win32":
                probe.unlink(missing_ok=True)  # a process that has the lock may have tidied up
    probe.unlink(missing_ok=True)
    return True


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _close(file: BinaryIO) -> None:
    """Close a file. An error of the disk changes nothing: the descriptor is gone, and the text was for messages."""
    with contextlib.suppress(OSError):
        file.close()


def _create(path: Path, text: bytes) -> bool:
    """Make a file that did not exist.   -> False if it exists"""
    try:
        write_synced(path, text, "xb")
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


# ---- looking -------------------------------------------------------------------------------------------------------------------


def is_taken(folder: Path) -> bool | None:
    """Return whether a process, this one included, holds the lock of a folder; None if this user may not know."""
    path = folder / LOCK
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        with open(path, "rb") as file:
            try:
                lock_in_kernel(file.fileno(), shared=True)
            except (BlockingIOError, PermissionError):
                return True
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                owner = read_owner(path)
                return owner is None or not owner.is_dead()
            return _counts(path)
    except FileNotFoundError:
        return False
    except OSError:
        return None


def _counts(path: Path) -> bool:
    """Return True if the text of a lock that the kernel does not hold is a lock by itself: its owner had no other, and may be alive."""
    owner = read_owner(path)
    return owner is not None and not owner.kernel and not owner.is_dead()


def read_owner(path: Path) -> Owner | None:
    """Return the process that a lock names; None if it names none."""
    try:
        return msgspec.json.decode(_read(path) or b"", type=Owner)
    except (OSError, Malformed, msgspec.MsgspecError, RecursionError):
        return None


def is_lock(path: Path) -> bool:
    """Return True for a file that a process of minimoe made: it names its owner, or the process ended before it had written it all."""
    try:
        text = (_read(path) or b"").strip(b"\0")
    except (OSError, Malformed):
        return False
    return BEGINNING.startswith(text) or text.startswith(BEGINNING)


def _read(path: Path) -> bytes | None:
    try:
        return read_regular(path)
    except FileNotFoundError:
        return None
