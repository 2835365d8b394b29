"""The operators and methods of Tensor: `a + b` is `ops.add(a, b)`. `engine/__init__.py` binds them when the package is imported."""

from typing import Any

from minimoe.backend import Array
from minimoe.engine import ops
from minimoe.engine.backward import backward
from minimoe.engine.tensor import Tensor


def bind() -> None:
    """Give Tensor its methods."""
    methods = {
        "backward": backward_from, "__add__": ops.add, "__radd__": ops.add, "__sub__": ops.subtract, "__rsub__": swapped(ops.subtract),
        "__mul__": ops.multiply, "__rmul__": ops.multiply, "__truediv__": ops.divide, "__rtruediv__": swapped(ops.divide),
        "__neg__": lambda x: ops.multiply(x, -1.0), "__pow__": ops.power, "__matmul__": ops.matmul, "__rmatmul__": swapped(ops.matmul),
        "__getitem__": ops.getitem, "sum": ops.sum, "mean": ops.mean, "max": ops.max, "reshape": reshape,
        "permute": lambda x, *axes: ops.permute(x, axes), "T": property(lambda x: ops.permute(x, tuple(reversed(range(x.ndim))))),
        "exp": ops.exp, "log": ops.log, "sqrt": lambda x: ops.power(x, 0.5), "tanh": ops.tanh, "astype": ops.astype,
    }  # fmt: skip
    for name, method in methods.items():
        setattr(Tensor, name, method)


def swapped(operation: Any) -> Any:
    """The operation with its operands the other way round."""
    return lambda x, other: operation(other, x)


def backward_from(tensor: Tensor, gradient: Array | Tensor | None = None) -> None:
    """Add to `.grad` of every leaf how this tensor depends on it; `gradient` defaults to 1 for a scalar."""
    backward([tensor], [gradient])


def reshape(x: Tensor, *shape: Any) -> Tensor:
    """x.reshape(2, 3) or x.reshape((2, 3))"""
    return ops.reshape(x, shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape)
