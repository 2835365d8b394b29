"""How far results of a backend may be from NumPy's float64: one table for each kind of comparison.

An error is the largest difference between two arrays over the largest finite value expected, so that rounding in small elements of
an array with large ones counts for what it is.
"""

KERNELS = {"float64": 1e-11, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
"""One kernel, inputs rounded to the dtype on both sides, sums of up to a hundred terms."""

GRADIENTS = {"float64": 1e-10, "float32": 5e-5}
"""An operation through autograd: outputs and the gradients of its inputs, a few kernels one after another."""

CURVE = {"float64": 1e-10, "float32": 1e-3}
"""The loss over 20 training steps: relative, each step."""

CHECK_GRADS = 1e-6
"""A directional derivative in float64 against differences: relative."""


def long_sum(dtype: str, terms: int) -> float:
    """Return how far a sum of so many terms may be off, relative to a result of terms of one sign.

    A term that passes through c additions, one after the other, is off by at most c u, with u the unit roundoff of the dtype that sums
    (float32 at least): sums by blocks of sqrt(n), by halves, or by vectors and threads have chains that are not longer than 4 sqrt(n).
    One chain of a million equal terms is off by 100 times the bound; it reaches n u only if every rounding goes the same way, but for
    equal terms all those within a power of two do.
    """
    unit = 2.0**-53 if dtype == "float64" else 2.0**-24
    return 4.0 * terms**0.5 * unit
