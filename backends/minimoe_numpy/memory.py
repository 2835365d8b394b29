"""Keeps memory that NumPy frees in the process, in huge pages if the system has them, so that the next array needs no new pages.

glibc hands large blocks back to the system at once, and the system clears every page again when it is next touched. A training step makes
and frees the same large arrays over and over. Pages of 2 MiB instead of 4 KiB spare the processor most of its walks through page tables.
`python -m benchmarks.memory` measures the gain of both on a machine.
"""

import ctypes
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # of glibc's malloc.h
KEPT = 2**31 - 1  # bytes at the top of the heap that are not returned to the system
LARGEST = 2**30  # blocks up to this size come from the heap
PAD = 64 * 2**20
MADV_HUGEPAGE = 14  # of Linux's mman.h


def keep_freed_memory(huge_pages: bool = True) -> bool:
    """Ask glibc's malloc to keep freed memory, in one heap for all threads.   -> False if this is another C library, or it refused"""
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        mallopt = library.mallopt
    except (OSError, AttributeError):  # another C library
        return False
    kept = mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, KEPT) and mallopt(M_TOP_PAD, PAD)
    if kept and mallopt(M_ARENA_MAX, 1) and huge_pages:
        widen_heap(library)
    return bool(kept)


def widen_heap(library: ctypes.CDLL) -> None:
    """Grow the heap by addresses alone (memory is mapped when they are touched), and ask for huge pages there."""
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    blocks = [library.malloc(LARGEST - PAD) for _ in range(2)]
    for block in blocks:
        library.free(block)  # it stays in the heap, since it is less than KEPT
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            library.madvise(first, last - first, MADV_HUGEPAGE)  # the result is ignored: everything works without huge pages
