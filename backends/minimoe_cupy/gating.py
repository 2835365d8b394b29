"""Gating: a token's scores, experts and weights by one warp, from one reading of its logits. The kernels are in kernels/gate.cu,
kernels/gate_backward.cu and, for the choice of tokens by experts, kernels/expert_choice.cu.

Routers that KINDS does not name, rows of more than 1024 experts, and logits that are not float32 go to the reference.
"""

from minimoe.backend import Array
from minimoe.reference.gating import Gate, Rule
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import ceil_div, check_shape, instance, wide
from minimoe_cupy.loader import Source
from minimoe_cupy.selection import BLOCK, MOST_COLUMNS, WARPS, CudaSelection, blocks_for, by_layout, layout

SOFTMAX_TOPK, TOPK_SOFTMAX, SIGMOID_BIAS, ALL = (
    constant("gate.cuh", name) for name in ("SOFTMAX_TOPK", "TOPK_SOFTMAX", "SIGMOID_BIAS", "ALL")
)
KINDS = {
    "softmax_topk": SOFTMAX_TOPK, "switch": SOFTMAX_TOPK, "topk_softmax": TOPK_SOFTMAX, "noisy_topk": TOPK_SOFTMAX,
    "sigmoid_bias": SIGMOID_BIAS, "expert_choice": ALL,
}  # fmt: skip
OVER_ALL = Source("gate.cu", by_layout("gate", SOFTMAX_TOPK))
OVER_CHOSEN = Source("gate.cu", by_layout("gate", TOPK_SOFTMAX))
SIGMOID = Source("gate.cu", by_layout("gate", SIGMOID_BIAS))
PROBABILITIES = Source("gate.cu", by_layout("gate", ALL))
FORWARD = (OVER_ALL, OVER_CHOSEN, SIGMOID, PROBABILITIES)  # by kind: a model compiles what its router needs
BACKWARD = Source("gate_backward.cu", by_layout("gate_backward"))
CHOICE = Source("expert_choice.cu", ("choice_histogram", "choice_digit", "choice_ties", "choice_write"))

CHOICE_WARPS, BITS, PIECE = (constant("expert_choice.cu", name) for name in ("WARPS", "BITS", "PIECE"))
CHOICE_BLOCK = 32 * CHOICE_WARPS


