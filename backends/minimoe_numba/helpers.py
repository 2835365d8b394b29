"""Helper processes that compile kernels into the cache on disk, side by side with the process that will use them.

Each helper (`python -m minimoe_numba.helper`) is handed one name at a time, compiles that kernel and asks for the next. A kernel that is
called meanwhile waits for its helper and is then loaded. Whatever goes wrong with a helper, its kernel is compiled where it is called.
"""

import atexit
import os
import subprocess
import sys
import threading
import time

from minimoe_numba.news import COMPILING, news

SECONDS_BETWEEN_REPORTS = 2.0


class Helpers:
    """Helper processes, each with a thread of this process that hands it one kernel after the other."""

    def __init__(self, names: list[str], count: int) -> None:
        self.total = len(names)
        self.queue, self.unfinished = list(names), set(names)
        self.changed = threading.Condition()
        self.running, self.owner = count, os.getpid()
        self.processes: list[subprocess.Popen[str]] = []
        self.reported = time.monotonic()
        for _ in range(count):
            threading.Thread(target=self._serve, daemon=True, name="minimoe_numba helper").start()
        atexit.register(self.close)

    def _serve(self) -> None:
        """Start a helper and hand it kernels until none is left, or the helper is gone."""
        name = None
        try:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
            command = [sys.executable, "-P", "-m", "minimoe_numba.helper"]  # -P: the current folder only where `environment` has it
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
            )
            self.processes.append(process)
            assert process.stdin is not None and process.stdout is not None
            with process.stdin, process.stdout:
                while (name := self._next(name)) is not None:
                    process.stdin.write(f"{name}\n")
                    process.stdin.flush()
                    if process.stdout.readline().strip() != name:
                        break
            process.wait()
        except (OSError, ValueError):  # it cannot be started, or its pipe is closed
            pass
        finally:
            with self.changed:
                self.running -= 1
                self.unfinished.discard(name or "")
                if not self.running:
                    self.unfinished.clear()
                self.changed.notify_all()

    def _next(self, finished: str | None) -> str | None:
        """Note which kernel is finished.   -> the next name"""
        with self.changed:
            self.unfinished.discard(finished or "")
            self.changed.notify_all()
            return self.queue.pop(0) if self.queue else None

    def wait_for(self, name: str) -> None:
        """Return when no helper has this kernel before it any more."""
        with self.changed:
            if name in self.queue:  # it is wanted now: it is the next
                self.queue.remove(name)
                self.queue.insert(0, name)
            while name in self.unfinished:
                news.tell(COMPILING)
                now = time.monotonic()
                if now - self.reported >= SECONDS_BETWEEN_REPORTS:
                    self.reported = now
                    news.tell(f"compiling kernels: {self.total - len(self.unfinished)} of {self.total}")
                self.changed.wait(0.2)

    def close(self) -> None:
        """End helpers that are still there."""
        if os.getpid() != self.owner:  # this is a fork: they belong to its parent
            return
        with self.changed:
            self.queue.clear()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


helpers: list[Helpers] = []  # of this process: one object or none


def start_helpers(names: list[str], count: int) -> None:
    """Start `count` helpers, which compile these kernels ("file.kernel") in this order."""
    helpers.append(Helpers(names, count))


def wait_for(name: str) -> None:
    """Let a helper finish the kernel of this name, if it is compiling it or is going to."""
    for each in helpers:
        if each.owner == os.getpid():
            each.wait_for(name)
