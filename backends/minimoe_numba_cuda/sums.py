"""Sums of columns in two launches, in an order that only the shape fixes: without atomics on floats, so equal inputs give equal bits.

The rows are divided into parts. One block sums 32 columns of a part, eight rows at a time; the second launch adds the parts in order.
"""

from minimoe.backend import Array
from minimoe_numba_cuda.compiler import cuda
from minimoe_numba_cuda.launch import CudaKernels, blocks_of
from minimoe_numba_cuda.warp import LANES, ROW_LANES, ZERO, sum_over_block_rows

MOST_PARTS = 64
SMALLEST_PART = 32  # rows
COLUMN_BLOCK = (LANES, ROW_LANES)


def parts_of(rows: int) -> tuple[int, int]:
    """-> rows per part, number of parts: enough blocks for the device, and dependent only on the number of rows"""
    height = max(SMALLEST_PART, blocks_of(rows, MOST_PARTS))
    return height, max(1, blocks_of(rows, height))


@cuda.jit
def sum_columns(x, scale, height, partials):  # type: ignore[no-untyped-def]
    """partials[p] = sum over the rows of part p of scale[r] * x[r]; a row of scale 0 is not read; empty: 1.   [R,D], [R] -> [P,D]

    Grid: (ceil(D / 32), P), block (32, 8). Bytes: R*D read.
    """
    column = cuda.blockIdx.x * LANES + cuda.threadIdx.x
    first = cuda.blockIdx.y * height
    last = min(first + height, x.shape[0])
    total = ZERO
    if column < x.shape[1]:
        for row in range(first + cuda.threadIdx.y, last, ROW_LANES):
            if scale.size == 0:
                total += x[row, column]
            elif scale[row] != ZERO:
                total += scale[row] * x[row, column]
    total = sum_over_block_rows(total)
    if cuda.threadIdx.y == 0 and column < x.shape[1]:
        partials[cuda.blockIdx.y, column] = total


@cuda.jit
def add_parts(partials, y):  # type: ignore[no-untyped-def]
    """y[d] = sum over the parts, in order.   [P,D] -> [D]   Grid: ceil(D / 128)."""
    column = cuda.grid(1)
    if column < y.size:
        total = ZERO
        for part in range(partials.shape[0]):
            total += partials[part, column]
        y[column] = total


class Sums(CudaKernels):
    def _sum_parts(self, partials: Array) -> Array:
        """[P,D] -> [D]"""
        y = self._empty(partials.shape[1])
        self._launch(add_parts, (blocks_of(len(y)),), (128,), partials, y)
        return y

    def _sum_columns(self, x: Array, scale: Array | None = None) -> Array:
        """x [R,D], contiguous -> [D]"""
        height, parts = parts_of(x.shape[0])
        partials = self._empty(parts, x.shape[1])
        scale = self._empty(0) if scale is None else scale
        self._launch(sum_columns, (blocks_of(x.shape[1], LANES), parts), COLUMN_BLOCK, x, scale, height, partials)
        return self._sum_parts(partials)
