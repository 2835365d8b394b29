"""Builds the machine's library from `native/*.cpp` with g++, once for each version of the sources, and keeps it.

It lies in a folder of this user alone in the system's temporary folder, under a hash of everything that it is built from.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
# Floats must be as PTX says: a product and a sum are two roundings unless the instruction is an fma.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fPIC",
    "-fno-semantic-interposition",
    "-Wall",
    "-Wextra",
)


def library() -> Path:
    """Return the path of the shared library. Raises RuntimeError without g++, or with its message if it rejects the sources."""
    if shutil.which("g++") is None:
        raise RuntimeError("g++ is needed to execute PTX on the processor: install it (Debian: apt-get install g++)")
    files = sorted(SOURCES.glob("*.*"))
    parts = [FLAGS, _processor(), *((file.name, file.read_bytes()) for file in files)]
    place = folder() / f"ptx-machine-{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}.so"
    if not place.exists():
        with place.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the test processes that want the library wait for the first to build it
            if not place.exists():
                _build([file for file in files if file.suffix == ".cpp"], place)
    return place


def folder(name: str = "ptx-machine") -> Path:
    """Return a folder of this user alone: a library that another user puts there would be executed."""
    place = Path(tempfile.gettempdir()) / f"minimoe-{name}-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid():
        raise RuntimeError(f"{place} belongs to another user: remove it, or set TMPDIR")
    return place


def _build(files: list[Path], place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        objects = [Path(scratch) / f"{file.stem}.o" for file in files]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda pair: _run("g++", *FLAGS, "-c", str(pair[0]), "-o", str(pair[1])), zip(files, objects, strict=True)))
        partial = Path(scratch) / "library.so"
        _run("g++", "-shared", *map(str, objects), "-o", str(partial), "-lpthread")
        os.replace(partial, place)


def _run(*command: str) -> None:
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


def _processor() -> str:
    """Return what -march=native depends on."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()} {flags}"
