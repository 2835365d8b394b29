"""A step that is written down while it runs, and repeated from then on without the Python that lies between its kernels.

What is written down are calls: a kernel with its packed arguments, a NumPy function with its arrays. Runs of kernels are handed to the
pool in one call of machine code. Arrays that the step makes come from memory of the tape, at addresses that stay; what is freed in the
step is used again in the step, in the same order each time, so a tape needs as much memory as the step itself.

NumPy tells nobody what it computes, but asks subclasses of its array: `Traced` is one, and what is computed of a traced array, by an
operator, a function or a method, is traced again. All state of a model is traced (the backend's `xp` and `from_host` give nothing else),
and so is all that comes of it. What is handed another array, and a number that is read on the host, cannot be repeated: then there is no
tape. NumPy is not asked everywhere (`np.asarray` and `np.array` of a traced array are not), so overrides do not use those.
"""

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minimoe_numba.pool import Pool

Call = Callable[[], Any]
LINE = 64  # bytes of a cache line: arrays begin on one
LONGEST_RUN = 4  # kernels handed to the pool at once: then workers that fell asleep meanwhile are woken


class Recorder(threading.local):
    """The tape that this Python thread is writing, if any."""

    tape: "Tape | None" = None


recorder = Recorder()


# ---- arrays that tell what is computed of them ------------------------------------------------------------------------------------------


class Traced(np.ndarray[Any, Any]):
    """An array whose uses by NumPy are written down while a tape is written."""

    owner: "Traced | None" = None  # of a view: the array that it is one of, whose memory must not be used again yet

    def __array_finalize__(self, source: Any) -> None:
        if isinstance(source, Traced) and self.base is not None:
            self.owner = source if source.owner is None else source.owner

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as NumPy's own array."""
        return plain(self).__reduce_ex__(protocol)

    @property
    def flat(self) -> Any:
        if recorder.tape is not None:
            recorder.tape.refuse("an array was gone through element by element (flat)")
        return plain(self).flat

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return perform(ufunc if method == "__call__" else getattr(ufunc, method), inputs, options)

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        return perform(function, args, options)


def through_perform(name: str) -> Any:
    function = getattr(np.ndarray, name)

    def method(self: Traced, *args: Any, **options: Any) -> Any:
        return perform(function, (self, *args), options)

    return method


def read_on_the_host(name: str) -> Any:
    function = getattr(np.ndarray, name)

    def method(self: Traced, *args: Any, **options: Any) -> Any:
        if recorder.tape is not None:
            recorder.tape.refuse(f"a number was read on the host ({name.strip('_')})")
        return function(plain(self), *args, **options)

    return method


for _name in (
    "__getitem__", "__setitem__", "astype", "copy", "reshape", "ravel", "flatten", "argsort", "sort", "cumsum", "cumprod", "take", "repeat",
    "fill", "argmax", "argmin", "round", "dot", "nonzero", "searchsorted", "partition", "argpartition", "put", "choose", "compress",
    "trace", "byteswap", "__copy__", "__deepcopy__",
):  # fmt: skip
    setattr(Traced, _name, through_perform(_name))
for _name in ("__bool__", "__int__", "__float__", "__index__", "__complex__", "item", "tolist", "tobytes", "tofile", "dumps", "__dlpack__"):
    setattr(Traced, _name, read_on_the_host(_name))


def plain(x: Any) -> Any:
    """The same memory as NumPy's own array, which does not keep the tape's memory from being used again; in lists and tuples too."""
    if isinstance(x, Traced):
        return x.view(np.ndarray)
    return type(x)([plain(part) for part in x]) if isinstance(x, tuple | list) else x


def traced(x: "np.ndarray[Any, Any]", source: Any = None) -> Traced:
    """The same memory, traced. `source`: the traced array that x is a view of."""
    y: Traced = x.view(Traced)
    if isinstance(source, Traced):
        y.owner = source if source.owner is None else source.owner
    return y


