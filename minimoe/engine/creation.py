"""Makes tensors from numbers and from arrays of any library."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.backend import Backend, current_backend
from minimoe.engine.tensor import Tensor


def tensor(array: Any, requires_grad: bool = False, dtype: str | None = None, backend: Backend | None = None) -> Tensor:
    """Return a leaf tensor made from numbers, or from an array of any library with DLPack or `__array__` (NumPy, CuPy, PyTorch, JAX).

    The data are copied. An array keeps its dtype; Python's numbers become float32 or int32, unless `dtype` says otherwise.
    """
    backend = backend or current_backend()
    if isinstance(array, Tensor):
        array = array.data if array.backend is backend else array.numpy()
    if isinstance(array, type(backend.xp.zeros(()))):
        data = backend.xp.asarray(array, copy=True)
    else:
        data = backend.from_host(_to_numpy(array))
    wanted = data.dtype if dtype is None else backend.dtype(dtype)
    if requires_grad and not backend.xp.isdtype(wanted, "real floating"):
        raise ValueError(f"only float tensors have gradients, got {wanted}: pass a float dtype")
    return Tensor(data if data.dtype == wanted else backend.xp.astype(data, wanted), backend, requires_grad)


def array_like(value: Any, like: Tensor) -> Any:
    """Return a value (a tensor, an array of any library, numbers) as an array of the backend and dtype of a tensor."""
    array = value.data if isinstance(value, Tensor) else value
    if not isinstance(array, type(like.data)):
        array = tensor(array, backend=like.backend).data
    return array if array.dtype == like.dtype else like.backend.xp.astype(array, like.dtype)


def _to_numpy(array: Any) -> np.ndarray[Any, Any]:
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "__dlpack__"):
        if getattr(array, "requires_grad", False):
            array = array.detach()
        try:
            return np.from_dlpack(array)
        except (BufferError, TypeError, RuntimeError):
            return np.asarray(array.get() if hasattr(array, "get") else array)  # on another device
    host = np.asarray(array)
    if not hasattr(array, "dtype"):  # Python's own numbers: the library's working precision, as in every other framework
        host = host.astype({"f": np.float32, "i": np.int32, "u": np.int32}.get(host.dtype.kind, host.dtype))
    return host
