"""Gating: from a token's logits to its experts, their weights, and what the balance loss needs, in one pass. Formulas: minimoe/reference/gating.py.

The k best are found one after the other: ties go to the lowest expert, NaN comes last. Expert choice and groups are the reference's.
"""

import numpy as np

from minimoe.backend import Array
from minimoe.reference.gating import TINY, Gate, Rule
from minimoe_numba.arrays import NO_BOOLS, NO_FLOATS, as_rows, optional, parts_of, singles
from minimoe_numba.compiling import compiled
from minimoe_numba.kernel import B1, F1, F2, I2, kernel
from minimoe_numba.maths import ONE, ZERO, sigmoid, softmax_into
from minimoe_numpy import NumpyBackend

SOFTMAX_TOPK, TOPK_SOFTMAX, SIGMOID_BIAS = range(3)
KINDS = {
    "softmax_topk": SOFTMAX_TOPK, "switch": SOFTMAX_TOPK, "topk_softmax": TOPK_SOFTMAX, "noisy_topk": TOPK_SOFTMAX,
    "sigmoid_bias": SIGMOID_BIAS,
}  # fmt: skip
SMALLEST = np.float32(TINY)


@compiled
def best_of(values, taken):  # type: ignore[no-untyped-def]
    """The index of the largest value that is not taken."""
    best = -1
    for i in range(len(values)):
        if not taken[i] and (best < 0 or values[i] > values[best] or (np.isnan(values[best]) and not np.isnan(values[i]))):
            best = i
    return best


@kernel
def gate_tokens(
    start: int, stop: int, logits: F2, bias: F1, valid: B1, kind: int, norm: int, scale: float, grain: int, weights: F2, ids: I2, scores: F2,
    counts: I2, sums: F2,
) -> None:  # fmt: skip
    """counts and sums have a row for each piece."""
    experts, k = logits.shape[1], ids.shape[1]
    part = start // grain
    taken, choice, chosen = np.empty(experts, np.bool_), np.empty(experts, np.float32), np.empty(k, np.float32)
    for n in range(start, stop):
        counted = not valid.size or valid[n]
        z, p = logits[n], scores[n]
        row_sum = ONE
        if kind == SIGMOID_BIAS:
            row_sum = SMALLEST
            for i in range(experts):
                p[i] = sigmoid(z[i])
                row_sum += p[i]
                choice[i] = p[i] + bias[i] if bias.size else p[i]
        else:
            softmax_into(z, p)
            for i in range(experts):
                choice[i] = z[i] if kind == TOPK_SOFTMAX else p[i]
        for i in range(experts):
            taken[i] = False
            if counted:
                sums[part, i] += p[i] / row_sum
        for j in range(k):
            best = best_of(choice, taken)
            taken[best] = True
            ids[n, j] = best
            chosen[j] = z[best] if kind == TOPK_SOFTMAX else p[best]
            if counted:
                counts[part, best] += 1
        if kind == TOPK_SOFTMAX:
            softmax_into(chosen, weights[n])
            continue
        total = SMALLEST if kind == SIGMOID_BIAS else ZERO
        for j in range(k):
            total += chosen[j]
        share = scale / total if norm else scale
        for j in range(k):
            weights[n, j] = chosen[j] * share


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


class FastGating(NumpyBackend):
    def gate(self, logits: Array, bias: Array | None, valid: Array | None, *, rule: Rule) -> Gate:
        if not handled(rule, logits, bias) or not logits.size:
            return super().gate(logits, bias, valid, rule=rule)
        (n, experts), k = logits.shape, rule.top_k
        grain, parts = parts_of(n)
        weights, ids, scores = np.empty((n, k), np.float32), np.empty((n, k), np.int32), np.empty((n, experts), np.float32)
        counts, sums = np.zeros((parts, experts), np.int32), np.zeros((parts, experts), np.float32)
        gate_tokens(
            n, grain, as_rows(logits), optional(bias), optional(valid, NO_BOOLS), KINDS[rule.router], rule.normalised, scale_of(rule), grain,
            weights, ids, scores, counts, sums,
        )  # fmt: skip
        return Gate(weights, ids, scores, counts.sum(axis=0, dtype=np.int32), sums.sum(axis=0))

    def gate_backward(self, dweights: Array | None, dprob_sum: Array | None, gate: Gate, valid: Array | None, *, rule: Rule) -> Array:
        if not handled(rule, gate.scores, dweights, dprob_sum) or not gate.scores.size:
            return super().gate_backward(dweights, dprob_sum, gate, valid, rule=rule)
        dlogits = np.empty(gate.scores.shape, np.float32)
        gate_tokens_backward(
            len(dlogits), parts_of(len(dlogits))[0], NO_ROWS if dweights is None else as_rows(dweights),
            NO_FLOATS if dprob_sum is None else np.ascontiguousarray(dprob_sum), as_rows(gate.weights), gate.ids, as_rows(gate.scores),
            optional(valid, NO_BOOLS), KINDS[rule.router], rule.normalised, scale_of(rule), dlogits,
        )  # fmt: skip
        return dlogits


NO_ROWS = np.zeros((0, 0), np.float32)


def handled(rule: Rule, *arrays: Array | None) -> bool:
    """Is there a kernel for this router, on these arrays?"""
    return rule.router in KINDS and rule.n_groups == 1 and singles(*arrays)


def scale_of(rule: Rule) -> float:
    return rule.route_scale if rule.router == "sigmoid_bias" else 1.0