def perform(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """function(*args, **options), written down if there is a tape. What it gives is traced."""
    bare = plain(args)
    bare_options = {name: plain(value) for name, value in options.items()} if options else options
    result = function(*bare, **bare_options)
    given = options.get("out") if options else None
    if given is not None:
        given = given[0] if isinstance(given, tuple) else given
    tape = recorder.tape
    if tape is not None:
        return tape.write(function, (*args, *options.values()), bare, bare_options, result, given)
    if given is not None:
        return given
    if isinstance(result, tuple | list):
        return rebuilt(result, [traced(part) if isinstance(part, np.ndarray) else part for part in result])
    return traced(result) if isinstance(result, np.ndarray) else result


def rebuilt(like: Any, parts: list[Any]) -> Any:
    """A list, a tuple or a named tuple as `like`, of other parts."""
    return like._make(parts) if hasattr(like, "_make") else type(like)(parts)


# ---- the tape ---------------------------------------------------------------------------------------------------------------------------


class Memory:
    """Blocks of memory; what is given back is given out again, to a request of about its size."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray[Any, Any]] = []  # all of them, as bytes
        self.free: dict[int, list[int]] = {}  # their numbers by size

    def array(self, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> Traced:
        """Memory for an array; it comes back when the array and all views of it are gone."""
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
    """The next larger of the sizes that blocks have: an eighth apart."""
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
        self.kernels: list[tuple[int, int, int, Any]] = []  # since the last call that is none: job, rows, rows to a piece, arguments
        self.held: list[np.ndarray[Any, Any]] = []  # what kernels were handed: memory that is not the tape's must stay too
        self.shared: dict[Any, Any] = {}  # what is computed once in a step and used by several kernels
        self.why_not = ""  # what cannot be repeated

    def refuse(self, why: str) -> None:
        """The step goes on, but there will be no tape of it."""
        self.why_not = self.why_not or why

    def write(self, function: Any, args: tuple[Any, ...], bare: Any, options: Any, result: Any, given: Any) -> Any:
        """A NumPy call that has just been made, its arguments, and the same as NumPy's own arrays.   -> its result, traced"""
        if function in OF_SHAPES:
            return result
        name = getattr(function, "__name__", str(function))
        if not all_traced(args):
            self.refuse(f"{name} was handed an array that is not traced")
        if function is np.empty_like:
            return self.memory.array(result.shape, result.dtype, result.strides)
        if varies(function, bare):
            self.refuse(f"the shape of what {name} gives depends on numbers")
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
                self.refuse(f"{name} gave a number of the host")
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
        """A copy of a result in the tape's memory, its axes in the same order: a product of them may round by it."""
        copy = self.memory.array(value.shape, value.dtype, np.empty_like(value).strides)
        plain(copy)[...] = value
        return copy

    def call(self, call: Call) -> None:
        """Anything that does its work anew when it is called."""
        self._close_run()
        self.calls.append(call)

    def check(self, array: "np.ndarray[Any, Any]") -> None:
        """Check an array that is handed to a kernel. Constants are traced too; what is empty holds nothing that could change."""
        if array.size and not isinstance(array, Traced):
            self.refuse(f"a kernel was handed an array that is not traced, {array.dtype}{list(array.shape)}")
        self.held.append(plain(array))

    def kernel(self, job: int, n: int, grain: int, words: Any) -> None:
        """A kernel with its packed arguments."""
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
        """What repeats it."""
        self._close_run()
        calls = self.calls

        def repeat(kept: Any = (self.memory, self.held)) -> None:
            if recorder.tape is not None:
                recorder.tape.refuse("a recorded step is part of it")
            for call in calls:
                call()

        return repeat


def source_of(result: Any, args: Any) -> Any:
    """The argument that a result is a view of, None for a result of its own."""
    for arg in args:
        if isinstance(arg, np.ndarray):
            if result is arg or (isinstance(result, np.ndarray) and result.base is not None and np.may_share_memory(result, plain(arg))):
                return arg
        elif isinstance(arg, tuple | list) and (found := source_of(result, arg)) is not None:
            return found
    return None


def all_traced(args: Any) -> bool:
    """Is there no array among these but traced ones? What is 0-d in NumPy's own hands came of a Python number."""
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
    """Has the result another shape where the numbers are others?"""
    if function is np.ndarray.__getitem__:
        keys = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(key, np.ndarray) and key.dtype == bool for key in keys)
    return function in DEPENDS or (function is np.where and len(args) == 1)


@contextmanager
def written(pool: Callable[[], Pool]) -> Iterator[Tape]:
    """A tape of all that happens within."""
    tape = Tape(pool)
    outer, recorder.tape = recorder.tape, tape
    if outer is not None:
        outer.refuse("a recorded step is part of it")
    try:
        yield tape
    finally:
        recorder.tape = outer


# ---- arrays made by the backend ----------------------------------------------------------------------------------------------------------


def empty(shape: Any, dtype: Any = np.float32) -> Any:
    """np.empty, in the tape's memory while there is a tape."""
    tape = recorder.tape
    if tape is None:
        return np.empty(shape, dtype)
    return tape.memory.array((shape,) if isinstance(shape, int) else tuple(shape), dtype)


def filled(shape: Any, value: Any, dtype: Any) -> Any:
    """An array of one value, written again in each repetition."""
    y = empty(shape, dtype)
    y.fill(value)
    return y


def contiguous(x: Any, dtype: Any = None) -> Any:
    """np.ascontiguousarray for an array of at least one axis, traced as x is."""
    if dtype is not None and x.dtype != dtype:
        x = x.astype(dtype)
    return x if x.flags.c_contiguous else x.copy()


class Namespace:
    """NumPy, whose new arrays are traced."""

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
    """A constant as a traced array, written again in each repetition, as it may be changed in place. `given`: an array of somebody else."""
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
