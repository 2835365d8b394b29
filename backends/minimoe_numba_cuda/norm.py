"""Norms, one warp per row, alone and fused with the residual addition before them. Formulas: minimoe/reference/norm.py.

A row is read twice, the second time from L1. A weight's gradient is a sum over rows: one launch sums parts of the rows, another adds the
parts in order (sums.py).
"""

import math
from typing import Any

from minimoe.backend import Array
from minimoe.reference.norm import NormSaved
from minimoe_numba_cuda.compiler import cuda, float32
from minimoe_numba_cuda.launch import blocks_of, singles
from minimoe_numba_cuda.sums import COLUMN_BLOCK, Sums, parts_of
from minimoe_numba_cuda.warp import LANES, ONE, ROW_LANES, WARPS, ZERO, sum_over_block_rows, warp_sum

BLOCK = (LANES * WARPS,)


@cuda.jit
def normalise(x, delta, weight, bias, eps, centred, total, y, mean, rstd):  # type: ignore[no-untyped-def]
    """y = (x - mean) * rstd * w + b of x + delta, which is kept in `total`; not centred: mean 0.   [N,D] -> [N,D], [N,D], [N], [N]

    delta, bias, total and mean may be empty. One warp per row, `WARPS` rows per block. Bytes: N*D read, N*D written; fused 2 N*D each.
    """
    n = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // LANES
    if n >= x.shape[0]:
        return
    lane, width = cuda.laneid, x.shape[1]
    total_of_row, squares, middle = ZERO, ZERO, ZERO
    for d in range(lane, width, LANES):
        value = x[n, d]
        if delta.size:
            value += delta[n, d]
            total[n, d] = value  # read again below, by the lane that wrote it
        total_of_row += value
        squares += value * value
    if centred:
        # the variance of differences from the mean: for large numbers the difference of squares would lose it
        middle, squares = warp_sum(total_of_row) / float32(width), ZERO
        for d in range(lane, width, LANES):
            value = (total[n, d] if delta.size else x[n, d]) - middle
            squares += value * value
    r = ONE / math.sqrt(warp_sum(squares) / float32(width) + eps)
    for d in range(lane, width, LANES):
        value = ((total[n, d] if delta.size else x[n, d]) - middle) * r * weight[d]
        y[n, d] = value + bias[d] if bias.size else value
    if lane == 0:
        rstd[n] = r
        if centred:
            mean[n] = middle


@cuda.jit
def normalise_backward(dy, x, weight, mean, rstd, dtotal, dx):  # type: ignore[no-untyped-def]
    """dx = rstd (g - xhat mean(g xhat) [- mean(g)]) + dtotal, g = dy w; mean and dtotal may be empty.   One warp per row.

    Bytes: 2 N*D read (3 with dtotal), N*D written.
    """
    n = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // LANES
    if n >= x.shape[0]:
        return
    lane, width, r = cuda.laneid, x.shape[1], rstd[n]
    middle = mean[n] if mean.size else ZERO
    product, total = ZERO, ZERO
    for d in range(lane, width, LANES):
        g = dy[n, d] * weight[d]
        product += g * (x[n, d] - middle) * r
        total += g
    product = warp_sum(product) / float32(width)
    total = warp_sum(total) / float32(width) if mean.size else ZERO
    for d in range(lane, width, LANES):
        value = (dy[n, d] * weight[d] - total - (x[n, d] - middle) * r * product) * r
        dx[n, d] = value + dtotal[n, d] if dtotal.size else value


@cuda.jit
def sum_weight_gradient(dy, x, mean, rstd, height, partials):  # type: ignore[no-untyped-def]
    """partials[p] = sum over the rows of part p of dy * xhat; then, in the other half, of dy itself if centred.   -> [P,D] or [P,2D]

    Grid: (ceil(D / 32), P), block (32, 8). Bytes: 2 N*D read.
    """
    column, width = cuda.blockIdx.x * LANES + cuda.threadIdx.x, x.shape[1]
    first = cuda.blockIdx.y * height
    last = min(first + height, x.shape[0])
    dweight, dbias = ZERO, ZERO
    if column < width:
        for n in range(first + cuda.threadIdx.y, last, ROW_LANES):
            middle = mean[n] if mean.size else ZERO
            dweight += dy[n, column] * (x[n, column] - middle) * rstd[n]
            dbias += dy[n, column]
    dweight, dbias = sum_over_block_rows(dweight), sum_over_block_rows(dbias)
    if cuda.threadIdx.y == 0 and column < width:
        partials[cuda.blockIdx.y, column] = dweight
        if partials.shape[1] > width:
            partials[cuda.blockIdx.y, width + column] = dbias


