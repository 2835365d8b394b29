"""What this process may use of the machine: processors and memory, as the system and Linux's control groups limit them.

A container's limits are those of a control group (cgroup, version 1 or 2). Groups are nested, and each one above limits as well. Inside
a container the path of its group may be the host's, which does not exist there; then the root is the container's group.
"""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_processors() -> int:
    """Return the number of processors that this process may use: those it may run on, or fewer if a quota allows less of their time."""
    quota = cpu_quota()
    return allowed_processors() if quota is None else max(1, min(allowed_processors(), math.ceil(quota)))


def allowed_processors() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Return how many processors' time the control groups allow, such as 1.5; None without a limit."""
    found = []
    for group in _groups("cpu"):
        quota, period = _words(group / "cpu.max", 2)
        if quota is None:
            (quota,), (period,) = _words(group / "cpu.cfs_quota_us", 1), _words(group / "cpu.cfs_period_us", 1)
        if quota is not None and quota > 0 and period:
            found.append(quota / period)
    return min(found, default=None)


def machine_memory() -> int | None:
    """Return the bytes of memory of this machine, or of the container on Linux; None if the system does not say."""
    try:
        bytes_here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    files = [group / name for group in _groups("memory") for name in ("memory.max", "memory.limit_in_bytes")]
    return min(bytes_here, *(limit for file in files for limit in _words(file, 1) if limit is not None), bytes_here)


def peak_memory() -> int | None:
    """Return the most bytes of memory that this process has held so far; None if the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups that have a controller: of the own group, then of those above."""
    for line in _lines(OWN_GROUPS):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            base = GROUPS / controller
        elif number == "0" and not controllers:
            base = GROUPS
        else:
            continue
        folder = base / path.lstrip("/")
        while folder != base and base in folder.parents and ".." not in folder.parts:
            yield folder
            folder = folder.parent
        yield base


def _words(file: Path, count: int) -> list[int | None]:
    """Return the numbers in the first line of a file, `count` of them; None for each that is absent or not a number, such as `max`."""
    words = [*(_lines(file) or [""])[0].split()[:count]]
    return [int(word) if word.removeprefix("-").isdecimal() else None for word in words] + [None] * (count - len(words))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no such group, or not Linux
        return []
