"""Optimizers over flat buffers: one call updates every parameter of a dtype and decay group.

Values that change from step to step are 0-d device arrays: `lr`; `scale`, which clips the gradient; `ok`, which is false if the loss or
a gradient is not finite. Then nothing changes, and the host need not read `ok`. Weight decay is decoupled (Loshchilov & Hutter 2019).
"""

from minimoe.reference.arrays import Array, ArrayLayer


class OptimizerKernels(ArrayLayer):
    def sum_of_squares(self, x: Array) -> Array:
        """sum(x^2) in at least float32.   [...] -> 0-d"""
        wide = self.wide(x)
        return self.xp.sum(wide * wide)

    def adamw(
        self, inout_param: Array, inout_m: Array, inout_v: Array, grad: Array, *, lr: Array, step: Array, scale: Array, ok: Array,
        beta1: float, beta2: float, eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        """m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, w = w (1 - lr wd) - lr m^ / (sqrt(v^) + eps), ^ over 1 - b^step.   flat [P] each"""
        xp = self.xp
        keep1, new1 = self.where_ok(ok, beta1, 1.0, grad), self.where_ok(ok, 1.0 - beta1, 0.0, grad)
        keep2, new2 = self.where_ok(ok, beta2, 1.0, grad), self.where_ok(ok, 1.0 - beta2, 0.0, grad)
        t = xp.astype(step, grad.dtype)
        rate = xp.where(ok, lr, xp.zeros_like(lr))
        shrink, correct2 = 1.0 - rate * weight_decay, xp.sqrt(1.0 - beta2**t)
        rate = rate / (1.0 - beta1**t)
        for part in self._parts(grad.shape[0]):
            g, m, v, w = self.clipped(grad[part], scale, ok), inout_m[part], inout_v[part], inout_param[part]
            m *= keep1
            m += g * new1
            g *= g
            g *= new2
            v *= keep2
            v += g
            update = xp.sqrt(v)
            update /= correct2
            update += eps
            update = m / update
            update *= rate
            w *= shrink
            w -= update

    def sgd(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, momentum: float, weight_decay: float
    ) -> None:
        """m = mu m + g, w = w (1 - lr wd) - lr m   (Polyak 1964).   flat [P] each"""
        rate = self.xp.where(ok, lr, self.xp.zeros_like(lr))
        inout_m *= self.where_ok(ok, momentum, 1.0, grad)
        inout_m += self.clipped(grad, scale, ok)
        inout_param *= 1.0 - rate * weight_decay
        inout_param -= rate * inout_m

    def lion(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, beta1: float, beta2: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        """w = w (1 - lr wd) - lr sign(b1 m + (1-b1) g), m = b2 m + (1-b2) g   (Chen et al. 2023).   flat [P] each"""
        g = self.clipped(grad, scale, ok)
        rate = self.xp.where(ok, lr, self.xp.zeros_like(lr))
        inout_param *= 1.0 - rate * weight_decay
        inout_param -= rate * self.xp.sign(beta1 * inout_m + (1.0 - beta1) * g)
        inout_m *= self.where_ok(ok, beta2, 1.0, grad)
        inout_m += self.where_ok(ok, 1.0 - beta2, 0.0, grad) * g

    def muon(
        self, inout_param: Array, inout_m: Array, grad: Array, *, lr: Array, scale: Array, ok: Array, momentum: float, weight_decay: float
    ) -> None:
        """m = mu m + g, w = w (1 - lr wd) - lr 0.2 sqrt(max(O, I)) orthogonal(g + mu m).   [...,O,I] each   (Jordan et al. 2024)

        The factor gives the update the size of AdamW's, so that both take the same lr (Liu et al. 2025).
        """
        xp = self.xp
        g = self.clipped(grad, scale, ok)
        rate = xp.where(ok, lr, xp.zeros_like(lr))
        inout_m *= self.where_ok(ok, momentum, 1.0, grad)
        inout_m += g
        update = self.orthogonal(g + momentum * inout_m)
        rows, columns = inout_param.shape[-2:]
        inout_param *= 1.0 - rate * weight_decay
        inout_param -= (rate * (0.2 * max(rows, columns) ** 0.5)) * update

    def orthogonal(self, x: Array, steps: int = 5) -> Array:
        """Return a matrix with the same singular vectors and singular values near 1 (0.7 to 1.2).   [...,O,I] -> [...,O,I]

        It takes `steps` Newton-Schulz steps, x <- a x + (b A + c A^2) x with A = x x^T.
        """
        xp = self.xp
        tall = x.shape[-2] > x.shape[-1]
        y = xp.matrix_transpose(x) if tall else x
        y = y / (xp.sqrt(xp.sum(y * y, axis=(-2, -1), keepdims=True)) + 1e-7)
        for _ in range(steps):
            a = xp.matmul(y, xp.matrix_transpose(y))
            y = 3.4445 * y + xp.matmul(-4.7750 * a + 2.0315 * xp.matmul(a, a), y)
        return xp.matrix_transpose(y) if tall else y

    def _parts(self, n: int) -> list[slice]:
        """Return slices to process one after the other, so that many passes over each stay in the processor's cache."""
        size = self.cache_elements or max(n, 1)
        return [slice(start, start + size) for start in range(0, n, size)]

    def clipped(self, grad: Array, scale: Array, ok: Array) -> Array:
        """Return grad * scale, or zeros if the step is skipped (NaN times zero would be NaN)."""
        return self.xp.where(ok, grad * scale, self.xp.zeros_like(grad))

    def where_ok(self, ok: Array, yes: float, no: float, like: Array) -> Array:
        """Return `yes` or `no` as a 0-d array of `like`'s dtype, chosen on the device."""
        return self.xp.where(ok, self.xp.full_like(ok, yes, dtype=like.dtype), self.xp.full_like(ok, no, dtype=like.dtype))
