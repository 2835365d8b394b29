"""The kernels of attention's gradient, as a ladder. They recompute the weights from q, k and logsumexp, so no [Tq,Tk] array is kept.

row_products           delta = sum(dy y) of each row, which the other kernels need
queries_by_thread      dq, one thread per query, its sums in dq itself.                                                           unmeasured
keys_by_thread         dk and dv, one thread per key: all queries of all heads of its group, its sums in dk and dv.               unmeasured
queries_tiled          dq, blocks of 16 queries that share tiles of 32 keys and values.                                           unmeasured
keys_tiled             dk and dv, blocks of 16 keys that share tiles of 32 queries and their dy.                                  unmeasured

Queries and keys have a kernel each, at the price of computing the weights twice: each sum then belongs to one thread, has one order, and
needs no atomics. Formulas: minimoe/reference/attention.py.
"""

import math

from minimoe_numba_cuda.attention_forward import (
    BLOCK_ROWS,
    COLUMNS,
    ROWS,
    TILE,
    add_weighted,
    attends,
    dot,
    load_tile,
    multiply_rows,
    row_index,
    store_rows,
)  # fmt: skip
from minimoe_numba_cuda.compiler import cuda, float32, int64
from minimoe_numba_cuda.warp import INFINITY, LANES, WARPS, ZERO, sum_over_block, warp_sum


@cuda.jit
def row_products(dy, y, delta):  # type: ignore[no-untyped-def]
    """delta[b,h,t] = <dy[b,t,h], y[b,t,h]>.   [B,Tq,Q,Cv] twice -> [B,Q,Tq]   One warp per row. Bytes: 2 B*Tq*Q*Cv read."""
    n = int64(cuda.blockIdx.x) * WARPS + cuda.threadIdx.x // LANES
    if n >= delta.size:
        return
    b, h, row = row_index(n, y.shape[1], y.shape[2])
    total = ZERO
    for c in range(cuda.laneid, y.shape[3], LANES):
        total += dy[b, row, h, c] * y[b, row, h, c]
    total = warp_sum(total)
    if cuda.laneid == 0:
        delta[b, h, row] = total


@cuda.jit
def sink_gradient(sinks, logsumexp, delta, dsinks):  # type: ignore[no-untyped-def]
    """dsinks[h] = -sum over b, t of exp(sink - logsumexp) delta, in a fixed order.   [Q], [B,Q,Tq] twice -> [Q]   One block per head."""
    h, rows = cuda.blockIdx.x, delta.shape[2]
    total = ZERO
    for n in range(cuda.threadIdx.x, delta.shape[0] * rows, cuda.blockDim.x):
        b, row = n // rows, n % rows
        total -= math.exp(sinks[h] - logsumexp[b, h, row]) * delta[b, h, row]
    total = sum_over_block(total)
    if cuda.threadIdx.x == 0:
        dsinks[h] = total


@cuda.jit
def queries_by_thread(dy, q, k, v, logsumexp, delta, q_pos, k_pos, k_valid, scale, causal, window, dq):  # type: ignore[no-untyped-def]
    """The first rung of dq = scale sum over keys of P (dy v - delta) k.   -> [B,Tq,Q,C]   Grid: ceil(B*Q*Tq / 128)."""
    n = cuda.grid(1)
    if n >= delta.size:
        return
    b, h, row = row_index(n, q.shape[1], q.shape[2])
    g = h // (q.shape[2] // k.shape[2])
    for c in range(q.shape[3]):
        dq[b, row, h, c] = ZERO
    for key in range(k.shape[1]):
        if attends(b, row, key, q_pos, k_pos, k_valid, causal, window):
            p = math.exp(scale * dot(q, k, b, row, h, key, g) - logsumexp[b, h, row])
            slope = scale * p * (dot(dy, v, b, row, h, key, g) - delta[b, h, row])
            for c in range(q.shape[3]):
                dq[b, row, h, c] += slope * k[b, key, g, c]


@cuda.jit
def keys_by_thread(dy, q, k, v, logsumexp, delta, q_pos, k_pos, k_valid, scale, causal, window, dk, dv):  # type: ignore[no-untyped-def]
    """The first rung of dv = sum over queries of P dy, dk = scale sum over queries of P (dy v - delta) q.   -> [B,Tk,G,C], [B,Tk,G,Cv]

    Grid: ceil(B*G*Tk / 128).
    """
    n = cuda.grid(1)
    if n >= k.shape[0] * k.shape[1] * k.shape[2]:
        return
    b, g, key = row_index(n, k.shape[1], k.shape[2])
    shared_by = q.shape[2] // k.shape[2]
    for c in range(k.shape[3]):
        dk[b, key, g, c] = ZERO
    for c in range(v.shape[3]):
        dv[b, key, g, c] = ZERO
    for h in range(g * shared_by, (g + 1) * shared_by):
        for row in range(q.shape[1]):
            if attends(b, row, key, q_pos, k_pos, k_valid, causal, window):
                p = math.exp(scale * dot(q, k, b, row, h, key, g) - logsumexp[b, h, row])
                slope = scale * p * (dot(dy, v, b, row, h, key, g) - delta[b, h, row])
                for c in range(k.shape[3]):
                    dk[b, key, g, c] += slope * q[b, row, h, c]
                for c in range(v.shape[3]):
                    dv[b, key, g, c] += p * dy[b, row, h, c]


