"""Activations of a feed-forward layer, elementwise except for swiglu, which joins the two halves of its input.

swiglu(g, u) = silu(g) * u, silu(g) = g * sigmoid(g)                                      (Shazeer 2020)
clipped:       g <- min(g, limit), u <- clip(u, -limit, limit), y = g * sigmoid(1.702 g) * (u + 1)      (gpt-oss)
gelu(x) = x * Phi(x), Phi the normal distribution function                                (Hendrycks & Gimpel 2016)
tanh form: x/2 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
"""

import math

from minimoe.reference.arrays import Array, ArrayLayer

CLIPPED_ALPHA = 1.702
TANH_SCALE = math.sqrt(2.0 / math.pi)
TANH_CUBE = 0.044715


class ActivationKernels(ArrayLayer):
    def swiglu(self, gate_up: Array, limit: float = 0.0, out: Array | None = None) -> Array:
        """gate_up [...,2H], the gate half first -> [...,H]; limit > 0: the clipped form"""
        y = self.by_parts(lambda part: self._swiglu(part, limit), gate_up)
        return self.store(self.xp.reshape(y, (*gate_up.shape[:-1], gate_up.shape[-1] // 2)), out)

    def swiglu_backward(self, dy: Array, gate_up: Array, limit: float = 0.0) -> Array:
        """-> dgate_up [...,2H].   silu'(g) = s + a g s (1 - s), s = sigmoid(a g), a = 1; the gradient is 0 where the clipped form clips"""
        dx = self.by_parts(lambda d, part: self._swiglu_backward(d, part, limit), dy, gate_up)
        return self.xp.reshape(dx, gate_up.shape)

    def gelu(self, x: Array, tanh: bool = False, out: Array | None = None) -> Array:
        """x [...] -> [...]; tanh: the approximation that GPT-2 uses"""
        return self.store(self.xp.reshape(self.by_parts(lambda part: self._gelu(part, tanh), x), x.shape), out)

    def gelu_backward(self, dy: Array, x: Array, tanh: bool = False) -> Array:
        """-> dx.   exact: Phi(x) + x phi(x)"""
        return self.xp.reshape(self.by_parts(lambda d, part: self._gelu_backward(d, part, tanh), dy, x), x.shape)

    def relu(self, x: Array, out: Array | None = None) -> Array:
        """max(x, 0)"""
        return self.store(self.xp.clip(x, min=0.0), out)

    def relu_backward(self, dy: Array, x: Array) -> Array:
        """dy where x > 0"""
        return dy * self.xp.astype(x > 0, dy.dtype)

    # ---- some rows at a time -----------------------------------------------------------------------------------------------------

    def _swiglu(self, gate_up: Array, limit: float) -> Array:
        """[n,2H] -> [n,H]"""
        h = gate_up.shape[1] // 2
        gate, up = gate_up[:, :h], gate_up[:, h:]
        if limit:
            gate, up = self.xp.clip(gate, max=limit), self.xp.clip(up, min=-limit, max=limit) + 1.0
            y = self.sigmoid(gate * CLIPPED_ALPHA)
        else:
            y = self.sigmoid(gate)
        y *= gate
        y *= up
        return y

    def _swiglu_backward(self, dy: Array, gate_up: Array, limit: float) -> Array:
        """dy [n,H], gate_up [n,2H] -> [n,2H]"""
        xp = self.xp
        h = gate_up.shape[1] // 2
        gate, up = gate_up[:, :h], gate_up[:, h:]
        if limit:
            open_gate, open_up = gate <= limit, xp.abs(up) <= limit
            gate, up = xp.clip(gate, max=limit), xp.clip(up, min=-limit, max=limit) + 1.0
        s = self.sigmoid(gate * CLIPPED_ALPHA if limit else gate)
        silu = gate * s
        slope = 1.0 - s  # becomes s + alpha silu (1 - s)
        slope *= silu
        if limit:
            slope *= CLIPPED_ALPHA
        slope += s
        slope *= up
        slope *= dy
        silu *= dy
        if limit:
            silu *= xp.astype(open_up, dy.dtype)
            slope *= xp.astype(open_gate, dy.dtype)
        return xp.concat((slope, silu), axis=1)

    def _gelu(self, x: Array, tanh: bool) -> Array:
        if tanh:
            y = x * x
            y *= TANH_CUBE * TANH_SCALE
            y += TANH_SCALE
            y *= x
            y = self.xp.tanh(y)
        else:
            y = self.erf(x * math.sqrt(0.5))
        y += 1.0
        y *= x
        y *= 0.5
        return y

    def _gelu_backward(self, dy: Array, x: Array, tanh: bool) -> Array:
        xp = self.xp
        square = x * x
        if tanh:
            t = xp.tanh(x * (TANH_SCALE + TANH_SCALE * TANH_CUBE * square))
            inner = TANH_SCALE + (3.0 * TANH_SCALE * TANH_CUBE) * square
            dx = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
        else:
            dx = self.erf(x * math.sqrt(0.5))
            dx += 1.0
            dx *= 0.5
            square *= -0.5
            phi = xp.exp(square)
            phi *= x
            phi *= 1.0 / math.sqrt(2.0 * math.pi)
            dx += phi
        dx *= dy
        return dx
