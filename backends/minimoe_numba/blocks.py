"""Blocks of rows of one expert: which rows a block has, their addresses, and how they are gathered."""

import numpy as np

from minimoe_numba.compiling import inlined


@inlined
def block_of(index, offsets, size):  # type: ignore[no-untyped-def]
    """Return the expert and the rows of a block of at most `size` rows; a block past the last has none.   -> e, first, last"""
    for e in range(len(offsets) - 1):
        first, last = np.int64(offsets[e]), np.int64(offsets[e + 1])
        blocks = (last - first + size - 1) // size
        if index < blocks:
            # blocks of even size: a product of few rows is slow
            even = (last - first + blocks - 1) // blocks
            return e, min(last, first + index * even), min(last, first + (index + 1) * even)
        index -= blocks
    return 0, 0, 0


@inlined
def at(x, row):  # type: ignore[no-untyped-def]
    """Return the address of a row."""
    return x.ctypes.data + row * x.shape[1] * 4


@inlined
def matrix_at(x, index):  # type: ignore[no-untyped-def]
    """Return the address of one matrix of a stack."""
    return x.ctypes.data + index * x.shape[1] * x.shape[2] * 4


@inlined
def gather(x, order, slots, first, y):  # type: ignore[no-untyped-def]
    """y[r] = x[order[first + r] // slots]"""
    for r in range(len(y)):
        source = order[first + r] // slots
        for d in range(y.shape[1]):
            y[r, d] = x[source, d]


@inlined
def add_to(y, x):  # type: ignore[no-untyped-def]
    """y += x, for one row"""
    for d in range(len(x)):
        y[d] += x[d]
