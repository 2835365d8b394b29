"""Norms in one pass over a row, alone and fused with the residual addition before them. Formulas: minimoe/reference/norm.py.

A weight's gradient is a sum over rows: each piece of rows has a partial sum, and the partial sums are added in order.
"""

from typing import Any, NamedTuple

import numpy as np

from minimoe.backend import Array
from minimoe_numba.arrays import as_rows, by_width, parts_of, result, singles, zeros
from minimoe_numba.compiling import compiled
from minimoe_numba.creation import contiguous, empty
from minimoe_numba.kernel import F1, F2, kernel
from minimoe_numba.maths import ONE, ZERO
from minimoe_numpy import NumpyBackend

NO_ROWS = np.zeros((0, 0), np.float32)


class Saved(NamedTuple):
    """The fused norms save this for their backward."""

    total: Array
    weight: Array
    moments: tuple[Array, ...]


# ---- rms -----------------------------------------------------------------------------------------------------------------------------


@compiled
def rms_row(x, weight, eps, y):  # type: ignore[no-untyped-def]
    """y = x * rstd * weight.   -> rstd"""
    width = len(x)
    squares = ZERO
    for d in range(width):
        squares += x[d] * x[d]
    r = ONE / np.sqrt(squares / np.float32(width) + eps)
    for d in range(width):
        y[d] = x[d] * r * weight[d]
    return r


@kernel
def rms_rows(start: int, stop: int, x: F2, weight: F1, eps: float, y: F2, rstd: F1) -> None:
    for n in range(start, stop):
        rstd[n] = rms_row(x[n], weight, eps, y[n])


@kernel
def add_rms_rows(start: int, stop: int, x: F2, delta: F2, weight: F1, eps: float, total: F2, y: F2, rstd: F1) -> None:
    for n in range(start, stop):
        for d in range(x.shape[1]):
            total[n, d] = x[n, d] + delta[n, d]
        rstd[n] = rms_row(total[n], weight, eps, y[n])


