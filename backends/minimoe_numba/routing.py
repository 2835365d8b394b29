"""Routing: a plan, made by a counting sort in two passes over the choices, and the kernels that move rows by it.

Formulas: minimoe/reference/routing.py.
"""

import numpy as np

from minimoe.backend import Array
from minimoe.reference.routing import Plan
from minimoe_numba.arrays import NO_BOOLS, as_rows, by_width, optional, result, singles, zeros
from minimoe_numba.creation import contiguous, empty
from minimoe_numba.kernel import B1, F2, I1, I2, L1, kernel
from minimoe_numba.maths import ONE, ZERO
from minimoe_numba.traced import traced
from minimoe_numpy import NumpyBackend

WITHOUT_LIMIT = traced(np.array([2**31 - 1], np.int64))


@kernel
def sort_by_expert(start: int, stop: int, ids: I2, valid: B1, capacity: L1, order: I1, inverse: I2, offsets: I1) -> None:
    """Count the choices of each expert, sum the counts, then put each choice in its row. One piece takes all tokens, in microseconds."""
    tokens, slots = ids.shape
    experts = len(offsets) - 1
    counts = np.zeros(experts, np.int64)
    for n in range(tokens):
        for j in range(slots):
            if 0 <= ids[n, j] < experts and (not valid.size or valid[n]):
                counts[ids[n, j]] += 1
    offsets[0] = 0
    for e in range(experts):
        offsets[e + 1] = offsets[e] + min(counts[e], capacity[0])
        counts[e] = 0
    for n in range(tokens):
        for j in range(slots):
            e = ids[n, j]
            inverse[n, j] = -1
            if 0 <= e < experts and (not valid.size or valid[n]):
                row = offsets[e] + counts[e]
                counts[e] += 1
                if row < min(offsets[e + 1], len(order)):
                    order[row] = n * slots + j
                    inverse[n, j] = row


@kernel
def gather_rows(start: int, stop: int, x: F2, order: I1, slots: int, rows: F2) -> None:
    for r in range(start, stop):
        source = order[r] // slots
        for d in range(x.shape[1]):
            rows[r, d] = x[source, d]


@kernel
def gather_sum(start: int, stop: int, rows: F2, inverse: I2, weights: F2, y: F2) -> None:
    """y[n] = sum_j weights[n,j] rows[inverse[n,j]]; weights are 1 if `weights` is empty."""
    width = rows.shape[1]
    for n in range(start, stop):
        first = True
        for j in range(inverse.shape[1]):
            r = inverse[n, j]
            if r < 0:
                continue
            weight = weights[n, j] if weights.size else ONE
            if first:
                for d in range(width):
                    y[n, d] = weight * rows[r, d]
            else:
                for d in range(width):
                    y[n, d] += weight * rows[r, d]
            first = False
        if first:
            for d in range(width):
                y[n, d] = ZERO


@kernel
def spread_rows(start: int, stop: int, dy: F2, rows: F2, weights: F2, inverse: I2, drows: F2, dweights: F2) -> None:
    """The backward of gather_sum: drows[inverse[n,j]] = weights[n,j] dy[n], dweights[n,j] = <rows[inverse[n,j]], dy[n]>"""
    width = rows.shape[1]
    for n in range(start, stop):
        for j in range(inverse.shape[1]):
            r, total = inverse[n, j], ZERO
            if r >= 0:
                for d in range(width):
                    total += rows[r, d] * dy[n, d]
                    drows[r, d] = weights[n, j] * dy[n, d]
            dweights[n, j] = total


class FastRouting(NumpyBackend):
    def route(
        self, ids: Array, weights: Array, valid: Array | None, *, n_experts: int, rows: int, capacity: int | Array | None = None,
        priority: str = "position",
    ) -> Plan:  # fmt: skip
        if capacity is not None and priority != "position":
            return super().route(ids, weights, valid, n_experts=n_experts, rows=rows, capacity=capacity, priority=priority)
        order, inverse, offsets = zeros(rows, np.int32), empty(ids.shape, np.int32), empty(n_experts + 1, np.int32)
        n, limit = len(ids), WITHOUT_LIMIT
        if capacity is not None:
            limit = empty(1, np.int64)
            limit[0] = capacity
        if n == 0:
            offsets[:] = 0
        sort_by_expert(n, n, contiguous(ids), contiguous(optional(valid, NO_BOOLS)), limit, order, inverse, offsets)
        return Plan(order, inverse, offsets)

    def dispatch(self, x: Array, plan: Plan, out: Array | None = None) -> Array:
        if not singles(x) or not x.size:
            return super().dispatch(x, plan, out)
        rows = result(out, (len(plan.order), x.shape[1]))
        gather_rows(len(rows), by_width(x.shape[1]), as_rows(x), plan.order, plan.inverse.shape[1], rows)
        return rows if rows is out else self.store(rows, out)

    def dispatch_backward(self, drows: Array, plan: Plan) -> Array:
        if not singles(drows):
            return super().dispatch_backward(drows, plan)
        dx = empty((len(plan.inverse), drows.shape[1]))
        gather_sum(len(dx), by_width(2 * drows.shape[1]), as_rows(drows), plan.inverse, NO_WEIGHTS, dx)
        return dx

    def combine(self, rows: Array, weights: Array, plan: Plan, out: Array | None = None) -> Array:
        if not singles(rows, weights):
            return super().combine(rows, weights, plan, out)
        y = result(out, (len(plan.inverse), rows.shape[1]))
        gather_sum(len(y), by_width(2 * rows.shape[1]), as_rows(rows), plan.inverse, as_rows(weights), y)
        return y if y is out else self.store(y, out)

    def combine_backward(self, dy: Array, rows: Array, weights: Array, plan: Plan) -> tuple[Array, Array]:
        if not singles(dy, rows, weights):
            return super().combine_backward(dy, rows, weights, plan)
        drows, dweights = empty(rows.shape), empty(weights.shape)  # unused rows of drows are not written
        grain = by_width(4 * rows.shape[1])
        spread_rows(len(dy), grain, as_rows(dy), as_rows(rows), as_rows(weights), plan.inverse, drows, dweights)
        return drows, dweights


NO_WEIGHTS = np.zeros((0, 0), np.float32)
