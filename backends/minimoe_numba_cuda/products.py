"""The kernels of grouped products, as a ladder: rows are sorted by expert, and `offsets`, read on the device, bound each expert's rows.

grouped_by_thread    one thread per result, straight from memory: I multiplications for 2 I numbers read.                  unmeasured
grouped_shared       blocks of 16 x 16 results share tiles of x and of W in shared memory: each number read is used by 16. unmeasured
grouped_registers    blocks of 64 x 64, 4 x 4 results per thread: numbers from shared memory are used 4, from memory 64 times. unmeasured

The host does not know how many rows an expert has. So a grid has as many row tiles as there can be, ceil(R / height) plus one per expert
(and one for the unused rows); each block finds its tile by going through the offsets, and those left over return at once. Row tiles are
blockIdx.x: the other two axes end at 65,535.
"""

from minimoe_numba_cuda.compiler import cuda, float32, int64
from minimoe_numba_cuda.warp import ZERO

SIDE = 16  # of the tiles of grouped_shared, and of every block of threads here
TILE = 64  # rows and columns of a block of grouped_registers
DEPTH = 16  # of the tiles in shared memory
EACH = TILE // SIDE  # results per thread, in either direction
SIDE_PITCH, PITCH = SIDE + 1, TILE + 1  # one more than a row's length, so that a column's numbers are in different banks
BLOCK = (SIDE, SIDE)


@cuda.jit(device=True, forceinline=True)
def tile_of(index, offsets, rows, height):  # type: ignore[no-untyped-def]
    """-> expert, first row, row after the last: experts in order, then the unused rows as expert E; an empty tile if none is left."""
    experts = offsets.size - 1
    first = int64(0)
    for e in range(experts):
        last = max(first, min(int64(offsets[e + 1]), rows))
        tiles = (last - first + height - 1) // height
        if index < tiles:
            first += index * height
            return e, first, min(last, first + height)
        index -= tiles
        first = last
    first += index * height
    return experts, min(first, rows), min(rows, first + height)


@cuda.jit
def grouped_by_thread(x, weight, offsets, transpose, y):  # type: ignore[no-untyped-def]
    """The first rung: y[r] = W_e x[r], or W_e^T x[r].   x [R,I], weight [E,O,I] -> [R,O] or back   Grid: (R, ceil(O / 128))."""
    r, column = int64(cuda.blockIdx.x), cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if column >= y.shape[1]:
        return
    total, e = ZERO, 0
    while e < weight.shape[0] and r >= offsets[e + 1]:
        e += 1
    if e < weight.shape[0]:
        for i in range(x.shape[1]):
            total += x[r, i] * (weight[e, i, column] if transpose else weight[e, column, i])
    y[r, column] = total


