"""Memory that NumPy frees stays with the process, so that the next array of its size needs no new pages.

glibc hands large blocks back to the system at once, and the system clears every page again when it is next touched. A training step makes
and frees the same large arrays over and over; `python -m benchmarks.step` without the call of `keep_freed_memory` shows the price.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
KEPT = 2**31 - 1  # bytes at the top of the heap that are not handed back
LARGEST = 2**30  # blocks up to this size come from the heap
PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Ask glibc's malloc to keep what is freed. Elsewhere nothing is done; says whether it was."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, KEPT) and mallopt(M_TOP_PAD, PAD))
