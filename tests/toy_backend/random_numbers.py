"""Philox-4x32-10 in unsigned 64-bit words: NumPy has them, so that a product of two 32-bit words is one multiplication."""

import math

import numpy as np

from minimoe.reference.random import Draw
from toy_backend.parts import Array, Scratch, put

LOW = 0xFFFFFFFF


class RandomNumbers(Scratch):
    def random_bits(self, count: int, rng: Draw) -> Array:
        blocks = -(-count // 4)
        a = np.arange(blocks, dtype=np.uint64)
        b, c, d = (np.full(blocks, int(word), dtype=np.uint64) for word in (rng.stream, rng.micro, rng.step))
        key0, key1 = rng.seed & LOW, rng.seed >> 32
        for _ in range(10):
            first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)  # 64-bit products
            a, b = (second >> 32) ^ b ^ np.uint64(key0), second & LOW
            c, d = (first >> 32) ^ d ^ np.uint64(key1), first & LOW
            key0, key1 = (key0 + 0x9E3779B9) & LOW, (key1 + 0xBB67AE85) & LOW
        words = np.empty((blocks, 4), dtype=np.int64)
        for i, word in enumerate((a, b, c, d)):
            words[:, i] = word
        return words.reshape(-1)[:count]

    def uniform(self, count: int, rng: Draw) -> Array:
        return ((self.random_bits(count, rng) >> 8) / 2**24).astype(np.float32)

    def normal(self, count: int, rng: Draw) -> Array:
        u = self.uniform(count + count % 2, rng).astype(np.float64)
        radius = np.sqrt(-2.0 * np.log1p(-u[0::2]))
        z = np.empty(len(u), dtype=np.float32)
        z[0::2] = radius * np.cos(2.0 * math.pi * u[1::2])
        z[1::2] = radius * np.sin(2.0 * math.pi * u[1::2])
        return z[:count]

    def dropout(self, x: Array, rate: float, rng: Draw, out: Array | None = None) -> Array:
        keep = self.uniform(x.size, rng).reshape(x.shape) >= rate
        return put(np.where(keep, x / (1.0 - rate), 0.0), out)

    def dropout_backward(self, dy: Array, rate: float, rng: Draw) -> Array:
        return self.dropout(dy, rate, rng)
