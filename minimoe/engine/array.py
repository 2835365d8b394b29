"""A tensor as an array: its shape, and its numbers as the host and other libraries read them."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.backend import Array, Backend


class BackendArray:
    """An array and the backend that it belongs to."""

    __slots__ = ("backend", "data")
    __array_priority__ = 1000  # NumPy's operators leave `array * tensor` to Tensor
    data: Array
    backend: Backend
    requires_grad: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The extent of each axis."""
        return tuple(self.data.shape)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.data.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        size = 1
        for extent in self.data.shape:
            size *= extent
        return size

    @property
    def dtype(self) -> Any:
        """The data type, as the backend's library names it."""
        return self.data.dtype

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return a copy on the host."""
        return np.array(self.backend.to_host(self.data))

    def item(self) -> Any:
        """Return the number in a tensor of one element."""
        return self.backend.to_host(self.data).item()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        host = self.backend.to_host(self.data)
        return np.array(host, dtype=dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self.backend.xp.asarray(self.data).__dlpack__(**options)  # NumPy returns 0-d results as scalars, which have no DLPack

    def __dlpack_device__(self) -> Any:
        return self.backend.xp.asarray(self.data).__dlpack_device__()

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __repr__(self) -> str:
        values = np.array2string(self.numpy(), separator=", ", threshold=20, precision=4)
        return f"tensor({values}, {self.data.dtype}, {self.backend.name}{', requires_grad' if self.requires_grad else ''})"
