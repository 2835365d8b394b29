"""The kernels of attention, as a ladder; none keeps a [Tq,Tk] array. Formulas: minimoe/reference/attention.py.

attention_by_thread    one thread per query: reads k twice and v once, straight from memory; its sums are in y itself.           unmeasured
attention_tiled        blocks of 16 queries share tiles of 32 keys and values in shared memory, in one pass; sums in registers.   unmeasured

The second needs one pass because softmax can be computed online (Milakov & Gimelshein 2018; Dao et al. 2022): of the scores so far, `top`
is the largest, `total` the sum of exp(score - top), `sums` that of exp(score - top) v; when a larger score comes, both sums are multiplied
by exp(top - score). A head's sink is a score that precedes the first key.
"""

import math

from minimoe_numba_cuda.compiler import cuda, float32, int64
from minimoe_numba_cuda.warp import INFINITY, LANES, ONE, WARPS, ZERO, warp_max, warp_sum

TILE = LANES  # rows in shared memory at a time, one per lane
ROWS = 4  # rows per warp: each number read from the tile is used as often
BLOCK_ROWS = ROWS * WARPS
COLUMNS = 4  # per lane, 32 apart
WIDEST = COLUMNS * LANES  # the widest head that is tiled


# ---- helpers -------------------------------------------------------------------------------------------------------------------------


@cuda.jit(device=True, forceinline=True)
def attends(b, row, key, q_pos, k_pos, k_valid, causal, window):  # type: ignore[no-untyped-def]
    """Returns True if the query of a row may see the key; False past either end."""
    if row >= q_pos.shape[1] or key >= k_pos.shape[1] or (k_valid.size and not k_valid[b % k_valid.shape[0], key]):
        return False
    distance = int64(q_pos[b % q_pos.shape[0], row]) - int64(k_pos[b % k_pos.shape[0], key])
    return not ((causal and distance < 0) or (window and abs(distance) >= window))


@cuda.jit(device=True, forceinline=True)
def row_index(n, rows, heads):  # type: ignore[no-untyped-def]
    """Splits n, an index into a flat [B,Q,Tq] array.   -> b, head, row"""
    return n // (rows * heads), n // rows % heads, n % rows


@cuda.jit(device=True, forceinline=True)
def dot(x, y, b, row, head, other, group):  # type: ignore[no-untyped-def]
    """<x[b,row,head], y[b,other,group]>"""
    total = ZERO
    for c in range(x.shape[3]):
        total += x[b, row, head, c] * y[b, other, group, c]
    return total


