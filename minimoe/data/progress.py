"""Says on standard error how far the reading of a text is.

It begins after two seconds: on a terminal with one line that changes, else with a line whenever the time has doubled.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from minimoe.data.pipes import PROGRESS_AFTER
from minimoe.figures import file_size

PAUSE = 0.2  # seconds between two states of a terminal's line
WIDTH = 79  # characters of that line at most

_shown: ContextVar[bool] = ContextVar("shown", default=True)


@contextmanager
def unsaid() -> Iterator[None]:
    """Show no progress within."""
    token = _shown.set(False)
    try:
        yield
    finally:
        _shown.reset(token)


def say(text: str) -> None:
    """Print a line on standard error, unless progress is not shown."""
    if _shown.get():
        print(text, file=sys.stderr, flush=True)


class Progress:
    """The progress of one pass over a text: `what` is done with it, `total` are its bytes if they are known."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.began = time.monotonic()
        self.next = self.began + PROGRESS_AFTER
        self.width = 0  # of the line on the terminal

    def add(self, size: int) -> None:
        """Count `size` more bytes."""
        self.done += size
        now = time.monotonic()
        if now < self.next or not _shown.get():
            return
        line, passed = self.line(now - self.began), now - self.began
        if sys.stderr.isatty():
            line = line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
            print("\r" + line.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width, self.next = len(line), now + PAUSE
        else:
            say(line)
            self.next = self.began + 2 * passed

    def line(self, passed: float) -> str:
        """Return the progress after some seconds in words."""
        speed = self.done / max(passed, 1e-9)
        if not self.total:
            return f"{self.what}: {file_size(self.done)} so far, {file_size(speed)}/s"
        left = max(0, self.total - self.done) / max(speed, 1.0)
        share = min(99, self.done * 100 // self.total)
        return f"{self.what}: {share}% of {file_size(self.total)}, {file_size(speed)}/s, {left // 60:.0f}:{left % 60:02.0f} left"

    def close(self) -> None:
        """Remove the line from the terminal."""
        if self.width:
            print("\r" + " " * self.width + "\r", end="", file=sys.stderr, flush=True)
            self.width = 0
