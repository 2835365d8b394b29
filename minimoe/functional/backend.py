"""The base class of backends over immutable arrays, and how such a backend records a step.

A port sets `plain` and defines `from_numpy`, `to_numpy`, `with_part`, `with_added`, `erf`, `synchronize` and `memory`. With `compile` it
also records steps. All of these take and return the library's own arrays; minimoe's kernels, and the references, see holders of them.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable
from functools import wraps
from inspect import signature
from threading import Timer
from typing import Any

import numpy as np

from minimoe.backend import Array, Backend, Work
from minimoe.functional.holder import Holder, NotRecordable, Value, holders_of, recording, refuse_while_recording, values_of
from minimoe.functional.namespace import HolderNamespace

ANNOUNCED_AFTER = 2.0  # seconds: a compilation that takes longer is announced to the user

Pure = Callable[[list[Value], list[Value]], tuple[list[Value], Value]]
"""A step as a function without side effects: (state, arguments) -> (state afterwards, result)."""


class FunctionalBackend(Backend):
    """A backend whose arrays are holders of one library's immutable arrays."""

    plain: Any  # the library's namespace, with the functions of the Array API standard that minimoe uses
    reads_offsets = False
    exact_recording = False  # a compiler that fuses operations rounds in other places
    warm_up = 0  # the first step is traced: a plain step would compile every operation separately

    def __init__(self) -> None:
        self.xp = HolderNamespace(self)
        self._listener: Callable[[str], None] = to_stderr

    # ---- what a port supplies, in the library's own arrays ------------------------------------------------------------------------------

    @abstractmethod
    def from_numpy(self, array: np.ndarray[Any, Any]) -> Value:
        """Return a copy of a NumPy array, of the same dtype."""

    @abstractmethod
    def to_numpy(self, x: Value) -> np.ndarray[Any, Any]:
        """Return an array's numbers on the host. It waits for them."""

    @abstractmethod
    def with_part(self, x: Value, index: Any, part: Any) -> Value:
        """Return x with x[index] = part, which is broadcast and cast to x's dtype. An index is what NumPy takes, without None."""

    @abstractmethod
    def with_added(self, x: Value, index: Value, rows: Value) -> Value:
        """Return x with x[index[i]] += rows[i] for each i, in the order of i; a negative index counts from the end."""

    def copied(self, x: Value) -> Value:
        """Return x, or a copy of it if `compile` donates its buffer: another holder may not share a buffer that is reused."""
        return x

    def compile(self, function: Pure) -> Pure | None:
        """Return the function compiled: it is traced when it is called first. Return None if the library cannot compile.

        The first argument may be donated: nothing reads those arrays after the call.
        """
        return None

    # ---- the array layer, in holders -----------------------------------------------------------------------------------------------------

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        refuse_while_recording("an array of the host is copied to the device")
        return Holder(self.from_numpy(array), self)

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        refuse_while_recording("an array is read on the host")
        return np.array(self.to_numpy(values_of(array)))

    def scatter_add(self, inout_target: Array, index: Array, values: Array) -> None:
        inout_target.value = self.with_added(inout_target.value, index.value, values.value)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        xp = self.xp
        ids = xp.argsort(0.0 - x, axis=-1, stable=True)[..., :k]  # 0 - x makes -0.0 tie with 0.0
        return xp.take_along_axis(x, ids, axis=-1), xp.astype(ids, xp.int32)

    def bincount(self, ids: Array, minlength: int) -> Array:
        counts = self.xp.zeros(minlength, dtype=self.xp.int32)
        self.scatter_add(counts, ids, self.xp.ones_like(ids))
        return counts

    def contiguous(self, x: Array) -> Array:
        return x

    def tell(self, listener: Callable[[str], None] | None) -> None:
        self._listener = listener or to_stderr

    def filled(self, like: Value, new: Any) -> Value:
        """Return `new`, a number or an array, with the shape and dtype of `like`."""
        plain = self.plain
        if not hasattr(new, "dtype"):
            return plain.full(like.shape, new, dtype=like.dtype)
        cast = new if new.dtype == like.dtype else plain.astype(plain.asarray(new), like.dtype)
        whole = cast if cast.shape == like.shape else plain.broadcast_to(cast, like.shape)
        return self.copied(whole) if whole is new else whole

    # ---- recording -----------------------------------------------------------------------------------------------------------------------

    def record(self, work: Work, say: Callable[[str], None]) -> Callable[[], None] | None:
        """Compile the work as a pure function of its state and arguments. The state's old buffers may be donated to the new."""
        state = list({id(array.root): array.root for array in work.state}.values())  # a parameter is a part of a flat buffer

        def pure(values: list[Value], arguments: list[Value]) -> tuple[list[Value], Value]:
            with recording([*state, *work.inputs]):
                replace([*state, *work.inputs], [*values, *arguments])
                work()
            return values_of(state), values_of(work.result)

        before, arguments = values_of(state), values_of(work.inputs)
        step = self.compile(pure)
        if step is None:
            work()
            return None
        announcement = Timer(ANNOUNCED_AFTER, self._listener, ["compiling the step"])
        announcement.daemon = True
        announcement.start()
        try:
            after, result = step(before, arguments)
        except BaseException as error:  # libraries raise errors of their own for what they cannot trace
            replace([*state, *work.inputs], [*before, *arguments])
            if not isinstance(error, Exception):  # an interrupt: the arrays hold numbers again, which can be saved
                raise
            first_line = next(iter(str(error).splitlines()), "it says nothing more")
            say(str(error) if isinstance(error, NotRecordable) else f"{type(error).__name__}: {first_line}")
            work()
            return None
        finally:
            announcement.cancel()
        replace([*state, *work.inputs], [*after, *arguments])
        work.result = Holder(result, self)

        def again() -> None:
            after, work.result.value = step(values_of(state), values_of(work.inputs))
            replace(state, after)

        return again


def replace(holders: list[Holder], values: list[Value]) -> None:
    """Make each holder hold a value."""
    for holder, value in zip(holders, values, strict=True):
        holder.value = value


def to_stderr(text: str) -> None:
    """Print a message for the user: the listener until `tell` sets another one."""
    print(f"minimoe: {text}", file=sys.stderr)


def on_library_arrays(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Let a kernel, or a method of the array layer, be written on the library's own arrays: a decorator for methods of a backend.

    It passes the arrays that holders hold, and returns holders of the results. The method has the reference's signature, but never gets
    `out` and `accumulate`: the decorator stores its result there, of several results the first. The backward of a composite is not for it,
    since its `out` is a tuple.
    """

    @wraps(kernel)  # loading compares the signature with the reference's
    def method(self: FunctionalBackend, *args: Any, **options: Any) -> Any:
        given = signature(kernel).bind(self, *args, **options).arguments
        out, accumulate = given.pop("out", None), given.pop("accumulate", False)
        result = holders_of(kernel(**values_of(given)), self)
        if out is None:
            return result
        if isinstance(result, tuple):
            return self.store(result[0], out, accumulate), *result[1:]
        return self.store(result, out, accumulate)

    return method
