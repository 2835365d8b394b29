"""New arrays: in the tape's memory while there is a tape, and written again in each repetition."""

from typing import Any

import numpy as np

from minimoe_numba.traced import Traced, plain, recorder, traced


def empty(shape: Any, dtype: Any = np.float32) -> Any:
    """Like np.empty, in the tape's memory while there is a tape."""
    tape = recorder.tape
    if tape is None:
        return np.empty(shape, dtype)
    return tape.memory.array((shape,) if isinstance(shape, int) else tuple(shape), dtype)


def filled(shape: Any, value: Any, dtype: Any) -> Any:
    """Return an array filled with one value, which each repetition writes again."""
    y = empty(shape, dtype)
    y.fill(value)
    return y


def contiguous(x: Any, dtype: Any = None) -> Any:
    """Like np.ascontiguousarray for an array of at least one axis; the result is traced if x is."""
    if dtype is not None and x.dtype != dtype:
        x = x.astype(dtype)
    return x if x.flags.c_contiguous else x.copy()


class Namespace:
    """NumPy, except that new arrays are traced."""

    def __init__(self) -> None:
        self.__dict__ |= {name: getattr(np, name) for name in np.__all__ if not hasattr(Namespace, name)}  # found without __getattr__

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any = np.float64) -> Any:
        return traced(np.empty(shape, dtype)) if recorder.tape is None else empty(shape, dtype)

    def zeros(self, shape: Any, dtype: Any = np.float64) -> Any:
        return traced(np.zeros(shape, dtype)) if recorder.tape is None else filled(shape, 0, dtype)

    def ones(self, shape: Any, dtype: Any = np.float64) -> Any:
        return traced(np.ones(shape, dtype)) if recorder.tape is None else filled(shape, 1, dtype)

    def full(self, shape: Any, value: Any, dtype: Any = None) -> Any:
        if isinstance(value, Traced):
            y = self.empty(shape, value.dtype if dtype is None else dtype)
            y[...] = value
            return y
        made = np.full(shape, value, dtype)
        return traced(made) if recorder.tape is None else filled(made.shape, value, made.dtype)

    def arange(self, *args: Any, **options: Any) -> Any:
        return again_from(np.arange(*args, **options))

    def eye(self, *args: Any, **options: Any) -> Any:
        return again_from(np.eye(*args, **options))

    def linspace(self, *args: Any, **options: Any) -> Any:
        return again_from(np.linspace(*args, **options))

    def asarray(self, x: Any, dtype: Any = None, copy: bool | None = None) -> Any:
        if isinstance(x, Traced):
            if dtype is not None and x.dtype != dtype:
                return x.astype(dtype)
            return x.copy() if copy else x
        return again_from(np.asarray(x, dtype=dtype, copy=copy), isinstance(x, np.ndarray))


def again_from(constant: "np.ndarray[Any, Any]", given: bool = False) -> Any:
    """Return a constant as a traced array, which each repetition writes again, since it may be changed in place.

    `given`: the caller owns the array and may change it later, so there can be no tape.
    """
    tape = recorder.tape
    if tape is None:
        return traced(constant)
    if given:
        tape.refuse("asarray was handed an array that is not traced")
        return traced(constant)
    y = tape.memory.array(constant.shape, constant.dtype)
    to = plain(y)
    np.copyto(to, constant)
    tape.call(lambda: np.copyto(to, constant))
    return y