@cuda.jit
def queries_tiled(dy, q, k, v, logsumexp, delta, q_pos, k_pos, k_valid, scale, causal, window, dq):  # type: ignore[no-untyped-def]
    """The second rung of dq, for heads of up to 128.   Grid: (ceil(Tq / 16), Q, B), block 128.

    Shared memory, in floats: 32 (C + Cv + 2) for tiles, 16 * 32 for slopes. Bytes: (C + Cv) Tk for each 16 queries, most of it from L2.
    """
    shared = cuda.shared.array(0, float32)
    sums = cuda.local.array((ROWS, COLUMNS), float32)
    products, inner = cuda.local.array(ROWS, float32), cuda.local.array(ROWS, float32)
    lane, warp, width, values = cuda.laneid, cuda.threadIdx.x // LANES, q.shape[3], v.shape[3]
    tile_k = shared[: TILE * (width + 1)]
    tile_v = shared[TILE * (width + 1) : TILE * (width + values + 2)]
    slopes = shared[TILE * (width + values + 2 + warp * ROWS) : TILE * (width + values + 2 + (warp + 1) * ROWS)]
    b, h, row = cuda.blockIdx.z, cuda.blockIdx.y, int64(cuda.blockIdx.x) * BLOCK_ROWS + warp * ROWS
    g = h // (q.shape[2] // k.shape[2])
    for i in range(ROWS):
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
        multiply_rows(dy, b, row, h, tile_v, inner)
        for i in range(ROWS):
            slope = ZERO
            if seen & (1 << i):
                p = math.exp(scale * products[i] - logsumexp[b, h, row + i])
                slope = scale * p * (inner[i] - delta[b, h, row + i])
            slopes[i * TILE + lane] = slope
        cuda.syncwarp()
        add_weighted(slopes, tile_k, width, sums)
    store_rows(sums, dq, b, row, h)


@cuda.jit
def keys_tiled(dy, q, k, v, logsumexp, delta, q_pos, k_pos, k_valid, scale, causal, window, dk, dv):  # type: ignore[no-untyped-def]
    """The second rung of dk and dv, for heads of up to 128: as queries_tiled, with queries and keys exchanged.

    Grid: (ceil(Tk / 16), G, B), block 128. Shared memory, in floats: 32 (C + Cv + 2) for tiles, 2 * 16 * 32 for slopes and weights.
    """
    shared = cuda.shared.array(0, float32)
    sums_k, sums_v = cuda.local.array((ROWS, COLUMNS), float32), cuda.local.array((ROWS, COLUMNS), float32)
    products, inner = cuda.local.array(ROWS, float32), cuda.local.array(ROWS, float32)
    lane, warp, width, values = cuda.laneid, cuda.threadIdx.x // LANES, q.shape[3], v.shape[3]
    end = width + values + 2  # of the tiles, in columns of them
    tile_q, tile_dy = shared[: TILE * (width + 1)], shared[TILE * (width + 1) : TILE * end]
    slopes = shared[TILE * (end + warp * ROWS) : TILE * (end + (warp + 1) * ROWS)]
    weights = shared[TILE * (end + BLOCK_ROWS + warp * ROWS) : TILE * (end + BLOCK_ROWS + (warp + 1) * ROWS)]
    b, g, key = cuda.blockIdx.z, cuda.blockIdx.y, int64(cuda.blockIdx.x) * BLOCK_ROWS + warp * ROWS
    shared_by = q.shape[2] // k.shape[2]
    for i in range(ROWS):
        for j in range(COLUMNS):
            sums_k[i, j], sums_v[i, j] = ZERO, ZERO

    for h in range(g * shared_by, (g + 1) * shared_by):
        for first in range(0, q.shape[1], TILE):
            seen = 0  # bit i: does this lane's query see key i of the warp?
            for i in range(ROWS):
                if attends(b, first + lane, key + i, q_pos, k_pos, k_valid, causal, window):
                    seen |= 1 << i
            if not cuda.syncthreads_or(seen):
                continue
            load_tile(q, b, first, h, tile_q)
            load_tile(dy, b, first, h, tile_dy)
            cuda.syncthreads()
            multiply_rows(k, b, key, g, tile_q, products)
            multiply_rows(v, b, key, g, tile_dy, inner)
            for i in range(ROWS):
                score = scale * products[i] - logsumexp[b, h, first + lane] if seen & (1 << i) else -INFINITY
                p = math.exp(score)
                weights[i * TILE + lane] = p
                slopes[i * TILE + lane] = scale * p * (inner[i] - delta[b, h, first + lane]) if seen & (1 << i) else ZERO
            cuda.syncwarp()
            add_weighted(slopes, tile_q, width, sums_k)
            add_weighted(weights, tile_dy, values, sums_v)
    store_rows(sums_k, dk, b, key, g)
    store_rows(sums_v, dv, b, key, g)