@cuda.jit(device=True, forceinline=True)
def load_tile(x, b, first, head, tile):  # type: ignore[no-untyped-def]
    """Loads x[b, first : first + 32, head] into shared memory, zeros past the end. Rows are width + 1 apart: a column's banks differ."""
    width = x.shape[3]
    for row in range(cuda.threadIdx.x // LANES, TILE, WARPS):
        for c in range(cuda.laneid, width, LANES):
            tile[row * (width + 1) + c] = x[b, first + row, head, c] if first + row < x.shape[1] else ZERO


@cuda.jit(device=True, forceinline=True)
def multiply_rows(x, b, first, head, tile, products):  # type: ignore[no-untyped-def]
    """products[i] = <x[b, first + i, head], row `lane` of the tile>: all lanes read the same x, from L1; past the end, the last row's."""
    width, last = x.shape[3], x.shape[1] - 1
    for i in range(ROWS):
        products[i] = ZERO
    for c in range(width):
        other = tile[cuda.laneid * (width + 1) + c]
        for i in range(ROWS):
            products[i] += x[b, min(first + i, last), head, c] * other


@cuda.jit(device=True, forceinline=True)
def add_weighted(factors, tile, width, sums):  # type: ignore[no-untyped-def]
    """sums[i,j] += sum over the tile's rows r of factors[i,r] * tile[r, lane + 32 j].   factors [ROWS * 32], the warp's own"""
    for r in range(TILE):
        for j in range(COLUMNS):
            column = cuda.laneid + LANES * j
            if column < width:
                other = tile[r * (width + 1) + column]
                for i in range(ROWS):
                    sums[i, j] += factors[i * TILE + r] * other


@cuda.jit(device=True, forceinline=True)
def store_rows(sums, y, b, first, head):  # type: ignore[no-untyped-def]
    """y[b, first + i, head, lane + 32 j] = sums[i,j] within y."""
    for i in range(ROWS):
        for j in range(COLUMNS):
            column = cuda.laneid + LANES * j
            if first + i < y.shape[1] and column < y.shape[3]:
                y[b, first + i, head, column] = sums[i, j]


# ---- the ladder ----------------------------------------------------------------------------------------------------------------------


@cuda.jit
def attention_by_thread(q, k, v, q_pos, k_pos, k_valid, sinks, scale, causal, window, y, logsumexp):  # type: ignore[no-untyped-def]
    """The first rung, for heads of any width.   q [B,Tq,Q,C], k [B,Tk,G,C], v [B,Tk,G,Cv] -> y [B,Tq,Q,Cv], logsumexp [B,Q,Tq]

    k_valid and sinks may be empty. Grid: ceil(B*Q*Tq / 128). Bytes: (2 C + 3 Cv) Tk for each query.
    """
    n = cuda.grid(1)
    if n >= logsumexp.size:
        return
    b, h, row = row_index(n, q.shape[1], q.shape[2])
    g, keys = h // (q.shape[2] // k.shape[2]), k.shape[1]
    top, total = -INFINITY, ZERO
    if sinks.size:
        top, total = sinks[h], ONE
    for key in range(keys):
        if attends(b, row, key, q_pos, k_pos, k_valid, causal, window):
            score = scale * dot(q, k, b, row, h, key, g)
            largest = max(top, score)
            total = total * math.exp(top - largest) + math.exp(score - largest)
            top = largest
    result = -INFINITY if total == ZERO else top + math.log(total)
    logsumexp[b, h, row] = result
    for c in range(v.shape[3]):
        y[b, row, h, c] = ZERO
    for key in range(keys):
        if attends(b, row, key, q_pos, k_pos, k_valid, causal, window):
            p = math.exp(scale * dot(q, k, b, row, h, key, g) - result)
            for c in range(v.shape[3]):
                y[b, row, h, c] += p * v[b, key, g, c]


@cuda.jit
def attention_tiled(q, k, v, q_pos, k_pos, k_valid, sinks, scale, causal, window, y, logsumexp):  # type: ignore[no-untyped-def]
    """The second rung, for heads of up to 128. Skips tiles that none of the block's queries may see.   Shapes as above

    For scores a lane has a key, for sums it has columns. Grid: (ceil(Tq / 16), Q, B), block 128. Shared memory, in floats:
    32 (C + Cv + 2) for tiles, 16 * 32 for weights. Bytes: (C + Cv) Tk for each 16 queries, most of it from L2.
    """
    shared = cuda.shared.array(0, float32)
    sums = cuda.local.array((ROWS, COLUMNS), float32)
    top, total, products = cuda.local.array(ROWS, float32), cuda.local.array(ROWS, float32), cuda.local.array(ROWS, float32)
    lane, warp, width, values = cuda.laneid, cuda.threadIdx.x // LANES, q.shape[3], v.shape[3]
    tile_k = shared[: TILE * (width + 1)]
    tile_v = shared[TILE * (width + 1) : TILE * (width + values + 2)]
    weights = shared[TILE * (width + values + 2 + warp * ROWS) : TILE * (width + values + 2 + (warp + 1) * ROWS)]
    b, h, row = cuda.blockIdx.z, cuda.blockIdx.y, int64(cuda.blockIdx.x) * BLOCK_ROWS + warp * ROWS
    g = h // (q.shape[2] // k.shape[2])
    for i in range(ROWS):
        top[i], total[i] = -INFINITY, ZERO
        if sinks.size:
            top[i], total[i] = sinks[h], ONE
        for j in range(COLUMNS):
            sums[i, j] = ZERO

    for first in range(0, k.shape[1], TILE):
        seen = 0  # bit i: does query i of the warp see this lane's key?
        for i in range(ROWS):
            if attends(b, row + i, first + lane, q_pos, k_pos, k_valid, causal, window):
                seen |= 1 << i
        if not cuda.syncthreads_or(seen):
            continue
        load_tile(k, b, first, g, tile_k)
        load_tile(v, b, first, g, tile_v)
        cuda.syncthreads()
        multiply_rows(q, b, row, h, tile_k, products)
        for i in range(ROWS):
            score = scale * products[i] if seen & (1 << i) else -INFINITY
            largest = max(top[i], warp_max(score))
            shift = largest if largest != -INFINITY else ZERO
            p, shrink = math.exp(score - shift), math.exp(top[i] - shift)
            top[i], total[i] = largest, total[i] * shrink + warp_sum(p)
            weights[i * TILE + lane] = p
            for j in range(COLUMNS):
                sums[i, j] *= shrink
        cuda.syncwarp()  # all lanes have written their weights; the next tile's barrier protects them from being overwritten
        add_weighted(weights, tile_v, values, sums)

    for i in range(ROWS):
        empty = total[i] == ZERO
        for j in range(COLUMNS):
            sums[i, j] /= ONE if empty else total[i]
        if lane == 0 and row + i < q.shape[1]:
            logsumexp[b, h, row + i] = -INFINITY if empty else top[i] + math.log(total[i])
    store_rows(sums, y, b, row, h)
