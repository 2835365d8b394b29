"""Activations, one thread per element, read once and written once. Formulas: minimoe/reference/activation.py."""

import math

import numpy as np

from minimoe.backend import Array
from minimoe.reference.activation import CLIPPED_ALPHA, TANH_CUBE, TANH_SCALE
from minimoe_numba_cuda.compiler import cuda
from minimoe_numba_cuda.launch import THREADS, CudaKernels, blocks_of, singles
from minimoe_numba_cuda.warp import HALF, INFINITY, ONE, THREE, ZERO, sigmoid

ALPHA, SCALE, CUBE = np.float32(CLIPPED_ALPHA), np.float32(TANH_SCALE), np.float32(TANH_CUBE)
ROOT_HALF, DENSITY = np.float32(math.sqrt(0.5)), np.float32(1.0 / math.sqrt(2.0 * math.pi))


@cuda.jit(device=True, forceinline=True)
def clip(x, least, most):  # type: ignore[no-untyped-def]
    """Returns x limited to least .. most. NaN stays NaN, which min and max would hide."""
    if x < least:
        return least
    return most if x > most else x


@cuda.jit
def swiglu(gate_up, limit, y):  # type: ignore[no-untyped-def]
    """y = silu(gate) * up, clipped where limit > 0.   [N,2H] -> [N,H]   Grid: (N, ceil(H / 128)). Bytes: 2 N*H read, N*H written."""
    n, h = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    width = y.shape[1]
    if h >= width:
        return
    gate, up, alpha = gate_up[n, h], gate_up[n, width + h], ONE
    if limit > ZERO:
        alpha = ALPHA
        gate = clip(gate, -INFINITY, limit)
        up = clip(up, -limit, limit) + ONE
    y[n, h] = gate * sigmoid(alpha * gate) * up


@cuda.jit
def swiglu_backward(dy, gate_up, limit, dx):  # type: ignore[no-untyped-def]
    """[N,H], [N,2H] -> [N,2H]   Grid: (N, ceil(H / 128)). Bytes: 3 N*H read, 2 N*H written."""
    n, h = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    width = dy.shape[1]
    if h >= width:
        return
    gate, up, d = gate_up[n, h], gate_up[n, width + h], dy[n, h]
    alpha, open_gate, open_up = ONE, ONE, ONE
    if limit > ZERO:
        alpha = ALPHA
        if gate > limit:
            gate, open_gate = limit, ZERO
        if abs(up) > limit:
            up, open_up = clip(up, -limit, limit), ZERO
        up += ONE
    s = sigmoid(alpha * gate)
    dx[n, h] = open_gate * d * up * (s + alpha * gate * s * (ONE - s))
    dx[n, width + h] = open_up * d * gate * s


@cuda.jit
def gelu(x, tanh, y):  # type: ignore[no-untyped-def]
    """x Phi(x), or the tanh form.   flat [P]   Grid: ceil(P / 128)."""
    i = cuda.grid(1)
    if i >= x.size:
        return
    v = x[i]
    if tanh:
        y[i] = HALF * v * (ONE + math.tanh(SCALE * v * (ONE + CUBE * v * v)))
    else:
        y[i] = HALF * v * (ONE + math.erf(v * ROOT_HALF))


@cuda.jit
def gelu_backward(x, dy, tanh, dx):  # type: ignore[no-untyped-def]
    """dy (Phi(x) + x phi(x)), or the tanh form's slope.   flat [P]   Grid: ceil(P / 128)."""
    i = cuda.grid(1)
    if i >= x.size:
        return
    v = x[i]
    if tanh:
        t = math.tanh(SCALE * v * (ONE + CUBE * v * v))
        slope = HALF * (ONE + t) + HALF * v * (ONE - t * t) * SCALE * (ONE + THREE * CUBE * v * v)
    else:
        slope = HALF * (ONE + math.erf(v * ROOT_HALF)) + v * DENSITY * math.exp(-HALF * v * v)
    dx[i] = dy[i] * slope


@cuda.jit
def relu(x, y):  # type: ignore[no-untyped-def]
    """max(x, 0), NaN kept.   flat [P]   Grid: ceil(P / 128)."""
    i = cuda.grid(1)
    if i < x.size:
        y[i] = ZERO if x[i] < ZERO else x[i]


@cuda.jit
def relu_backward(x, dy, dx):  # type: ignore[no-untyped-def]
    """dy where x > 0.   flat [P]   Grid: ceil(P / 128)."""
    i = cuda.grid(1)
    if i < x.size:
        dx[i] = dy[i] if x[i] > ZERO else ZERO


class CudaActivation(CudaKernels):
    def swiglu(self, gate_up: Array, limit: float = 0.0, out: Array | None = None) -> Array:
        if not singles(gate_up):
            return super().swiglu(gate_up, limit, out)
        x = self._flat_rows(gate_up)
        y = self._result(out, (*gate_up.shape[:-1], gate_up.shape[-1] // 2))
        rows = self.xp.reshape(y, (x.shape[0], y.shape[-1]))
        self._launch(swiglu, (rows.shape[0], blocks_of(rows.shape[1])), (THREADS,), x, float(limit), rows)
        return self._stored(y, out)

    def swiglu_backward(self, dy: Array, gate_up: Array, limit: float = 0.0) -> Array:
        if not singles(dy, gate_up):
            return super().swiglu_backward(dy, gate_up, limit)
        d = self._flat_rows(dy)
        x = self._read("swiglu_backward", "gate_up", self._flat_rows(gate_up), (d.shape[0], 2 * d.shape[1]))
        dx = self._empty(*x.shape)
        self._launch(swiglu_backward, (d.shape[0], blocks_of(d.shape[1])), (THREADS,), d, x, float(limit), dx)
        return self.xp.reshape(dx, gate_up.shape)

    def gelu(self, x: Array, tanh: bool = False, out: Array | None = None) -> Array:
        if not singles(x):
            return super().gelu(x, tanh, out)
        return self._each("gelu", gelu, (x,), (int(tanh),), out)

    def gelu_backward(self, dy: Array, x: Array, tanh: bool = False) -> Array:
        if not singles(dy, x):
            return super().gelu_backward(dy, x, tanh)
        return self._each("gelu_backward", gelu_backward, (x, dy), (int(tanh),), None)

    def relu(self, x: Array, out: Array | None = None) -> Array:
        if not singles(x):
            return super().relu(x, out)
        return self._each("relu", relu, (x,), (), out)

    def relu_backward(self, dy: Array, x: Array) -> Array:
        if not singles(dy, x):
            return super().relu_backward(dy, x)
        return self._each("relu_backward", relu_backward, (x, dy), (), None)

    def _each(self, name: str, kernel: object, arrays: tuple[Array, ...], options: tuple[int, ...], out: Array | None) -> Array:
        """Launches an elementwise kernel of x, or of x and dy."""
        if any(array.shape != arrays[0].shape for array in arrays):
            raise ValueError(f"{name}: x and dy differ in shape: {' and '.join(str(tuple(array.shape)) for array in arrays)}")
        flat = [self.contiguous(self.xp.reshape(array, (-1,))) for array in arrays]
        y = self._result(out, tuple(arrays[0].shape))
        self._launch(kernel, (blocks_of(flat[0].size),), (THREADS,), *flat, *options, self.xp.reshape(y, (-1,)))
        return self._stored(y, out)
