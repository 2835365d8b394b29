"""The error function for NumPy, which has none: rational approximations, elementwise.

float64: three intervals by W. J. Cody, "Rational Chebyshev approximations for the error function" (1969), accurate to about 1e-16.
float32: one odd rational function x P(x^2) / Q(x^2) on |x| <= 3.92, accurate to 5e-7, and constant beyond: one pass, no branches.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]

SMALL = (
    (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2, 3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3),
)
MIDDLE = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1, 2.98635138197400131e2,
     8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3),
    (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3, 3.29079923573345963e3,
     4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3),
)  # fmt: skip
LARGE = (
    (1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1, 1.60837851487422766e-2,
     6.58749161529837803e-4),
    (1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1, 6.05183413124413191e-2, 2.33520497626869185e-3),
)  # fmt: skip
ONE_OVER_SQRT_PI = 5.6418958354775628695e-1

SINGLE = (
    (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04,
     -2.95459980854025e-03, -1.60960333262415e-02),
    (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02),
)  # fmt: skip
CHUNK = 32768  # elements at a time, so that the passes of a polynomial stay in the cache


def erf(x: Floats) -> Floats:
    """erf(x), in x's dtype.   [...] -> [...]"""
    if x.dtype == np.float64:
        return _double(x)
    flat = x.reshape(-1)
    y = np.empty_like(flat)
    for start in range(0, flat.size, CHUNK):
        y[start : start + CHUNK] = _single(flat[start : start + CHUNK])
    return y.reshape(x.shape)


def _single(x: Floats) -> Floats:
    x = np.clip(x, -3.92, 3.92)
    square = x * x
    y = _horner(SINGLE[0], square)
    y *= x
    y /= _horner(SINGLE[1], square)
    return y


def _double(x: Floats) -> Floats:
    a = np.abs(x)
    y = np.ones_like(x)
    small, middle, large = a <= 0.46875, (a > 0.46875) & (a <= 4.0), (a > 4.0) & (a < 6.0)
    square = a[small] ** 2
    y[small] = a[small] * _horner(SMALL[0], square) / _horner(SMALL[1], square)
    t = a[middle]
    y[middle] = 1.0 - np.exp(-t * t) * _horner(MIDDLE[0], t) / _horner(MIDDLE[1], t)
    t = a[large]
    inverse = 1.0 / (t * t)
    tail = inverse * _horner(LARGE[0], inverse) / _horner(LARGE[1], inverse)
    y[large] = 1.0 - np.exp(-t * t) / t * (ONE_OVER_SQRT_PI - tail)
    return np.where(np.isnan(x), x, np.copysign(y, x))


def _horner(coefficients: tuple[float, ...], x: Floats) -> Floats:
    """Evaluate a polynomial whose leading coefficient comes first."""
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y *= x
        y += c
    return y
