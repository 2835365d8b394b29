"""Activations, read once and written once: the launches of kernels/activation.cu. The formulas are in kernels/activation.cuh."""

import math

from minimoe.backend import Array
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import CudaLaunch, by_width, ceil_div, computed, instance, instances, lanes, writable
from minimoe_cupy.linear import grid_columns
from minimoe_cupy.loader import Source

BLOCK = 256
MOST_DOWN = 65535  # blocks that a grid may have along its second axis
KINDS = {name: constant("activation.cuh", name.upper()) for name in ("swiglu", "gelu", "gelu_tanh", "relu")}
EACH = tuple(kind for name, kind in KINDS.items() if name != "swiglu")
POINTWISE = tuple(name for kernel in ("each", "each_backward")
                  for name in (*instances(kernel, ["float"], EACH, [1, 4]), *instances(kernel, ["bf16"], EACH, [1, 8])))  # fmt: skip
ACTIVATION = Source("activation.cu", (*by_width("swiglu_rows"), *by_width("swiglu_rows_backward"), *POINTWISE))


class CudaActivation(CudaLaunch):
    def swiglu(self, gate_up: Array, limit: float = 0.0, out: Array | None = None) -> Array:
        shape = halved(gate_up)
        if not computed(gate_up, out) or gate_up.shape[-1] % 2 or limit < 0.0 or not writable(out, shape, gate_up.dtype):
            return super().swiglu(gate_up, limit, out)
        (gate_up,) = self._contiguous(gate_up)
        y = self.xp.empty(shape, dtype=gate_up.dtype) if out is None else out
        self._gated("swiglu_rows", gate_up, y, limit=limit, shape=shape)
        return y

    def swiglu_backward(self, dy: Array, gate_up: Array, limit: float = 0.0) -> Array:
        shape = halved(gate_up)
        if not computed(dy, gate_up) or gate_up.shape[-1] % 2 or limit < 0.0 or dy.shape != shape:
            return super().swiglu_backward(dy, gate_up, limit)
        dy, gate_up = self._contiguous(dy, gate_up)
        dgate_up = self.xp.empty(gate_up.shape, dtype=dy.dtype)
        self._gated("swiglu_rows_backward", dy, gate_up, dgate_up, limit=limit, shape=shape)
        return dgate_up

    def gelu(self, x: Array, tanh: bool = False, out: Array | None = None) -> Array:
        if not computed(x, out) or not writable(out, x.shape, x.dtype):
            return super().gelu(x, tanh, out)
        return self._each("each", "gelu_tanh" if tanh else "gelu", x, out=out)

    def gelu_backward(self, dy: Array, x: Array, tanh: bool = False) -> Array:
        if not computed(dy, x) or dy.shape != x.shape:
            return super().gelu_backward(dy, x, tanh)
        return self._each("each_backward", "gelu_tanh" if tanh else "gelu", dy, x)

    def relu(self, x: Array, out: Array | None = None) -> Array:
        if not computed(x, out) or not writable(out, x.shape, x.dtype):
            return super().relu(x, out)
        return self._each("each", "relu", x, out=out)

    def relu_backward(self, dy: Array, x: Array) -> Array:
        if not computed(dy, x) or dy.shape != x.shape:
            return super().relu_backward(dy, x)
        return self._each("each_backward", "relu", dy, x)

    def _gated(self, kernel: str, *arrays: Array, limit: float, shape: tuple[int, ...]) -> None:
        """Launches a kernel over rows: `arrays` are its arguments, of [N,H] or [N,2H]; `shape` is [...,H]."""
        width, n = shape[-1], math.prod(shape[:-1])
        v = lanes(width, *arrays)
        columns, block = grid_columns(width, v)
        grid = columns, min(ceil_div(n, block[1]), MOST_DOWN)
        self._launch(ACTIVATION, instance(kernel, arrays[0].dtype, v), grid, block, *arrays, limit, n, width)

    def _each(self, kernel: str, activation: str, *arrays: Array, out: Array | None = None) -> Array:
        """Launches a kernel over flat arrays, all of one shape."""
        given = self._contiguous(*arrays)
        y = self.xp.empty(arrays[0].shape, dtype=arrays[0].dtype) if out is None else out
        count, v = math.prod(y.shape), lanes(0, *given, y)
        self._launch(ACTIVATION, instance(kernel, y.dtype, KINDS[activation], v), ceil_div(count, v * BLOCK), BLOCK, *given, y, count)
        return y


def halved(gate_up: Array) -> tuple[int, ...]:
    """Returns the shape of swiglu's result: [...,2H] -> [...,H]."""
    return (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
