"""The experts' layers: a product fused with the activation, a second product, and their backward; grouped.py launches them.

moe_ffn gathers tokens as it loads them, in the first product and in its weights' gradient, so it makes no copy of them sorted by expert.
Backward needs x, the pre-activation and the hidden rows: the first product writes both, and recomputing `hidden` would write it again.
The combine weights are not fused: the rows of a token are in tiles of different blocks, so a product could not sum them in a fixed order.
`ffn`, with one expert, is not overridden: its products are the library's, which are faster than mma.sync, and the activation is cheap.
"""

from typing import Any

from minimoe.backend import Array
from minimoe.reference.expert import ExpertSaved, ExpertWeights, MoESaved
from minimoe.reference.routing import Plan
from minimoe_cupy.activation import KINDS
from minimoe_cupy.grouped import ACTIVATE, BACKWARD, FORWARD, TRANSPOSED, CudaGrouped
from minimoe_cupy.launch import computed, wide


class CudaExpert(CudaGrouped):
    def expert_ffn(self, rows: Array, weights: ExpertWeights, offsets: Array, activation: str, limit: float = 0.0) -> tuple[Array, Any]:
        if not computed(rows, *weights):
            return super().expert_ffn(rows, weights, offsets, activation, limit)
        return self._experts(rows, weights, offsets, activation, limit, None)

    def expert_ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, ExpertWeights]:
        if not computed(dy, saved.rows, *saved.weights):
            return super().expert_ffn_backward(dy, saved, activation, limit, out, accumulate)
        return self._experts_backward(dy, saved, activation, limit, out, accumulate, None)

    def moe_ffn(
        self, x: Array, gate_weights: Array, plan: Plan, weights: ExpertWeights, activation: str, limit: float = 0.0
    ) -> tuple[Array, Any]:
        if not computed(x, *weights) or not wide(gate_weights):
            return super().moe_ffn(x, gate_weights, plan, weights, activation, limit)
        y_rows, expert = self._experts(x, weights, plan.offsets, activation, limit, plan)
        return self.combine(y_rows, gate_weights, plan), MoESaved(y_rows, gate_weights, plan, expert)

    def moe_ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, Array, ExpertWeights]:
        expert = saved.expert  # its `rows` are x if this backend saved it
        if not computed(expert.rows, *expert.weights) or not wide(saved.gate_weights):
            return super().moe_ffn_backward(dy, saved, activation, limit, out, accumulate)
        dy = self.xp.astype(dy, expert.rows.dtype, copy=False)
        dy_rows, dgate_weights = self.combine_backward(dy, saved.y_rows, saved.gate_weights, saved.plan)
        drows, dweights = self._experts_backward(dy_rows, expert, activation, limit, out, accumulate, saved.plan)
        return self.dispatch_backward(drows, saved.plan), dgate_weights, dweights

    # ---- for rows that are sorted by expert, or gathered from x [N,D] by a plan -------------------------------------------------------

    def _experts(
        self, x: Array, weights: ExpertWeights, offsets: Array, activation: str, limit: float, plan: Plan | None
    ) -> tuple[Array, ExpertSaved]:
        """-> y_rows [R,D], saved"""
        r, (_, d, h) = x.shape[0] if plan is None else plan.order.shape[0], weights.down.shape
        pre_activation = self.xp.empty((r, weights.up.shape[1]), dtype=x.dtype)
        hidden = self.xp.empty((r, h), dtype=x.dtype)
        y = self.xp.empty((r, d), dtype=x.dtype)
        self._rows(
            ACTIVATE, x, weights.up, offsets, pre_activation, bias=weights.up_bias, hidden=hidden, kind=KINDS[activation], limit=limit,
            **_gather(plan),
        )  # fmt: skip
        self._rows(FORWARD, hidden, weights.down, offsets, y, bias=weights.down_bias)
        return y, ExpertSaved(x, weights, offsets, pre_activation, hidden)

    def _experts_backward(
        self, dy: Array, saved: ExpertSaved, activation: str, limit: float, out: ExpertWeights | None, accumulate: bool, plan: Plan | None
    ) -> tuple[Array, ExpertWeights]:
        """-> drows [R,D], the weights' gradients"""
        x, weights, offsets, pre_activation, hidden = saved
        to = out or ExpertWeights(None, None)
        dpre_activation = self.xp.empty(pre_activation.shape, dtype=dy.dtype)
        drows = self.xp.empty((pre_activation.shape[0], x.shape[1]), dtype=dy.dtype)
        kind = KINDS[activation]
        self._rows(BACKWARD, dy, weights.down, offsets, dpre_activation, pre_activation=pre_activation, kind=kind, limit=limit)
        ddown = self._dw(dy, hidden, offsets, to.down, accumulate)
        dup = self._dw(dpre_activation, x, offsets, to.up, accumulate, **_gather(plan))
        dup_bias = None if weights.up_bias is None else self._db(dpre_activation, offsets, to.up_bias, accumulate)
        ddown_bias = None if weights.down_bias is None else self._db(dy, offsets, to.down_bias, accumulate)
        self._rows(TRANSPOSED, dpre_activation, weights.up, offsets, drows)
        return drows, ExpertWeights(dup, ddown, dup_bias, ddown_bias)


def _gather(plan: Plan | None) -> dict[str, Any]:
    return {} if plan is None else {"order": plan.order, "slots": plan.inverse.shape[1]}
