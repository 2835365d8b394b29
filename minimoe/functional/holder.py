"""A mutable array over an immutable one.

    x = Holder(value, library)
    x += 1.0            # replaces what x holds
    part = x[2:6]       # a view: it reads through x, and writing to it replaces what x holds
    rows = part.reshape((2, 2))   # a view of the view

Only basic slices and reshapes are views, which is all that minimoe relies on. What other operations return shares nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import numpy as np

Value = Any
"""An array of the library, which cannot be written."""


class Library(Protocol):
    """What a holder needs from its backend, `FunctionalBackend`."""

    plain: Any
    xp: Any

    def filled(self, like: Value, new: Any) -> Value:
        """Return `new` with the shape and dtype of `like`."""

    def with_part(self, x: Value, index: Any, part: Any) -> Value:
        """Return x with another part."""

    def copied(self, x: Value) -> Value:
        """Return an array with a buffer of its own."""

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        """Return a copy in a NumPy array."""
        ...


class View(NamedTuple):
    """How a view reads its part of another holder, and how it computes that holder's value with the part replaced."""

    base: Holder
    read: Callable[[Value], Value]
    write: Callable[[Value, Value], Value]


def _operators(op: Callable[[Any, Any], Any]) -> tuple[Callable[..., Holder], Callable[..., Holder], Callable[..., Holder]]:
    """Return the methods for `x op y`, for `y op x` and for `x op= y`."""

    def forward(self: Holder, other: Any) -> Holder:
        return Holder(op(self.value, values_of(other)), self.library)

    def reflected(self: Holder, other: Any) -> Holder:
        return Holder(op(values_of(other), self.value), self.library)

    def in_place(self: Holder, other: Any) -> Holder:
        self.value = self.library.filled(self.value, op(self.value, values_of(other)))
        return self

    return forward, reflected, in_place


