"""Experts: products with rows grouped by expert, the feed-forward of all experts at once, and the whole routed layer.

rows [R,I] lie expert by expert, `offsets` [E+1] bound them, weights [E,O,I] hold a matrix for each expert:
y[r] = W_e x[r] for the expert e whose rows hold r.   dx[r] = W_e^T dy[r],   dW_e = dy_e^T x_e,   db_e = sum(dy_e).
The gradients of weights may be added to float32 where rows are bfloat16: then they are not rounded.
An expert without rows has a zero gradient. Rows at or past offsets[E] may have any values (here zeros): nothing reads them.
What a composite saves may alias its inputs, which must not change until its backward has run.
"""

from typing import Any, NamedTuple

from minimoe.reference import masked
from minimoe.reference.activation import ActivationKernels
from minimoe.reference.arrays import Array
from minimoe.reference.linear import LinearKernels
from minimoe.reference.routing import Plan, RoutingKernels


class ExpertWeights(NamedTuple):
    """The weights of all experts of a layer; those of a dense layer have no axis E. O is 2H for swiglu (gate rows first), else H."""

    up: Array  # [E,O,D]
    down: Array  # [E,D,H]
    up_bias: Array | None = None  # [E,O]
    down_bias: Array | None = None  # [E,D]


class ExpertSaved(NamedTuple):
    """What the reference keeps from expert_ffn for its backward."""

    rows: Array
    weights: ExpertWeights
    offsets: Array
    pre_activation: Array
    hidden: Array


class FFNSaved(NamedTuple):
    """What the reference keeps from ffn for its backward."""

    x: Array
    weights: ExpertWeights
    pre_activation: Array
    hidden: Array


class MoESaved(NamedTuple):
    """What the reference keeps from moe_ffn for its backward."""

    y_rows: Array
    gate_weights: Array
    plan: Plan
    expert: Any


