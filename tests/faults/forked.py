"""Runs the command line in forked children, with a fault at one of their system calls: a trial costs a tenth of a fresh process.

The library of `system_calls.cpp` must have been loaded before Python started: `preloaded` starts this process again with it.
"""

import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("system_calls.cpp")
COMMAND = ("g++", "-shared", "-fPIC", "-O1", "-Wall", "-x", "c++", "-std=c++17", str(SOURCE), "-ldl")
MODES = {"count": 0, "kill before": 1, "kill after": 2, "torn write": 3, "once": 4, "from here on": 5}
EVERY_CALL = 1 << 40  # a number that no call has: all are counted, none is met
TIMEOUT = 60.0  # seconds
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Fault:
    """What happens at the call number `at`, from 1, among those that touch a path with `mark` in it."""

    mark: str
    at: int = EVERY_CALL
    mode: str = "count"
    errno: int = 0
    reads: bool = False  # whether reads count


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, negative for a signal, None if it did not end; and what it wrote on standard error."""

    code: int | None
    errors: str

    def message(self) -> str:
        """The last line of its errors."""
        return self.errors.strip().rpartition("\n")[2]

    def problem(self) -> str | None:
        """What is wrong with the way it ended, whatever it was to do; None if it succeeded, or refused in one line."""
        if self.code is None:
            return f"hangs for {TIMEOUT:.0f} s"
        if self.code not in (0, 2) or "Traceback" in self.errors:
            return f"exit {self.code}: {self.errors.strip()[-300:]}"
        refused = [line for line in self.errors.splitlines() if line.startswith("minimoe: ")]
        return f"{len(refused)} lines of refusal: {self.errors.strip()[-300:]}" if self.code == 2 and len(refused) != 1 else None


def build() -> Path:
    """Compile the library, once for each state of its source. Raises `RuntimeError` with the compiler's words."""
    if shutil.which("g++") is None:
        raise RuntimeError("g++ is needed to inject faults: install it (Debian: apt-get install g++)")
    folder = Path(tempfile.gettempdir()) / f"minimoe-faults-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(COMMAND).encode()).hexdigest()[:16]
    library = folder / f"system_calls-{key}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*COMMAND, "-o", str(partial)], capture_output=True, text=True)
        if result.returncode or result.stderr:
            raise RuntimeError(f"g++: {result.stderr}")
        partial.replace(library)
    return library


def preloaded(module: str) -> None:
    """Return if this process has the library; else replace the process by one that runs the module with the same arguments and has it."""
    library = str(build())
    if os.environ.get("LD_PRELOAD") != library:
        os.environ["LD_PRELOAD"] = library
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def arm(fault: Fault, log: Path | None) -> None:
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    if log is not None:
        ctypes.c_int.in_dll(library, "fault_log").value = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    ctypes.c_int.in_dll(library, "fault_mode").value = MODES[fault.mode]
    ctypes.c_int.in_dll(library, "fault_errno").value = fault.errno
    ctypes.c_int.in_dll(library, "fault_reads").value = fault.reads
    ctypes.c_long.in_dll(library, "fault_at").value = fault.at
    (ctypes.c_char * 256).in_dll(library, "fault_mark").value = fault.mark.encode()  # last: from here on calls count


def run(arguments: list[str], fault: Fault | None = None, log: Path | None = None) -> Ended:
    """Run `minimoe ARGUMENTS` in a child of this process; `log` gets a line for each call that counts."""
    errors = Path("errors.txt")
    child = os.fork()
    if not child:
        _be_the_command(arguments, errors, fault, log)
    code = _wait(child)
    return Ended(code, errors.read_text(errors="replace"))


def _be_the_command(arguments: list[str], errors: Path, fault: Fault | None, log: Path | None) -> None:
    code = 99
    try:
        descriptor = os.open(errors, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if fault is not None:
            arm(fault, log)
        from minimoe.cli import main

        main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> int | None:
    began = time.monotonic()
    while time.monotonic() - began < TIMEOUT:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def calls(arguments: list[str], mark: str, reads: bool = False) -> list[str]:
    """Return the name of each call of a command that touches the mark, with its path if it has one, in order."""
    log = Path("calls.txt")
    ended = run(arguments, Fault(mark, reads=reads), log)
    if ended.code != 0:
        raise RuntimeError(f"{' '.join(arguments[:3])}: {ended.errors}")
    return [line.partition(" ")[2].strip() for line in log.read_text().splitlines()]
