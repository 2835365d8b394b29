"""Random numbers: one thread encrypts one counter for four elements. Formulas: minimoe/reference/random.py.

`normal` is not overridden: the reference computes it in float64, to agree to 4 ulp on all backends, from the uniforms of this file.
"""

import numpy as np

from minimoe.backend import Array
from minimoe.reference.random import MASK, MULTIPLIERS, ROUNDS, WEYL, Draw
from minimoe_numba_cuda.compiler import cuda, float32, int64, uint32, uint64
from minimoe_numba_cuda.launch import I64, THREADS, CudaKernels, blocks_of, singles
from minimoe_numba_cuda.warp import ZERO

FACTOR0, FACTOR1 = (np.uint64(factor) for factor in MULTIPLIERS)
WEYL0, WEYL1 = (np.uint32(step) for step in WEYL)
STEP = np.float32(2.0**-24)


@cuda.jit(device=True, forceinline=True)
def philox(block, stream, micro, step, key0, key1):  # type: ignore[no-untyped-def]
    """Ten rounds of Philox-4x32 on the counter (block, stream, micro, step).   -> four uint32"""
    c0, c1, c2, c3 = uint32(block), uint32(stream), uint32(micro), uint32(step)
    k0, k1 = uint32(key0), uint32(key1)
    for _ in range(ROUNDS):
        first, second = uint64(c0) * FACTOR0, uint64(c2) * FACTOR1
        c0, c1, c2, c3 = (
            uint32(uint32(second >> uint64(32)) ^ c1 ^ k0),
            uint32(second),
            uint32(uint32(first >> uint64(32)) ^ c3 ^ k1),
            uint32(first),
        )
        k0, k1 = uint32(k0 + WEYL0), uint32(k1 + WEYL1)
    return c0, c1, c2, c3


@cuda.jit(device=True, forceinline=True)
def word_of(words, i):  # type: ignore[no-untyped-def]
    """Returns the i-th of four words, without an array in local memory."""
    if i < 2:
        return words[0] if i == 0 else words[1]
    return words[2] if i == 2 else words[3]


@cuda.jit(device=True, forceinline=True)
def uniform_of(word):  # type: ignore[no-untyped-def]
    return float32(word >> uint32(8)) * STEP


@cuda.jit
def draw_bits(stream, micro, step, key0, key1, bits):  # type: ignore[no-untyped-def]
    """bits [P] int64   Grid: ceil(P / 512), block 128."""
    block = cuda.grid(1)
    words = philox(block, stream, micro[0], step[0], key0, key1)
    for i in range(4):
        if 4 * block + i < bits.size:
            bits[4 * block + i] = int64(word_of(words, i))


@cuda.jit
def draw_uniform(stream, micro, step, key0, key1, u):  # type: ignore[no-untyped-def]
    """u [P] float32: multiples of 2^-24 in [0, 1)   Grid: ceil(P / 512), block 128."""
    block = cuda.grid(1)
    words = philox(block, stream, micro[0], step[0], key0, key1)
    for i in range(4):
        if 4 * block + i < u.size:
            u[4 * block + i] = uniform_of(word_of(words, i))


@cuda.jit
def drop(x, rate, scale, stream, micro, step, key0, key1, y):  # type: ignore[no-untyped-def]
    """y = x * scale where uniform >= rate, else 0; the mask is never stored.   flat [P]   Grid: ceil(P / 512). Bytes: P read, P written."""
    block = cuda.grid(1)
    words = philox(block, stream, micro[0], step[0], key0, key1)
    for i in range(4):
        if 4 * block + i < x.size:
            keep = uniform_of(word_of(words, i)) >= rate
            y[4 * block + i] = x[4 * block + i] * (scale if keep else ZERO)


class CudaRandom(CudaKernels):
    def random_bits(self, count: int, rng: Draw) -> Array:
        bits = self._empty(count, dtype=I64)
        self._launch(draw_bits, (blocks_of(count, 4 * THREADS),), (THREADS,), *self._counter(rng), bits)
        return bits

    def uniform(self, count: int, rng: Draw) -> Array:
        u = self._empty(count)
        self._launch(draw_uniform, (blocks_of(count, 4 * THREADS),), (THREADS,), *self._counter(rng), u)
        return u

    def dropout(self, x: Array, rate: float, rng: Draw, out: Array | None = None) -> Array:
        if not singles(x):
            return super().dropout(x, rate, rng, out)
        flat, y = self.xp.reshape(self.contiguous(x), (-1,)), self._result(out, tuple(x.shape))
        grid, scale = (blocks_of(flat.size, 4 * THREADS),), 1.0 / (1.0 - rate)
        self._launch(drop, grid, (THREADS,), flat, float(rate), scale, *self._counter(rng), self.xp.reshape(y, (-1,)))
        return self._stored(y, out)

    def _counter(self, rng: Draw) -> tuple[int | Array, ...]:
        """Returns the stream, micro-batch and step as arrays of one element, and the halves of the seed."""
        return rng.stream & MASK, self._one(rng.micro, I64), self._one(rng.step, I64), rng.seed & MASK, (rng.seed >> 32) & MASK
