"""Turns a library's namespace, whose functions take immutable arrays, into one whose functions take holders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minimoe.functional.holder import Holder, Library, refuse_while_recording, values_of

NO_ARRAYS = ("isdtype", "result_type")  # they return dtypes or booleans


class HolderNamespace:
    """Calls `plain.NAME` with the values of holders, and returns a holder of the result.

    `plain` follows the Array API standard as far as minimoe uses it (`minimoe.testing.array_layer`).
    """

    def __init__(self, library: Library) -> None:
        self._library, self._plain = library, library.plain

    def __getattr__(self, name: str) -> Any:
        thing = getattr(self._plain, name)
        if not callable(thing) or isinstance(thing, type):
            return thing  # a constant or a dtype
        library = self._library

        def call(*args: Any, **options: Any) -> Any:
            result = thing(*values_of(args), **values_of(options))
            return result if name in NO_ARRAYS else Holder(result, library)

        setattr(self, name, call)  # the next access finds it
        return call

    def reshape(self, x: Holder, shape: int | Sequence[int], *, copy: bool | None = None) -> Holder:
        """Return a view of another shape, or with copy=True a copy."""
        view = x.reshape((shape,) if isinstance(shape, int) else tuple(shape))
        return self.asarray(view, copy=True) if copy else view

    def astype(self, x: Holder, dtype: Any, *, copy: bool = True) -> Holder:
        """Return x in a dtype: x itself if it has that dtype and `copy` is false."""
        if x.dtype == dtype:
            return self.asarray(x, copy=True) if copy else x
        return Holder(self._plain.astype(x.value, dtype), self._library)

    def asarray(self, x: Any, *, dtype: Any = None, copy: bool | None = None) -> Holder:
        """Return a holder of an array, a number or nested lists; a holder itself unless it must be copied or cast."""
        if isinstance(x, Holder):
            if dtype is not None and x.dtype != dtype:
                return self.astype(x, dtype)
            return Holder(self._library.copied(x.value), self._library) if copy else x
        if isinstance(x, np.ndarray):
            refuse_while_recording("an array of the host is copied to the device")
        return Holder(self._plain.asarray(x, dtype=dtype), self._library)
