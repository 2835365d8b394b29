"""Executes PTX on NumPy arrays, without a GPU, and stops at the first fault of the program.

    module = Module(ptx)
    module.launch("kernel", (blocks,), (threads,), (x, y, np.int32(n)), shared=1024, seed=7)

PTX is what NVRTC makes of CUDA C, and NVVM of Numba's kernels; a card's driver assembles the same text. The machine (`native/*.cpp`)
executes it warp by warp and checks what a card does not: see docs/gpu.md.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from .build import library

UNWRITTEN = 0x7FA5  # each 16 bits of memory that nobody wrote (`native/memory.h`): `unwritten` makes such arrays
COUNTERS = (
    "warp_instructions", "thread_instructions", "global_loads", "global_load_sectors", "global_load_bytes", "global_stores",
    "global_store_sectors", "global_store_bytes", "shared_requests", "shared_waves", "shared_ideal_waves", "matrix_loads",
    "matrix_load_waves", "products", "async_product_flops", "copied_bytes",
)  # fmt: skip  # as in `Counters` of native/machine.h

Array = np.ndarray[Any, Any]


class Fault(RuntimeError):
    """What is wrong with a program, and where: kernel, thread, PTX line, source line, and the seed that shows it again."""


class _Argument(ctypes.Structure):
    _fields_ = (("bits", ctypes.c_uint64), ("array", ctypes.c_int32))


class _Array(ctypes.Structure):
    _fields_ = (
        ("memory", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("offset", ctypes.c_uint64), ("element", ctypes.c_uint32),
        ("same_as", ctypes.c_int32), ("unwritten", ctypes.c_int32), ("name", ctypes.c_char_p),
    )  # fmt: skip


_TRACE = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p), ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("dynamic_shared", ctypes.c_uint32),
        ("arguments", ctypes.POINTER(_Argument)), ("argument_count", ctypes.c_int32), ("arrays", ctypes.POINTER(_Array)),
        ("array_count", ctypes.c_int32), ("seed", ctypes.c_uint64), ("most_instructions", ctypes.c_uint64), ("threads", ctypes.c_int32),
        ("counts", ctypes.c_int32),
        ("trace", _TRACE), ("trace_block", ctypes.c_int32), ("trace_warp", ctypes.c_int32),
    )  # fmt: skip


@cache
def _machine() -> ctypes.CDLL:
    found = ctypes.CDLL(str(library()))
    found.ptx_load.restype = ctypes.c_void_p
    found.ptx_load.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
    found.ptx_unload.argtypes = (ctypes.c_void_p,)
    found.ptx_unload.restype = None
    found.ptx_kernels.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
    found.ptx_kernels.restype = None
    found.ptx_launch.argtypes = (
        ctypes.c_void_p, ctypes.POINTER(_Launch), ctypes.POINTER(ctypes.c_uint64), ctypes.c_char_p, ctypes.c_size_t,
    )  # fmt: skip
    assert found.ptx_counter_count() == len(COUNTERS)
    return found


class Module:
    """The kernels of a PTX text. Raises Fault for PTX that the machine does not know."""

    def __init__(self, ptx: str) -> None:
        message = ctypes.create_string_buffer(4096)
        self._module = _machine().ptx_load(ptx.encode(), message, len(message))
        if not self._module:
            raise Fault(message.value.decode())

    def __del__(self) -> None:
        if getattr(self, "_module", None):
            _machine().ptx_unload(self._module)

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels, as the PTX has them."""
        names = ctypes.create_string_buffer(1 << 20)
        _machine().ptx_kernels(self._module, names, len(names))
        return names.value.decode().split()

    def launch(
        self, kernel: str, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared: int = 0, seed: int = 0,
        threads: int = 1, count: bool = False, trace: Callable[[str], None] | None = None, traced: tuple[int, int] = (0, 0),
        title: str | None = None, names: Sequence[str] | None = None, most_instructions: int = 1 << 30,
    ) -> dict[str, int]:  # fmt: skip
        """Run a kernel; the arrays hold its results.   -> the machine's counters

        `grid` and `block` have one to three sizes; `args` are C-contiguous arrays and NumPy scalars of the parameters' types. `seed` 0
        runs blocks, warps and lanes in order, any other in a random one. `threads` is how many threads of this processor run blocks.
        `count` adds the counters of memory. `trace` is called with a line for each instruction of the warp `traced` (block, warp).
        `title` and `names` are what messages call the kernel and its arguments. A block whose warps execute more than
        `most_instructions` is taken not to end. Raises Fault.
        """
        arrays, words = _arguments(args, names or [f"argument {i}" for i in range(len(args))])
        message, counters = ctypes.create_string_buffer(4096), (ctypes.c_uint64 * len(COUNTERS))()
        sizes = [(ctypes.c_uint32 * 3)(*(*map(int, size), 1, 1)[:3]) for size in (grid, block)]
        call = _TRACE((lambda line: trace(line.decode())) if trace else 0)
        launch = _Launch(
            kernel.encode(), *sizes, int(shared), (_Argument * len(words))(*words), len(words), (_Array * len(arrays))(*arrays),
            len(arrays), seed, most_instructions, threads, count, call, *traced,
        )  # fmt: skip
        if _machine().ptx_launch(self._module, ctypes.byref(launch), counters, message, len(message)):
            raise Fault(f"{title or kernel}: {message.value.decode()} (seed {seed})")
        return dict(zip(COUNTERS, counters, strict=True))


