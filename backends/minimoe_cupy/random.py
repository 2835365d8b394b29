"""Random numbers and dropout, one launch each: kernels/random.cu, with Philox in kernels/philox.cuh.

A step or micro-batch on the device is passed as a pointer, one on the host as a number, so a recorded step draws new numbers each time.
Normals are computed in float64, as the reference does: they are few (noise on router logits).
"""

import math
from typing import Any

import numpy as np

from minimoe.backend import Array
from minimoe.reference.random import MASK, Draw
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import CudaLaunch, by_width, ceil_div, computed, instance, lanes, writable
from minimoe_cupy.loader import Source

BLOCK = 256
WORDS = constant("random.cu", "WORDS")  # numbers per counter
RANDOM = Source("random.cu", ("random_bits", "uniform", "normal", *by_width("dropout")))


class CudaRandom(CudaLaunch):
    def random_bits(self, count: int, rng: Draw) -> Array:
        return self._numbers("random_bits", count, rng, self.xp.int64)

    def uniform(self, count: int, rng: Draw) -> Array:
        return self._numbers("uniform", count, rng, self.xp.float32)

    def normal(self, count: int, rng: Draw) -> Array:
        return self._numbers("normal", count, rng, self.xp.float32)

    def dropout(self, x: Array, rate: float, rng: Draw, out: Array | None = None) -> Array:
        if not computed(x, out) or not writable(out, x.shape, x.dtype):
            return super().dropout(x, rate, rng, out)
        (x,) = self._contiguous(x)
        y = self.xp.empty(x.shape, dtype=x.dtype) if out is None else out
        count, width = math.prod(x.shape), lanes(0, x, y)
        arguments = x, y, count, rate, 1.0 / (1.0 - rate), *self._draw(rng)
        self._launch(RANDOM, instance("dropout", x.dtype, width), ceil_div(count, max(width, WORDS) * BLOCK), BLOCK, *arguments)
        return y

    def dropout_backward(self, dy: Array, rate: float, rng: Draw) -> Array:
        return self.dropout(dy, rate, rng)

    def _numbers(self, kernel: str, count: int, rng: Draw, dtype: Any) -> Array:
        y = self.xp.empty(count, dtype=dtype)
        self._launch(RANDOM, kernel, ceil_div(count, WORDS * BLOCK), BLOCK, y, count, *self._draw(rng))
        return y

    def _draw(self, rng: Draw) -> tuple[Any, ...]:
        """Returns a draw as kernels take it: the seed's halves, the stream, then micro-batch and step, each as a pointer and a number."""
        return rng.seed & MASK, (rng.seed >> 32) & MASK, rng.stream, *self._counter(rng.micro), *self._counter(rng.step)

    def _counter(self, value: "int | Array") -> tuple[Array | None, int]:
        """Returns a number as (None, number), and an integer on the device as its 4-byte words, the low one first, and 0."""
        if isinstance(value, int | np.integer):
            return None, int(value) & MASK
        return self.xp.reshape(value, (1,)).view(np.uint32), 0
