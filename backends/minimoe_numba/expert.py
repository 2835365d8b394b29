"""The experts: a thread takes a block of one expert's rows from the gathered input to the last product while the block is in the cache.

forward, per block:   x rows gathered -> up product (kept: `pre_activation`) -> activation -> down product
backward, per block:  dy rows gathered -> dy W_down = dh -> hidden again from `pre_activation`, d weight = <hidden, dh>
                     -> dpre_activation -> dpre_activation W_up
backward, per expert: dW_up = dpre_activation^T x, dW_down = dy^T (weight * hidden)

The gradient of a combine weight is <y_row, dy> = <W_down h, dy> = <h, W_down^T dy>, so the experts' outputs need not be kept. Neither is
`hidden`, which is cheaper to compute again than to fetch from memory. Formulas: minimoe/reference/expert.py.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from minimoe.backend import Array
from minimoe.reference.expert import ExpertWeights
from minimoe.reference.routing import Plan
from minimoe_numba.activation import KINDS, activate, activate_backward
from minimoe_numba.arrays import as_rows, optional, result, singles, zeros
from minimoe_numba.blocks import add_to, at, block_of, gather, matrix_at
from minimoe_numba.creation import contiguous, empty
from minimoe_numba.few_rows import PART, hidden_slices, output_slices
from minimoe_numba.kernel import F1, F2, F3, I1, kernel
from minimoe_numba.machine import machine
from minimoe_numba.maths import ONE, ZERO
from minimoe_numba.native import PLAIN, TRANSPOSED, call_sgemm
from minimoe_numba.routing import FastRouting
from minimoe_numba.traced import traced

BLOCK = 256  # rows at most: the numbers of a block still fit in a core's own cache
FEW = 64  # rows of all experts up to which products are cut along the weights: reading each weight once then takes most of the time
NO_BIAS = np.zeros((0, 0), np.float32)


class Saved(NamedTuple):
    """The forward saves this for the backward."""

    x: Array  # [N,D]
    pre_activation: Array  # [R,O]
    gate_weights: Array  # [N,W]
    plan: Plan
    weights: ExpertWeights


@kernel
def expert_blocks(
    start: int, stop: int, sgemm: int, size: int, x: F2, order: I1, slots: int, offsets: I1, up: F3, down: F3, up_bias: F2, down_bias: F2,
    kind: int, limit: float, pre_activation: F2, y_rows: F2,
) -> None:  # fmt: skip
    width, both, hidden_width = x.shape[1], up.shape[1], down.shape[2]
    halves = both // hidden_width  # 2 for swiglu (gate and up), else 1
    # made before the loop, to live through it: Numba frees an array after its last use, and does not see a use of its address
    rows, hidden = np.empty((size, width), np.float32), np.empty((size, PART), np.float32)
    for block in range(start, stop):
        e, first, last = block_of(block, offsets, size)
        m = last - first
        if m == 0:
            continue
        gather(x, order, slots, first, rows[:m])
        for column in range(0, hidden_width, PART):
            count, other = min(PART, hidden_width - column), both - hidden_width + column
            for half in range(halves):
                offset = half * hidden_width + column
                call_sgemm(
                    sgemm, PLAIN, TRANSPOSED, m, count, width, rows.ctypes.data, width, at(up[e], offset), width, ZERO,
                    at(pre_activation, first) + 4 * offset, both,
                )  # fmt: skip
            for r in range(m):
                gate, other_half = pre_activation[first + r, column : column + count], pre_activation[first + r, other : other + count]
                if up_bias.size:
                    add_to(gate, up_bias[e, column : column + count])
                    if halves > 1:
                        add_to(other_half, up_bias[e, other : other + count])
                activate(gate, other_half, hidden[r, :count], kind, limit)
            call_sgemm(
                sgemm, PLAIN, TRANSPOSED, m, width, count, hidden.ctypes.data, PART, matrix_at(down, e) + 4 * column, hidden_width,
                ONE if column else ZERO, at(y_rows, first), width,
            )  # fmt: skip
        if down_bias.size:
            for r in range(first, last):
                add_to(y_rows[r], down_bias[e])


@kernel
def expert_blocks_backward(
    start: int, stop: int, sgemm: int, size: int, dy: F2, x: F2, gate_weights: F1, order: I1, slots: int, offsets: I1, up: F3, down: F3,
    down_bias: F2, kind: int, limit: float, pre_activation: F2, x_rows: F2, dy_rows: F2, weighted: F2, dpre_activation: F2, drows: F2,
    dgate: F1,
) -> None:  # fmt: skip
    """Fill x_rows, dy_rows, weighted (hidden times the combine weight), dpre_activation, drows [R,...] and dgate [N*W]."""
    width, both, hidden_width = x.shape[1], up.shape[1], down.shape[2]
    halves = both // hidden_width
    dhidden = np.empty((size, PART), np.float32)  # before the loop, as above
    for block in range(start, stop):
        e, first, last = block_of(block, offsets, size)
        m = last - first
        if m == 0:
            continue
        gather(x, order, slots, first, x_rows[first:last])
        gather(dy, order, slots, first, dy_rows[first:last])
        for r in range(first, last):
            total = ZERO
            for d in range(width if down_bias.size else 0):
                total += down_bias[e, d] * dy_rows[r, d]
            dgate[order[r]] = total
        for column in range(0, hidden_width, PART):
            count, other = min(PART, hidden_width - column), both - hidden_width + column
            call_sgemm(
                sgemm, PLAIN, PLAIN, m, count, width, at(dy_rows, first), width, matrix_at(down, e) + 4 * column, hidden_width, ZERO,
                dhidden.ctypes.data, PART,
            )  # fmt: skip
            for r in range(first, last):
                weight, dh, hidden = gate_weights[order[r]], dhidden[r - first, :count], weighted[r, column : column + count]
                gate, dgate_half = pre_activation[r, column : column + count], dpre_activation[r, column : column + count]
                up_half, dup_half = pre_activation[r, other : other + count], dpre_activation[r, other : other + count]
                dgate[order[r]] += activate_backward(dh, gate, up_half, weight, hidden, dgate_half, dup_half, kind, limit)
            for half in range(halves):
                offset = half * hidden_width + column
                call_sgemm(
                    sgemm, PLAIN, PLAIN, m, width, count, at(dpre_activation, first) + 4 * offset, both, at(up[e], offset), width,
                    ONE if offset else ZERO, at(drows, first), width,
                )  # fmt: skip


@kernel
def weight_gradients(start: int, stop: int, sgemm: int, slices: int, dy_rows: F2, x_rows: F2, offsets: I1, beta: float, dw: F3) -> None:
    """dW_e = dy_e^T x_e + beta dW_e. A unit is a slice of one dW_e along its longer side.   dy_rows [R,O], x_rows [R,I] -> [E,O,I]"""
    outputs, inputs = dw.shape[1], dw.shape[2]
    for unit in range(start, stop):
        e, part = unit // slices, unit % slices
        first, last = np.int64(offsets[e]), np.int64(offsets[e + 1])
        row, rows, column, columns = 0, outputs, 0, inputs
        if outputs >= inputs:
            row = outputs * part // slices
            rows = outputs * (part + 1) // slices - row
        else:
            column = inputs * part // slices
            columns = inputs * (part + 1) // slices - column
        if last > first:
            call_sgemm(
                sgemm, TRANSPOSED, PLAIN, rows, columns, last - first, at(dy_rows, first) + 4 * row, outputs,
                at(x_rows, first) + 4 * column, inputs, beta, matrix_at(dw, e) + 4 * (row * inputs + column), inputs,
            )  # fmt: skip
        elif beta == ZERO:
            dw[e, row : row + rows, column : column + columns] = ZERO


@kernel
def bias_gradients(start: int, stop: int, dy_rows: F2, row_weights: F1, offsets: I1, accumulate: int, db: F2) -> None:
    """db_e = sum(weight dy_e), added to db_e if `accumulate`. Empty row_weights are 1.   dy_rows [R,O], row_weights [R] -> [E,O]"""
    for e in range(start, stop):
        if not accumulate:
            db[e] = ZERO
        for r in range(offsets[e], offsets[e + 1]):
            weight = row_weights[r] if row_weights.size else ONE
            for d in range(db.shape[1]):
                db[e, d] += weight * dy_rows[r, d]


@kernel
def grouped_product(start: int, stop: int, sgemm: int, size: int, x: F2, weight: F3, offsets: I1, transpose: int, y: F2) -> None:
    """y[r] = W_e x[r], or W_e^T x[r], in blocks of rows."""
    inputs = weight.shape[2]
    for block in range(start, stop):
        e, first, last = block_of(block, offsets, size)
        if last > first:
            call_sgemm(
                sgemm, PLAIN, PLAIN if transpose else TRANSPOSED, last - first, y.shape[1], x.shape[1], at(x, first), x.shape[1],
                matrix_at(weight, e), inputs, ZERO, at(y, first), y.shape[1],
            )  # fmt: skip


class FastExpert(FastRouting):
    def grouped_matmul(self, x: Array, weight: Array, offsets: Array, transpose: bool = False, out: Array | None = None) -> Array:
        blas = machine().blas
        if blas is None or not singles(x, weight) or not weight.size:
            return super().grouped_matmul(x, weight, offsets, transpose, out)
        shape = (x.shape[0], weight.shape[2] if transpose else weight.shape[1])
        y = result(out, shape)
        y[:] = 0.0  # for unused rows
        count, size = blocks(shape[0], weight.shape[0])
        grouped_product(count, 1, blas.sgemm, size, as_rows(x), whole(weight), offsets, transpose, y)
        return y if y is out else self.store(y, out)

    def grouped_matmul_dw(self, dy: Array, x: Array, offsets: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        if machine().blas is None or not singles(dy, x) or not dy.shape[1] or not x.shape[1]:
            return super().grouped_matmul_dw(dy, x, offsets, out, accumulate)
        return self._dw(as_rows(dy), as_rows(x), offsets, out, accumulate)

    def _dw(self, dy: Array, x: Array, offsets: Array, out: Array | None, accumulate: bool) -> Array:
        blas = machine().blas
        assert blas is not None
        e = len(offsets) - 1
        slices = 4 if e < 4 else 2 if e < 16 else 1
        dw = result(out, (e, dy.shape[1], x.shape[1]))
        weight_gradients(e * slices, 1, blas.sgemm, slices, dy, x, offsets, float(accumulate and dw is out), dw)
        return dw if dw is out else self.store(dw, out, accumulate)

    def _db(self, dy: Array, row_weights: Array | None, offsets: Array, out: Array | None, accumulate: bool) -> Array:
        db = result(out, (len(offsets) - 1, dy.shape[1]))
        bias_gradients(len(db), 1, dy, optional(row_weights), offsets, accumulate and db is out, db)
        return db if db is out else self.store(db, out, accumulate)

    # ---- composites ------------------------------------------------------------------------------------------------------------

    def expert_ffn(self, rows: Array, weights: ExpertWeights, offsets: Array, activation: str, limit: float = 0.0) -> tuple[Array, Any]:
        r = len(rows)
        plan = Plan(order_of(r), order_of(r).reshape(r, 1), offsets)  # each row is its own token
        if not self._fuses(rows, weights, plan.order):
            return super().expert_ffn(rows, weights, offsets, activation, limit)
        y, pre_activation = self._forward(rows, plan, weights, activation, limit)
        return y, Saved(rows, pre_activation, ones_of(r), plan, weights)

    def expert_ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, ExpertWeights]:
        if not isinstance(saved, Saved):
            return super().expert_ffn_backward(dy, saved, activation, limit, out, accumulate)
        drows, _, dweights = self._backward(dy, saved, activation, limit, out, accumulate)
        return drows, dweights

    def ffn(self, x: Array, weights: ExpertWeights, activation: str, limit: float = 0.0) -> tuple[Array, Any]:
        if not self._fuses(x, weights, x):
            return super().ffn(x, weights, activation, limit)
        n = math.prod(x.shape[:-1])
        one = ExpertWeights(*(None if w is None else w[None] for w in weights))
        offsets = ends_of(n)
        plan = Plan(order_of(n), order_of(n).reshape(n, 1), offsets)
        y, pre_activation = self._forward(as_rows(x), plan, one, activation, limit)
        return y.reshape(x.shape), Saved(as_rows(x), pre_activation, ones_of(n), plan, one)

    def ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, ExpertWeights]:
        if not isinstance(saved, Saved):
            return super().ffn_backward(dy, saved, activation, limit, out, accumulate)
        to = None if out is None else ExpertWeights(*(None if w is None else w[None] for w in out))
        drows, _, dweights = self._backward(as_rows(dy), saved, activation, limit, to, accumulate)
        if out is None:
            return drows.reshape(dy.shape), ExpertWeights(*(None if d is None else d[0] for d in dweights))
        return drows.reshape(dy.shape), out

    def moe_ffn(
        self, x: Array, gate_weights: Array, plan: Plan, weights: ExpertWeights, activation: str, limit: float = 0.0
    ) -> tuple[Array, Any]:
        if not self._fuses(x, weights, plan.order) or not singles(gate_weights):
            return super().moe_ffn(x, gate_weights, plan, weights, activation, limit)
        y_rows, pre_activation = self._forward(x, plan, weights, activation, limit)
        return self.combine(y_rows, gate_weights, plan), Saved(x, pre_activation, gate_weights, plan, weights)

    def moe_ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, Array, ExpertWeights]:
        if not isinstance(saved, Saved):
            return super().moe_ffn_backward(dy, saved, activation, limit, out, accumulate)
        drows, dgate, dweights = self._backward(dy, saved, activation, limit, out, accumulate)
        return self.dispatch_backward(drows, saved.plan), dgate, dweights

    # ---- parts -----------------------------------------------------------------------------------------------------------------

    def _fuses(self, x: Array, weights: ExpertWeights, rows: Array) -> bool:
        """True if all are float32 and not empty, and there is a product to call."""
        sizes = (x.size, weights.up.size, weights.down.size, rows.size)
        return singles(x, *weights) and machine().blas is not None and all(sizes)

    def _forward(self, x: Array, plan: Plan, weights: ExpertWeights, activation: str, limit: float) -> tuple[Array, Array]:
        """-> y_rows [R,D], pre_activation [R,O]; unused rows of both are not written"""
        blas = machine().blas
        assert blas is not None
        r, (e, both, width) = len(plan.order), weights.up.shape
        pre_activation, y_rows = empty((r, both)), empty((r, width))
        if r <= FEW:
            self._forward_few(x, plan, weights, KINDS[activation], limit, pre_activation, y_rows)
            return y_rows, pre_activation
        count, size = blocks(r, e)
        expert_blocks(
            count, 1, blas.sgemm, size, as_rows(x), plan.order, plan.inverse.shape[1], plan.offsets, whole(weights.up),
            whole(weights.down), optional(weights.up_bias, NO_BIAS), optional(weights.down_bias, NO_BIAS), KINDS[activation], limit,
            pre_activation, y_rows,
        )  # fmt: skip
        return y_rows, pre_activation

    def _forward_few(
        self, x: Array, plan: Plan, weights: ExpertWeights, kind: int, limit: float, pre_activation: Array, y_rows: Array
    ) -> None:
        """Fill pre_activation and y_rows, by the same sums as blocks of rows."""
        blas = machine().blas
        assert blas is not None
        r, (e, width, hidden_width) = len(plan.order), weights.down.shape
        hidden, most = empty((r, hidden_width)), min(r, e)  # experts that have a row
        up_bias, down_bias = optional(weights.up_bias, NO_BIAS), optional(weights.down_bias, NO_BIAS)
        slices = -(-hidden_width // PART)
        hidden_slices(
            most * slices, 1, blas.sgemm, slices, as_rows(x), plan.order, plan.inverse.shape[1], plan.offsets, whole(weights.up), up_bias,
            kind, limit, pre_activation, hidden,
        )  # fmt: skip
        slices = -(-width // PART)
        output_slices(most * slices, 1, blas.sgemm, slices, plan.offsets, whole(weights.down), down_bias, hidden, y_rows)

    def _backward(
        self, dy: Array, saved: Saved, activation: str, limit: float, out: ExpertWeights | None, accumulate: bool
    ) -> tuple[Array, Array, ExpertWeights]:
        """-> drows [R,D], dgate_weights [N,W], the weights' gradients"""
        blas = machine().blas
        assert blas is not None
        plan, weights, offsets = saved.plan, saved.weights, saved.plan.offsets
        r, (e, both, width), hidden = len(plan.order), weights.up.shape, weights.down.shape[2]
        x_rows, dy_rows, drows = (empty((r, width)) for _ in range(3))
        weighted, dpre_activation = empty((r, hidden)), empty((r, both))
        dgate = zeros(saved.gate_weights.shape)
        count, size = blocks(r, e)
        expert_blocks_backward(
            count, 1, blas.sgemm, size, as_rows(dy), as_rows(saved.x), as_rows(saved.gate_weights).reshape(-1), plan.order,
            plan.inverse.shape[1], offsets, whole(weights.up), whole(weights.down), optional(weights.down_bias, NO_BIAS), KINDS[activation],
            limit, saved.pre_activation, x_rows, dy_rows, weighted, dpre_activation, drows, dgate.reshape(-1),
        )  # fmt: skip
        to = out or ExpertWeights(None, None)
        dup = self._dw(dpre_activation, x_rows, offsets, to.up, accumulate)
        ddown = self._dw(dy_rows, weighted, offsets, to.down, accumulate)
        dup_bias = ddown_bias = None
        if weights.up_bias is not None:
            dup_bias = self._db(dpre_activation, None, offsets, to.up_bias, accumulate)
        if weights.down_bias is not None:
            row_weights = saved.gate_weights.reshape(-1)[plan.order]
            ddown_bias = self._db(dy_rows, row_weights, offsets, to.down_bias, accumulate)
        return drows, dgate, ExpertWeights(dup, ddown, dup_bias, ddown_bias)


@lru_cache(maxsize=8)
def order_of(n: int) -> Array:
    """Return 0 .. n - 1."""
    return traced(np.arange(n, dtype=np.int32))


@lru_cache(maxsize=8)
def ends_of(n: int) -> Array:
    """Return the offsets of one expert that has all n rows."""
    return traced(np.array([0, n], np.int32))


@lru_cache(maxsize=8)
def ones_of(n: int) -> Array:
    """Return a weight of 1 for each row.   -> [n,1]"""
    return traced(np.ones((n, 1), np.float32))


def blocks(rows: int, experts: int) -> tuple[int, int]:
    """Return an upper bound of the number of blocks and their size. If there are fewer experts than threads, threads get equal shares."""
    threads = machine().pool.threads
    rounds = -(-rows // (threads * BLOCK))
    size = min(BLOCK, -(-rows // (threads * rounds))) if experts < threads else BLOCK
    return -(-rows // size) + experts, size


def whole(stack: Array) -> Array:
    """Return a stack of matrices in contiguous memory."""
    return contiguous(stack)
