"""Gating: from a token's logits to its experts, their weights, and the sums that the balance loss needs, in one pass.

The k best are found one after the other, by integers that order as the floats do: ties go to the lowest expert, NaN comes last.
Elementwise functions run over a tile of tokens at once, since a row of few experts is shorter than a vector. A router that KINDS does
not name goes to the reference. Formulas: minimoe/reference/routers.py.
"""

import numpy as np

from minimoe.backend import Array
from minimoe.reference.gating import TINY, Gate, Rule
from minimoe_numba.arrays import NO_BOOLS, NO_FLOATS, as_rows, by_width, optional, parts_of, singles
from minimoe_numba.compiling import compiled, inlined
from minimoe_numba.creation import contiguous, empty
from minimoe_numba.kernel import B1, F1, F2, I2, kernel
from minimoe_numba.maths import INFINITY, ONE, ZERO, exp, largest, sigmoid
from minimoe_numba.native import float_as_int, floats_at, int_as_float
from minimoe_numpy import NumpyBackend

SOFTMAX_TOPK, TOPK_SOFTMAX, SIGMOID_BIAS = range(3)
KINDS = {
    "softmax_topk": SOFTMAX_TOPK, "switch": SOFTMAX_TOPK, "topk_softmax": TOPK_SOFTMAX, "noisy_topk": TOPK_SOFTMAX,
    "sigmoid_bias": SIGMOID_BIAS,
}  # fmt: skip
TILE = 2048  # numbers per tile: they stay in the nearest cache
MOST = 64  # largest k: beyond it sorting is faster than searching a row k times
SMALLEST = np.float32(TINY)
MAGNITUDE, LOWEST_INT = np.int32(2**31 - 1), np.int32(-(2**31))
NAN, NAN_KEY, ZERO_KEY = np.float32(np.nan), np.int32(LOWEST_INT + 1), np.int32(0)
NO_ROWS = np.zeros((0, 0), np.float32)


# ---- the k largest of a row -------------------------------------------------------------------------------------------------------------


