"""How far results of a backend may be from NumPy's float64: one table for each kind of comparison.

An error is the largest difference between two arrays over the largest finite value expected, so that rounding in small elements of
an array with large ones counts for what it is.
"""

KERNELS = {"float64": 1e-11, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
"""One kernel, inputs rounded to the dtype on both sides, sums of up to a hundred terms."""

GRADIENTS = {"float64": 1e-10, "float32": 5e-5}
"""An operation through autograd: outputs and the gradients of its inputs, a few kernels one after another."""

CURVE = {"float64": 1e-10, "float32": 5e-5}
"""The loss and the gradient's norm over 20 training steps: relative, each step.

Measured in float32 against NumPy's float64, the main curve's norm was off by up to 5.6e-6 on NumPy and 1.4e-5 on Numba, without a choice of
experts that flipped: none is nearly tied (tests/testing/test_curve_level.py).
"""

CURVE_START = {"float64": 1e-10, "float32": 1e-5}
"""The same over the first six steps, where rounding has not grown yet: 2.5e-6 at most on Numba's main curve."""

RECORDING = {"float64": 1e-10, "float32": 1e-4}
"""Recorded steps against plain ones, of a backend that promises them to rounding: figures, weights and moments after a few steps."""

CHECK_GRADS = 1e-6
"""A directional derivative in float64 against differences: relative."""


def long_sum(dtype: str, additions: int) -> float:
    """Return the relative error of a sum of terms of one sign, each of which passes through that many additions, one after the other.

    Each addition rounds by at most u, the unit roundoff of the dtype that sums (float32 at least), so that c of them are off by at most
    c u to first order (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2). Roundings of terms of random signs cancel;
    those of equal terms do not.
    """
    return additions * (2.0**-53 if dtype == "float64" else 2.0**-24)
