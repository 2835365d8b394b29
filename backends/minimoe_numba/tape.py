"""A tape: a step that is written down while it runs, and then repeated without the Python code between its kernels.

A tape holds calls: a kernel with its packed arguments, or a NumPy function with its arrays. Several kernels in a row are handed to the
pool in one call of machine code. Arrays that the step makes lie in memory of the tape, at fixed addresses. What is freed during the step
is used again in the step, in the same order each time, so a tape needs as much memory as the step itself.

If a step passes an array that is not traced (`traced.py`) to a kernel or to NumPy, or reads a number on the host, it cannot be repeated:
then there is no tape.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minimoe_numba.pool import Pool
from minimoe_numba.traced import Traced, plain, rebuilt, recorder, traced

Call = Callable[[], Any]
LINE = 64  # bytes of a cache line: arrays begin on one
LONGEST_RUN = 4  # kernels handed to the pool at once; then workers that fell asleep meanwhile are woken


class Memory:
    """Blocks of memory. A block that is returned serves the next request of about its size."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray[Any, Any]] = []  # as bytes
        self.free: dict[int, list[int]] = {}  # indices of the free blocks of each size

    def array(self, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> Traced:
        """Return an array whose memory is free again when the array and all views of it are gone."""
        kind = np.dtype(dtype)
        size = size_class(int(np.prod(shape, dtype=np.int64)) * kind.itemsize)
        waiting = self.free.get(size)
        if waiting:
            number = waiting.pop()
        else:
            number = len(self.blocks)
            self.blocks.append(np.empty(size + LINE, np.uint8))
        block = self.blocks[number]
        array: Traced = np.ndarray.__new__(Traced, shape, kind, block, -block.ctypes.data % LINE, strides)
        weakref.finalize(array, self.free.setdefault(size, []).append, number).atexit = False
        return array


def size_class(size: int) -> int:
    """Round up to a size that blocks have; the sizes are about an eighth apart."""
    if size <= 8 * LINE:
        return 8 * LINE
    step = 1 << (size.bit_length() - 4)
    return -(-size // step) * step


class Tape:
    """The calls of one step, in order."""

    def __init__(self, pool: Callable[[], Pool]) -> None:
        self.pool = pool
        self.memory = Memory()
        self.calls: list[Call] = []
        self.kernels: list[tuple[int, int, int, Any]] = []  # since the last call: job, rows, rows per piece, arguments
        self.held: list[np.ndarray[Any, Any]] = []  # arguments of kernels, kept alive: some lie outside the tape's memory
        self.shared: dict[Any, Any] = {}  # values computed once in a step and used by several kernels
        self.why_not = ""  # why the step cannot be repeated

    def refuse(self, why: str) -> None:
        """Note why the step cannot be repeated. The step goes on, but there will be no tape of it."""
        self.why_not = self.why_not or why

    def write(self, function: Any, args: tuple[Any, ...], bare: Any, options: Any, result: Any, given: Any) -> Any:
        """Write down a NumPy call that has just been made. `bare`: its arguments as NumPy's own arrays.   -> its result, traced"""
        if function in OF_SHAPES:
            return result
        name = getattr(function, "__name__", str(function))
        if not all_traced(args):
            self.refuse(f"{name} was handed an array that is not traced")
        if function is np.empty_like:
            return self.memory.array(result.shape, result.dtype, result.strides)
        if varies(function, bare):
            self.refuse(f"the shape of the result of {name} depends on numbers")
        if given is not None or result is None:  # it wrote into one of its arguments
            self.call(lambda: function(*bare, **options))
            return given
        if isinstance(result, tuple | list) and any(isinstance(part, np.ndarray | np.generic) for part in result):
            sources = [source_of(part, args) for part in result]
            if all(source is not None for source in sources):
                return rebuilt(result, [traced(np.asarray(part), source) for part, source in zip(result, sources, strict=True)])
            copies = [self.kept(part) for part in result]
            targets = [plain(copy) for copy in copies]

            def several() -> None:
                for to, part in zip(targets, function(*bare, **options), strict=True):
                    to[...] = part

            self.call(several)
            return rebuilt(result, copies)
        if not isinstance(result, np.ndarray | np.generic):
            if isinstance(result, bool | int | float | complex):
                self.refuse(f"{name} returned a number on the host")
            return result
        source = source_of(result, args)
        if source is not None:
            return traced(np.asarray(result), source)
        copy = self.kept(result)
        to = plain(copy)

        def one() -> None:
            to[...] = function(*bare, **options)

        self.call((lambda: function(*bare, out=to, **options)) if isinstance(function, np.ufunc) else one)
        return copy

    def kept(self, value: Any) -> Traced:
        """Copy a result into the tape's memory, with its axes in the same memory order: the rounding of a product may depend on it."""
        copy = self.memory.array(value.shape, value.dtype, np.empty_like(value).strides)
        plain(copy)[...] = value
        return copy

    def call(self, call: Call) -> None:
        """Add a function that does its work again each time it is called."""
        self._close_run()
        self.calls.append(call)

    def check(self, array: "np.ndarray[Any, Any]") -> None:
        """Check that an array passed to a kernel is traced, as constants are too. An empty array has nothing that could change."""
        if array.size and not isinstance(array, Traced):
            self.refuse(f"a kernel was handed an array that is not traced, {array.dtype}{list(array.shape)}")
        self.held.append(plain(array))

    def kernel(self, job: int, n: int, grain: int, words: Any) -> None:
        """Add a kernel with its packed arguments."""
        if n > 0:
            self.kernels.append((job, n, grain, words))
        if len(self.kernels) == LONGEST_RUN:
            self._close_run()

    def _close_run(self) -> None:
        if not self.kernels:
            return
        rows = [(job, n, grain, ctypes.addressof(words)) for job, n, grain, words in self.kernels]
        table, arguments, pool = np.array(rows, np.int64), [words for *_, words in self.kernels], self.pool
        at, count = table.ctypes.data, len(table)

        def run(kept: Any = (table, arguments)) -> None:
            pool().run_all(at, count)

        self.calls.append(run)
        self.kernels = []

    def again(self) -> Call:
        """Return the function that repeats the step."""
        self._close_run()
        calls = self.calls

        def repeat(kept: Any = (self.memory, self.held)) -> None:
            if recorder.tape is not None:
                recorder.tape.refuse("a recorded step is part of it")
            for call in calls:
                call()

        return repeat


def source_of(result: Any, args: Any) -> Any:
    """Return the argument that a result is a view of, None if it has its own memory."""
    for arg in args:
        if isinstance(arg, np.ndarray):
            if result is arg or (isinstance(result, np.ndarray) and result.base is not None and np.may_share_memory(result, plain(arg))):
                return arg
        elif isinstance(arg, tuple | list) and (found := source_of(result, arg)) is not None:
            return found
    return None


def all_traced(args: Any) -> bool:
    """True if all arrays among these are traced. A 0-d array that is not traced came from a Python number, so it passes."""
    for arg in args:
        if isinstance(arg, np.ndarray):
            if arg.ndim and arg.size and not isinstance(arg, Traced):
                return False
        elif isinstance(arg, tuple | list) and not all_traced(arg):
            return False
    return True


OF_SHAPES = (np.shape, np.ndim, np.size, np.may_share_memory, np.shares_memory, np.can_cast, np.result_type, np.iscomplexobj, np.isrealobj)
DEPENDS = (
    np.unique, np.unique_values, np.unique_counts, np.unique_inverse, np.unique_all, np.nonzero, np.flatnonzero, np.argwhere, np.extract,
    np.compress, np.delete, np.ndarray.nonzero, np.ndarray.compress,
)  # fmt: skip


def varies(function: Any, args: Any) -> bool:
    """True if the shape of the result depends on the numbers in the arguments."""
    if function is np.ndarray.__getitem__:
        keys = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(key, np.ndarray) and key.dtype == bool for key in keys)
    return function in DEPENDS or (function is np.where and len(args) == 1)


@contextmanager
def written(pool: Callable[[], Pool]) -> Iterator[Tape]:
    """Write a tape of everything that is computed inside the `with` block."""
    tape = Tape(pool)
    outer, recorder.tape = recorder.tape, tape
    if outer is not None:
        outer.refuse("a recorded step is part of it")
    try:
        yield tape
    finally:
        recorder.tape = outer
