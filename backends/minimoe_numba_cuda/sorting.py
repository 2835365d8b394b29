"""A stable sort of (token, slot) pairs by expert, without comparing any two: count, add up, place.

count_pairs    each block counts how many of its 256 pairs go to each expert          -> counts [P,E]
scan_counts    one block turns the counts into the first row of each block and expert -> starts [P,E], offsets [E+1]
place_pairs    a pair's row is its block's start plus its rank within the block       -> order, inverse

The rank within a block is the number of earlier pairs of the same expert. Within a warp one operation (`match_any`) tells each lane which
lanes have the same expert, and those below it are counted; the warps' counts are added in order. A pair without an expert has expert E.
Only integers are summed, so the plan does not depend on the order of blocks.
"""

from minimoe_numba_cuda.compiler import cuda, int32, int64
from minimoe_numba_cuda.warp import ALL, LANES

PAIRS = 256  # a block's pairs and threads
PAIR_WARPS = PAIRS // LANES
SCAN_THREADS = 128


@cuda.jit(device=True)
def expert_of(i, ids, valid, width, experts):  # type: ignore[no-untyped-def]
    """Returns the expert of pair i, or E if it has none or an invalid one.   ids flat [N*W], valid [N] or empty"""
    expert = int32(experts)
    if i < ids.size and (valid.size == 0 or valid[i // width]) and 0 <= ids[i] < experts:
        expert = ids[i]
    return expert


@cuda.jit(device=True)
def count_in_warps(expert, counts, experts):  # type: ignore[no-untyped-def]
    """Fills counts [warps, E+1], shared, with how many of each warp's lanes have each expert.   -> the lane's rank in its warp"""
    thread = cuda.threadIdx.x
    for i in range(thread, PAIR_WARPS * (experts + 1), PAIRS):
        counts[i] = 0
    cuda.syncthreads()
    same = cuda.match_any_sync(ALL, expert)
    rank = cuda.popc(same & ((1 << cuda.laneid) - 1))
    if rank == 0:
        counts[(thread // LANES) * (experts + 1) + expert] = cuda.popc(same)
    cuda.syncthreads()
    return rank


@cuda.jit
def count_pairs(ids, valid, turn, width, counts):  # type: ignore[no-untyped-def]
    """counts[p,e] = pairs of block p that go to expert e; pairs in the order `turn`, or in their own if that is empty.

    Grid: P = ceil(N*W / 256), block 256; shared memory: 8 (E+1) int32. Bytes: 4 N*W read, 4 P*E written.
    """
    shared = cuda.shared.array(0, int32)
    experts, i = counts.shape[1], cuda.grid(1)
    pair = turn[i] if turn.size and i < ids.size else int64(i)
    count_in_warps(expert_of(pair, ids, valid, width, experts), shared, experts)
    for e in range(cuda.threadIdx.x, experts, PAIRS):
        total = 0
        for warp in range(PAIR_WARPS):
            total += shared[warp * (experts + 1) + e]
        counts[cuda.blockIdx.x, e] = total


@cuda.jit
def scan_counts(counts, limit, limits, inout_starts, offsets):  # type: ignore[no-untyped-def]
    """starts[p,e] = pairs of e before block p; offsets = exclusive sums of min(total, capacity), or of the totals.   One block of 128.

    One thread per expert goes through the blocks; then one thread adds up the experts. capacity: limits[0], or `limit` if that is empty.
    """
    experts, capacity = counts.shape[1], limit
    if limits.size:
        capacity = limits[0]
    for e in range(cuda.threadIdx.x, experts, SCAN_THREADS):
        total = int64(0)
        for part in range(counts.shape[0]):
            inout_starts[part, e] = total
            total += counts[part, e]
        offsets[e + 1] = min(total, capacity)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        offsets[0] = 0
        for e in range(experts):
            offsets[e + 1] += offsets[e]


@cuda.jit
def place_pairs(ids, valid, turn, width, starts, offsets, order, inverse, keep):  # type: ignore[no-untyped-def]
    """Gives a pair a row if its rank is below its expert's number of rows: order[row] = pair, inverse[pair] = row, else -1.

    With `keep` [N*W] instead of order and inverse: keep[pair] = its expert if it gets a row, else -1. Launched as count_pairs is.
    """
    shared = cuda.shared.array(0, int32)
    experts, i = starts.shape[1], cuda.grid(1)
    pair = turn[i] if turn.size and i < ids.size else int64(i)
    expert = expert_of(pair, ids, valid, width, experts)
    rank = count_in_warps(expert, shared, experts)
    if i >= ids.size:
        return
    row = int64(-1)
    if expert < experts:
        for warp in range(cuda.threadIdx.x // LANES):
            rank += shared[warp * (experts + 1) + expert]
        rank += starts[cuda.blockIdx.x, expert]
        if rank < offsets[expert + 1] - offsets[expert]:
            row = offsets[expert] + rank
    if keep.size:
        keep[pair] = expert if row >= 0 else -1
    else:
        if row >= order.size:
            row = int64(-1)
        if row >= 0:
            order[row] = pair
        inverse[pair] = row
