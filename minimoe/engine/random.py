"""Randomness without state: a random number is a function of the seed, the step and the name of its purpose.

A step's `Rng` hands each module a `Draw` by name; kernels turn draws into bits, uniforms and normals on the device
(`reference/random.py`). Initial weights and batches are drawn here, on the host: integers and + - * / sqrt in float64 alone, so that
they have the same bits on every machine.
"""


from dataclasses import dataclass
from zlib import crc32

import numpy as np
import numpy.typing as npt

from minimoe.backend import Array, load
from minimoe.reference.random import Draw

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rng:
    """The randomness of one micro-batch of one training step. Without one (None), a layer evaluates."""

    seed: int = 0
    step: int | Array = 0
    micro: int | Array = 0

    def draw(self, path: str, purpose: str) -> Draw:
        """Return the draw of a module, named by its path, for one purpose."""
        return Draw(self.seed, stream_id(f"{path}.{purpose}" if path else purpose), self.micro, self.step)


def stream_id(name: str) -> int:
    """Return the CRC-32 of a stream's name."""
    return crc32(name.encode())


def host_bits(count: int, seed: int, stream: str, micro: int = 0, step: int = 0) -> npt.NDArray[np.int64]:
    """Return random 32-bit words as NumPy int64.   -> [count] in [0, 2^32)"""
    bits: npt.NDArray[np.int64] = load("numpy").random_bits(count, Draw(seed, stream_id(stream), micro, step))
    return bits


def host_words(blocks: npt.NDArray[np.int64], seed: int, stream: str) -> npt.NDArray[np.int64]:
    """Return the words 4b .. 4b + 3 of `host_bits` for each block b.   [n] -> [n,4]"""
    words: npt.NDArray[np.int64] = load("numpy").random_words(blocks, Draw(seed, stream_id(stream), 0, 0))
    return words


def host_normal(count: int, seed: int, stream: str) -> Floats:
    """Return standard normals, the same bits on every machine: Phi^-1((bits + 1/2) / 2^32).   -> float64 [count]"""
    return inverse_normal((host_bits(count, seed, stream).astype(np.float64) + 0.5) * 2.0**-32)


# The inverse of the normal distribution function: M. J. Wichura, algorithm AS 241 (PPND16), Applied Statistics 37 (1988).
CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457, 13731.693765509461125,
     1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867, 5394.1960214247511077,
     687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
TAIL = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258, 3.64784832476320460504,
     5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459, 0.68976733498510000455,
     1.6763848301838038494, 2.05319162663775882187, 1.0),
)  # fmt: skip
LN2 = 0.69314718055994530942


def inverse_normal(p: Floats) -> Floats:
    """Phi^-1(p) for 2^-33 <= p <= 1 - 2^-33, to about 1e-15, by + - * / and sqrt alone.   [n] -> [n]"""
    q = p - 0.5
    centre = np.abs(q) <= 0.425
    r = 0.180625 - q * q
    z = q * _horner(CENTRE[0], r) / _horner(CENTRE[1], r)
    tail = ~centre
    nearer = np.where(q[tail] < 0.0, p[tail], 1.0 - p[tail])
    r = np.sqrt(-_log(nearer)) - 1.6
    z[tail] = np.where(q[tail] < 0.0, -1.0, 1.0) * _horner(TAIL[0], r) / _horner(TAIL[1], r)
    return z


def _log(x: Floats) -> Floats:
    """ln(x) = e ln 2 + 2 artanh((m - 1) / (m + 1)), x = m 2^e with m in [1/2, 1): NumPy's own differs between processors."""
    m, e = np.frexp(x)
    s = (m - 1.0) / (m + 1.0)  # |s| <= 1/3
    square = s * s
    series = np.zeros_like(s)
    for odd in range(35, 0, -2):
        series = series * square + 1.0 / odd
    return e * LN2 + 2.0 * s * series


def _horner(coefficients: tuple[float, ...], x: Floats) -> Floats:
    """The polynomial with the leading coefficient first."""
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y
