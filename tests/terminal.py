"""A terminal for tests: a process in it, and what a user would see, which the emulator pyte makes of the process's output."""

import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from contextlib import suppress

import pyte
from command_line import environment

PATIENCE = 60.0  # seconds; a test that waits for longer has failed
OF_TERMINALS = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
QUIET = 0.05  # seconds without output after which the screen is complete


class Terminal:
    """A process whose standard streams are a terminal of `columns` x `rows`, which controls it; the process leads its session."""

    def __init__(self, command: list[str], columns: int, rows: int = 24, cwd: str | os.PathLike[str] = "/", **more: str) -> None:
        """`more`: variables of the environment."""
        self.ours, theirs = os.openpty()
        self._set_size(columns, rows)
        settings = termios.tcgetattr(theirs)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, settings)
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.output = b""
        env = {name: value for name, value in environment().items() if name not in OF_TERMINALS} | {"TERM": "xterm-256color"} | more
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=cwd, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.ours)  # hangs up, which ends what else runs in the session

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        """Change the size, as a user does with the window; the process gets SIGWINCH."""
        self._set_size(columns, rows)
        self.screen.resize(rows, columns)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def read(self, until: str | Callable[[], bool] = "") -> str:
        """Take in the output until a text is shown, or a condition holds, and nothing more comes.   -> the screen's text"""
        holds = until if callable(until) else lambda: until in self.text
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            ready, _, _ = select.select([self.ours], [], [], QUIET)
            if ready:
                try:
                    data = os.read(self.ours, 65536)
                except OSError:  # the process has ended
                    data = b""
                self.output += data
                self.stream.feed(data)
                if data:
                    continue
            if holds():
                return self.text
            assert not ready, f"the process has ended:\n{self.text}"
        raise AssertionError(f"{until!r} is not shown:\n{self.text}")

    @property
    def text(self) -> str:
        """The lines of the screen, without the spaces at their ends and the empty lines at its end."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip() + "\n"
