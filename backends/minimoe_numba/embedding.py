"""Embedding: all threads copy rows of the table. The gradient is added row by row, each thread in columns of its own.

Thus rows of equal ids are added in their order in the batch at any number of threads, and nothing is sorted. When the gradient is
accumulated, only the rows of the ids are touched.
"""

import numpy as np

from minimoe.backend import Array
from minimoe_numba.arrays import as_rows, by_width, result, singles
from minimoe_numba.compiling import inlined
from minimoe_numba.kernel import F2, I1, kernel
from minimoe_numba.traced import recorder
from minimoe_numpy import NumpyBackend

COLUMNS = 64  # per piece: a few cache lines of each row


@inlined
def row_of(index, rows):  # type: ignore[no-untyped-def]
    """Return the row that an index names: a negative one counts from the end."""
    row = np.int64(index)
    return row + rows if row < 0 else row


@kernel
def take_rows(start: int, stop: int, ids: I1, weight: F2, y: F2) -> None:
    for n in range(start, stop):
        row = row_of(ids[n], len(weight))
        if 0 <= row < len(weight):
            for d in range(weight.shape[1]):
                y[n, d] = weight[row, d]
        else:
            y[n] = np.float32(np.nan)


@kernel
def add_columns(start: int, stop: int, dy: F2, ids: I1, padding: int, dweight: F2) -> None:
    """Add to columns start .. stop of dweight [V,D] all rows of dy [N,D] but those of `padding`."""
    for n in range(len(ids)):
        row = row_of(ids[n], len(dweight))
        if row != padding and 0 <= row < len(dweight):
            for d in range(start, stop):
                dweight[row, d] += dy[n, d]


def in_range(ids: Array, vocab: int) -> bool:
    """True if all ids are in 0 .. vocab-1. A negative id is large when read as unsigned.

    While a step is recorded ids cannot be read, so this returns True. The kernels then count negative ids from the end, as indices do,
    and for an id that names no row they return NaN, and add nothing.
    """
    return recorder.tape is not None or not ids.size or int(ids.view(np.uint32).max()) < vocab


class FastEmbedding(NumpyBackend):
    def embedding(self, ids: Array, weight: Array, out: Array | None = None) -> Array:
        if not singles(weight) or ids.dtype != np.int32 or not weight.flags.c_contiguous or not in_range(ids, len(weight)):
            return super().embedding(ids, weight, out)
        y = result(out, (*ids.shape, weight.shape[1]))
        take_rows(ids.size, by_width(weight.shape[1]), ids.reshape(-1), weight, as_rows(y))
        return y if y is out else self.store(y, out)

    def embedding_backward(
        self, dy: Array, ids: Array, vocab: int, padding: int | None = None, out: Array | None = None, accumulate: bool = False
    ) -> Array:
        shape = (vocab, dy.shape[-1])
        fits = ids.dtype == np.int32 and dy.shape[:-1] == ids.shape and (out is None or out.shape == shape) and in_range(ids, vocab)
        if not singles(dy) or not fits:
            return super().embedding_backward(dy, ids, vocab, padding, out, accumulate)
        dweight = result(out, shape)
        if dweight is not out or not accumulate:
            dweight.fill(0.0)
        add_columns(shape[1], COLUMNS, as_rows(dy), ids.reshape(-1), -1 if padding is None else padding % vocab, dweight)
        return dweight if dweight is out else self.store(dweight, out, accumulate)
