"""The operators and methods of Tensor: `a + b` is `ops.add(a, b)`.

The operations make tensors, so they are imported after Tensor: `engine/__init__.py` hands them to `bind` when the package is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from minimoe.backend import Array

Result = TypeVar("Result")  # Tensor
Axis = int | tuple[int, ...] | None
ops: Any = None  # the package minimoe.engine.ops
walk: Any = None  # minimoe.engine.backward.backward


def bind(operations: Any, backward: Any) -> None:
    """Set the operations and the walk that the methods below call."""
    global ops, walk
    ops, walk = operations, backward


class Operators(Generic[Result]):
    """The operators and methods of a tensor that compute."""

    __slots__ = ()

    def backward(self, gradient: Array | Result | Sequence[Any] | None = None) -> None:
        """Add the gradient of this tensor to `.grad` of every leaf; `gradient`, its own, defaults to 1 for a scalar."""
        walk([self], [gradient])

    def __add__(self, other: Any) -> Result:
        """self + other, broadcast"""
        return ops.add(self, other)

    def __radd__(self, other: Any) -> Result:
        """other + self, broadcast"""
        return ops.add(self, other)

    def __sub__(self, other: Any) -> Result:
        """self - other, broadcast"""
        return ops.subtract(self, other)

    def __rsub__(self, other: Any) -> Result:
        """other - self, broadcast"""
        return ops.subtract(other, self)

    def __mul__(self, other: Any) -> Result:
        """self * other, broadcast"""
        return ops.multiply(self, other)

    def __rmul__(self, other: Any) -> Result:
        """other * self, broadcast"""
        return ops.multiply(self, other)

    def __truediv__(self, other: Any) -> Result:
        """self / other, broadcast"""
        return ops.divide(self, other)

    def __rtruediv__(self, other: Any) -> Result:
        """other / self, broadcast"""
        return ops.divide(other, self)

    def __neg__(self) -> Result:
        """-self"""
        return ops.multiply(self, -1.0)

    def __pow__(self, exponent: float) -> Result:
        """self ** exponent, for a constant exponent"""
        return ops.power(self, exponent)

    def __matmul__(self, other: Any) -> Result:
        """self @ other over the last two axes.   [...,N,I], [...,I,O] -> [...,N,O]"""
        return ops.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Result:
        """other @ self over the last two axes.   [...,N,I], [...,I,O] -> [...,N,O]"""
        return ops.matmul(other, self)

    def __getitem__(self, index: Any) -> Result:
        """self[index], for integers, slices, None and Ellipsis, or for an array of row numbers"""
        return ops.getitem(self, index)

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Result:
        """Return the sum over some axes, or over all."""
        return ops.sum(self, axis, keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Result:
        """Return the mean over some axes, or over all."""
        return ops.mean(self, axis, keepdims)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Result:
        """Return the largest element over some axes, or over all; ties share the gradient."""
        return ops.max(self, axis, keepdims)

    def reshape(self, *shape: Any) -> Result:
        """Return the same numbers in another shape: x.reshape(2, 3) or x.reshape((2, 3))."""
        return ops.reshape(self, shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape)

    def permute(self, *axes: int) -> Result:
        """Return the axes in another order: x.permute(1, 0)."""
        return ops.permute(self, axes)

    @property
    def T(self) -> Result:
        """The axes in reverse order."""
        return ops.permute(self, tuple(reversed(range(self.ndim))))  # type: ignore[attr-defined]

    def exp(self) -> Result:
        """Return e^self, elementwise."""
        return ops.exp(self)

    def log(self) -> Result:
        """Return ln(self), elementwise."""
        return ops.log(self)

    def sqrt(self) -> Result:
        """Return the square root, elementwise."""
        return ops.power(self, 0.5)

    def tanh(self) -> Result:
        """Return the hyperbolic tangent, elementwise."""
        return ops.tanh(self)

    def astype(self, dtype: Any) -> Result:
        """Return the same numbers in another floating dtype; the gradient comes back in this one."""
        return ops.astype(self, dtype)
