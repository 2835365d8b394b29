"""Moves rows to their experts and back: the launches of kernels/dispatch.cu and kernels/combine.cu."""

from minimoe.backend import Array
from minimoe.reference.routing import Plan
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import CudaLaunch, by_width, ceil_div, computed, instance, instances, lanes, wide, writable
from minimoe_cupy.loader import Source

DISPATCH_WARPS, COMBINE_WARPS = (constant(file, "WARPS") for file in ("dispatch.cu", "combine.cu"))
DISPATCH = Source("dispatch.cu", by_width("dispatch"))
AT_ONCE = (1, 2, 4, constant("combine.cu", "MOST"))  # rows that a lane loads at once: a kernel for each
COMBINE = Source(
    "combine.cu",
    tuple(
        name
        for kernel in ("combine", "combine_backward")
        for dtype, v in (("float", (1, 4)), ("bf16", (1, 8)))
        for name in instances(kernel, [dtype], AT_ONCE, v)
    ),
)


class CudaDispatch(CudaLaunch):
    def dispatch(self, x: Array, plan: Plan, out: Array | None = None) -> Array:
        if not computed(x, out) or not writable(out, (plan.order.shape[0], x.shape[1]), x.dtype):
            return super().dispatch(x, plan, out)
        x, inverse = self._contiguous(x, plan.inverse)
        n, d = x.shape
        rows = self.xp.empty((plan.order.shape[0], d), dtype=x.dtype) if out is None else out
        name = instance("dispatch", x.dtype, lanes(d, x, rows))
        self._launch(DISPATCH, name, ceil_div(n, DISPATCH_WARPS) if d else 0, 32 * DISPATCH_WARPS, x, inverse, rows, n, inverse.shape[1], d)
        return rows

    def dispatch_backward(self, drows: Array, plan: Plan) -> Array:
        if not computed(drows):
            return super().dispatch_backward(drows, plan)
        return self._combine(drows, None, plan, None)

    def combine(self, rows: Array, weights: Array, plan: Plan, out: Array | None = None) -> Array:
        if not computed(rows, out) or not wide(weights) or not writable(out, (plan.inverse.shape[0], rows.shape[1]), rows.dtype):
            return super().combine(rows, weights, plan, out)
        return self._combine(rows, weights, plan, out)

    def _combine(self, rows: Array, weights: Array | None, plan: Plan, out: Array | None) -> Array:
        rows, weights, inverse = self._contiguous(rows, weights, plan.inverse)
        (n, width), d = inverse.shape, rows.shape[1]
        y = self.xp.empty((n, d), dtype=rows.dtype) if out is None else out
        name = instance("combine", rows.dtype, at_once(width), lanes(d, rows, y))
        self._launch(COMBINE, name, ceil_div(n, COMBINE_WARPS) if d else 0, 32 * COMBINE_WARPS, rows, weights, inverse, y, n, width, d)
        return y

    def combine_backward(self, dy: Array, rows: Array, weights: Array, plan: Plan) -> tuple[Array, Array]:
        if not computed(dy, rows) or not wide(weights):
            return super().combine_backward(dy, rows, weights, plan)
        dy, rows, weights, inverse = self._contiguous(dy, rows, weights, plan.inverse)
        (n, width), d = inverse.shape, rows.shape[1]
        drows, dweights = self.xp.empty(rows.shape, dtype=dy.dtype), self.xp.empty((n, width), dtype=weights.dtype)
        name = instance("combine_backward", dy.dtype, at_once(width), lanes(d, dy, rows, drows))
        args = (dy, rows, weights, inverse, drows, dweights, n, width, d)
        self._launch(COMBINE, name, ceil_div(n, COMBINE_WARPS), 32 * COMBINE_WARPS, *args)
        return drows, dweights


def at_once(width: int) -> int:
    """Returns how many of a token's rows are loaded together: all of them, or as many as a lane holds."""
    return next((rows for rows in AT_ONCE if width <= rows), AT_ONCE[-1])
