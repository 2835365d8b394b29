"""Random numbers by Philox, many counters at once, and dropout that does not store them. Formulas: minimoe/reference/random.py."""

import math

import numpy as np

from minimoe.backend import Array
from minimoe.reference.random import MULTIPLIERS, ROUNDS, WEYL, Draw
from minimoe_numba.arrays import FLOAT32, result, singles
from minimoe_numba.compiling import inlined
from minimoe_numba.creation import empty, filled
from minimoe_numba.kernel import F1, L1, kernel
from minimoe_numba.maths import ZERO
from minimoe_numpy import NumpyBackend

PIECE = 4096  # blocks per piece; a block is four numbers
LANES = 64  # blocks drawn together: each round goes over all of them, which LLVM turns into vector instructions
u32, u64 = np.uint32, np.uint64
FACTOR0, FACTOR1 = (u64(factor) for factor in MULTIPLIERS)
WEYL0, WEYL1 = (u32(step) for step in WEYL)
SHIFT, MANTISSA = u64(32), u32(8)
UNIT = np.float32(2.0**-24)
TURN = 2.0 * math.pi


@inlined
def draw(first, stream, micro, step, key0, key1, words):  # type: ignore[no-untyped-def]
    """Write the words [4,LANES] of the LANES blocks from `first` on."""
    for i in range(LANES):
        words[0, i], words[1, i], words[2, i], words[3, i] = u32(first + i), u32(stream), u32(micro), u32(step)
    k0, k1 = u32(key0), u32(key1)
    for _ in range(ROUNDS):
        for i in range(LANES):
            product0, product1 = u64(words[0, i]) * FACTOR0, u64(words[2, i]) * FACTOR1
            words[0, i] = u32(product1 >> SHIFT) ^ words[1, i] ^ k0
            words[1, i] = u32(product1)
            words[2, i] = u32(product0 >> SHIFT) ^ words[3, i] ^ k1
            words[3, i] = u32(product0)
        k0, k1 = u32(k0 + WEYL0), u32(k1 + WEYL1)


@inlined
def uniform_of(word):  # type: ignore[no-untyped-def]
    return np.float32(np.int32(word >> MANTISSA)) * UNIT


@kernel
def bit_blocks(start: int, stop: int, stream: int, when: L1, key0: int, key1: int, bits: L1) -> None:
    words = np.empty((4, LANES), np.uint32)
    for low in range(start, stop, LANES):
        draw(low, stream, when[0], when[1], key0, key1, words)
        for i in range(min(LANES, stop - low)):
            for j in range(4):
                bits[4 * (low + i) + j] = np.int64(words[j, i])


@kernel
def uniform_blocks(start: int, stop: int, stream: int, when: L1, key0: int, key1: int, y: F1) -> None:
    words = np.empty((4, LANES), np.uint32)
    for low in range(start, stop, LANES):
        draw(low, stream, when[0], when[1], key0, key1, words)
        for i in range(min(LANES, stop - low)):
            for j in range(4):
                y[4 * (low + i) + j] = uniform_of(words[j, i])


@kernel
def normal_blocks(start: int, stop: int, stream: int, when: L1, key0: int, key1: int, y: F1) -> None:
    """Write normal numbers, by the Box-Muller transform in float64."""
    words = np.empty((4, LANES), np.uint32)
    for low in range(start, stop, LANES):
        draw(low, stream, when[0], when[1], key0, key1, words)
        for i in range(min(LANES, stop - low)):
            for j in range(0, 4, 2):
                radius = np.sqrt(-2.0 * np.log(1.0 - np.float64(uniform_of(words[j, i]))))
                angle = TURN * np.float64(uniform_of(words[j + 1, i]))
                y[4 * (low + i) + j] = np.float32(radius * np.cos(angle))
                y[4 * (low + i) + j + 1] = np.float32(radius * np.sin(angle))


@kernel
def dropout_blocks(start: int, stop: int, stream: int, when: L1, key0: int, key1: int, rate: float, factor: float, x: F1, y: F1) -> None:
    """y = x * (factor or 0); x and y may end within the last block."""
    words = np.empty((4, LANES), np.uint32)
    for low in range(start, stop, LANES):
        draw(low, stream, when[0], when[1], key0, key1, words)
        whole = min(low + LANES, stop, len(x) // 4)
        for i in range(whole - low):
            for j in range(4):
                y[4 * (low + i) + j] = x[4 * (low + i) + j] * (factor if uniform_of(words[j, i]) >= rate else ZERO)
        if whole < min(low + LANES, stop):
            for n in range(4 * whole, len(x)):
                y[n] = x[n] * (factor if uniform_of(words[n - 4 * whole, whole - low]) >= rate else ZERO)


def words_of(rng: Draw) -> tuple[int, Array, int, int]:
    """Return the stream, an array of micro-batch and step, and the two halves of the seed."""
    when = empty(2, np.int64)
    when[0], when[1] = rng.micro, rng.step
    return rng.stream, when, rng.seed & 0xFFFFFFFF, rng.seed >> 32 & 0xFFFFFFFF


def blocks_of(count: int) -> int:
    return (count + 3) // 4


class FastRandom(NumpyBackend):
    def random_bits(self, count: int, rng: Draw) -> Array:
        bits = empty(4 * blocks_of(count), np.int64)
        bit_blocks(blocks_of(count), PIECE, *words_of(rng), bits)
        return bits[:count]

    def uniform(self, count: int, rng: Draw) -> Array:
        y = empty(4 * blocks_of(count))
        uniform_blocks(blocks_of(count), PIECE, *words_of(rng), y)
        return y[:count]

    def normal(self, count: int, rng: Draw) -> Array:
        y = empty(4 * blocks_of(count))
        normal_blocks(blocks_of(count), PIECE // 16, *words_of(rng), y)
        return y[:count]

    def dropout(self, x: Array, rate: float, rng: Draw, out: Array | None = None) -> Array:
        if not singles(x):
            return super().dropout(x, rate, rng, out)
        y = result(out, x.shape)
        dropout_blocks(blocks_of(x.size), PIECE, *words_of(rng), rate, 1.0 / (1.0 - rate), x.reshape(-1), y.reshape(-1))
        return y if y is out else self.store(y, out)

    def dropout_mask(self, count: int, rate: float, rng: Draw, dtype: object) -> Array:
        if dtype != FLOAT32:
            return super().dropout_mask(count, rate, rng, dtype)
        return self.dropout(filled((count,), 1, np.float32), rate, rng)