class ExpertKernels(RoutingKernels, ActivationKernels, LinearKernels):
    def grouped_matmul(self, x: Array, weight: Array, offsets: Array, transpose: bool = False, out: Array | None = None) -> Array:
        """y[r] = W_e x[r], or W_e^T x[r] if `transpose`.   x [R,I], weight [E,O,I], offsets [E+1] -> [R,O]  (transpose: [R,O] -> [R,I])"""
        if not self.reads_offsets:
            return self.store(masked.grouped_matmul(self, x, weight, offsets, transpose), out)
        xp = self.xp
        width = weight.shape[2] if transpose else weight.shape[1]
        y = xp.empty((x.shape[0], width), dtype=x.dtype) if out is None else out
        ends = self.offsets_on_host(offsets)
        for e, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
            if stop > start:
                y[start:stop, :] = xp.matmul(x[start:stop, :], weight[e, :, :] if transpose else weight[e, :, :].T)
        y[ends[-1] :, :] = 0.0
        return y

    def grouped_matmul_dw(self, dy: Array, x: Array, offsets: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        """dW_e = dy_e^T x_e.   dy [R,O], x [R,I] -> [E,O,I]

        This is a kernel of its own, not `grouped_matmul` with other arguments, because the groups cut another axis:

            grouped_matmul: y[r] = W_e x[r]             grouped_matmul_dw: dW_e = dy_e^T x_e

               I         O          O                         R               I            I
             +----+    +----+     +----+               +--+------+---+      +----+       +----+
           R | e0 |  I |W0^T|     | e0 | R           O |e0|  e1  |e2 |    R | e0 |     O |dW_0|
             +----+    +----+     +----+               +--+------+---+      +----+       +----+
             |    |    +----+     |    |                    dy^T            |    |       +----+
             | e1 |  x |W1^T|  =  | e1 |                              x     | e1 |  =    |dW_1|
             |    |    +----+     |    |                                    |    |       +----+
             +----+    +----+     +----+                                    +----+       +----+
             | e2 |    |W2^T|     | e2 |                                    | e2 |       |dW_2|
             +----+    +----+     +----+                                    +----+       +----+

        On the left `offsets` cut the rows of the result. Every sum has I terms, so all tiles of the result cost the same, and a row at or
        past offsets[E] gives a row that is never read. On the right `offsets` cut the axis that is summed. Each expert has a whole [O,I]
        of results, whose sums have as many terms as the expert has rows: from 0, where zeros must be written all the same, to R. A fast
        kernel divides the work by tiles of dW_e and leaves each sum whole, so that it has one order. A row at or past offsets[E] must not
        enter any sum. And the result is a weight's gradient, which is written, or added, where the optimizer keeps it: hence `out` and
        `accumulate`.
        """
        dy, x = self.for_sum(dy, out), self.for_sum(x, out)
        if not self.reads_offsets:
            return self.store(masked.grouped_matmul_dw(self, dy, x, offsets), out, accumulate)
        xp = self.xp
        ends = self.offsets_on_host(offsets)
        dw = xp.zeros((len(ends) - 1, dy.shape[1], x.shape[1]), dtype=x.dtype)
        for e, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
            if stop > start:
                dw[e, :, :] = xp.matmul(dy[start:stop, :].T, x[start:stop, :])
        return self.store(dw, out, accumulate)

    def grouped_bias(self, bias: Array, offsets: Array, rows: int) -> Array:
        """Give each row its expert's bias, and unused rows zero.   bias [E,O] -> [R,O]"""
        if not self.reads_offsets:
            return masked.grouped_bias(self, bias, offsets, rows)
        full = self.xp.zeros((rows, bias.shape[1]), dtype=bias.dtype)
        ends = self.offsets_on_host(offsets)
        for e, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
            full[start:stop, :] = bias[e, :]
        return full

    def grouped_bias_backward(self, dy: Array, offsets: Array) -> Array:
        """db_e = sum(dy_e).   dy [R,O] -> [E,O]"""
        if not self.reads_offsets:
            return masked.grouped_bias_backward(self, dy, offsets)
        xp, wide = self.xp, self.wide(dy)
        ends = self.offsets_on_host(offsets)
        db = xp.stack([xp.sum(wide[start:stop, :], axis=0) for start, stop in zip(ends, ends[1:], strict=False)], axis=0)
        return self.narrowed(db, dy, None)

    def activate(self, x: Array, activation: str, limit: float = 0.0) -> Array:
        """Apply the named activation.   [...,O] -> [...,H]"""
        if activation == "swiglu":
            return self.swiglu(x, limit)
        if activation == "relu":
            return self.relu(x)
        return self.gelu(x, tanh=activation == "gelu_tanh")

    def activate_backward(self, dy: Array, x: Array, activation: str, limit: float = 0.0) -> Array:
        """-> dx [...,O]"""
        if activation == "swiglu":
            return self.swiglu_backward(dy, x, limit)
        if activation == "relu":
            return self.relu_backward(dy, x)
        return self.gelu_backward(dy, x, tanh=activation == "gelu_tanh")

    # ---- composites ------------------------------------------------------------------------------------------------------------

    def ffn(self, x: Array, weights: ExpertWeights, activation: str, limit: float = 0.0) -> tuple[Array, Any]:
        """down(activation(up(x))): one expert for every row, with weights that have no axis E.   x [...,D] -> [...,D], saved"""
        pre_activation = self.linear(x, weights.up, weights.up_bias)
        hidden = self.activate(pre_activation, activation, limit)
        return self.linear(hidden, weights.down, weights.down_bias), FFNSaved(x, weights, pre_activation, hidden)

    def ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, ExpertWeights]:
        """-> dx [...,D], the weights' gradients (in `out` if given, added to it if `accumulate`)"""
        weights, to = saved.weights, out or ExpertWeights(None, None)
        ddown = self.linear_dw(dy, saved.hidden, to.down, accumulate)
        ddown_bias = None if weights.down_bias is None else self.linear_db(dy, to.down_bias, accumulate)
        dpre_activation = self.activate_backward(self.linear_dx(dy, weights.down), saved.pre_activation, activation, limit)
        dup = self.linear_dw(dpre_activation, saved.x, to.up, accumulate)
        dup_bias = None if weights.up_bias is None else self.linear_db(dpre_activation, to.up_bias, accumulate)
        return self.linear_dx(dpre_activation, weights.up), ExpertWeights(dup, ddown, dup_bias, ddown_bias)

    def expert_ffn(self, rows: Array, weights: ExpertWeights, offsets: Array, activation: str, limit: float = 0.0) -> tuple[Array, Any]:
        """down_e(activation(up_e(rows))).   rows [R,D] -> [R,D], saved"""
        pre_activation = self.grouped_matmul(rows, weights.up, offsets)
        if weights.up_bias is not None:
            pre_activation += self.grouped_bias(weights.up_bias, offsets, rows.shape[0])
        hidden = self.activate(pre_activation, activation, limit)
        y = self.grouped_matmul(hidden, weights.down, offsets)
        if weights.down_bias is not None:
            y += self.grouped_bias(weights.down_bias, offsets, rows.shape[0])
        return y, ExpertSaved(rows, weights, offsets, pre_activation, hidden)

    def expert_ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, ExpertWeights]:
        """-> drows [R,D], the weights' gradients (in `out` if given, added to it if `accumulate`)"""
        weights, offsets = saved.weights, saved.offsets
        to = out or ExpertWeights(None, None)
        ddown = self.grouped_matmul_dw(dy, saved.hidden, offsets, to.down, accumulate)
        dhidden = self.grouped_matmul(dy, weights.down, offsets, transpose=True)
        dpre_activation = self.activate_backward(dhidden, saved.pre_activation, activation, limit)
        dup = self.grouped_matmul_dw(dpre_activation, saved.rows, offsets, to.up, accumulate)
        dup_bias = ddown_bias = None
        if weights.up_bias is not None:
            db = self.grouped_bias_backward(self.for_sum(dpre_activation, to.up_bias), offsets)
            dup_bias = self.store(db, to.up_bias, accumulate)
        if weights.down_bias is not None:
            db = self.grouped_bias_backward(self.for_sum(dy, to.down_bias), offsets)
            ddown_bias = self.store(db, to.down_bias, accumulate)
        drows = self.grouped_matmul(dpre_activation, weights.up, offsets, transpose=True)
        return drows, ExpertWeights(dup, ddown, dup_bias, ddown_bias)

    def moe_ffn(
        self, x: Array, gate_weights: Array, plan: Plan, weights: ExpertWeights, activation: str, limit: float = 0.0
    ) -> tuple[Array, Any]:
        """combine(expert_ffn(dispatch(x))).   x [N,D], gate_weights [N,W] -> [N,D], saved"""
        y_rows, expert = self.expert_ffn(self.dispatch(x, plan), weights, plan.offsets, activation, limit)
        return self.combine(y_rows, gate_weights, plan), MoESaved(y_rows, gate_weights, plan, expert)

    def moe_ffn_backward(
        self, dy: Array, saved: Any, activation: str, limit: float = 0.0, out: ExpertWeights | None = None, accumulate: bool = False
    ) -> tuple[Array, Array, ExpertWeights]:
        """-> dx [N,D], dgate_weights [N,W], the weights' gradients (as expert_ffn_backward's)"""
        dy_rows, dgate_weights = self.combine_backward(dy, saved.y_rows, saved.gate_weights, saved.plan)
        drows, dweights = self.expert_ffn_backward(dy_rows, saved.expert, activation, limit, out, accumulate)
        return self.dispatch_backward(drows, saved.plan), dgate_weights, dweights
