"""Gating: scores, choice and weights of a token by one warp, whose lanes are experts. Formulas: minimoe/reference/routers.py.

A choice is the largest `sort_key` below the last one, so no list of what is chosen already is kept. As a ladder, for `softmax_topk`:

gate_by_thread    one thread per token. Plain, and slow: neighbours read logits that lie E apart, and few threads run.     unmeasured
gate_softmax      one warp per token: lanes read side by side, maxima and sums go through shuffles.                         unmeasured
"""

import math

from minimoe.backend import Array
from minimoe.reference.gating import TINY, Gate, Rule
from minimoe_numba_cuda.compiler import cuda, float32, int32
from minimoe_numba_cuda.launch import BOOL, I32, SHARED_LIMIT, blocks_of, singles
from minimoe_numba_cuda.sums import Sums
from minimoe_numba_cuda.warp import (
    ALL,
    EVERYTHING,
    INFINITY,
    LANES,
    NOTHING,
    ONE,
    WARPS,
    ZERO,
    key_index,
    sigmoid,
    sort_key,
    warp_max,
    warp_sum,
)  # fmt: skip

BLOCK = (LANES * WARPS,)
OVER_ALL, OVER_CHOSEN, SIGMOID = range(3)  # what the weights are: p of all experts, a softmax over the chosen, sigmoids
KINDS = {
    "softmax_topk": OVER_ALL, "switch": OVER_ALL, "topk_softmax": OVER_CHOSEN, "noisy_topk": OVER_CHOSEN, "sigmoid_bias": SIGMOID,
}  # fmt: skip


# ---- forward -------------------------------------------------------------------------------------------------------------------------


@cuda.jit
def gate_by_thread(logits, norm, weights, ids, scores):  # type: ignore[no-untyped-def]
    """The first rung: a thread does all of a token, expert by expert.   [N,E] -> [N,K], [N,K], [N,E]   Grid: ceil(N / 128)."""
    n = cuda.grid(1)
    if n >= logits.shape[0]:
        return
    experts, top_k = logits.shape[1], ids.shape[1]
    top = -INFINITY
    for e in range(experts):
        top = max(top, logits[n, e])
    total = ZERO
    for e in range(experts):
        scores[n, e] = math.exp(logits[n, e] - top)
        total += scores[n, e]
    for e in range(experts):
        scores[n, e] /= total
    last, chosen = EVERYTHING, ZERO
    for j in range(top_k):
        best = NOTHING
        for e in range(experts):
            key = sort_key(scores[n, e], e)
            if best < key < last:
                best = key
        last = best
        ids[n, j] = key_index(best)
        weights[n, j] = scores[n, key_index(best)]
        chosen += weights[n, j]
    if norm:
        for j in range(top_k):
            weights[n, j] /= chosen


@cuda.jit(device=True)
def choose(values, start, count, last):  # type: ignore[no-untyped-def]
    """The key of the best of values[start : start + count] after `last`, found by a warp.   values flat"""
    best = NOTHING
    for first in range(0, count, LANES):  # as often in each lane, or libNVVM makes a copy of the maximum for lanes without a value
        e = first + cuda.laneid
        if e < count:
            key = sort_key(values[start + e], e)
            if best < key < last:
                best = key
    return warp_max(best)