class Holder:
    """A mutable array of one library. `value`: what it holds, of the library's own type."""

    __slots__ = ("__weakref__", "_caching", "_value", "_view", "library", "recording")
    __array_ufunc__ = None  # NumPy's operators leave `scalar * holder` to the holder
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Value, library: Library, view: View | None = None) -> None:
        self.library = library
        self.recording = _recording.get()
        self._value = value  # of a view: what it has read, None after a write
        self._view = view
        self._caching: WeakValueDictionary[int, Holder] | None = None  # views of it that keep what they have read, by id

    @property
    def root(self) -> Holder:
        """The holder that a view is a part of in the end; itself if it is not a view."""
        return self if self._view is None else self._view.base.root

    @property
    def value(self) -> Value:
        """The array that it holds now."""
        if self._view is not None and self._value is None:
            self._value = self._view.read(self._view.base.value)
            self.root._remember(self)
        return self._value

    @value.setter
    def value(self, value: Value) -> None:
        if self._view is not None:
            self._view.base.value = self._view.write(self._view.base.value, value)
            return
        recording = _recording.get()
        if recording is not None and recording is not self.recording and id(self) not in recording.may_write:
            raise NotRecordable(f"it writes an array {list(self.shape)} that is not declared as its state")
        self._replace(value)

    def _replace(self, value: Value) -> None:
        self._value = value
        if self._caching is not None:
            for view in self._caching.values():
                view._value = None
            self._caching = None

    def _remember(self, view: Holder) -> None:
        if self._caching is None:
            self._caching = WeakValueDictionary()
        self._caching[id(view)] = view

    # ---- what minimoe uses of an array ---------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """The extent of each axis."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        """The library's dtype."""
        return self.value.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape))

    @property
    def T(self) -> Holder:
        """The transpose of a matrix, which is not a view."""
        return self.library.xp.permute_dims(self, tuple(reversed(range(self.ndim))))

    def __getitem__(self, index: Any) -> Holder:
        """Return a view for ints, slices, Ellipsis and None; for index arrays a new holder."""
        parts = index if isinstance(index, tuple) else (index,)
        if not all(part is None or part is Ellipsis or isinstance(part, int | np.integer | slice) for part in parts):
            return Holder(self.value[values_of(index)], self.library)
        if None in parts:
            return self[tuple(part for part in parts if part is not None)].reshape(tuple(self.value[index].shape))
        if all(part is Ellipsis for part in parts):
            return self.reshape(self.shape)
        with_part = self.library.with_part
        return Holder(None, self.library, View(self, lambda whole: whole[index], lambda whole, part: with_part(whole, index, part)))

    def __setitem__(self, index: Any, new: Any) -> None:
        if index is Ellipsis:
            self.value = self.library.filled(self.value, values_of(new))
        else:
            self.value = self.library.with_part(self.value, values_of(index), values_of(new))

    def reshape(self, shape: tuple[int, ...]) -> Holder:
        """Return a view of another shape."""
        reshape, own = self.library.plain.reshape, self.shape
        return Holder(None, self.library, View(self, lambda whole: reshape(whole, shape), lambda whole, part: reshape(part, own)))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Holder]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Holder({self.value!r})"

    # ---- operators -------------------------------------------------------------------------------------------------------------------

    __add__, __radd__, __iadd__ = _operators(operator.add)
    __sub__, __rsub__, __isub__ = _operators(operator.sub)
    __mul__, __rmul__, __imul__ = _operators(operator.mul)
    __truediv__, __rtruediv__, __itruediv__ = _operators(operator.truediv)
    __floordiv__, __rfloordiv__, __ifloordiv__ = _operators(operator.floordiv)
    __mod__, __rmod__, __imod__ = _operators(operator.mod)
    __pow__, __rpow__, __ipow__ = _operators(operator.pow)
    __matmul__, __rmatmul__, __imatmul__ = _operators(operator.matmul)
    __and__, __rand__, __iand__ = _operators(operator.and_)
    __or__, __ror__, __ior__ = _operators(operator.or_)
    __xor__, __rxor__, __ixor__ = _operators(operator.xor)
    __lshift__, __rlshift__, __ilshift__ = _operators(operator.lshift)
    __rshift__, __rrshift__, __irshift__ = _operators(operator.rshift)
    __lt__, __gt__, _ = _operators(operator.lt)
    __le__, __ge__, _ = _operators(operator.le)
    __eq__, __ne__ = _operators(operator.eq)[0], _operators(operator.ne)[0]  # type: ignore[assignment]

    def __neg__(self) -> Holder:
        return Holder(-self.value, self.library)

    def __invert__(self) -> Holder:
        return Holder(~self.value, self.library)

    def __abs__(self) -> Holder:
        return Holder(abs(self.value), self.library)

    # ---- reads on the host ---------------------------------------------------------------------------------------------------------

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.library.to_host(self), dtype=dtype)  # to_host has copied already

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return self.library.xp

    def __dlpack__(self, **options: Any) -> Any:
        return self.value.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.value.__dlpack_device__()

    def item(self) -> Any:
        """Return the number in an array of one element."""
        return self.library.to_host(self).item()

    def tolist(self) -> Any:
        """Return nested lists of numbers."""
        return self.library.to_host(self).tolist()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return operator.index(self.item())

    def __float__(self) -> float:
        return float(self.item())


def values_of(tree: Any) -> Any:
    """Return the same (named) tuples, lists and dicts with the values of all holders in place of them."""
    if isinstance(tree, Holder):
        return tree.value
    if isinstance(tree, tuple):
        items = [values_of(item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [values_of(item) for item in tree]
    if isinstance(tree, dict):
        return {key: values_of(item) for key, item in tree.items()}
    return tree


def holders_of(tree: Any, library: Library) -> Any:
    """Return the same (named) tuples with holders of all arrays in place of them."""
    if isinstance(tree, tuple):
        items = [holders_of(item, library) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return Holder(tree, library) if hasattr(tree, "dtype") and hasattr(tree, "shape") else tree


# ---- recording ---------------------------------------------------------------------------------------------------------------------------


class NotRecordable(Exception):
    """Raised while a step is recorded, for what a compiled function would repeat wrongly; the message names it."""


class Recording:
    """A step that is being traced. `holders`: those that it may write, besides those that it makes."""

    def __init__(self, holders: list[Holder]) -> None:
        self.may_write = {id(holder) for holder in holders}


_recording: ContextVar[Recording | None] = ContextVar("minimoe_functional_recording", default=None)


@contextmanager
def recording(holders: list[Holder]) -> Iterator[None]:
    """Refuse, within the block, to write other holders that were made before, and to move arrays between the host and the device."""
    token = _recording.set(Recording(holders))
    try:
        yield
    finally:
        _recording.reset(token)


def refuse_while_recording(what: str) -> None:
    """Raise NotRecordable if a step is being recorded."""
    if _recording.get() is not None:
        raise NotRecordable(what)