class CudaGating(CudaSelection):
    routers = frozenset(KINDS)

    def gate(self, logits: Array, bias: Array | None, valid: Array | None, *, rule: Rule) -> Gate:
        kind = KINDS.get(rule.router)
        bias = bias if kind == SIGMOID_BIAS else None
        n, e = logits.shape
        if kind is None or not wide(logits, bias) or e > MOST_COLUMNS:
            return super().gate(logits, bias, valid, rule=rule)
        check_rule(rule, e)
        check_shape("gate", (e,), bias=bias)
        check_shape("gate", (n,), valid=valid)
        logits, bias, valid = self._contiguous(logits, bias, valid)
        xp, blocks, k = self.xp, blocks_for(n), rule.top_k
        scores, parts = xp.empty((n, e), dtype=xp.float32), xp.empty((blocks, e), dtype=xp.float32)
        weights = ids = count_parts = None
        if kind != ALL:
            weights, ids = xp.empty((n, k), dtype=xp.float32), xp.empty((n, k), dtype=xp.int32)
            count_parts = xp.empty((blocks, e), dtype=xp.int32)
        grouped = kind == SIGMOID_BIAS and rule.n_groups > 1
        groups = rule.n_groups if grouped else 1
        name = instance("gate", kind, *layout(e, logits, scores, *(() if bias is None else (bias,))))
        options = rule.normalised or kind == TOPK_SOFTMAX, rule.route_scale if kind == SIGMOID_BIAS else 1.0, groups, rule.top_groups
        args = logits, bias, valid, weights, ids, scores, parts, count_parts, n, e, k, *options
        shared = 8 * e + (4 * WARPS * (e + groups) if grouped else 0)
        self._launch(FORWARD[kind], name, blocks, BLOCK, *args, shared=shared)
        prob_sum, counts = self._add_partials(parts, count_parts)
        if kind == ALL:
            return Gate(*self._chosen(scores, valid, k), prob_sum)
        return Gate(weights, ids, scores, counts, prob_sum)

    def gate_backward(self, dweights: Array | None, dprob_sum: Array | None, gate: Gate, valid: Array | None, *, rule: Rule) -> Array:
        kind = KINDS.get(rule.router)
        (n, e), width = gate.scores.shape, gate.ids.shape[1]
        if kind is None or not wide(dweights, dprob_sum, gate.weights, gate.scores) or e > MOST_COLUMNS:
            return super().gate_backward(dweights, dprob_sum, gate, valid, rule=rule)
        check_shape("gate_backward", (n, e if kind == ALL else width), dweights=dweights, weights=gate.weights, ids=gate.ids)
        check_shape("gate_backward", (e,), dprob_sum=dprob_sum)
        check_shape("gate_backward", (n,), valid=valid)
        dweights, dprob_sum, valid = self._contiguous(dweights, dprob_sum, valid)
        weights, ids, scores = self._contiguous(gate.weights, gate.ids, gate.scores)
        dlogits = self.xp.empty((n, e), dtype=self.xp.float32)
        rows = scores, dlogits, *(a for a in (dprob_sum, dweights if kind == ALL else None) if a is not None)
        name = instance("gate_backward", *layout(e, *rows))
        options = rule.normalised, rule.route_scale if kind == SIGMOID_BIAS else 1.0
        args = dweights, dprob_sum, weights, ids, scores, valid, dlogits, kind, n, e, width, *options
        self._launch(BACKWARD, name, blocks_for(n), BLOCK, *args)
        return dlogits

    def _chosen(self, p: Array, valid: Array | None, k: int) -> tuple[Array, Array, Array, Array]:
        """Returns what each expert takes of p [N,E].   -> weights, ids [N,E], p, counts [E]"""
        xp, (n, e) = self.xp, p.shape
        grid = ceil_div(e, 32), ceil_div(n, PIECE)
        histogram, prefix = xp.zeros((1 << BITS, e), dtype=xp.int32), xp.empty(e, dtype=xp.uint32)
        wanted, counts = xp.empty(e, dtype=xp.int32), xp.empty(e, dtype=xp.int32)
        ties = xp.empty((grid[1], e), dtype=xp.int32)
        weights, ids = xp.empty((n, e), dtype=xp.float32), xp.empty((n, e), dtype=xp.int32)
        for shift in range(32 - BITS, -1, -BITS):
            mask = (0xFFFFFFFF << (shift + BITS)) & 0xFFFFFFFF  # the digits that are found
            self._launch(CHOICE, "choice_histogram", grid, CHOICE_BLOCK, p, valid, prefix, histogram, n, e, mask, shift)
            args = histogram, prefix, wanted, counts, e, k, mask, shift
            self._launch(CHOICE, "choice_digit", ceil_div(e, CHOICE_WARPS), CHOICE_BLOCK, *args)
        self._launch(CHOICE, "choice_ties", grid, CHOICE_BLOCK, p, valid, prefix, wanted, ties, n, e)
        self._launch(CHOICE, "choice_write", grid, CHOICE_BLOCK, p, valid, prefix, wanted, ties, weights, ids, counts, n, e)
        return weights, ids, p, counts


def check_rule(rule: Rule, e: int) -> None:
    """Refuse, with ValueError, a choice that E experts do not allow."""
    kind = KINDS[rule.router]
    if kind != ALL and not 1 <= rule.top_k <= e:
        raise ValueError(f"gate: top_k ({rule.top_k}) must be 1 to {e}, the number of experts")
    if kind == SIGMOID_BIAS and (rule.n_groups < 1 or e % rule.n_groups or not 1 <= rule.top_groups <= rule.n_groups):
        raise ValueError(f"gate: {e} experts in {rule.n_groups} groups, {rule.top_groups} of them: wanted groups of one size, at least one")
