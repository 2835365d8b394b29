"""Runs conformance cases in a child process (`child.py`), so that one that hangs or crashes is named and the others still run.

The process is a fresh interpreter, since many libraries do not survive a fork. It is ended when a case takes longer than the limit, and
another one goes on with the next case. It runs in its own session: an interrupt from the terminal reaches the parent alone, which ends
it. If the parent is killed, the child ends with its standard input, or, if it hangs, at the limit of its case.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic as now
from typing import IO, Any

from minimoe.errors import UserError
from minimoe.testing.results import CRASHED, TIMEOUT, Listed, Result

TICK = 0.2  # seconds between two looks at the clock
GRACE = 2.0  # seconds in which a process may end by itself, and say where it was
LOADING = 300.0  # seconds for loading a backend
START = """
import json, sys
given = json.loads(sys.argv[1])
sys.path[:] = given.pop("path")
from minimoe.testing.child import main
main(**given)
"""
TOO_LATE = "Timeout ("
STACK = ("Fatal Python error: ", TOO_LATE)  # how Python's faulthandler begins
FRAME = re.compile(r'\s+File "(.*)", line (\d+) in (.*)')
FRAMES = 2  # shown, innermost first
LAST_LINES = 3  # of what a backend printed, shown if it crashes


@dataclass(frozen=True)
class Begun:
    """Case `number` of `cases` begins, counted from 0."""

    number: int
    cases: list[Listed]


@dataclass(frozen=True)
class Printed:
    """A line that the backend printed."""

    text: str


def check_watched(name: str, selection: dict[str, Any], limit: float) -> Generator[Begun | Result | Printed | None]:
    """Run cases of a backend, each for at most `limit` seconds.   -> what happens, and None every `TICK` seconds in which nothing does

    `selection`: the arguments of `cases`. Raises `UserError` for one that does not fit, and for a backend that cannot be loaded. Close
    the iterator to end the process.
    """
    done, total = 0, 1
    while done < total:
        child = Child(name, selection, done, limit)
        try:
            for event in child.events():
                if isinstance(event, Result):
                    done += 1
                yield event
        finally:
            child.end()
        total = len(child.cases)


class Child:
    """One process, and the case that it is running."""

    def __init__(self, name: str, selection: dict[str, Any], first: int, limit: float) -> None:
        self.name, self.first, self.limit = name, first, limit
        self.cases: list[Listed] = []
        self.running: Listed | None = None
        self.next = first  # the case that begins next
        self.began, self.allowed = now(), LOADING
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self.stack: list[str] = []
        self.ended = False
        given = {"path": sys.path, "name": name, "selection": selection, "first": first, "limit": limit}
        warned = [f"-W{option}" for option in sys.warnoptions]
        self.process = subprocess.Popen(
            [sys.executable, "-P", *warned, "-c", START, json.dumps(given)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        self.lines: queue.Queue[tuple[str, str]] = queue.Queue()
        streams = {"report": self.process.stdout, "printed": self.process.stderr}
        self.readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in streams.items()]
        for reader in self.readers:
            reader.start()

    def _read(self, kind: str, stream: IO[str]) -> None:
        for line in stream:
            self.lines.put((kind, line.rstrip("\n")))
        self.lines.put((kind, ""))

    def events(self) -> Iterator[Begun | Result | Printed | None]:
        """Yield what happens until the process ends, with a result for the case that it was running if there was one."""
        late = False
        while self.process.poll() is None and not late:
            try:
                yield from self.event(*self.lines.get(timeout=TICK))
            except queue.Empty:
                yield None
            late = now() - self.began > self.allowed
        self.end()
        while not self.lines.empty():
            yield from self.event(*self.lines.get())
        if self.running is not None:
            yield self.lost(late or any(line.startswith(TOO_LATE) for line in self.stack))
        elif not self.cases or self.first == self.next < len(self.cases):
            how = f"not loaded after {self.allowed:g} s" if late else f"the process that loads it {self.end_text()}"
            raise UserError(f"backend {self.name}: {how}{self.place()}{self.printed_last()}")

    def event(self, kind: str, line: str) -> Iterator[Begun | Result | Printed]:
        """Yield what a line from the process reports."""
        if not line:
            return
        if kind == "printed":
            if self.stack or line.startswith(STACK):
                self.stack.append(line)
                if os.environ.get("MINIMOE_DEBUG") != "1":
                    return
            else:
                self.last_lines.append(line)
            yield Printed(line)
            return
        ((what, value),) = json.loads(line).items()
        if what == "error":
            raise UserError(value)
        elif what == "cases":
            self.cases = [Listed(*fields) for fields in value]
        elif what == "begun":
            self.running, self.next, self.began, self.allowed = self.cases[value], value + 1, now(), self.limit + GRACE
            self.last_lines.clear()
            yield Begun(value, self.cases)
        else:
            assert self.running is not None
            case, self.running = self.running, None
            self.began, self.allowed = now(), GRACE  # until the next begins, or the process ends
            yield Result(case, *value)

    def end(self) -> None:
        """End the process, if it has not ended by itself, and those that it started."""
        if self.ended:
            return
        self.ended = True
        with suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        with suppress(subprocess.TimeoutExpired):  # a driver can delay the end of a killed process
            self.process.wait(GRACE)
        for reader in self.readers:
            reader.join(GRACE)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with suppress(OSError, ValueError):
                if stream is not None:
                    stream.close()

    # ---- what is known of a case that did not end --------------------------------------------------------------------------------------

    def lost(self, late: bool) -> Result:
        """Return the result of the case that was running: too late, or crashed."""
        assert self.running is not None
        if late:
            text = f"It was not done after {self.limit:g} s{self.place()}. If it is only slow, --timeout gives it longer"
            return Result(self.running, TIMEOUT, self.limit, text)
        return Result(self.running, CRASHED, now() - self.began, f"The process {self.end_text()}{self.place()}{self.printed_last()}")

    def end_text(self) -> str:
        code = self.process.returncode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        known = {number.value: number.name for number in signal.Signals}
        return f"ended with signal {-code} ({known.get(-code, 'unknown')}{', perhaps for lack of memory' if code == -9 else ''})"

    def place(self) -> str:
        """Return where the process was, in words, from the stack of the thread that ran the case."""
        threads = re.split(r"\n(?=Current thread|Thread)", "\n".join(self.stack))
        frames = FRAME.findall(next((text for text in threads if text.startswith("Current thread")), threads[-1]))
        shown = [f"{function} ({os.path.join(*file.split(os.sep)[-2:])}, line {line})" for file, line, function in frames[:FRAMES]]
        return f", in {', called by '.join(shown)}" if shown else ""

    def printed_last(self) -> str:
        return f". It printed: {' '.join(self.last_lines)}" if self.last_lines else ""
