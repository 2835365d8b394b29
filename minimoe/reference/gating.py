"""Gating: from a router's logits z [N,E] to the experts of each token and their weights, one reference function a router.

p = softmax(z) over all E (s = sigmoid(z) for `sigmoid_bias`).

softmax_topk    the k largest p, over their sum if `norm`                       Mixtral (Jiang et al. 2024)
topk_softmax    softmax over the k largest z                                    gpt-oss; noisy_topk on noisy logits (Shazeer et al. 2017)
switch          the largest p, weight p                                         Fedus et al. 2021
sigmoid_bias    chosen by s + b within the best groups; weight s, over its sum if `norm`, times route_scale       DeepSeek-V3
expert_choice   each expert takes its c largest p over the tokens, weight p     Zhou et al. 2022

Beside weights and ids each returns the probabilities P_i that a balance loss needs, summed over the tokens, and the counts before capacity.
Gradients come in for the weights and for those sums. A softmax passes back dz = p * (dp - sum(dp * p)).
"""

from fractions import Fraction
from typing import NamedTuple

from minimoe.reference.arrays import Array, ArrayLayer

TINY = 1e-20  # beside a sum of sigmoids, all of which may round to 0 (DeepSeek-V3)


class Rule(NamedTuple):
    """How a router chooses; static."""

    router: str
    top_k: int
    norm: bool = True
    n_groups: int = 1
    top_groups: int = 1
    route_scale: float = 1.0

    @property
    def normalised(self) -> bool:
        """Are the weights of a token's experts divided by their sum?"""
        return self.norm and self.router in ("softmax_topk", "sigmoid_bias")


class Gate(NamedTuple):
    """What a router decided. W is K, for expert choice E. Sums over tokens are taken in an order that the shape alone fixes."""

    weights: Array  # [N,W]
    ids: Array  # [N,W] int32 in range, or -1: no expert (expert choice)
    scores: Array  # [N,E]: p, or s for sigmoid_bias
    counts: Array  # [E] int32, before capacity, valid tokens only
    prob_sum: Array  # [E]: sum over valid tokens of p (of s over its row's sum)