def _arguments(args: Sequence[Any], names: Sequence[str]) -> tuple[list[_Array], list[_Argument]]:
    """Return the arrays among the arguments, and a word for each argument."""
    arrays: list[_Array] = []
    words: list[_Argument] = []
    for argument, name in zip(args, names, strict=True):
        if isinstance(argument, np.ndarray):
            words.append(_Argument(0, len(arrays)))
            arrays.append(_array(argument, f"{name}, {argument.dtype}{list(argument.shape)}"))
        elif isinstance(argument, np.generic):
            words.append(_Argument(int.from_bytes(argument.tobytes(), "little"), -1))
        else:
            raise TypeError(f"a kernel takes C-contiguous arrays and NumPy scalars, not {type(argument).__name__}")
    for array, first in zip(arrays, _firsts([(array.memory, array.memory + array.bytes) for array in arrays]), strict=True):
        array.same_as = first
    return arrays, words


def _firsts(spans: list[tuple[int, int]]) -> list[int]:
    """Return, for each span of memory, the first one that it overlaps, by itself or through others; its own index if there is none."""
    firsts = list(range(len(spans)))
    for i, (begin, end) in enumerate(spans):
        for j, (other_begin, other_end) in enumerate(spans[:i]):
            if begin < other_end and other_begin < end:
                low, high = sorted((firsts[i], firsts[j]))
                firsts = [low if first == high else first for first in firsts]
    return firsts


def _array(array: Array, name: str) -> _Array:
    if not array.flags.c_contiguous:
        raise TypeError(f"a kernel takes C-contiguous arrays, not one of shape {array.shape} and strides {array.strides}")
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    offset = array.ctypes.data - owner.ctypes.data
    return _Array(array.ctypes.data, array.nbytes, offset, array.itemsize, 0, holds_unwritten(array), name.encode())


def holds_unwritten(array: Array) -> bool:
    """Tell whether an array holds the pattern of memory that nobody wrote."""
    halves = array.reshape(-1).view(np.uint8)[: array.nbytes // 2 * 2].view(np.uint16)
    return bool((halves == UNWRITTEN).any())


def unwritten(shape: Any, dtype: Any) -> Array:
    """Allocate an array as `np.empty` does; reading an element before it is written is a fault."""
    array = np.empty(shape, dtype)
    halves = np.full(-(-array.nbytes // 2), UNWRITTEN, np.uint16)
    array.reshape(-1).view(np.uint8)[:] = halves.view(np.uint8)[: array.nbytes]
    return array
