"""Normalisation over the last axis, alone and fused with the residual addition before it.

rms:    y = x * rstd * w,             rstd = 1 / sqrt(mean(x^2) + eps)         (Zhang & Sennrich 2019)
layer:  y = (x - mean) * rstd * w + b, rstd = 1 / sqrt(var(x) + eps)           (Ba, Kiros & Hinton 2016)

With xhat = x * rstd (or (x - mean) * rstd) and g = dy * w:   dx = rstd * (g - xhat * mean(g * xhat) [- mean(g)]),   dw = sum(dy * xhat).
The gradients of weight and bias stay in at least float32, so that bfloat16 models do not round them before they are added up.
"""

from typing import Any, NamedTuple

from minimoe.reference.arrays import Array, ArrayLayer


class NormSaved(NamedTuple):
    """What the reference's fused norms keep for their backward."""

    total: Array
    weight: Array
    moments: tuple[Array, ...]


class NormKernels(ArrayLayer):
    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array | None = None) -> tuple[Array, Array]:
        """x [...,D], weight [D] -> y [...,D], rstd [...,1]"""
        xp = self.xp
        wide = self.wide(x)
        rstd = 1.0 / xp.sqrt(xp.mean(wide * wide, axis=-1, keepdims=True) + eps)
        y = wide * rstd
        y *= self.wide(weight)
        return self.store(xp.astype(y, x.dtype, copy=False), out), rstd

    def rms_norm_backward(self, dy: Array, x: Array, weight: Array, rstd: Array) -> tuple[Array, Array]:
        """-> dx [...,D], dweight [D]"""
        xp = self.xp
        xhat, g = self.wide(x) * rstd, self.wide(dy)
        dweight = xp.sum(self.rows(g * xhat), axis=0)
        g = g * self.wide(weight)
        g -= xhat * xp.mean(g * xhat, axis=-1, keepdims=True)
        g *= rstd
        return xp.astype(g, x.dtype, copy=False), dweight

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float, out: Array | None = None) -> tuple[Array, Array, Array]:
        """x [...,D], weight [D], bias [D] or None -> y [...,D], mean [...,1], rstd [...,1]"""
        xp = self.xp
        wide = self.wide(x)
        mean = xp.mean(wide, axis=-1, keepdims=True)
        y = wide - mean
        rstd = 1.0 / xp.sqrt(xp.mean(y * y, axis=-1, keepdims=True) + eps)
        y *= rstd
        y *= self.wide(weight)
        if bias is not None:
            y += self.wide(bias)
        return self.store(xp.astype(y, x.dtype, copy=False), out), mean, rstd

    def layer_norm_backward(self, dy: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, Array, Array]:
        """-> dx [...,D], dweight [D], dbias [D]"""
        xp = self.xp
        xhat, g = (self.wide(x) - mean) * rstd, self.wide(dy)
        dweight = xp.sum(self.rows(g * xhat), axis=0)
        dbias = xp.sum(self.rows(g), axis=0)
        g = g * self.wide(weight)
        dx = g - xp.mean(g, axis=-1, keepdims=True)
        dx -= xhat * xp.mean(g * xhat, axis=-1, keepdims=True)
        dx *= rstd
        return xp.astype(dx, x.dtype, copy=False), dweight, dbias

    # ---- composites: add to the residual stream and normalise it in one kernel -----------------------------------------------

    def add_rms_norm(self, x: Array, delta: Array, weight: Array, eps: float) -> tuple[tuple[Array, Array], Any]:
        """total = x + delta, y = rms_norm(total).   -> (total [...,D], y [...,D]), saved"""
        total = x + delta
        y, rstd = self.rms_norm(total, weight, eps)
        return (total, y), NormSaved(total, weight, (rstd,))

    def add_rms_norm_backward(self, dtotal: Array | None, dy: Array, saved: Any) -> tuple[Array, Array]:
        """-> dx, which is ddelta too [...,D]; dweight [D]"""
        dx, dweight = self.rms_norm_backward(dy, saved.total, saved.weight, *saved.moments)
        return (dx if dtotal is None else self.store(dtotal, dx, accumulate=True)), dweight

    def add_layer_norm(self, x: Array, delta: Array, weight: Array, bias: Array | None, eps: float) -> tuple[tuple[Array, Array], Any]:
        """total = x + delta, y = layer_norm(total).   -> (total [...,D], y [...,D]), saved"""
        total = x + delta
        y, mean, rstd = self.layer_norm(total, weight, bias, eps)
        return (total, y), NormSaved(total, weight, (mean, rstd))

    def add_layer_norm_backward(self, dtotal: Array | None, dy: Array, saved: Any) -> tuple[Array, Array, Array]:
        """-> dx, which is ddelta too [...,D]; dweight [D]; dbias [D]"""
        dx, dweight, dbias = self.layer_norm_backward(dy, saved.total, saved.weight, *saved.moments)
        return (dx if dtotal is None else self.store(dtotal, dx, accumulate=True)), dweight, dbias