class GatingKernels(ArrayLayer):
    def gate(self, logits: Array, bias: Array | None, valid: Array | None, *, rule: Rule) -> Gate:
        """logits [N,E] at least float32, bias [E] (sigmoid_bias) or None, valid [N] bool or None -> Gate"""
        if rule.router == "expert_choice":
            return self.gate_expert_choice(logits, valid, rule.top_k)
        if rule.router == "sigmoid_bias":
            weights, ids, scores = self.gate_sigmoid_bias(logits, bias, rule)
            probs = scores / (self.xp.sum(scores, axis=-1, keepdims=True) + TINY)
        elif rule.router in ("topk_softmax", "noisy_topk"):
            weights, ids, scores = self.gate_topk_softmax(logits, rule.top_k)
            probs = scores
        else:
            weights, ids, scores = self.gate_softmax_topk(logits, rule.top_k, rule.normalised)
            probs = scores
        return Gate(weights, ids, scores, self._count(ids, valid, logits.shape[1]), self._sum_valid(probs, valid))

    def gate_backward(self, dweights: Array | None, dprob_sum: Array | None, gate: Gate, valid: Array | None, *, rule: Rule) -> Array:
        """dweights [N,W], dprob_sum [E], either None where unused -> dlogits [N,E]"""
        xp = self.xp
        scores = gate.scores
        dscores = xp.zeros_like(scores)
        if rule.router == "sigmoid_bias":
            if dweights is not None:
                dscores += self._spread(self._undo_norm(dweights, gate, rule), gate.ids, scores.shape[1])
            if dprob_sum is not None:
                total = xp.sum(scores, axis=-1, keepdims=True) + TINY
                dprobs = self._each_valid(dprob_sum, valid, scores)
                dscores += (dprobs - xp.sum(dprobs * scores, axis=-1, keepdims=True) / total) / total
            return dscores * scores * (1.0 - scores)
        if dprob_sum is not None:
            dscores += self._each_valid(dprob_sum, valid, scores)
        dlogits = xp.zeros_like(scores)
        if dweights is not None and rule.router in ("topk_softmax", "noisy_topk"):
            w = gate.weights
            dlogits += self._spread(w * (dweights - xp.sum(dweights * w, axis=-1, keepdims=True)), gate.ids, scores.shape[1])
        elif dweights is not None and rule.router == "expert_choice":
            dscores += dweights * xp.astype(gate.ids >= 0, dweights.dtype)
        elif dweights is not None:
            dscores += self._spread(self._undo_norm(dweights, gate, rule), gate.ids, scores.shape[1])
        dlogits += scores * (dscores - xp.sum(dscores * scores, axis=-1, keepdims=True))
        return dlogits

    # ---- one reference a router: -> weights [N,K], ids [N,K] int32, scores [N,E] -----------------------------------------------

    def gate_softmax_topk(self, logits: Array, k: int, norm: bool) -> tuple[Array, Array, Array]:
        """p = softmax(z); keep the k largest, over their sum if `norm`."""
        p = self.softmax(logits)
        weights, ids = self.top_k(p, k)
        if norm:
            weights = weights / self.xp.sum(weights, axis=-1, keepdims=True)
        return weights, ids, p

    def gate_topk_softmax(self, logits: Array, k: int) -> tuple[Array, Array, Array]:
        """Keep the k largest z; softmax over those."""
        values, ids = self.top_k(logits, k)
        return self.softmax(values), ids, self.softmax(logits)

    def gate_sigmoid_bias(self, logits: Array, bias: Array | None, rule: Rule) -> tuple[Array, Array, Array]:
        """s = sigmoid(z); choose by s + b within the best groups (a group's score: its two best); weigh by s."""
        xp = self.xp
        s = self.sigmoid(logits)
        choice = s if bias is None else s + bias
        if rule.n_groups > 1:
            n, e = logits.shape
            grouped = xp.reshape(choice, (n, rule.n_groups, e // rule.n_groups))
            best, _ = self.top_k(grouped, 2)
            _, groups = self.top_k(xp.sum(best, axis=-1), rule.top_groups)  # [N,top_groups]
            inside = xp.any(groups[:, :, None] == xp.arange(rule.n_groups, dtype=xp.int32), axis=1)
            choice = xp.reshape(xp.where(inside[:, :, None], grouped, xp.full_like(grouped, -xp.inf)), (n, e))
        _, ids = self.top_k(choice, rule.top_k)
        weights = xp.take_along_axis(s, xp.astype(ids, xp.int64), axis=-1)
        if rule.norm:
            weights = weights / (xp.sum(weights, axis=-1, keepdims=True) + TINY)
        return weights * rule.route_scale, ids, s

    def gate_expert_choice(self, logits: Array, valid: Array | None, k: int) -> Gate:
        """Each expert takes its c = min(N, max(1, ceil(N k / E))) largest p, N counting valid tokens.   -> Gate with W = E"""
        xp = self.xp
        n, e = logits.shape
        p = self.softmax(logits)
        order = p if valid is None else xp.where(valid[:, None], p, xp.full_like(p, -xp.inf))
        rank = xp.argsort(xp.argsort(-order, axis=0, stable=True), axis=0, stable=True)
        chosen = rank < self.choice_size(n, valid, k, e)
        if valid is not None:
            chosen = chosen & valid[:, None]
        experts = xp.broadcast_to(xp.arange(e, dtype=xp.int32), (n, e))
        ids = xp.where(chosen, experts, xp.full_like(experts, -1))
        weights = xp.where(chosen, p, xp.zeros_like(p))
        counts = xp.sum(xp.astype(chosen, xp.int32), axis=0, dtype=xp.int32)
        return Gate(weights, ids, p, counts, self._sum_valid(p, valid))

    # ---- sizes that depend on how many tokens are valid ------------------------------------------------------------------------

    def n_valid(self, n: int, valid: Array | None) -> int | Array:
        """How many tokens count: an int, or a 0-d int64 on the device."""
        return n if valid is None else self.xp.sum(self.xp.astype(valid, self.xp.int64))

    def choice_size(self, n: int, valid: Array | None, k: int, e: int) -> int | Array:
        """c of expert choice; with padding a 0-d device array."""
        if valid is None:
            return min(n, max(1, -(-n * k // e)))
        count = self.n_valid(n, valid)
        return self.xp.minimum(count, self.xp.clip((count * k + (e - 1)) // e, min=1))

    def capacity(self, n: int, valid: Array | None, k: int, e: int, factor: float) -> int | Array:
        """Rows an expert may take: min(N, ceil(N k f / E)), f taken as the decimal that was written: 1.1 is 11/10."""
        f = Fraction(repr(factor))
        count = self.n_valid(n, valid)
        rows = (count * (k * f.numerator) + (e * f.denominator - 1)) // (e * f.denominator)
        return min(n, rows) if valid is None else self.xp.minimum(count, rows)

    # ---- parts -----------------------------------------------------------------------------------------------------------------

    def _count(self, ids: Array, valid: Array | None, e: int) -> Array:
        if valid is not None:
            ids = self.xp.where(valid[:, None], ids, self.xp.full_like(ids, e))
        return self.bincount(self.xp.reshape(ids, (-1,)), e + 1)[:e]

    def _sum_valid(self, probs: Array, valid: Array | None) -> Array:
        if valid is not None:
            probs = self.xp.where(valid[:, None], probs, self.xp.zeros_like(probs))
        return self.xp.sum(probs, axis=0)

    def _each_valid(self, dsum: Array, valid: Array | None, like: Array) -> Array:
        """The gradient of a sum over valid tokens, at each token.   [E] -> [N,E]"""
        each = self.xp.broadcast_to(dsum, like.shape)
        return each if valid is None else self.xp.where(valid[:, None], each, self.xp.zeros_like(like))

    def _spread(self, values: Array, ids: Array, e: int) -> Array:
        """values [N,K] at columns ids [N,K] of zeros [N,E]; slot by slot, so that no scatter is needed."""
        xp = self.xp
        experts = xp.arange(e, dtype=xp.int32)
        full = xp.zeros((values.shape[0], e), dtype=values.dtype)
        for slot in range(ids.shape[1]):
            here = ids[:, slot, None] == experts
            full += xp.astype(here, values.dtype) * values[:, slot, None]
        return full

    def _undo_norm(self, dweights: Array, gate: Gate, rule: Rule) -> Array:
        """The gradient at the chosen scores.   w = c s / sum(s):   ds = c / sum(s) * (dw - sum(dw w) / c)"""
        xp = self.xp
        scale = rule.route_scale if rule.router == "sigmoid_bias" else 1.0
        if not rule.normalised:
            return dweights * scale
        chosen = xp.take_along_axis(gate.scores, xp.astype(gate.ids, xp.int64), axis=-1)
        total = xp.sum(chosen, axis=-1, keepdims=True)
        if rule.router == "sigmoid_bias":
            total = total + TINY
        return (dweights * scale - xp.sum(dweights * gate.weights, axis=-1, keepdims=True)) / total
