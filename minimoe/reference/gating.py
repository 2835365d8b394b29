"""Gating: from a router's logits z [N,E] to the experts of each token and their weights. Formulas and gradients: routers.py.

A rule's name is looked up in the table of routers, so an unknown one raises. A backend that has kernels for some routers names them in
`routers`, and passes every other rule on to the reference here.
"""

from fractions import Fraction

from minimoe.reference.arrays import Array, ArrayLayer
from minimoe.reference.routers import TINY, Gate, Rule, choice_size, find, n_valid

__all__ = ["TINY", "Gate", "GatingKernels", "Rule"]


class GatingKernels(ArrayLayer):
    routers: frozenset[str] = frozenset()  # those for which the backend has its own kernels

    def gate(self, logits: Array, bias: Array | None, valid: Array | None, *, rule: Rule) -> Gate:
        """logits [N,E] at least float32, bias [E] (sigmoid_bias) or None, valid [N] bool or None -> Gate

        Raises ConfigError for an unknown router, with the nearest name.
        """
        return find(rule.router).forward(self, logits, bias, valid, rule)

    def gate_backward(self, dweights: Array | None, dprob_sum: Array | None, gate: Gate, valid: Array | None, *, rule: Rule) -> Array:
        """dweights [N,W], dprob_sum [E], either None if unused -> dlogits [N,E]"""
        return find(rule.router).backward(self, dweights, dprob_sum, gate, valid, rule)

    # ---- sizes that depend on how many tokens are valid ------------------------------------------------------------------------

    def n_valid(self, n: int, valid: Array | None) -> int | Array:
        """Return the number of valid tokens: an int, or a 0-d int64 on the device."""
        return n_valid(self, n, valid)

    def choice_size(self, n: int, valid: Array | None, k: int, e: int) -> int | Array:
        """Return how many tokens each expert takes in expert choice; with padding, a 0-d device array."""
        return choice_size(self, n, valid, k, e)

    def capacity(self, n: int, valid: Array | None, k: int, e: int, factor: float) -> int | Array:
        """Return how many rows an expert may take: min(N, ceil(N k f / E)), with f as the decimal that was written: 1.1 is 11/10."""
        f = Fraction(repr(factor))
        count = self.n_valid(n, valid)
        rows = (count * (k * f.numerator) + (e * f.denominator - 1)) // (e * f.denominator)
        return min(n, rows) if valid is None else self.xp.minimum(count, rows)
