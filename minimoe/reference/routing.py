"""Routing: the integer plan that sorts (token, slot) pairs by expert, and the moves of rows that it describes.

order [R]     order[r] = n * W + j: row r is slot j of token n; rows are sorted by expert, then by n * W + j
inverse [N,W] the row of each slot, -1 for none (dropped, padding, not chosen)
offsets [E+1] rows offsets[e] to offsets[e+1] belong to expert e; rows at or past offsets[E] are unused and never read

dispatch gathers rows by `order`; combine gathers them back by `inverse` and sums over the slots with the weights. Both backwards are
gathers too, so nothing here adds in an order that could change: equal inputs give equal bits.
"""

import math
from typing import NamedTuple

from minimoe.reference.arrays import Array, ArrayLayer


class Plan(NamedTuple):
    """Which row goes where; all int32 and on the device."""

    order: Array
    inverse: Array
    offsets: Array


class RoutingKernels(ArrayLayer):
    def route(
        self, ids: Array, weights: Array, valid: Array | None, *, n_experts: int, rows: int, capacity: int | Array | None = None,
        priority: str = "position",
    ) -> Plan:  # fmt: skip
        """ids [N,W] int32 (-1: none), weights [N,W], valid [N] bool or None, rows R: N*K, for expert choice E*c -> Plan

        `capacity` (None: dropless) keeps that many rows of an expert: the first by token, then slot (`position`), or those of the largest
        weight, ties to the first (`probability`).
        """
        xp = self.xp
        flat = xp.reshape(ids, (-1,))
        nowhere = xp.full_like(flat, n_experts)
        used = flat >= 0
        if valid is not None:
            used = used & xp.reshape(xp.broadcast_to(valid[:, None], ids.shape), (-1,))
        expert = xp.where(used, flat, nowhere)
        if capacity is not None:
            rank = self._rank(expert, weights if priority == "probability" else None, n_experts)
            expert = xp.where(rank < capacity, expert, nowhere)
        order = self.argsort(expert)
        place = xp.reshape(self.argsort(order), ids.shape)
        kept = xp.reshape(expert, ids.shape) < n_experts
        inverse = xp.where(kept, place, xp.full_like(place, -1))
        offsets = self._offsets(expert, n_experts)
        return Plan(*(xp.astype(a, xp.int32, copy=False) for a in (order[:rows], inverse, offsets)))

    def dispatch(self, x: Array, plan: Plan, out: Array | None = None) -> Array:
        """rows[r] = x[order[r] // W].   x [N,D] -> [R,D]"""
        return self.store(self.xp.take(x, plan.order // plan.inverse.shape[1], axis=0), out)

    def dispatch_backward(self, drows: Array, plan: Plan) -> Array:
        """dx[n] = sum_j drows[inverse[n,j]].   drows [R,D] -> dx [N,D]"""
        return self._gather_sum(drows, plan, None)

    def combine(self, rows: Array, weights: Array, plan: Plan, out: Array | None = None) -> Array:
        """y[n] = sum_j weights[n,j] * rows[inverse[n,j]].   rows [R,D], weights [N,W] -> [N,D]"""
        return self.store(self._gather_sum(rows, plan, weights), out)

    def combine_backward(self, dy: Array, rows: Array, weights: Array, plan: Plan) -> tuple[Array, Array]:
        """drows[r] = weights[order[r]] * dy[order[r] // W],   dweights[n,j] = <rows[inverse[n,j]], dy[n]>.

        -> drows [R,D], dweights [N,W]
        """
        xp = self.xp
        width = plan.inverse.shape[1]
        drows = xp.take(dy, plan.order // width, axis=0)
        drows *= xp.astype(xp.take(xp.reshape(weights, (-1,)), plan.order), dy.dtype, copy=False)[:, None]
        slots = []
        for j in range(width):
            product, used = self._slot(rows, plan, j)
            product *= dy
            slots.append(xp.where(used, xp.sum(self.wide(product), axis=-1), xp.zeros_like(used, dtype=weights.dtype)))
        return drows, xp.stack(slots, axis=-1)

    def noisy_load(self, clean: Array, noisy: Array, sigma: Array, valid: Array | None, *, k: int) -> tuple[Array, Array]:
        """Return how often each expert would be chosen if only its noise were drawn again (Shazeer et al. 2017, appendix A).

        load_i = sum_n Phi((z_ni - t_ni) / sigma_ni), t_ni the k-th largest of h over the experts except i: the (k+1)-th value of h if i
        is among the top k, else the k-th.   clean z, noisy h, sigma [N,E], k < E -> load [E], ids [N,k+1] of the k+1 largest h
        """
        xp = self.xp
        _, ids = self.top_k(noisy, k + 1)
        u = (clean - self._threshold(noisy, ids, k)) / sigma
        load = 0.5 * (1.0 + self.erf(u * math.sqrt(0.5)))
        if valid is not None:
            load = xp.where(valid[:, None], load, xp.zeros_like(load))
        return xp.sum(load, axis=0), ids

    def noisy_load_backward(
        self, dload: Array, clean: Array, noisy: Array, sigma: Array, ids: Array, valid: Array | None, *, k: int
    ) -> tuple[Array, Array, Array]:
        """-> dclean, dnoisy, dsigma [N,E].   With g = dload phi(u) / sigma:  dclean = g, dt = -g (to the h that is t), dsigma = -g u"""
        xp = self.xp
        u = (clean - self._threshold(noisy, ids, k)) / sigma
        g = dload * xp.exp(-0.5 * u * u) / (math.sqrt(2.0 * math.pi) * sigma)
        if valid is not None:
            g = xp.where(valid[:, None], g, xp.zeros_like(g))
        experts = xp.arange(noisy.shape[1], dtype=xp.int32)
        zeros = xp.zeros_like(g)
        among = self._among(ids[:, :k], noisy.shape[1])
        from_next = xp.sum(xp.where(among, g, zeros), axis=-1, keepdims=True)
        from_kth = xp.sum(xp.where(among, zeros, g), axis=-1, keepdims=True)
        dnoisy = xp.where(ids[:, k - 1, None] == experts, -from_kth, zeros)
        dnoisy += xp.where(ids[:, k, None] == experts, -from_next, zeros)
        return g, dnoisy, -g * u

    # ---- parts -----------------------------------------------------------------------------------------------------------------

    def _rank(self, expert: Array, weights: Array | None, n_experts: int) -> Array:
        """Return the rank of each pair among its expert's, by position or, given weights, from the largest.   [N*W] -> [N*W]"""
        xp = self.xp
        if weights is None:
            by_expert = self.argsort(expert)
        else:
            by_weight = self.argsort(-xp.reshape(weights, (-1,)))
            by_expert = xp.take(by_weight, self.argsort(xp.take(expert, by_weight)))
        place = self.argsort(by_expert)
        starts = self._offsets(expert, n_experts)
        return place - xp.take(starts, expert)

    def _offsets(self, expert: Array, n_experts: int) -> Array:
        """Exclusive sums of the counts; pairs without an expert carry n_experts and come last.   -> [E+1]"""
        xp = self.xp
        counts = self.bincount(expert, n_experts + 1)[:n_experts]
        ends = xp.cumulative_sum(counts)
        return xp.concat((xp.zeros(1, dtype=ends.dtype), ends))

    def _slot(self, rows: Array, plan: Plan, j: int) -> tuple[Array, Array]:
        """Return the row of each token's slot j, zero if it has none: an unused row may hold anything.   -> [N,D], used [N]"""
        index = plan.inverse[:, j]
        used = index >= 0
        taken = self.xp.take(rows, self.xp.where(used, index, self.xp.zeros_like(index)), axis=0)
        return self.xp.where(used[:, None], taken, self.xp.zeros_like(taken)), used

    def _gather_sum(self, rows: Array, plan: Plan, weights: Array | None) -> Array:
        total: Array = None
        for j in range(plan.inverse.shape[1]):
            taken, _ = self._slot(rows, plan, j)
            if weights is not None:
                taken *= self.xp.astype(weights[:, j, None], rows.dtype, copy=False)
            total = taken if total is None else self.store(taken, total, accumulate=True)
        return total

    def _among(self, ids: Array, e: int) -> Array:
        """[N,k] -> bool [N,E]: true where the expert is one of those"""
        return self.xp.any(ids[:, :, None] == self.xp.arange(e, dtype=self.xp.int32), axis=1)

    def _threshold(self, noisy: Array, ids: Array, k: int) -> Array:
        """t of `noisy_load`.   -> [N,E]"""
        xp = self.xp
        edges = xp.take_along_axis(noisy, xp.astype(ids[:, k - 1 : k + 1], xp.int64), axis=-1)  # the k-th and the (k+1)-th
        return xp.where(self._among(ids[:, :k], noisy.shape[1]), edges[:, 1:], edges[:, :1])
