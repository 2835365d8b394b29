"""Six routers, with an own pair of functions for each family; a router that is not among them runs the reference.

token choice    scores of one token [E] -> k ids, weights from the scores at those ids
expert choice   scores of one expert over the tokens [N] -> its c tokens
"""

import numpy as np

from minimoe.reference.gating import TINY, Gate, Rule
from toy_backend.parts import Array, Scratch, logistic

SOFTMAX = ("softmax_topk", "switch")  # the weights are probabilities
TOP_SOFTMAX = ("topk_softmax", "noisy_topk")  # the weights are a softmax over the chosen logits


class Gates(Scratch):
    routers = frozenset({*SOFTMAX, *TOP_SOFTMAX, "sigmoid_bias", "expert_choice"})

    def gate(self, logits: Array, bias: Array | None, valid: Array | None, *, rule: Rule) -> Gate:
        if rule.router in SOFTMAX:
            return softmax_gate(logits, valid, rule)
        if rule.router in TOP_SOFTMAX:
            return top_softmax_gate(logits, valid, rule)
        if rule.router == "sigmoid_bias":
            return sigmoid_gate(logits, bias, valid, rule)
        if rule.router == "expert_choice":
            return expert_choice_gate(logits, valid, rule)
        return super().gate(logits, bias, valid, rule=rule)

    def gate_backward(self, dweights: Array | None, dprob_sum: Array | None, gate: Gate, valid: Array | None, *, rule: Rule) -> Array:
        if rule.router not in self.routers:
            return super().gate_backward(dweights, dprob_sum, gate, valid, rule=rule)
        dprobs = np.zeros_like(gate.scores)  # [N,E]: of the sums over the tokens
        if dprob_sum is not None:
            dprobs[slice(None) if valid is None else valid] = dprob_sum
        if rule.router in SOFTMAX:
            return softmax_gate_backward(dweights, dprobs, gate, rule)
        if rule.router in TOP_SOFTMAX:
            return top_softmax_gate_backward(dweights, dprobs, gate)
        if rule.router == "sigmoid_bias":
            return sigmoid_gate_backward(dweights, dprobs, gate, rule)
        return expert_choice_gate_backward(dweights, dprobs, gate)


# ---- softmax over all experts, then the k largest --------------------------------------------------------------------------------


def softmax_gate(logits: Array, valid: Array | None, rule: Rule) -> Gate:
    p = softmax(logits)
    ids = largest(p, rule.top_k)
    weights = np.take_along_axis(p, ids, axis=1)  # [N,K]
    if rule.normalised:
        weights /= weights.sum(axis=1, keepdims=True)
    return gate_of(weights, ids, p, p, valid)


def softmax_gate_backward(dweights: Array | None, dprobs: Array, gate: Gate, rule: Rule) -> Array:
    p, dp = gate.scores, dprobs.copy()
    if dweights is not None:
        dchosen = dweights
        if rule.normalised:
            total = np.take_along_axis(p, gate.ids, axis=1).sum(axis=1, keepdims=True)  # [N,1]
            dchosen = (dweights - row_dots(dweights, gate.weights)) / total
        add_at_ids(dp, gate.ids, dchosen)
    return p * (dp - row_dots(dp, p))


# ---- the k largest logits, then a softmax over those -----------------------------------------------------------------------------


def top_softmax_gate(logits: Array, valid: Array | None, rule: Rule) -> Gate:
    p = softmax(logits)
    ids = largest(logits, rule.top_k)
    weights = softmax(np.take_along_axis(logits, ids, axis=1))
    return gate_of(weights, ids, p, p, valid)


def top_softmax_gate_backward(dweights: Array | None, dprobs: Array, gate: Gate) -> Array:
    p, w = gate.scores, gate.weights
    dlogits = p * (dprobs - row_dots(dprobs, p))
    if dweights is not None:
        add_at_ids(dlogits, gate.ids, w * (dweights - row_dots(dweights, w)))
    return dlogits


# ---- sigmoids, chosen with a bias and within the best groups, weighed without it -------------------------------------------------


