"""Functions of one float32 that LLVM turns into vector instructions: they have no branches, no calls, and few multiplications.

exp:   2^n times a polynomial in x - n ln 2, |x - n ln 2| <= ln 2 / 2; within 2 ulp.
erf:   an odd rational function on |x| <= 3.92, within 5e-7, held constant beyond (the coefficients of `minimoe_numpy/erf.py`).
"""

import numpy as np

from minimoe_numba.compiling import compiled
from minimoe_numba.native import float_as_int, int_as_float
from minimoe_numba.vector import WIDTH, largest_of_vectors
from minimoe_numpy.erf import SINGLE

f32 = np.float32
LOG2_E = f32(1.44269504)
LN2_HIGH, LN2_LOW = f32(0.693359375), f32(-2.12194440e-4)  # their sum is ln 2; the first times n is exact
E0, E1, E2, E3, E4, E5 = (f32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5))
LOWEST, HIGHEST = f32(-87.33654), f32(88.72283)
ZERO, HALF, ONE, TWO, INFINITY = f32(0.0), f32(0.5), f32(1.0), f32(2.0), f32(np.inf)
ERF_LIMIT = f32(3.92)
P0, P1, P2, P3, P4, P5, P6 = (f32(c) for c in SINGLE[0])
Q0, Q1, Q2, Q3, Q4 = (f32(c) for c in SINGLE[1])


@compiled
def exp(x):  # type: ignore[no-untyped-def]
    """e^x; 0 below -87.3, infinity above 88.7.   (Moshier, Cephes)"""
    n = np.floor(x * LOG2_E + HALF)
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    y = p * r * r + r + ONE
    y = int_as_float(float_as_int(y) + (np.int32(n) << np.int32(23)))  # times 2^n, in the exponent's bits
    y = ZERO if x < LOWEST else y
    return INFINITY if x > HIGHEST else y


@compiled
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e^-x)"""
    return ONE / (ONE + exp(-x))


@compiled
def tanh(x):  # type: ignore[no-untyped-def]
    """1 - 2 / (1 + e^2x)"""
    return ONE - TWO / (ONE + exp(TWO * x))


@compiled
def erf(x):  # type: ignore[no-untyped-def]
    """The error function."""
    x = min(max(x, -ERF_LIMIT), ERF_LIMIT)
    s = x * x
    top = (((((P0 * s + P1) * s + P2) * s + P3) * s + P4) * s + P5) * s + P6
    return x * top / ((((Q0 * s + Q1) * s + Q2) * s + Q3) * s + Q4)


@compiled
def largest(x):  # type: ignore[no-untyped-def]
    """Return the largest number of a row, -inf if it is empty. It may miss a NaN, which the sums that follow do not."""
    if len(x) >= WIDTH:
        return largest_of_vectors(x.ctypes.data, len(x))
    best = -INFINITY
    for i in range(len(x)):
        best = x[i] if x[i] > best else best
    return best


@compiled
def softmax_into(z, p):  # type: ignore[no-untyped-def]
    """Write the softmax of a row z to p."""
    top, total = largest(z), ZERO
    for i in range(len(z)):
        p[i] = exp(z[i] - top)
        total += p[i]
    share = ONE / total
    for i in range(len(z)):
        p[i] *= share
