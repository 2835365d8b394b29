"""tinygrad's tensors as a minimoe backend: the array layer, and steps that TinyJit repeats. An example of backends/README.md.

tinygrad computes lazily, when a number is read: it fuses what it can into kernels, and compiles each of them for its shapes. The variable
DEV of the environment names the device; without it, tinygrad chooses. Its autograd is not used, since minimoe has its own.
"""

import math
import os
from typing import Any

import numpy as np

from minimoe.backend import Backend, BackendUnavailable, load
from minimoe.functional import FunctionalBackend, on_library_arrays
from minimoe.functional.backend import Pure

os.environ.setdefault("PARALLEL", "0")  # no processes that compile: each would import the running program first
from tinygrad import Device, Tensor, TinyJit, dtypes
from tinygrad.dtype import least_upper_dtype
from tinygrad.tensor import all_tensors

Value = Any  # tinygrad's Tensor
KINDS = {"bool": (dtypes.bool,), "integral": dtypes.ints, "real floating": dtypes.floats}


def argsort(x: Value, axis: int = -1, stable: bool = True) -> Value:
    """Count the elements that sort before each, NaN last: n^2 comparisons in two kernels, where tinygrad's own sort compiles dozens."""
    x = x.transpose(axis, -1)
    place, nan, mine, other = Tensor.arange(x.shape[-1]), x != x, x.unsqueeze(-1), x.unsqueeze(-2)  # mine [...,n,1], other [...,1,n]
    less = (other < mine) | (nan.unsqueeze(-1) & ~nan.unsqueeze(-2))
    tie = (other == mine) | (nan.unsqueeze(-1) & nan.unsqueeze(-2))
    rank = (less | (tie & (place < place.unsqueeze(-1)))).sum(-1, dtype=dtypes.int32)  # [...,n]
    order = (rank.unsqueeze(-2) == place.unsqueeze(-1)).where(place, 0).sum(-1, dtype=dtypes.int32)
    return order.transpose(axis, -1)


def full(shape: Any, value: Any, dtype: Any = None) -> Value:
    """Return a constant: it takes no memory, since it is part of the code of every kernel that reads it."""
    dtype = dtype or {bool: dtypes.bool, int: dtypes.int32, float: dtypes.float32}[type(value)]
    return Tensor.full(shape if isinstance(shape, tuple) else (shape,), value, dtype=dtype, buffer=False)


def maximum_of(x: Value, axis: Any = None, keepdims: bool = False) -> Value:
    """Return the maximum, NaN if there is one, which tinygrad's own passes over."""
    return (x != x).any(axis, keepdims).where(math.nan, x.max(axis, keepdims)) if x.is_floating_point() else x.max(axis, keepdims)


def logaddexp(x: Value, y: Value) -> Value:
    """log(e^x + e^y); two equal arguments may be infinite, and their difference NaN."""
    return (x == y).where(x + math.log(2.0), x.maximum(y) + (1.0 + (-(x - y).abs()).exp()).log())


def from_numpy(x: Any) -> Value:
    """Copy it now. tinygrad makes a constant of a 0-d array, and would compile kernels for each number: it goes as a vector of one."""
    if isinstance(x, Tensor):
        return x
    array = np.array(x, dtype=np.float32 if isinstance(x, float) else None)
    return Tensor(array.reshape(-1)).realize().reshape(array.shape)


