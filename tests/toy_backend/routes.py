"""Routing, one expert after the other: it lists its pairs (token, slot), keeps those that it has room for, and gives them rows."""

import math

import numpy as np

from minimoe.reference.routing import Plan
from toy_backend.parts import Array, Scratch, put


class Routes(Scratch):
    def route(
        self, ids: Array, weights: Array, valid: Array | None, *, n_experts: int, rows: int, capacity: int | Array | None = None,
        priority: str = "position",
    ) -> Plan:  # fmt: skip
        width = ids.shape[1]
        expert = ids.copy()
        if valid is not None:
            expert[~valid] = -1
        order = np.zeros(rows, dtype=np.int32)  # unused rows gather slot 0, which exists
        inverse = np.full(ids.shape, -1, dtype=np.int32)
        offsets = np.zeros(n_experts + 1, dtype=np.int32)
        for e in range(n_experts):
            pairs = np.flatnonzero(expert == e)  # n * W + j
            if capacity is not None and len(pairs) > capacity:
                if priority == "probability":
                    by_weight = np.argsort(-weights.reshape(-1)[pairs], kind="stable")
                    pairs = np.sort(pairs[by_weight[: int(capacity)]])
                else:
                    pairs = pairs[: int(capacity)]
            start, stop = offsets[e], offsets[e] + len(pairs)
            offsets[e + 1] = stop
            order[start:stop] = pairs
            inverse[pairs // width, pairs % width] = np.arange(start, stop)
        return Plan(order, inverse, offsets)

    def dispatch(self, x: Array, plan: Plan, out: Array | None = None) -> Array:
        return put(x[plan.order // plan.inverse.shape[1]], out)

    def dispatch_backward(self, drows: Array, plan: Plan) -> Array:
        n, width = plan.inverse.shape
        dx = np.zeros((n, drows.shape[1]), dtype=drows.dtype)
        for j in range(width):
            has = plan.inverse[:, j] >= 0  # [N]
            dx[has] += drows[plan.inverse[has, j]]
        return dx

    def combine(self, rows: Array, weights: Array, plan: Plan, out: Array | None = None) -> Array:
        n, width = plan.inverse.shape
        y = np.empty((n, rows.shape[1]), dtype=rows.dtype) if out is None else out
        y[...] = 0.0
        for j in range(width):
            has = plan.inverse[:, j] >= 0
            y[has] += weights[has, j, None] * rows[plan.inverse[has, j]]
        return y

    def combine_backward(self, dy: Array, rows: Array, weights: Array, plan: Plan) -> tuple[Array, Array]:
        width = plan.inverse.shape[1]
        drows, dweights = np.zeros_like(rows), np.zeros_like(weights)
        for j in range(width):
            has = plan.inverse[:, j] >= 0
            where = plan.inverse[has, j]
            drows[where] = weights[has, j, None] * dy[has]
            dweights[has, j] = np.sum(rows[where] * dy[has], axis=1)
        return drows, dweights

    def noisy_load(self, clean: Array, noisy: Array, sigma: Array, valid: Array | None, *, k: int) -> tuple[Array, Array]:
        load = 0.5 * (1.0 + self.erf(self._margins(clean, noisy, sigma, k) / math.sqrt(2.0)))  # [N,E]
        if valid is not None:
            load[~valid] = 0.0
        return load.sum(axis=0), np.argsort(-noisy, axis=1, kind="stable")[:, : k + 1].astype(np.int32)

    def noisy_load_backward(
        self, dload: Array, clean: Array, noisy: Array, sigma: Array, ids: Array, valid: Array | None, *, k: int
    ) -> tuple[Array, Array, Array]:
        margins = self._margins(clean, noisy, sigma, k)
        dclean = dload * np.exp(-margins * margins / 2.0) / math.sqrt(2.0 * math.pi) / sigma  # [N,E]
        if valid is not None:
            dclean[~valid] = 0.0
        dnoisy = np.zeros_like(noisy)
        rows = np.arange(len(noisy))
        for e in range(noisy.shape[1]):
            among = np.any(ids[:, :k] == e, axis=1)  # [N]: then the threshold is the next value, else the k-th
            np.subtract.at(dnoisy, (rows, np.where(among, ids[:, k], ids[:, k - 1])), dclean[:, e])
        return dclean, dnoisy, -dclean * margins

    def _margins(self, clean: Array, noisy: Array, sigma: Array, k: int) -> Array:
        """(z - t) / sigma, where t is the k-th largest noisy logit of the other experts.   -> [N,E]"""
        margins = np.empty_like(clean)
        for e in range(noisy.shape[1]):
            others = np.sort(np.delete(noisy, e, axis=1), axis=1)  # [N,E-1]
            margins[:, e] = (clean[:, e] - others[:, -k]) / sigma[:, e]
        return margins