@cuda.jit
def gate_softmax(logits, over_chosen, norm, weights, ids, scores):  # type: ignore[no-untyped-def]
    """p = softmax(z); the top k, weighed by p (over their sum if `norm`), or by a softmax over the chosen.   [N,E] -> [N,K], [N,K], [N,E]

    One warp per token, `WARPS` tokens per block; logits and scores flat. Bytes: N*E read, N*E written, what is chosen from stays in L1.
    """
    n = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // LANES
    tokens, top_k = ids.shape
    if n >= tokens:
        return  # the whole warp leaves
    lane, experts = cuda.laneid, logits.size // tokens
    start = n * experts
    top = -INFINITY
    for e in range(lane, experts, LANES):
        top = max(top, logits[start + e])
    top = warp_max(top)
    total = ZERO
    for e in range(lane, experts, LANES):
        p = math.exp(logits[start + e] - top)
        scores[start + e] = p
        total += p
    total = warp_sum(total)
    for e in range(lane, experts, LANES):
        scores[start + e] /= total
    cuda.syncwarp()  # below, lanes read what others wrote

    # every lane adds up the same sum; z and not p decides for topk_softmax, where p may round to equal numbers
    last, chosen, best = EVERYTHING, ZERO, ZERO
    for j in range(top_k):
        last = choose(logits, start, experts, last) if over_chosen else choose(scores, start, experts, last)
        expert = key_index(last)
        if over_chosen:
            if j == 0:
                best = logits[start + expert]
            weight = math.exp(logits[start + expert] - best)
        else:
            weight = scores[start + expert]
        chosen += weight
        if lane == 0:
            ids[n, j] = expert
            weights[n, j] = weight
    cuda.syncwarp()
    if norm or over_chosen:
        for j in range(lane, top_k, LANES):
            weights[n, j] /= chosen


@cuda.jit(device=True)
def group_score(choice, start, size):  # type: ignore[no-untyped-def]
    """The sum of the two best of a group (of one where it has one)."""
    first, second = NOTHING, NOTHING
    for i in range(size):
        key = sort_key(choice[start + i], i)
        if key > first:
            first, second = key, first
        elif key > second:
            second = key
    total = choice[start + key_index(first)]
    if size > 1:
        total += choice[start + key_index(second)]
    return total


@cuda.jit
def gate_sigmoid(logits, bias, norm, n_groups, top_groups, route_scale, tiny, weights, ids, scores, per_row):  # type: ignore[no-untyped-def]
    """s = sigmoid(z); the top k of s + bias within the best groups, weighed by s.   [N,E], [E] -> [N,K], [N,K], [N,E], [N]

    One warp per token. Shared memory: E + n_groups floats per warp, what is chosen from. per_row is 1 / (sum of s), for the balance loss.
    """
    shared = cuda.shared.array(0, float32)
    warp = cuda.threadIdx.x // LANES
    n = cuda.blockIdx.x * WARPS + warp
    tokens, experts = logits.shape
    if n >= tokens:
        return
    lane, top_k = cuda.laneid, ids.shape[1]
    choice = shared[warp * (experts + n_groups) : (warp + 1) * (experts + n_groups)]
    total = ZERO
    for e in range(lane, experts, LANES):
        s = sigmoid(logits[n, e])
        scores[n, e] = s
        total += s
        choice[e] = s + bias[e] if bias.size else s
    total = warp_sum(total)
    if lane == 0:
        per_row[n] = ONE / (total + tiny)
    cuda.syncwarp()

    if n_groups > 1:
        size = experts // n_groups
        for g in range(lane, n_groups, LANES):
            choice[experts + g] = group_score(choice, g * size, size)
        cuda.syncwarp()
        worst = EVERYTHING  # the key of the last group that is inside
        for _ in range(top_groups):
            worst = choose(choice, experts, n_groups, worst)
        for g in range(lane, n_groups, LANES):
            if sort_key(choice[experts + g], g) < worst:
                for i in range(size):
                    choice[g * size + i] = -INFINITY
        cuda.syncwarp()

    last, chosen = EVERYTHING, ZERO
    for j in range(top_k):
        last = choose(choice, 0, experts, last)
        weight = scores[n, key_index(last)]
        chosen += weight
        if lane == 0:
            ids[n, j] = key_index(last)
            weights[n, j] = weight
    cuda.syncwarp()
    factor = route_scale / (chosen + tiny) if norm else route_scale
    for j in range(lane, top_k, LANES):
        weights[n, j] *= factor


