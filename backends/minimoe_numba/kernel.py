"""`@kernel` compiles a function over rows `start .. stop` with Numba, caches it on disk, and shares its rows out over the pool's threads.

    @kernel
    def scaled(start: int, stop: int, x: F2, factor: float, y: F2) -> None:
        for n in range(start, stop):
            for d in range(x.shape[1]):
                y[n, d] = x[n, d] * factor

    scaled(len(x), 64, x, 2.0, y)             # len(x) rows, 64 per piece

Annotations are the types: F1 to F4 are C-contiguous float32 arrays with that number of axes, D1 is float64, I1 and I2 int32, L1 int64, B1
and B2 bool; an int is an int64, a float a float32. Other arguments raise TypeError before anything runs. A kernel is compiled when it is
first called.

For each kernel a C function is generated that builds the arrays from addresses and shapes, which the pool's threads call without Python.
The machine code is kept on disk (`disk_cache.py`): beside this file, or in the user's own cache if that folder cannot be written.
"""

import ctypes
import inspect
import struct
import threading
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeAlias, get_type_hints

import numpy as np
import numpy.typing as npt
from numba import carray
from numba.core import types

from minimoe_numba import native
from minimoe_numba.codegen import for_kernels, optimised_names
from minimoe_numba.compiling import FAST, callback_of, compiled, is_cached, stamp
from minimoe_numba.helpers import wait_for
from minimoe_numba.machine import machine
from minimoe_numba.tape import Tape
from minimoe_numba.traced import recorder

Floats: TypeAlias = npt.NDArray[np.float32]
F1: TypeAlias = Annotated[Floats, "float32", 1]
F2: TypeAlias = Annotated[Floats, "float32", 2]
F3: TypeAlias = Annotated[Floats, "float32", 3]
F4: TypeAlias = Annotated[Floats, "float32", 4]
I1: TypeAlias = Annotated[npt.NDArray[np.int32], "int32", 1]
I2: TypeAlias = Annotated[npt.NDArray[np.int32], "int32", 2]
D1: TypeAlias = Annotated[npt.NDArray[np.float64], "float64", 1]
L1: TypeAlias = Annotated[npt.NDArray[np.int64], "int64", 1]
B1: TypeAlias = Annotated[npt.NDArray[np.bool_], "bool", 1]
B2: TypeAlias = Annotated[npt.NDArray[np.bool_], "bool", 2]

SHARED = ("activation", "blocks", "codegen", "compiling", "kernel", "maths", "native", "vector")  # files that other kernels use
MAX_WORDS = 128  # of 8 bytes, for the arguments of one call
DATA = ctypes.sizeof(ctypes.c_void_p) * 2  # where CPython keeps the address of an array's numbers, after count and type
read = ctypes.c_void_p.from_address
DIRECT = read(id(probe := np.zeros(1)) + DATA).value == probe.ctypes.data  # in another Python the slow way takes a microsecond more
ADDRESS = "read(id({0}) + DATA).value" if DIRECT else "{0}.ctypes.data"  # as source text for the packers


def address(x: Any) -> int:
    """Return the address of an array's numbers, to be passed to a kernel."""
    if recorder.tape is not None:
        recorder.tape.check(x)
    return read(id(x) + DATA).value or 0 if DIRECT else int(x.ctypes.data)