@inlined
def as_ordered(bits):  # type: ignore[no-untyped-def]
    """Map the bits of a float32 to an int32 that orders as the float does, NaN above infinity. It is its own inverse."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & MAGNITUDE))


@inlined
def key_of(x):  # type: ignore[no-untyped-def]
    """Return an int32 that orders as x does. Both zeros are equal; NaN is below all but LOWEST_INT, which marks a taken key."""
    key = as_ordered(float_as_int(x))
    key = ZERO_KEY if x == ZERO else key
    return key if x == x else NAN_KEY


@inlined
def value_of(key):  # type: ignore[no-untyped-def]
    value = int_as_float(as_ordered(key))
    return NAN if key == NAN_KEY else value


@inlined
def write_keys(values, keys):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        keys[i] = key_of(values[i])


@inlined
def take_best(keys):  # type: ignore[no-untyped-def]
    """Return the index of the largest key, the first of equal ones, and mark it as taken."""
    top = LOWEST_INT
    for i in range(len(keys)):
        top = keys[i] if keys[i] > top else top
    best = len(keys)
    for i in range(len(keys)):
        here = i if keys[i] == top else len(keys)
        best = here if here < best else best
    keys[best] = LOWEST_INT
    return best


@inlined
def drop_groups(keys, groups, top_groups, group_keys, inside):  # type: ignore[no-untyped-def]
    """Set the keys of experts outside the best groups to that of -infinity. The score of a group is the sum of its two best."""
    size = len(keys) // groups
    for g in range(groups):
        first, second = LOWEST_INT, LOWEST_INT
        for i in range(g * size, (g + 1) * size):
            lower = min(first, keys[i])
            first = max(first, keys[i])
            second = max(second, lower)
        group_keys[g] = key_of(value_of(first) + value_of(second) if size > 1 else value_of(first))
        inside[g] = False
    for _ in range(top_groups):
        inside[take_best(group_keys)] = True
    for g in range(groups):
        if not inside[g]:
            keys[g * size : (g + 1) * size] = key_of(-INFINITY)


# ---- rows ------------------------------------------------------------------------------------------------------------------------------


@compiled
def softmax_rows(z, p):  # type: ignore[no-untyped-def]
    """p = softmax(z) of each row. z and p may be the same array."""
    for n in range(len(z)):
        top = largest(z[n])
        for i in range(z.shape[1]):
            p[n, i] = z[n, i] - top
    flat = floats_at(p.ctypes.data, p.size)
    for i in range(len(flat)):
        flat[i] = exp(flat[i])
    for n in range(len(z)):
        total = ZERO
        for i in range(z.shape[1]):
            total += p[n, i]
        share = ONE / total
        for i in range(z.shape[1]):
            p[n, i] *= share


@compiled
def sigmoid_rows(z, p):  # type: ignore[no-untyped-def]
    flat_z, flat_p = floats_at(z.ctypes.data, z.size), floats_at(p.ctypes.data, p.size)
    for i in range(len(flat_z)):
        flat_p[i] = sigmoid(flat_z[i])


@compiled
def weigh(p, ids, start, norm, scale, weights):  # type: ignore[no-untyped-def]
    """weights = the chosen scores times `scale`, divided by their sum plus `start` if `norm`."""
    total = start
    for j in range(len(ids)):
        total += p[ids[j]]
    share = scale / total if norm else scale
    for j in range(len(ids)):
        weights[j] = p[ids[j]] * share


@kernel
def gate_tokens(
    start: int, stop: int, logits: F2, bias: F1, valid: B1, kind: int, norm: int, scale: float, groups: int, top_groups: int, grain: int,
    weights: F2, ids: I2, scores: F2, counts: I2, sums: F2,
) -> None:  # fmt: skip
    """Compute a gate. counts and sums have a row for each piece."""
    experts, k = logits.shape[1], ids.shape[1]
    keys, group_keys, inside = np.empty(experts, np.int32), np.empty(groups, np.int32), np.empty(groups, np.bool_)
    count, prob_sum = np.zeros(experts, np.int32), np.zeros(experts, np.float32)
    tile = max(1, TILE // experts)
    for first in range(start, stop, tile):
        last = min(stop, first + tile)
        if kind == SIGMOID_BIAS:
            sigmoid_rows(logits[first:last], scores[first:last])
        else:
            softmax_rows(logits[first:last], scores[first:last])
        for n in range(first, last):
            z, p = logits[n], scores[n]
            counted = not valid.size or valid[n]
            if counted:
                total = SMALLEST
                if kind == SIGMOID_BIAS:
                    for i in range(experts):
                        total += p[i]
                share = ONE / total if kind == SIGMOID_BIAS else ONE
                for i in range(experts):
                    prob_sum[i] += p[i] * share
            if kind == SIGMOID_BIAS and bias.size:
                for i in range(experts):
                    keys[i] = key_of(p[i] + bias[i])
            else:
                write_keys(z if kind == TOPK_SOFTMAX else p, keys)
            if groups > 1:
                drop_groups(keys, groups, top_groups, group_keys, inside)
            for j in range(k):
                best = take_best(keys)
                ids[n, j] = best
                count[best] += counted
            if kind == TOPK_SOFTMAX:
                for j in range(k):
                    weights[n, j] = z[ids[n, j]]
            else:
                weigh(p, ids[n], SMALLEST if kind == SIGMOID_BIAS else ZERO, norm, scale, weights[n])
        if kind == TOPK_SOFTMAX:
            softmax_rows(weights[first:last], weights[first:last])
    piece = start // grain
    for i in range(experts):  # an assignment of arrays would compile a check of shapes, with its message
        counts[piece, i], sums[piece, i] = count[i], prob_sum[i]


@kernel
def best_columns(start: int, stop: int, x: F2, values: F2, ids: I2) -> None:
    keys = np.empty(x.shape[1], np.int32)
    for n in range(start, stop):
        write_keys(x[n], keys)
        for j in range(ids.shape[1]):
            best = take_best(keys)
            ids[n, j], values[n, j] = best, x[n, best]


@kernel
def gate_tokens_backward(
    start: int, stop: int, dweights: F2, dprob_sum: F1, weights: F2, ids: I2, scores: F2, valid: B1, kind: int, norm: int, scale: float,
    dlogits: F2,
) -> None:  # fmt: skip
    experts, k = scores.shape[1], ids.shape[1]
    dscores = np.empty(experts, np.float32)
    for n in range(start, stop):
        p = scores[n]
        counted = dprob_sum.size and (not valid.size or valid[n])
        for i in range(experts):
            dscores[i] = dprob_sum[i] if counted else ZERO
        if kind == SIGMOID_BIAS and counted:
            total, inner = SMALLEST, ZERO
            for i in range(experts):
                total += p[i]
                inner += p[i] * dscores[i]
            for i in range(experts):
                dscores[i] = (dscores[i] - inner / total) / total
        if dweights.size and kind != TOPK_SOFTMAX:
            inner, total = ZERO, SMALLEST if kind == SIGMOID_BIAS else ZERO
            for j in range(k):
                inner += dweights[n, j] * weights[n, j]
                total += p[ids[n, j]]
            for j in range(k):
                direct = dweights[n, j] * scale
                dscores[ids[n, j]] += (direct - inner) / total if norm else direct
        if kind == SIGMOID_BIAS:
            for i in range(experts):
                dlogits[n, i] = dscores[i] * p[i] * (ONE - p[i])
            continue
        inner = ZERO
        for i in range(experts):
            inner += dscores[i] * p[i]
        for i in range(experts):
            dlogits[n, i] = p[i] * (dscores[i] - inner)
        if dweights.size and kind == TOPK_SOFTMAX:
            inner = ZERO
            for j in range(k):
                inner += dweights[n, j] * weights[n, j]
            for j in range(k):
                dlogits[n, ids[n, j]] += weights[n, j] * (dweights[n, j] - inner)


# ---- the contract's kernels ------------------------------------------------------------------------------------------------------------


class FastGating(NumpyBackend):
    routers = frozenset(KINDS)

    def gate(self, logits: Array, bias: Array | None, valid: Array | None, *, rule: Rule) -> Gate:
        if not handled(rule, logits, bias) or not logits.size or not 0 < rule.top_k <= min(MOST, logits.shape[1]):
            return super().gate(logits, bias, valid, rule=rule)
        (n, experts), k = logits.shape, rule.top_k
        grain, parts = parts_of(n)
        weights, ids, scores = empty((n, k)), empty((n, k), np.int32), empty((n, experts))
        counts, sums = empty((parts, experts), np.int32), empty((parts, experts))
        groups = rule.n_groups if KINDS[rule.router] == SIGMOID_BIAS else 1
        gate_tokens(
            n, grain, as_rows(logits), vector(bias), vector(valid, NO_BOOLS), KINDS[rule.router], rule.normalised, scale_of(rule), groups,
            rule.top_groups, grain, weights, ids, scores, counts, sums,
        )  # fmt: skip
        if parts == 1:
            return Gate(weights, ids, scores, counts[0], sums[0])
        return Gate(weights, ids, scores, np.add.reduce(counts, axis=0, dtype=np.int32), np.add.reduce(sums, axis=0))

    def gate_backward(self, dweights: Array | None, dprob_sum: Array | None, gate: Gate, valid: Array | None, *, rule: Rule) -> Array:
        if not handled(rule, gate.scores, gate.weights, dweights, dprob_sum) or not gate.scores.size:
            return super().gate_backward(dweights, dprob_sum, gate, valid, rule=rule)
        dlogits = empty(gate.scores.shape)
        gate_tokens_backward(
            len(dlogits), parts_of(len(dlogits))[0], NO_ROWS if dweights is None else as_rows(dweights), vector(dprob_sum),
            as_rows(gate.weights), as_rows(gate.ids), as_rows(gate.scores), vector(valid, NO_BOOLS), KINDS[rule.router], rule.normalised,
            scale_of(rule), dlogits,
        )  # fmt: skip
        return dlogits

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        if not singles(x) or x.ndim != 2 or not x.size or not 0 < k <= min(MOST, x.shape[1]):
            return super().top_k(x, k)
        n = len(x)
        values, ids = empty((n, k)), empty((n, k), np.int32)
        best_columns(n, by_width(4 * k * x.shape[1]), as_rows(x), values, ids)
        return values, ids


def handled(rule: Rule, *arrays: Array | None) -> bool:
    """True if there is a kernel for this router, on these arrays."""
    return rule.router in KINDS and singles(*arrays)


def scale_of(rule: Rule) -> float:
    return rule.route_scale if KINDS[rule.router] == SIGMOID_BIAS else 1.0


def vector(x: Array | None, like: Array = NO_FLOATS) -> Array:
    """Return x in contiguous memory, or an empty array if it is None."""
    return contiguous(optional(x, like))
