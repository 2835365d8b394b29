"""CUDA C kernels on NumPy arrays, without a GPU: g++ compiles the `.cu` with the headers of `include/` before it, ctypes calls it.

    module = CudaOnCpu(path, ["gate<float>", "gate<__nv_bfloat16>"])
    module.kernel("gate<float>")((blocks,), (threads,), (logits, weights, np.int32(n)), shared_mem=4 * experts)

A kernel is launched like a `cupy.RawKernel`. Each array is copied between margins of NaN, and back after the launch: a write outside an
array raises an error that names the argument, and a read there gives NaN. The library is kept in a folder of the system's temporary folder,
under a hash of everything that it is built from.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

INCLUDE = Path(__file__).parent / "include"
# -O1 compiles in 2/3 of the time of -O2, and the tests spend more time compiling than running. Hidden symbols and -Bsymbolic: many
# libraries of the same headers share a process, and each must use its own threads and shared memory.
COMMAND = (
    "g++", "-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fno-extern-tls-init", "-fno-strict-aliasing", "-fvisibility=hidden",
    "-Wl,-Bsymbolic", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable",
)  # fmt: skip
ORDERS = ("forward", "reverse", "shuffled")
MARGIN = 256  # bytes on either side of an array, which begins at a multiple of as many, as CUDA's allocations do

Launch = Callable[..., None]


class CudaOnCpu:
    """The kernels of one `.cu` file, by their C++ names; `order`, one of ORDERS, is the order in which threads and blocks run."""

    def __init__(self, path: Path, names: Sequence[str], order: str = "forward", options: Sequence[str] = ()) -> None:
        self.order, self.names = ORDERS.index(order), list(names)
        self.library = ctypes.CDLL(str(build(path, self.names, options)))

    def kernel(self, name: str) -> Launch:
        """The launcher of a kernel: (grid, block, args, shared_mem=0), sizes as tuples of one to three numbers.

        Arguments are C-contiguous arrays and NumPy scalars of the parameters' exact types. Raises RuntimeError if threads wait for
        each other forever or the kernel writes outside an array, and TypeError for any other argument.
        """
        function = getattr(self.library, f"launch_kernel_{self.names.index(name)}")

        def launch(grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int = 0) -> None:
            guarded = [Guarded(argument) if isinstance(argument, np.ndarray) else None for argument in args]
            values = [_scalar(argument) if guard is None else guard.address() for argument, guard in zip(args, guarded, strict=True)]
            pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
            message = ctypes.create_string_buffer(256)
            sizes = [(ctypes.c_uint * 3)(*(*size, 1, 1)[:3]) for size in (grid, block)]
            words = ctypes.c_size_t(shared_mem), pointers, self.order, message, ctypes.c_size_t(len(message))
            if function(*sizes, *words):
                raise RuntimeError(f"{name}: {message.value.decode()}")
            for i, guard in enumerate(guarded):
                if guard is not None:
                    guard.copy_back(f"{name}: argument {i}")

        return launch


class Guarded:
    """A copy of an array between margins of 0xff bytes, which are NaN in every float."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        if not array.flags.c_contiguous:
            raise TypeError(f"a kernel takes C-contiguous arrays, not one of shape {array.shape} and strides {array.strides}")
        self.array = array
        memory = np.full(array.nbytes + 3 * MARGIN, 0xFF, np.uint8)
        first = MARGIN + -memory.ctypes.data % MARGIN
        self.before, self.copy = memory[first - MARGIN : first], memory[first : first + array.nbytes]
        self.behind = memory[first + array.nbytes : first + array.nbytes + MARGIN]
        self.copy[:] = array.reshape(-1).view(np.uint8)

    def address(self) -> np.ndarray[Any, Any]:
        """The address of the copy, as a kernel's parameter."""
        return np.asarray(self.copy.ctypes.data, dtype=np.uintp)

    def copy_back(self, name: str) -> None:
        """Copies back into the array. Raises RuntimeError if a margin has changed."""
        for margin, where in ((self.before, "before"), (self.behind, "behind")):
            if (margin != 0xFF).any():
                raise RuntimeError(f"{name}, {self.array.dtype}{list(self.array.shape)}: the kernel wrote {where} its memory")
        self.array.reshape(-1).view(np.uint8)[:] = self.copy


def _scalar(argument: Any) -> np.ndarray[Any, Any]:
    if isinstance(argument, np.generic):
        return np.asarray(argument)
    raise TypeError(f"a kernel takes C-contiguous arrays and NumPy scalars, not {type(argument).__name__}")


def build(path: Path, names: Sequence[str], options: Sequence[str] = ()) -> Path:
    """The shared library of a `.cu` file, compiled unless it is there already.

    Raises RuntimeError without g++, and with the compiler's message if it rejects the source.
    """
    if shutil.which("g++") is None:
        raise RuntimeError("g++ is needed to run CUDA kernels on the processor: install it (Debian: apt-get install g++)")
    exports = "\n".join(f"CUDA_ON_CPU_EXPORT(kernel_{i}, {name})" for i, name in enumerate(names))
    unit = f'#include "tensor_core.h"\n#line 1 "{path.name}"\n{path.read_text()}\n{exports}\n'
    command = (*COMMAND, *options, f"-I{INCLUDE}", f"-I{path.parent}")
    headers = [header.read_text() for folder in (INCLUDE, path.parent) for header in sorted(folder.glob("*.*h"))]
    key = hashlib.sha256(repr((command, unit, headers)).encode()).hexdigest()[:20]
    library = _folder() / f"{path.stem}-{key}.so"
    if not library.exists():
        with library.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the test processes that want the same library wait for the first to build it
            if not library.exists():
                _compile(command, unit, library)
    return library


def _compile(command: Sequence[str], unit: str, library: Path) -> None:
    partial = library.with_suffix(f".{os.getpid()}")
    result = subprocess.run([*command, "-", "-o", str(partial)], input=unit, text=True, capture_output=True, check=False)
    if result.returncode:
        raise RuntimeError(f"g++ refused {library.stem}:\n{result.stderr}")
    os.replace(partial, library)  # a process that dies while it builds leaves no half of a library


def _folder() -> Path:
    """A folder of this user alone: a library that another user puts there would be executed."""
    folder = Path(tempfile.gettempdir()) / f"minimoe-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user: remove it, or set TMPDIR")
    return folder