@cuda.jit
def count_ids(ids, valid, width, counts):  # type: ignore[no-untyped-def]
    """counts[e] += how often valid tokens chose e.   ids flat [N*W], valid [N] -> [E]   Grid: ceil(N*W / 128).

    Lanes with the same expert are found by one warp operation, and the first of them adds for all. Integers may be added in any order.
    """
    i = cuda.grid(1)
    expert = int32(-1)
    if i < ids.size and (valid.size == 0 or valid[i // width]):
        expert = ids[i]
    same = cuda.match_any_sync(ALL, expert)
    if expert >= 0 and cuda.ffs(same) == cuda.laneid + 1:
        cuda.atomic.add(counts, expert, cuda.popc(same))


# ---- backward ------------------------------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def slot_sums(n, dweights, weights, ids, scores):  # type: ignore[no-untyped-def]
    """<dw, w> over the slots of a token, and the sum of the chosen scores; every lane the same."""
    inner, total = ZERO, ZERO
    for j in range(dweights.shape[1]):
        inner += dweights[n, j] * weights[n, j]
        if 0 <= ids[n, j] < scores.shape[1]:
            total += scores[n, ids[n, j]]
    return inner, total


@cuda.jit(device=True)
def at_slots(n, e, dweights, weights, ids, over_chosen, scale, shift):  # type: ignore[no-untyped-def]
    """What the weights pass back to expert e: dw * scale - shift where a slot holds it, times w for a softmax over the chosen."""
    total = ZERO
    for j in range(dweights.shape[1]):
        if ids[n, j] == e:
            slot = dweights[n, j] * scale - shift
            total += slot * weights[n, j] if over_chosen else slot
    return total


@cuda.jit
def gate_softmax_backward(dweights, dsum, weights, ids, scores, valid, over_chosen, norm, dlogits):  # type: ignore[no-untyped-def]
    """dz = p (dp - <dp, p>), dp from the weights and the sum of p.   One warp per token.   dweights [N,K] or empty, dsum [E] or empty"""
    n = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // LANES
    tokens, experts = scores.shape
    if n >= tokens:
        return
    lane = cuda.laneid
    counted = dsum.size > 0 and (valid.size == 0 or valid[n])
    inner, total = slot_sums(n, dweights, weights, ids, scores)
    scale = ONE / total if norm else ONE
    shift = inner * scale if norm or over_chosen else ZERO

    product = ZERO
    for e in range(lane, experts, LANES):
        dp = dsum[e] if counted else ZERO
        if not over_chosen:
            dp += at_slots(n, e, dweights, weights, ids, over_chosen, scale, shift)
        product += dp * scores[n, e]
    product = warp_sum(product)
    for e in range(lane, experts, LANES):
        dp = dsum[e] if counted else ZERO
        slots = at_slots(n, e, dweights, weights, ids, over_chosen, scale, shift)
        if over_chosen:
            dlogits[n, e] = slots + scores[n, e] * (dp - product)
        else:
            dlogits[n, e] = scores[n, e] * (dp + slots - product)


@cuda.jit
def gate_sigmoid_backward(dweights, dsum, weights, ids, scores, valid, norm, route_scale, tiny, dlogits):  # type: ignore[no-untyped-def]
    """dz = ds s (1 - s), ds from the weights and from the sum of s over its row's sum.   One warp per token."""
    n = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // LANES
    tokens, experts = scores.shape
    if n >= tokens:
        return
    lane = cuda.laneid
    counted = dsum.size > 0 and (valid.size == 0 or valid[n])
    inner, chosen = slot_sums(n, dweights, weights, ids, scores)
    scale = route_scale / (chosen + tiny) if norm else route_scale
    shift = inner / (chosen + tiny) if norm else ZERO
    row, product = ZERO, ZERO
    for e in range(lane, experts, LANES):
        row += scores[n, e]
        if counted:
            product += dsum[e] * scores[n, e]
    row = warp_sum(row) + tiny
    product = warp_sum(product) / row
    for e in range(lane, experts, LANES):
        s = scores[n, e]
        ds = at_slots(n, e, dweights, weights, ids, 0, scale, shift)
        if counted:
            ds += (dsum[e] - product) / row
        dlogits[n, e] = ds * s * (ONE - s)


# ---- the launches --------------------------------------------------------------------------------------------------------------------


class CudaGating(Sums):
    routers = frozenset(KINDS)  # the reference serves all others

    def gate(self, logits: Array, bias: Array | None, valid: Array | None, *, rule: Rule) -> Gate:
        n, e = logits.shape
        kind, k, groups = KINDS.get(rule.router), rule.top_k, max(1, rule.n_groups)
        shared = 4 * WARPS * (e + groups) if kind == SIGMOID else 0
        if kind is None or not singles(logits, bias) or shared > SHARED_LIMIT:
            return super().gate(logits, bias, valid, rule=rule)
        if not 1 <= k <= e:
            raise ValueError(f"gate: top_k ({k}) must be 1 to {e}, the number of experts")
        logits = self._read("gate", "logits", logits, (n, e))
        valid = self._read("gate", "valid", valid, (n,), BOOL)
        weights, ids, scores = self._empty(n, k), self._empty(n, k, dtype=I32), self._empty(n, e)
        grid = (blocks_of(n, WARPS),)
        if kind == SIGMOID:
            per_row, given = self._empty(n), self._read("gate", "bias", bias, (e,))
            options = int(rule.norm), groups, rule.top_groups, float(rule.route_scale), TINY
            self._launch(gate_sigmoid, grid, BLOCK, logits, given, *options, weights, ids, scores, per_row, shared=shared)
            scale = per_row if not valid.size else self.xp.where(valid, per_row, self.xp.zeros_like(per_row))
        else:
            over_chosen = int(kind == OVER_CHOSEN)
            z, p = (self.xp.reshape(a, (-1,)) for a in (logits, scores))
            self._launch(gate_softmax, grid, BLOCK, z, over_chosen, int(rule.normalised), weights, ids, p)
            scale = None if not valid.size else self.xp.astype(valid, self.xp.float32)
        return Gate(weights, ids, scores, self._counts(ids, valid, e), self._sum_columns(scores, scale))

    def gate_backward(self, dweights: Array | None, dprob_sum: Array | None, gate: Gate, valid: Array | None, *, rule: Rule) -> Array:
        kind = KINDS.get(rule.router)
        if kind is None or not singles(dweights, dprob_sum, gate.weights, gate.scores):
            return super().gate_backward(dweights, dprob_sum, gate, valid, rule=rule)
        (n, e), k = gate.scores.shape, gate.ids.shape[1]
        where = "gate_backward"
        dw, dsum = self._read(where, "dweights", dweights, (n, k)), self._read(where, "dprob_sum", dprob_sum, (e,))
        weights, ids = self._read(where, "weights", gate.weights, (n, k)), self._read(where, "ids", gate.ids, (n, k), I32)
        scores, valid = self._read(where, "scores", gate.scores, (n, e)), self._read(where, "valid", valid, (n,), BOOL)
        dlogits, grid = self._empty(n, e), (blocks_of(n, WARPS),)
        given = dw, dsum, weights, ids, scores, valid
        if kind == SIGMOID:
            self._launch(gate_sigmoid_backward, grid, BLOCK, *given, int(rule.norm), float(rule.route_scale), TINY, dlogits)
        else:
            over_chosen = int(kind == OVER_CHOSEN)
            self._launch(gate_softmax_backward, grid, BLOCK, *given, over_chosen, int(rule.normalised), dlogits)
        return dlogits

    def _counts(self, ids: Array, valid: Array, e: int) -> Array:
        """How often each expert was chosen by valid tokens.   ids [N,K] -> int32 [E]"""
        counts = self.xp.zeros((e,), dtype=I32)
        flat = self.xp.reshape(ids, (-1,))
        self._launch(count_ids, (blocks_of(flat.size),), (128,), flat, valid, ids.shape[1], counts)
        return counts