@kernel
def rms_rows_backward(start: int, stop: int, dy: F2, x: F2, weight: F1, rstd: F1, dtotal: F2, grain: int, dx: F2, dweights: F2) -> None:
    """Write dx, plus dtotal if that has rows, and the partial sums dweights [parts,D]."""
    width = x.shape[1]
    dweight = dweights[start // grain]
    for n in range(start, stop):
        r, product = rstd[n], ZERO
        for d in range(width):
            product += dy[n, d] * weight[d] * x[n, d]
        share = product * r * r / np.float32(width)
        if len(dtotal):
            for d in range(width):
                dx[n, d] = dtotal[n, d] + r * (dy[n, d] * weight[d] - x[n, d] * share)
        else:
            for d in range(width):
                dx[n, d] = r * (dy[n, d] * weight[d] - x[n, d] * share)
        for d in range(width):
            dweight[d] += dy[n, d] * x[n, d] * r


# ---- layer ---------------------------------------------------------------------------------------------------------------------------


@compiled
def layer_row(x, weight, bias, eps, y):  # type: ignore[no-untyped-def]
    """y = (x - mean) * rstd * weight + bias.   -> mean, rstd"""
    width = len(x)
    total, squares = ZERO, ZERO
    for d in range(width):
        total += x[d]
    mean = total / np.float32(width)
    for d in range(width):
        squares += (x[d] - mean) * (x[d] - mean)
    r = ONE / np.sqrt(squares / np.float32(width) + eps)
    for d in range(width):
        y[d] = (x[d] - mean) * r * weight[d] + bias[d]
    return mean, r


@kernel
def layer_rows(start: int, stop: int, x: F2, weight: F1, bias: F1, eps: float, y: F2, mean: F1, rstd: F1) -> None:
    for n in range(start, stop):
        mean[n], rstd[n] = layer_row(x[n], weight, bias, eps, y[n])


@kernel
def add_layer_rows(start: int, stop: int, x: F2, delta: F2, weight: F1, bias: F1, eps: float, total: F2, y: F2, mean: F1, rstd: F1) -> None:
    for n in range(start, stop):
        for d in range(x.shape[1]):
            total[n, d] = x[n, d] + delta[n, d]
        mean[n], rstd[n] = layer_row(total[n], weight, bias, eps, y[n])


@kernel
def layer_rows_backward(
    start: int, stop: int, dy: F2, x: F2, weight: F1, mean: F1, rstd: F1, dtotal: F2, grain: int, dx: F2, dweights: F2, dbiases: F2
) -> None:
    """Write dx, plus dtotal if that has rows, and the partial sums dweights and dbiases [parts,D]."""
    width = x.shape[1]
    dweight, dbias = dweights[start // grain], dbiases[start // grain]
    g = np.empty(width, np.float32)  # dy * weight, rounded once: what cancels in g - mean(g) must be the same number twice
    for n in range(start, stop):
        m, r, total, product = mean[n], rstd[n], ZERO, ZERO
        for d in range(width):
            g[d] = dy[n, d] * weight[d]
        for d in range(width):
            total += g[d]
            product += g[d] * (x[n, d] - m)
        even, share = total / np.float32(width), product * r * r / np.float32(width)
        if len(dtotal):
            for d in range(width):
                dx[n, d] = dtotal[n, d] + r * (g[d] - even - (x[n, d] - m) * share)
        else:
            for d in range(width):
                dx[n, d] = r * (g[d] - even - (x[n, d] - m) * share)
        for d in range(width):
            dweight[d] += dy[n, d] * (x[n, d] - m) * r
            dbias[d] += dy[n, d]


@kernel
def add_parts(start: int, stop: int, sums: F2, y: F1) -> None:
    y[:] = ZERO
    for part in range(len(sums)):
        for d in range(len(y)):
            y[d] += sums[part, d]


# ---- the contract's kernels ------------------------------------------------------------------------------------------------------------


def fit(x: Array, like: tuple[Array | None, ...], *vectors: Array | None) -> bool:
    """True if all are float32, those of `like` have x's shape [...,D], and the vectors are [D].

    Everything else goes to the reference, which computes it or says what is wrong.
    """
    return (
        singles(x, *like, *vectors)
        and all(each is None or each.shape == x.shape for each in like)
        and all(each is None or each.shape == x.shape[-1:] for each in vectors)
    )


def moment(x: Array) -> Array:
    """Return memory for one number per row.   [...,D] -> [...,1]"""
    return empty((*x.shape[:-1], 1))


def vector(weight: Array | None, like: Array) -> Array:
    """Return weight [D], contiguous, or zeros if it is None."""
    return zeros(like.shape) if weight is None else contiguous(weight)


def rms_gradients(dy: Array, x: Array, weight: Array, moments: tuple[Array, ...], dtotal: Array | None = None) -> tuple[Array, Array]:
    """-> dx [...,D], dweight [D]"""
    rows, dtotal_rows = as_rows(x), NO_ROWS if dtotal is None else as_rows(dtotal)
    grain, parts = parts_of(len(rows))
    dx, sums = empty(x.shape), zeros((parts, rows.shape[1]))
    (rstd,) = (each.reshape(-1) for each in moments)
    rms_rows_backward(len(rows), grain, as_rows(dy), rows, vector(weight, weight), rstd, dtotal_rows, grain, as_rows(dx), sums)
    return dx, added(sums)


def added(sums: Array) -> Array:
    """Add the parts, in their order.   [parts,D] -> [D]"""
    y = empty(sums.shape[1])
    add_parts(sums.shape[1], sums.shape[1], sums, y)
    return y


def layer_gradients(
    dy: Array, x: Array, weight: Array, moments: tuple[Array, ...], dtotal: Array | None = None
) -> tuple[Array, Array, Array]:  # fmt: skip
    """-> dx [...,D], dweight [D], dbias [D]"""
    rows, dtotal_rows = as_rows(x), NO_ROWS if dtotal is None else as_rows(dtotal)
    grain, parts = parts_of(len(rows))
    dx, sums = empty(x.shape), zeros((2, parts, rows.shape[1]))
    mean, rstd = (each.reshape(-1) for each in moments)
    w = vector(weight, weight)
    layer_rows_backward(len(rows), grain, as_rows(dy), rows, w, mean, rstd, dtotal_rows, grain, as_rows(dx), sums[0], sums[1])
    return dx, added(sums[0]), added(sums[1])


class FastNorm(NumpyBackend):
    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array | None = None) -> tuple[Array, Array]:
        if not fit(x, (), weight):
            return super().rms_norm(x, weight, eps, out)
        rows = as_rows(x)
        y, rstd = result(out, x.shape), moment(x)
        rms_rows(len(rows), by_width(rows.shape[1]), rows, vector(weight, weight), eps, as_rows(y), rstd.reshape(-1))
        return (y if y is out else self.store(y, out)), rstd

    def rms_norm_backward(self, dy: Array, x: Array, weight: Array, rstd: Array) -> tuple[Array, Array]:
        if not fit(x, (dy,), weight) or not singles(rstd):
            return super().rms_norm_backward(dy, x, weight, rstd)
        return rms_gradients(dy, x, weight, (rstd,))

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float, out: Array | None = None) -> tuple[Array, Array, Array]:
        if not fit(x, (), weight, bias):
            return super().layer_norm(x, weight, bias, eps, out)
        rows = as_rows(x)
        y, mean, rstd = result(out, x.shape), moment(x), moment(x)
        w, b = vector(weight, weight), vector(bias, weight)
        layer_rows(len(rows), by_width(rows.shape[1]), rows, w, b, eps, as_rows(y), mean.reshape(-1), rstd.reshape(-1))
        return (y if y is out else self.store(y, out)), mean, rstd

    def layer_norm_backward(self, dy: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, Array, Array]:
        if not fit(x, (dy,), weight) or not singles(mean, rstd):
            return super().layer_norm_backward(dy, x, weight, mean, rstd)
        return layer_gradients(dy, x, weight, (mean, rstd))

    def add_rms_norm(self, x: Array, delta: Array, weight: Array, eps: float) -> tuple[tuple[Array, Array], Any]:
        if not fit(x, (delta,), weight):
            return super().add_rms_norm(x, delta, weight, eps)
        rows, w = as_rows(x), vector(weight, weight)
        total, y, rstd = empty(x.shape), empty(x.shape), moment(x)
        add_rms_rows(len(rows), by_width(rows.shape[1]), rows, as_rows(delta), w, eps, as_rows(total), as_rows(y), rstd.reshape(-1))
        return (total, y), Saved(total, weight, (rstd,))

    def add_rms_norm_backward(self, dtotal: Array | None, dy: Array, saved: Any) -> tuple[Array, Array]:
        if not fit(saved.total, (dtotal, dy), saved.weight):
            return super().add_rms_norm_backward(dtotal, dy, saved)
        return rms_gradients(dy, saved.total, saved.weight, saved.moments, dtotal)

    def add_layer_norm(self, x: Array, delta: Array, weight: Array, bias: Array | None, eps: float) -> tuple[tuple[Array, Array], Any]:
        if not fit(x, (delta,), weight, bias):
            return super().add_layer_norm(x, delta, weight, bias, eps)
        rows, w, b = as_rows(x), vector(weight, weight), vector(bias, weight)
        total, y, mean, rstd = empty(x.shape), empty(x.shape), moment(x), moment(x)
        add_layer_rows(
            len(rows), by_width(rows.shape[1]), rows, as_rows(delta), w, b, eps, as_rows(total), as_rows(y), mean.reshape(-1),
            rstd.reshape(-1),
        )  # fmt: skip
        return (total, y), Saved(total, weight, (mean, rstd))

    def add_layer_norm_backward(self, dtotal: Array | None, dy: Array, saved: Any) -> tuple[Array, Array, Array]:
        if not fit(saved.total, (dtotal, dy), saved.weight):
            return super().add_layer_norm_backward(dtotal, dy, saved)
        return layer_gradients(dy, saved.total, saved.weight, saved.moments, dtotal)