class _Arguments(threading.local):
    """Memory for the arguments of a call, one for each thread."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(8 * MAX_WORDS)
        self.address = ctypes.addressof(self.memory)


arguments = _Arguments()


class Kernel:
    """A function that runs on the pool's threads."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function, self.name = function, function.__name__
        hints = get_type_hints(function, include_extras=True)
        self.parameters = {name: hints[name] for name in list(inspect.signature(function).parameters)[2:]}
        self.multiplies = "sgemm" in self.parameters
        self.job = 0
        self.held: Any = None  # keeps the compiled code alive
        self.pack = self._packer()

    def __call__(self, n: int, grain: int, *args: Any) -> None:
        """Run over n rows, `grain` rows per piece."""
        if not self.job:
            self.compile()
        if recorder.tape is not None:
            self._write(recorder.tape, n, grain, args)
            return
        words = arguments
        self.pack(words.memory, *args)
        self._run(n, grain, words.address)

    def _run(self, n: int, grain: int, words: int) -> None:
        here = machine()
        if not self._limits():
            here.pool.run(self.job, n, grain, words)
            return
        assert here.blas is not None and here.blas.limit is not None
        previous = here.blas.limit(1)
        here.pool.run(self.job, n, grain, words)
        here.blas.limit(previous)

    def _run_again(self, n: int, grain: int, words: Any) -> None:
        self._run(n, grain, ctypes.addressof(words))

    def _limits(self) -> bool:
        """True if this kernel calls a library's product, which would start threads of its own."""
        blas = machine().blas
        return self.multiplies and blas is not None and blas.limit is not None

    def _write(self, tape: Tape, n: int, grain: int, args: tuple[Any, ...]) -> None:
        """Run, and write the call on the tape with arguments of its own."""
        words = ctypes.create_string_buffer(8 * MAX_WORDS)
        self.pack(words, *args)
        for arg in args:
            if isinstance(arg, np.ndarray):
                tape.check(arg)
        self._run(n, grain, ctypes.addressof(words))
        if self._limits():
            tape.call(partial(self._run_again, n, grain, words))
        else:
            tape.kernel(self.job, n, grain, words)

    # ---- from Python: the arguments as words of 8 bytes ---------------------------------------------------------------------------

    def _packer(self) -> Callable[..., None]:
        """Return a function that checks the arguments of a call and packs them."""
        checks, words, layout = [], [], "="
        for name, kind in self.parameters.items():
            if kind is int:
                words.append(name)
                layout += "q"
            elif kind is float:
                words.append(name)
                layout += "d"
            else:
                dtype, ndim = kind.__metadata__
                checks.append(f"{name}.dtype == {dtype} and {name}.ndim == {ndim} and {name}.flags.c_contiguous")
                words += [ADDRESS.format(name), f"*{name}.shape"]
                layout += "q" * (1 + ndim)
        assert len(layout) <= MAX_WORDS
        source = (
            f"def pack(memory, {', '.join(self.parameters)}):\n"
            f"    if not ({' and '.join(checks) or 'True'}):\n        misfit({', '.join(self.parameters)})\n"
            f"    write(memory, 0, {', '.join(words)})\n"
        )
        names: dict[str, Any] = {"read": read, "DATA": DATA, "write": struct.Struct(layout).pack_into, "misfit": self._misfit}
        names |= {dtype: np.dtype(dtype) for dtype in ("float32", "float64", "int32", "int64", "bool")}
        exec(source, names)
        return names["pack"]

    def _misfit(self, *args: Any) -> None:
        for (name, kind), given in zip(self.parameters.items(), args, strict=True):
            if kind in (int, float):
                continue
            dtype, ndim = kind.__metadata__
            if given.dtype != dtype or given.ndim != ndim or not given.flags.c_contiguous:
                order = "" if given.flags.c_contiguous else ", not contiguous"
                raise TypeError(f"{self.name}: {name} is {given.dtype}{list(given.shape)}{order}: wanted contiguous {dtype} of {ndim} axes")

    # ---- from machine code: the arguments back from the words -----------------------------------------------------------------------

    def _generate(self) -> tuple[Callable[..., None], Any]:
        """Return a function of (start, stop, address of the words) that calls the kernel, and its signature."""
        arguments, position = [], 0
        for kind in self.parameters.values():
            if kind is int:
                arguments.append(f"a[{position}]")
                position += 1
            elif kind is float:
                arguments.append(f"np.float32(int_as_double(a[{position}]))")
                position += 1
            else:
                dtype, ndim = kind.__metadata__
                shape = "".join(f"a[{position + 1 + i}], " for i in range(ndim))
                arguments.append(f"carray(pointer(a[{position}], np.{'bool_' if dtype == 'bool' else dtype}), ({shape}))")
                position += 1 + ndim
        name = f"{self.name}_{stamp(*SHARED)}"
        source = (
            f"def {name}(start, stop, words):\n"
            f"    a = carray(pointer(words, np.int64), ({max(position, 1)},))\n"
            f"    inner(start, stop, {', '.join(arguments)})\n"
        )
        names: dict[str, Any] = {
            "np": np, "carray": carray, "pointer": native.pointer, "int_as_double": native.int_as_double, "inner": compiled(self.function),
            "__name__": self.function.__module__,
        }  # fmt: skip
        exec(compile(source, self.function.__code__.co_filename, "exec"), names)
        optimised_names.add(name)
        return names[name], types.void(types.int64, types.int64, types.int64)

    def compile(self) -> None:
        """Compile the kernel, or load it from the cache."""
        wait_for(f"{self.function.__module__.rpartition('.')[2]}.{self.name}")
        function, signature = self._generate()
        with for_kernels():
            self.held = callback_of(function, signature, nopython=True, error_model="numpy", fastmath=FAST)
        self.job = self.held.address

    def is_cached(self) -> bool:
        return is_cached(*self._generate())


kernel = Kernel
