"""Normalisation over the last axis, with sums over D instead of means, and fused with the addition before it.

The fused kernels save xhat, the normalised numbers, and neither x nor the sum: both gradients need xhat, rstd and the weight alone.
"""

from typing import Any

import numpy as np

from toy_backend.parts import Array, Scratch, as_rows


class Norms(Scratch):
    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array | None = None) -> tuple[Array, Array]:
        rstd = self._rms_rstd(x, eps)  # [...,1]
        y = np.empty_like(x) if out is None else out
        np.multiply(x, rstd, out=y)
        y *= weight
        return y, rstd

    def rms_norm_backward(self, dy: Array, x: Array, weight: Array, rstd: Array) -> tuple[Array, Array]:
        xhat = self._scratch("xhat", x.shape, x.dtype)
        np.multiply(x, rstd, out=xhat)
        return self._rms_dx(dy, xhat, weight, rstd), column_sums(dy, xhat)

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float, out: Array | None = None) -> tuple[Array, Array, Array]:
        mean = x.sum(axis=-1, keepdims=True) / x.shape[-1]  # [...,1]
        y = np.empty_like(x) if out is None else out
        np.subtract(x, mean, out=y)
        rstd = self._rms_rstd(y, eps)
        y *= rstd
        y *= weight
        if bias is not None:
            y += bias
        return y, mean, rstd

    def layer_norm_backward(self, dy: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, Array, Array]:
        xhat = self._scratch("xhat", x.shape, x.dtype)
        np.subtract(x, mean, out=xhat)
        xhat *= rstd
        return self._layer_dx(dy, xhat, weight, rstd), column_sums(dy, xhat), as_rows(dy).sum(axis=0)

    # ---- composites --------------------------------------------------------------------------------------------------------------

    def add_rms_norm(self, x: Array, delta: Array, weight: Array, eps: float) -> tuple[tuple[Array, Array], Any]:
        total = x + delta
        rstd = self._rms_rstd(total, eps)
        xhat = total * rstd
        return (total, xhat * weight), (xhat, weight, rstd)

    def add_rms_norm_backward(self, dtotal: Array | None, dy: Array, saved: Any) -> tuple[Array, Array]:
        xhat, weight, rstd = saved
        dx = self._rms_dx(dy, xhat, weight, rstd)
        if dtotal is not None:
            dx += dtotal
        return dx, column_sums(dy, xhat)

    def add_layer_norm(self, x: Array, delta: Array, weight: Array, bias: Array | None, eps: float) -> tuple[tuple[Array, Array], Any]:
        total = x + delta
        xhat = total - total.sum(axis=-1, keepdims=True) / total.shape[-1]
        rstd = self._rms_rstd(xhat, eps)
        xhat *= rstd
        y = xhat * weight
        if bias is not None:
            y += bias
        return (total, y), (xhat, weight, rstd)

    def add_layer_norm_backward(self, dtotal: Array | None, dy: Array, saved: Any) -> tuple[Array, Array, Array]:
        xhat, weight, rstd = saved
        dx = self._layer_dx(dy, xhat, weight, rstd)
        if dtotal is not None:
            dx += dtotal
        return dx, column_sums(dy, xhat), as_rows(dy).sum(axis=0)

    # ---- parts -------------------------------------------------------------------------------------------------------------------

    def _rms_rstd(self, x: Array, eps: float) -> Array:
        """1 / sqrt(sum(x^2) / D + eps).   [...,D] -> [...,1]"""
        square = self._scratch("square", x.shape, x.dtype)
        np.multiply(x, x, out=square)
        return 1.0 / np.sqrt(square.sum(axis=-1, keepdims=True) / x.shape[-1] + eps)

    def _rms_dx(self, dy: Array, xhat: Array, weight: Array, rstd: Array) -> Array:
        """rstd * (g - xhat * sum(g * xhat) / D) with g = dy * weight.   -> [...,D]"""
        dx = dy * weight
        product = self._scratch("product", dx.shape, dx.dtype)
        np.multiply(dx, xhat, out=product)
        along = product.sum(axis=-1, keepdims=True) / dx.shape[-1]  # [...,1]
        np.multiply(xhat, along, out=product)
        dx -= product
        dx *= rstd
        return dx

    def _layer_dx(self, dy: Array, xhat: Array, weight: Array, rstd: Array) -> Array:
        """As `_rms_dx`; the mean of each row of the result is zero too, since a constant added to x changes nothing."""
        dx = self._rms_dx(dy, xhat, weight, rstd)
        dx -= dx.sum(axis=-1, keepdims=True) / dx.shape[-1]
        return dx


def column_sums(dy: Array, xhat: Array) -> Array:
    """sum over all rows of dy * xhat.   [...,D] -> [D]"""
    return np.sum(as_rows(dy) * as_rows(xhat), axis=0)
