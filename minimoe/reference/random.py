"""Random numbers without a state: Philox-4x32-10, a cipher of a counter (Salmon et al. 2011).

Key: the 64-bit seed. Counter: (element // 4, stream, micro-batch, step); element i takes word i % 4. So a number depends on
its purpose alone, is the same on every backend, and recomputation draws it again. uniform = (bits >> 8) * 2^-24; normals by Box and Muller.
The words live in int64, and stay below 2^49 there: several array libraries lack unsigned arithmetic.
"""

import math
from typing import NamedTuple

from minimoe.reference.arrays import Array, ArrayLayer

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Draw(NamedTuple):
    """What a random array is for. `step` and `micro` may be 0-d device arrays."""

    seed: int
    stream: int  # CRC-32 of the module's path and the purpose
    micro: int | Array
    step: int | Array


class RandomKernels(ArrayLayer):
    def random_bits(self, count: int, rng: Draw) -> Array:
        """32 random bits for each element.   -> int64 [count] in [0, 2^32)"""
        xp = self.xp
        blocks = xp.arange((count + 3) // 4, dtype=xp.int64)
        return xp.reshape(self.random_words(blocks, rng), (-1,))[:count]

    def random_words(self, blocks: Array, rng: Draw) -> Array:
        """The 32 random bits of elements 4b .. 4b + 3 of `random_bits`, for each block b.   int64 [n] -> int64 [n,4] in [0, 2^32)"""
        zero = self.xp.zeros_like(blocks)
        counter = (blocks & MASK, zero + rng.stream, zero + rng.micro, zero + rng.step)
        return self.xp.stack(self._philox(counter, (rng.seed & MASK, (rng.seed >> 32) & MASK)), axis=-1)

    def uniform(self, count: int, rng: Draw) -> Array:
        """Multiples of 2^-24 in [0, 1).   -> float32 [count]"""
        return self.xp.astype(self.random_bits(count, rng) >> 8, self.xp.float32) * 2.0**-24

    def normal(self, count: int, rng: Draw) -> Array:
        """Standard normals, sqrt(-2 ln(1 - u0)) * (cos, sin)(2 pi u1) from neighbours u0, u1.   -> float32 [count]

        They are computed in float64 if the backend has it, so that backends agree to 4 ulp.
        """
        xp = self.xp
        real = self.dtype("float64" if "float64" in self.dtypes else "float32")
        u = xp.reshape(xp.astype(self.uniform(count + count % 2, rng), real), (-1, 2))
        radius, angle = xp.sqrt(-2.0 * xp.log(1.0 - u[:, 0])), (2.0 * math.pi) * u[:, 1]
        pair = xp.stack((radius * xp.cos(angle), radius * xp.sin(angle)), axis=-1)
        return xp.astype(xp.reshape(pair, (-1,))[:count], xp.float32)

    def dropout(self, x: Array, rate: float, rng: Draw, out: Array | None = None) -> Array:
        """x / (1 - rate) where uniform >= rate, else 0. Its gradient is dropout of the gradient, with the same draw.   x [...] -> [...]"""
        keep = self.dropout_mask(math.prod(x.shape), rate, rng, x.dtype)
        return self.store(x * self.xp.reshape(keep, x.shape), out)

    def dropout_backward(self, dy: Array, rate: float, rng: Draw) -> Array:
        """-> dx [...]"""
        return self.dropout(dy, rate, rng)

    def dropout_mask(self, count: int, rate: float, rng: Draw, dtype: object) -> Array:
        """1 / (1 - rate) where uniform >= rate, else 0.   -> [count]"""
        keep = self.xp.astype(self.uniform(count, rng) >= rate, dtype)
        keep *= 1.0 / (1.0 - rate)
        return keep

    def _philox(self, counter: tuple[Array, Array, Array, Array], key: tuple[int, int]) -> tuple[Array, Array, Array, Array]:
        c0, c1, c2, c3 = counter
        k0, k1 = key
        for _ in range(ROUNDS):
            high0, low0 = self._multiply(c0, MULTIPLIERS[0])
            high1, low1 = self._multiply(c2, MULTIPLIERS[1])
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
        return c0, c1, c2, c3

    def _multiply(self, words: Array, factor: int) -> tuple[Array, Array]:
        """The high and low words of a 64-bit product, by halves of 16 bits that stay positive in int64."""
        low = (words & 0xFFFF) * factor  # < 2^48
        high = (words >> 16) * factor + (low >> 16)  # < 2^49
        return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