class CudaNorm(Sums):
    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array | None = None) -> tuple[Array, Array]:
        if not singles(x, weight):
            return super().rms_norm(x, weight, eps, out)
        y, _, (rstd,) = self._normalised(x, None, weight, None, eps, False, out)
        return y, rstd

    def rms_norm_backward(self, dy: Array, x: Array, weight: Array, rstd: Array) -> tuple[Array, Array]:
        if not singles(dy, x, weight, rstd):
            return super().rms_norm_backward(dy, x, weight, rstd)
        dx, dweight = self._gradients(None, dy, x, weight, (rstd,))
        return dx, dweight

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float, out: Array | None = None) -> tuple[Array, Array, Array]:
        if not singles(x, weight, bias):
            return super().layer_norm(x, weight, bias, eps, out)
        y, _, (mean, rstd) = self._normalised(x, None, weight, bias, eps, True, out)
        return y, mean, rstd

    def layer_norm_backward(self, dy: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, Array, Array]:
        if not singles(dy, x, weight, mean, rstd):
            return super().layer_norm_backward(dy, x, weight, mean, rstd)
        dx, dweight, dbias = self._gradients(None, dy, x, weight, (mean, rstd))
        return dx, dweight, dbias

    def add_rms_norm(self, x: Array, delta: Array, weight: Array, eps: float) -> tuple[tuple[Array, Array], Any]:
        if not singles(x, delta, weight):
            return super().add_rms_norm(x, delta, weight, eps)
        y, total, moments = self._normalised(x, delta, weight, None, eps, False, None)
        return (total, y), NormSaved(total, weight, moments)

    def add_rms_norm_backward(self, dtotal: Array | None, dy: Array, saved: Any) -> tuple[Array, Array]:
        if not singles(dtotal, dy, saved.total, saved.weight):
            return super().add_rms_norm_backward(dtotal, dy, saved)
        dx, dweight = self._gradients(dtotal, dy, saved.total, saved.weight, saved.moments)
        return dx, dweight

    def add_layer_norm(self, x: Array, delta: Array, weight: Array, bias: Array | None, eps: float) -> tuple[tuple[Array, Array], Any]:
        if not singles(x, delta, weight, bias):
            return super().add_layer_norm(x, delta, weight, bias, eps)
        y, total, moments = self._normalised(x, delta, weight, bias, eps, True, None)
        return (total, y), NormSaved(total, weight, moments)

    def add_layer_norm_backward(self, dtotal: Array | None, dy: Array, saved: Any) -> tuple[Array, Array, Array]:
        if not singles(dtotal, dy, saved.total, saved.weight):
            return super().add_layer_norm_backward(dtotal, dy, saved)
        dx, dweight, dbias = self._gradients(dtotal, dy, saved.total, saved.weight, saved.moments)
        return dx, dweight, dbias

    # ---- the launches ----------------------------------------------------------------------------------------------------------

    def _normalised(
        self, x: Array, delta: Array | None, weight: Array, bias: Array | None, eps: float, centred: bool, out: Array | None
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """-> y, total (x itself without delta), the moments [...,1]: rstd, or mean and rstd"""
        rows, lead, kernel = self._flat_rows(x), x.shape[:-1], "layer_norm" if centred else "rms_norm"
        n, d = rows.shape
        weight, bias = self._read(kernel, "weight", weight, (d,)), self._read(kernel, "bias", bias, (d,))
        delta = self._read(kernel, "delta", None if delta is None else self._flat_rows(delta), (n, d))
        y, fused = self._result(out, tuple(x.shape)), delta.shape == rows.shape
        total = self._empty(*rows.shape) if fused else self._empty(0, 0)
        mean, rstd = self._empty(n if centred else 0), self._empty(n)
        self._launch(
            normalise, (blocks_of(n, WARPS),), BLOCK, rows, delta, weight, bias, float(eps), int(centred), total,
            self.xp.reshape(y, (n, d)), mean, rstd,
        )  # fmt: skip
        moments = tuple(self.xp.reshape(moment, (*lead, 1)) for moment in ((mean, rstd) if centred else (rstd,)))
        return self._stored(y, out), self.xp.reshape(total, x.shape) if fused else x, moments

    def _gradients(self, dtotal: Array | None, dy: Array, x: Array, weight: Array, moments: tuple[Array, ...]) -> tuple[Array, ...]:
        """-> dx, to which dtotal is added; dweight [D]; dbias [D] if the moments have a mean"""
        rows, kernel = self._flat_rows(x), "layer_norm_backward" if len(moments) > 1 else "rms_norm_backward"
        n, d = rows.shape
        dy = self._read(kernel, "dy", self._flat_rows(dy), (n, d))
        dtotal = self._read(kernel, "dtotal", None if dtotal is None else self._flat_rows(dtotal), (n, d))
        weight = self._read(kernel, "weight", weight, (d,))
        rstd = self._read(kernel, "rstd", self.xp.reshape(moments[-1], (-1,)), (n,))
        mean = self._read(kernel, "mean", self.xp.reshape(moments[0], (-1,)) if len(moments) > 1 else None, (n,))
        dx = self._empty(n, d)
        self._launch(normalise_backward, (blocks_of(n, WARPS),), BLOCK, dy, rows, weight, mean, rstd, dtotal, dx)
        height, parts = parts_of(n)
        partials = self._empty(parts, d * len(moments))
        self._launch(sum_weight_gradient, (blocks_of(d, LANES), parts), COLUMN_BLOCK, dy, rows, mean, rstd, height, partials)
        sums = self._sum_parts(partials)
        return self.xp.reshape(dx, x.shape), *(sums[i * d : (i + 1) * d] for i in range(len(moments)))