@cuda.jit
def grouped_shared(x, weight, offsets, transpose, y):  # type: ignore[no-untyped-def]
    """The second rung: a block has 16 x 16 results, one per thread, and loads 16 of the depth at a time into shared memory.

    Grid: (ceil(R / 16) + E + 1, ceil(O / 16)), block (16, 16).
    """
    xs, ws = cuda.shared.array((SIDE, SIDE_PITCH), float32), cuda.shared.array((SIDE, SIDE_PITCH), float32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    depth, width = x.shape[1], y.shape[1]
    e, first, last = tile_of(int64(cuda.blockIdx.x), offsets, x.shape[0], SIDE)
    row, left = first + ty, int64(cuda.blockIdx.y) * SIDE
    total = ZERO
    for start in range(0, depth if e < weight.shape[0] and first < last else 0, SIDE):
        k = start + tx
        xs[ty, tx] = x[row, k] if row < last and k < depth else ZERO
        # contiguous in memory: the depth of W, or the columns of W transposed
        if transpose:
            k, column = start + ty, left + tx
            ws[ty, tx] = weight[e, k, column] if k < depth and column < width else ZERO
        else:
            column = left + ty
            ws[tx, ty] = weight[e, column, k] if k < depth and column < width else ZERO
        cuda.syncthreads()
        for k in range(SIDE):
            total += xs[ty, k] * ws[k, tx]
        cuda.syncthreads()
    if row < last and left + tx < width:
        y[row, left + tx] = total


@cuda.jit(device=True, forceinline=True)
def multiply_tiles(a, b, sums):  # type: ignore[no-untyped-def]
    """sums[i,j] += sum over k of a[k, ty + 16 i] * b[k, tx + 16 j]: reads 8 numbers from shared memory for 16 multiplications."""
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    left, right = cuda.local.array(EACH, float32), cuda.local.array(EACH, float32)
    for k in range(DEPTH):
        for i in range(EACH):
            left[i] = a[k, ty + SIDE * i]
            right[i] = b[k, tx + SIDE * i]
        for i in range(EACH):
            for j in range(EACH):
                sums[i, j] += left[i] * right[j]


@cuda.jit
def grouped_registers(x, weight, offsets, transpose, y):  # type: ignore[no-untyped-def]
    """The last rung: each thread has 4 x 4 results, 16 apart, in registers. Rows at or past offsets[E] become zero.

    Grid: (ceil(R / 64) + E + 1, ceil(O / 64)), block (16, 16). Bytes: R*I*ceil(O / 64) + O*I for each tile of rows, most of it from L2.
    """
    a, b = cuda.shared.array((DEPTH, PITCH), float32), cuda.shared.array((DEPTH, PITCH), float32)
    sums = cuda.local.array((EACH, EACH), float32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    depth, width = x.shape[1], y.shape[1]
    e, first, last = tile_of(int64(cuda.blockIdx.x), offsets, x.shape[0], TILE)
    left = int64(cuda.blockIdx.y) * TILE
    for i in range(EACH):
        for j in range(EACH):
            sums[i, j] = ZERO
    for start in range(0, depth if e < weight.shape[0] and first < last else 0, DEPTH):
        for i in range(EACH):
            row, column, k = first + ty + SIDE * i, left + ty + SIDE * i, start + tx
            a[tx, ty + SIDE * i] = x[row, k] if row < last and k < depth else ZERO
            if transpose:
                k, column = start + ty, left + tx + SIDE * i
                b[ty, tx + SIDE * i] = weight[e, k, column] if k < depth and column < width else ZERO
            else:
                b[tx, ty + SIDE * i] = weight[e, column, k] if k < depth and column < width else ZERO
        cuda.syncthreads()
        multiply_tiles(a, b, sums)
        cuda.syncthreads()
    for i in range(EACH):
        for j in range(EACH):
            row, column = first + ty + SIDE * i, left + tx + SIDE * j
            if row < last and column < width:
                y[row, column] = sums[i, j]


@cuda.jit
def grouped_weight_gradient(dy, x, offsets, accumulate, dw):  # type: ignore[no-untyped-def]
    """dW_e = dy_e^T x_e, added to dw if `accumulate`.   dy [R,O], x [R,I] -> [E,O,I]

    A block has 64 x 64 results of one expert and adds all its rows in order. Grid: (ceil(I / 64), ceil(O / 64), E).
    """
    a, b = cuda.shared.array((DEPTH, PITCH), float32), cuda.shared.array((DEPTH, PITCH), float32)
    sums = cuda.local.array((EACH, EACH), float32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    e, top, left = cuda.blockIdx.z, int64(cuda.blockIdx.y) * TILE, int64(cuda.blockIdx.x) * TILE
    height, width, last = dw.shape[1], dw.shape[2], min(int64(offsets[e + 1]), x.shape[0])
    for i in range(EACH):
        for j in range(EACH):
            sums[i, j] = ZERO
    for first in range(max(int64(offsets[e]), 0), last, DEPTH):
        row = first + ty
        for i in range(EACH):
            o, column = top + tx + SIDE * i, left + tx + SIDE * i
            a[ty, tx + SIDE * i] = dy[row, o] if row < last and o < height else ZERO
            b[ty, tx + SIDE * i] = x[row, column] if row < last and column < width else ZERO
        cuda.syncthreads()
        multiply_tiles(a, b, sums)
        cuda.syncthreads()
    for i in range(EACH):
        for j in range(EACH):
            o, column = top + ty + SIDE * i, left + tx + SIDE * j
            if o < height and column < width:
                dw[e, o, column] = sums[i, j] + dw[e, o, column] if accumulate else sums[i, j]
