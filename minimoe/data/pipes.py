"""Reads a pipe to its end, and tells the user while it delivers nothing; devices and sockets are refused."""

import os
import select
import stat
import sys
import time
from pathlib import Path

from minimoe.errors import UserError
from minimoe.figures import file_size

SAY_AFTER = 1.0  # seconds without a byte before a message about the wait
GIVE_UP_AFTER = 10.0  # seconds without a first byte before the pipe is refused
PROGRESS_AFTER = 2.0  # seconds of reading before a message about its size, repeated whenever the time has doubled
CHUNK = 1 << 20


def is_pipe(path: Path) -> bool:
    """Return True for a pipe: a named one, `<(command)`, or /dev/stdin in a pipeline. It can be read only once."""
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def refuse_devices(path: Path) -> None:
    """Raise `UserError` for what is neither a file nor a pipe: reading it may never end, or means something else."""
    mode = path.stat().st_mode
    kinds = ((stat.S_ISSOCK, "a socket"), (stat.S_ISBLK, "a disk"), (stat.S_ISCHR, "a device"))
    kind = next((name for test, name in kinds if test(mode)), None)
    if kind is not None:
        raise UserError(f"{path}: {kind}, not text: data.source needs a text file, a folder of them, or a pipe")


def read_pipe(path: Path, most: int) -> bytes:
    """Return what comes through a pipe up to its end, or `most` + 1 bytes of it. Raises `UserError` if nothing comes at all."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a named pipe would wait for a writer
    try:
        return _Reading(descriptor, path).to_the_end(most)
    finally:
        os.close(descriptor)


class _Reading:
    """One pass over a pipe, with the messages that a user gets meanwhile."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.descriptor, self.path = descriptor, path
        self.chunks: list[bytes] = []
        self.size = 0
        self.began = time.monotonic()
        self.next_message = SAY_AFTER

    def to_the_end(self, most: int) -> bytes:
        poller = select.poll()
        poller.register(self.descriptor, select.POLLIN)
        while self.size <= most:
            if not poller.poll(max(1.0, 1000 * (self._next() - self._passed()))):
                self._nothing_came()
                continue
            chunk = os.read(self.descriptor, min(CHUNK, most + 1 - self.size))
            if not chunk:
                break
            if not self.chunks:
                self.next_message = max(PROGRESS_AFTER, self._passed())
            self.chunks.append(chunk)
            self.size += len(chunk)
            self._progress()
        return b"".join(self.chunks)

    def _passed(self) -> float:
        return time.monotonic() - self.began

    def _next(self) -> float:
        """Return when a message or a refusal is due, in seconds from the beginning."""
        return self.next_message if self.chunks else min(self.next_message, GIVE_UP_AFTER)

    def _nothing_came(self) -> None:
        if self.chunks:
            self._progress()
        elif self._passed() >= GIVE_UP_AFTER:
            raise UserError(
                f"{self.path}: nothing came through this pipe in {GIVE_UP_AFTER:g} seconds: "
                "start the program that writes to it first, or give a file"
            )
        elif self._passed() >= self.next_message:
            self.next_message = float("inf")
            _say(f"waiting for data from the pipe {self.path} (ctrl-C stops)")

    def _progress(self) -> None:
        if self._passed() >= self.next_message:
            self.next_message = 2 * self._passed()
            _say(f"reading the pipe {self.path}: {file_size(self.size)} so far")


def _say(text: str) -> None:
    """Print a message at once, also where progress is not shown: a wait without one looks like a fault."""
    print(text, file=sys.stderr, flush=True)
