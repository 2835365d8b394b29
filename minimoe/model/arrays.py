"""Converts arrays that a caller passes (lists, NumPy, any library with DLPack, tensors) to arrays of the backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.backend import Array, Backend
from minimoe.engine.tensor import Tensor


class DeviceArrays:
    """Copies arrays to the backend's device if they are elsewhere. Values that the host can read are checked on the way."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.array_type = backend, type(backend.xp.zeros(()))

    def any(self, values: Any) -> Array:
        """Return numbers of any dtype, which is kept."""
        if isinstance(values, Tensor):
            values = values.data
        if isinstance(values, list | tuple):
            values = np.asarray(values)
        if isinstance(values, np.ndarray) and (self.array_type is np.ndarray or not isinstance(values, self.array_type)):
            return self.backend.from_host(values)
        return values

    def integers(self, values: Any, limit: int = 0, what: str = "", holder: str = "", ignore: int | None = None) -> Array:
        """Return int32. With a limit, values that the host can read must be 0 .. limit - 1, or `ignore`; else ValueError names `what`."""
        if isinstance(values, Tensor):
            values = values.data
        if isinstance(values, list | tuple):
            values = np.asarray(values)
        elif hasattr(values, "__dlpack__") and not isinstance(values, np.ndarray | self.array_type):
            values = np.from_dlpack(values)
        seen = self.backend.host_view(values) if limit else None
        if seen is not None:
            checked = seen if ignore is None else seen[seen != ignore]
            if checked.size and (checked.min() < 0 or checked.max() >= limit):
                raise ValueError(f"{what} run from {checked.min()} to {checked.max()}, {holder} {limit}")
        return self.backend.xp.astype(self.any(values), self.backend.xp.int32, copy=False)
