"""Routing: the plan (sorting.py), and moving rows to their experts and back. Formulas: minimoe/reference/routing.py.

`combine` and the backward of `dispatch` gather and then add, slot by slot, so no result depends on the order of blocks. As a ladder:

combine_by_thread    one thread per token, which walks along D: neighbours read different rows, 32 bytes fetched for 4.       unmeasured
gather_sum           one thread per element: neighbours read neighbouring numbers; row ids and weights come from L1.          unmeasured
"""

from minimoe.backend import Array
from minimoe.reference.routing import Plan
from minimoe_numba_cuda.compiler import cuda
from minimoe_numba_cuda.launch import BOOL, I32, I64, SHARED_LIMIT, THREADS, CudaKernels, Shape, blocks_of, singles
from minimoe_numba_cuda.sorting import PAIR_WARPS, PAIRS, SCAN_THREADS, count_pairs, place_pairs, scan_counts
from minimoe_numba_cuda.warp import LANES, ONE, WARPS, ZERO, warp_sum

NO_LIMIT = 2**31 - 1


@cuda.jit
def gather_rows(x, order, used, width, rows):  # type: ignore[no-untyped-def]
    """rows[r] = x[order[r] // W]; zeros from row used[0] on.   [N,D] -> [R,D]   Grid: (R, ceil(D / 128)). Bytes: R*D read, R*D written."""
    r, d = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if d < x.shape[1]:
        token = order[r] // width
        rows[r, d] = x[token, d] if r < used[0] and 0 <= token < x.shape[0] else ZERO


@cuda.jit
def combine_by_thread(rows, inverse, weights, y):  # type: ignore[no-untyped-def]
    """The first rung of combine: y[n] = sum_j weights[n,j] rows[inverse[n,j]].   [R,D], [N,W] -> [N,D]   Grid: ceil(N / 128)."""
    n = cuda.grid(1)
    if n >= y.shape[0]:
        return
    for d in range(y.shape[1]):
        total = ZERO
        for j in range(inverse.shape[1]):
            if 0 <= inverse[n, j] < rows.shape[0]:
                total += weights[n, j] * rows[inverse[n, j], d]
        y[n, d] = total


@cuda.jit
def gather_sum(rows, inverse, weights, y):  # type: ignore[no-untyped-def]
    """y[n] = sum_j weights[n,j] rows[inverse[n,j]], weights of 1 if empty; -1, or any invalid row, adds nothing.   [R,D], [N,W] -> [N,D]

    Grid: (N, ceil(D / 128)). Bytes: W*N*D read, N*D written.
    """
    n, d = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if d >= y.shape[1]:
        return
    total = ZERO
    for j in range(inverse.shape[1]):
        r = inverse[n, j]
        if 0 <= r < rows.shape[0]:
            weight = weights[n, j] if weights.size else ONE
            total += weight * rows[r, d]
    y[n, d] = total


@cuda.jit
def spread_rows(dy, rows, inverse, weights, drows, dweights):  # type: ignore[no-untyped-def]
    """drows[inverse[n,j]] = weights[n,j] dy[n],   dweights[n,j] = <rows[inverse[n,j]], dy[n]>.   [N,D], [R,D], [N,W] -> [R,D], [N,W]

    The backward of gather_sum: one warp per token computes both results in one pass over dy. Bytes: (W + 1) N*D read, W*N*D written.
    """
    n = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // LANES
    if n >= dy.shape[0]:
        return
    lane = cuda.laneid
    for j in range(inverse.shape[1]):
        r, total = inverse[n, j], ZERO
        if 0 <= r < rows.shape[0]:
            weight = weights[n, j]
            for first in range(0, dy.shape[1], LANES):  # as often in each lane: libNVVM would copy the sum for lanes without columns
                d = first + lane
                if d < dy.shape[1]:
                    total += rows[r, d] * dy[n, d]
                    drows[r, d] = weight * dy[n, d]
        total = warp_sum(total)
        if lane == 0:
            dweights[n, j] = total