class Namespace:
    """What minimoe uses of the Array API standard."""

    bool, int32, int64, float32, inf = dtypes.bool, dtypes.int32, dtypes.int64, dtypes.float32, math.inf
    abs, cos, exp, isfinite, isinf, log = Tensor.abs, Tensor.cos, Tensor.exp, Tensor.isfinite, Tensor.isinf, Tensor.log
    matmul, minimum, sin, sqrt, tanh = Tensor.matmul, Tensor.minimum, Tensor.sin, Tensor.sqrt, Tensor.tanh
    astype, broadcast_to, permute_dims, reshape, where = Tensor.cast, Tensor.expand, Tensor.permute, Tensor.reshape, Tensor.where
    argsort, full, logaddexp, max = staticmethod(argsort), staticmethod(full), staticmethod(logaddexp), staticmethod(maximum_of)
    any = staticmethod(lambda x, axis=None, keepdims=False: x.any(axis, keepdims))
    arange = staticmethod(lambda start, stop=None, step=1, dtype=dtypes.int32: Tensor.arange(start, stop, step, dtype=dtype))
    asarray = staticmethod(lambda x, dtype=None: (y := from_numpy(x)).cast(dtype or y.dtype))
    clip = staticmethod(lambda x, min=None, max=None: x.clamp(min, max))
    concat = staticmethod(lambda xs, axis=0: xs[0].cat(*xs[1:], dim=axis))
    cumulative_sum = staticmethod(lambda x, axis=0: x.cumsum(axis))
    empty = zeros = staticmethod(lambda shape, dtype=dtypes.float32: full(shape, 0, dtype))
    empty_like = zeros_like = staticmethod(lambda x, dtype=None: full(x.shape, 0, dtype or x.dtype))
    full_like = staticmethod(lambda x, value, dtype=None: full(x.shape, value, dtype or x.dtype))
    isdtype = staticmethod(lambda dtype, kind: dtype in KINDS[kind])
    matrix_transpose = staticmethod(lambda x: x.transpose(-2, -1))
    mean = staticmethod(lambda x, axis=None, keepdims=False: x.mean(axis, keepdims))
    ones = staticmethod(lambda shape, dtype=dtypes.float32: full(shape, 1, dtype))
    ones_like = staticmethod(lambda x, dtype=None: full(x.shape, 1, dtype or x.dtype))
    result_type = staticmethod(lambda *things: least_upper_dtype(*[getattr(thing, "dtype", thing) for thing in things]))
    sign = staticmethod(lambda x: (x != x).where(x, x.sign()))  # tinygrad's sign of NaN is 1
    squeeze = staticmethod(lambda x, axis: x.squeeze(axis))
    stack = staticmethod(lambda xs, axis=0: xs[0].stack(*xs[1:], dim=axis))
    sum = staticmethod(lambda x, axis=None, keepdims=False, dtype=None: x.sum(axis, keepdims, dtype=dtype))
    take = staticmethod(lambda x, index, axis=0: x[(*[slice(None)] * axis, index)])
    take_along_axis = staticmethod(lambda x, index, axis=-1: x.gather(axis, index))


class TinygradBackend(FunctionalBackend):
    """tinygrad on the device that it chose."""

    name, dtypes, plain = "tinygrad", ("float32",), Namespace

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Value:
        return from_numpy(array)

    def to_numpy(self, x: Value) -> np.ndarray[Any, Any]:
        """Compute whatever is alive as well as x: parameters that nobody reads would otherwise stay an expression of every step so far."""
        Tensor.realize(x, *(tensor for reference in list(all_tensors) if (tensor := reference()) is not None))
        return x.numpy()

    def with_part(self, x: Value, index: Any, part: Any) -> Value:
        new = x.clone()
        new[index] = part.cast(x.dtype) if isinstance(part, Tensor) else Tensor(part, dtype=x.dtype)
        return new

    def with_added(self, x: Value, index: Value, rows: Value) -> Value:
        here = index % x.shape[0] == Tensor.arange(x.shape[0]).unsqueeze(-1)  # [V,N]: a row of x sums those that name it
        return x + here.reshape(*here.shape, *[1] * (x.ndim - 1)).where(rows.unsqueeze(0), 0).sum(1)

    @on_library_arrays
    def erf(self, x: Value) -> Value:
        return x.erf()

    def synchronize(self) -> None:
        Device[Device.DEFAULT].synchronize()

    def memory(self) -> dict[str, int]:
        return load("numpy").memory()  # of the process

    def compile(self, function: Pure) -> Pure:
        """Return the function for TinyJit: it runs at the first two calls, which builds its kernels, and is not run again after that."""

        def arrays(state: list[Value], arguments: list[Value]) -> list[Value]:
            after, result = function(state, arguments)
            return [x.clone() for x in (*after, result)]  # what the step only reads would remain that of the first calls

        step = TinyJit(arrays)

        def run(state: list[Value], arguments: list[Value]) -> tuple[list[Value], Value]:
            *after, result = step(own(state), own(arguments))
            return own(after), own([result])[0]  # the next call overwrites what this one returned

        def own(arrays: list[Value]) -> list[Value]:
            return [x.clone().realize() for x in arrays]

        return run


def backend() -> Backend:
    """Return the backend on tinygrad's device. Raises `BackendUnavailable` if it has none: its CPU device calls the compiler clang."""
    try:
        Device[Device.DEFAULT]
    except Exception as error:  # whatever the driver of a device raises
        raise BackendUnavailable(f"backend tinygrad: {error}; its CPU device needs the compiler clang on the PATH") from error
    return TinygradBackend()