def sigmoid_gate(logits: Array, bias: Array | None, valid: Array | None, rule: Rule) -> Gate:
    s = logistic(logits)
    choice = s.copy() if bias is None else s + bias
    if rule.n_groups > 1:
        keep_best_groups(choice, rule.n_groups, rule.top_groups)
    ids = largest(choice, rule.top_k)
    weights = np.take_along_axis(s, ids, axis=1)
    if rule.norm:
        weights /= weights.sum(axis=1, keepdims=True) + TINY
    weights *= rule.route_scale
    return gate_of(weights, ids, s, s / (s.sum(axis=1, keepdims=True) + TINY), valid)


def keep_best_groups(inout_choice: Array, n_groups: int, top_groups: int) -> None:
    """Write -inf outside the groups whose two best experts have the largest sums.   [N,E]"""
    n, e = inout_choice.shape
    grouped = inout_choice.reshape(n, n_groups, e // n_groups)
    two_best = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)  # [N,n_groups]
    outside = np.ones((n, n_groups), dtype=np.bool_)
    np.put_along_axis(outside, largest(two_best, top_groups), False, axis=1)
    grouped[outside] = -np.inf


def sigmoid_gate_backward(dweights: Array | None, dprobs: Array, gate: Gate, rule: Rule) -> Array:
    s = gate.scores
    total = s.sum(axis=1, keepdims=True) + TINY
    ds = dprobs / total - row_dots(dprobs, s) / (total * total)
    if dweights is not None:
        dchosen = rule.route_scale * dweights
        if rule.norm:
            chosen = np.take_along_axis(s, gate.ids, axis=1).sum(axis=1, keepdims=True) + TINY  # [N,1]
            dchosen = (dchosen - row_dots(dweights, gate.weights)) / chosen
        add_at_ids(ds, gate.ids, dchosen)
    return ds * s * (1.0 - s)


# ---- experts choose tokens -------------------------------------------------------------------------------------------------------


def expert_choice_gate(logits: Array, valid: Array | None, rule: Rule) -> Gate:
    n, e = logits.shape
    p = softmax(logits)
    tokens = np.arange(n) if valid is None else np.flatnonzero(valid)  # those that may be chosen
    size = min(len(tokens), max(1, -(-len(tokens) * rule.top_k // e)))
    weights, ids = np.zeros_like(p), np.full((n, e), -1, dtype=np.int32)
    for expert in range(e):
        best = np.argsort(-p[tokens, expert], kind="stable")[:size]
        weights[tokens[best], expert] = p[tokens[best], expert]
        ids[tokens[best], expert] = expert
    counts = np.full(e, size, dtype=np.int32)
    return Gate(weights, ids, p, counts, p[tokens].sum(axis=0))


def expert_choice_gate_backward(dweights: Array | None, dprobs: Array, gate: Gate) -> Array:
    p, dp = gate.scores, dprobs.copy()
    if dweights is not None:
        dp += np.where(gate.ids < 0, 0.0, dweights)
    return p * (dp - row_dots(dp, p))


# ---- parts -----------------------------------------------------------------------------------------------------------------------


def gate_of(weights: Array, ids: Array, scores: Array, probs: Array, valid: Array | None) -> Gate:
    """Return the gate with its counts and sums, which only valid tokens enter."""
    counts = np.zeros(scores.shape[1], dtype=np.int32)
    np.add.at(counts, ids if valid is None else ids[valid], 1)
    return Gate(weights, ids, scores, counts, (probs if valid is None else probs[valid]).sum(axis=0))


def softmax(x: Array) -> Array:
    """[N,E] -> [N,E]"""
    p = np.exp(x - x.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p


def largest(x: Array, k: int) -> Array:
    """Return the ids of the k largest of each row, ties to the lowest, NaN last.   [N,E] -> int32 [N,k]"""
    return np.argsort(-x, axis=1, kind="stable")[:, :k].astype(np.int32)


def row_dots(a: Array, b: Array) -> Array:
    """[N,E], [N,E] -> [N,1]"""
    return np.sum(a * b, axis=1, keepdims=True)


def add_at_ids(inout: Array, ids: Array, values: Array) -> None:
    """inout[n, ids[n,j]] += values[n,j]; the ids of a row differ.   [N,E], [N,K], [N,K]"""
    rows = np.arange(len(ids))
    for slot in range(ids.shape[1]):
        inout[rows, ids[:, slot]] += values[:, slot]