class CudaRouting(CudaKernels):
    def route(
        self, ids: Array, weights: Array, valid: Array | None, *, n_experts: int, rows: int, capacity: int | Array | None = None,
        priority: str = "position",
    ) -> Plan:  # fmt: skip
        n, width = ids.shape
        pairs, parts, shared = n * width, blocks_of(n * width, PAIRS), 4 * PAIR_WARPS * (n_experts + 1)
        if not pairs or shared > SHARED_LIMIT:
            return super().route(
                ids, weights, valid, n_experts=n_experts, rows=rows, capacity=capacity, priority=priority
            )  # fmt: skip
        xp = self.xp
        flat = xp.reshape(self._read("route", "ids", ids, (n, width), I32), (-1,))
        valid = self._read("route", "valid", valid, (n,), BOOL)
        limit, limits = NO_LIMIT, self._empty(0, dtype=I64)
        if isinstance(capacity, int):
            limit = capacity
        elif capacity is not None:
            limits = self._one(capacity, I64)
        turn, none = self._empty(0, dtype=I64), self._empty(0, dtype=I32)
        order, inverse = xp.zeros((rows,), dtype=I32), self._empty(pairs, dtype=I32)  # unused rows name token 0
        counts, starts = self._empty(parts, n_experts, dtype=I32), self._empty(parts, n_experts, dtype=I32)
        offsets = self._empty(n_experts + 1, dtype=I32)

        def sort(flat: Array, turn: Array, order: Array, inverse: Array, keep: Array) -> None:
            self._launch(count_pairs, (parts,), (PAIRS,), flat, valid, turn, width, counts, shared=shared)
            self._launch(scan_counts, (1,), (SCAN_THREADS,), counts, limit, limits, starts, offsets)
            self._launch(place_pairs, (parts,), (PAIRS,), flat, valid, turn, width, starts, offsets, order, inverse, keep, shared=shared)

        if capacity is not None and priority == "probability":
            # first sorted by weight, to find which pairs get a row; then those pairs by position
            by_weight = xp.argsort(-xp.reshape(weights, (-1,)), stable=True)  # can be recorded: CuPy 14.2 sorts without waiting
            keep = self._empty(pairs, dtype=I32)
            sort(flat, self._read("route", "weights", by_weight, (pairs,), I64), none, none, keep)
            flat = keep
        sort(flat, turn, order, inverse, none)
        return Plan(order, xp.reshape(inverse, (n, width)), offsets)

    def dispatch(self, x: Array, plan: Plan, out: Array | None = None) -> Array:
        if not singles(x):
            return super().dispatch(x, plan, out)
        plan = self._plan("dispatch", plan)
        x = self._read("dispatch", "x", x, (plan.inverse.shape[0], None))
        rows = self._result(out, (plan.order.shape[0], x.shape[1]))
        self._launch(gather_rows, by_row(*rows.shape), (THREADS,), x, plan.order, plan.offsets[-1:], plan.inverse.shape[1], rows)
        return self._stored(rows, out)

    def dispatch_backward(self, drows: Array, plan: Plan) -> Array:
        if not singles(drows):
            return super().dispatch_backward(drows, plan)
        return self._gathered("dispatch_backward", drows, plan, None, None)

    def combine(self, rows: Array, weights: Array, plan: Plan, out: Array | None = None) -> Array:
        if not singles(rows, weights):
            return super().combine(rows, weights, plan, out)
        return self._stored(self._gathered("combine", rows, plan, weights, out), out)

    def combine_backward(self, dy: Array, rows: Array, weights: Array, plan: Plan) -> tuple[Array, Array]:
        if not singles(dy, rows, weights):
            return super().combine_backward(dy, rows, weights, plan)
        plan, d = self._plan("combine_backward", plan), dy.shape[-1]
        n = plan.inverse.shape[0]
        dy = self._read("combine_backward", "dy", dy, (n, d))
        rows = self._read("combine_backward", "rows", rows, (plan.order.shape[0], d))
        weights = self._read("combine_backward", "weights", weights, plan.inverse.shape)
        drows, dweights = self._empty(*rows.shape), self._empty(*weights.shape)  # unused rows stay unset
        self._launch(spread_rows, (blocks_of(n, WARPS),), (LANES * WARPS,), dy, rows, plan.inverse, weights, drows, dweights)
        return drows, dweights

    def _plan(self, kernel: str, plan: Plan) -> Plan:
        """Returns a plan as kernels read it."""
        shapes: tuple[Shape, ...] = (None,), (None, None), (None,)
        return Plan(*(self._read(kernel, name, a, shape, I32) for name, a, shape in zip(Plan._fields, plan, shapes, strict=True)))

    def _gathered(self, kernel: str, rows: Array, plan: Plan, weights: Array | None, out: Array | None) -> Array:
        """Runs gather_sum into `out` or new memory.   [R,D] -> [N,D]"""
        plan = self._plan(kernel, plan)
        rows = self._read(kernel, "rows", rows, (plan.order.shape[0], None))
        weights = self._read(kernel, "weights", weights, plan.inverse.shape)
        y = self._result(out, (plan.inverse.shape[0], rows.shape[1]))
        self._launch(gather_sum, by_row(*y.shape), (THREADS,), rows, plan.inverse, weights, y)
        return y


def by_row(rows: int, width: int) -> tuple[int, int]:
    """Returns a grid with one row of blocks per row, and 128 columns per block."""
    return rows, blocks_of(width)
