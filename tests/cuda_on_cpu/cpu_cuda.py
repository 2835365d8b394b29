"""CUDA C kernels on NumPy arrays, without a GPU: g++ compiles the `.cu` with `cuda_on_cpu.h` before it, ctypes calls it.

A kernel is launched as `cupy.RawKernel` is: `CudaOnCpu(path).kernel(name)(grid, block, args)`. The built library is kept in a folder of
the system's temporary one, under a hash of everything that it was made from.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEADER = Path(__file__).parent / "cuda_on_cpu.h"
COMMAND = ("g++", "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas")
KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(\w+)\s*\(')
ORDERS = ("forward", "reverse", "shuffled")

Launch = Callable[[tuple[int], tuple[int], Sequence[Any]], None]


class CudaOnCpu:
    """The kernels of one `.cu` file. `order`, one of ORDERS, is that in which threads and blocks get their turns."""

    def __init__(self, path: Path, order: str = "forward") -> None:
        self.order = ORDERS.index(order)
        self.library = ctypes.CDLL(str(build(path)))

    def kernel(self, name: str) -> Launch:
        """The launcher of a kernel. Arguments: C-contiguous arrays, and NumPy scalars of the parameter's exact type.

        It raises RuntimeError where threads wait for one another for ever, and TypeError for any other argument.
        """
        function = getattr(self.library, f"launch_{name}")

        def launch(grid: tuple[int], block: tuple[int], args: Sequence[Any]) -> None:
            values = [_value(argument) for argument in args]  # kept alive until the launch is over
            pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
            message = ctypes.create_string_buffer(256)
            sizes = ctypes.c_uint(grid[0]), ctypes.c_uint(block[0])
            if function(*sizes, pointers, self.order, message, ctypes.c_size_t(len(message))):
                raise RuntimeError(f"{name}: {message.value.decode()}")

        return launch


def _value(argument: Any) -> np.ndarray[Any, Any]:
    """What the kernel's parameter holds, in an array of its own: a scalar, or an array's address."""
    if isinstance(argument, np.generic):
        return np.asarray(argument)
    if isinstance(argument, np.ndarray) and argument.flags.c_contiguous:
        return np.asarray(argument.ctypes.data, dtype=np.uintp)
    raise TypeError(f"a kernel takes C-contiguous arrays and NumPy scalars, not {type(argument).__name__}")


def build(path: Path) -> Path:
    """The shared library of a `.cu` file, compiled unless it is there already.

    Raises RuntimeError without g++, and with the compiler's words where it refuses the source.
    """
    if shutil.which("g++") is None:
        raise RuntimeError("g++ is needed to run CUDA kernels on the processor: install it (Debian: apt-get install g++)")
    source = path.read_text()
    exports = "\n".join(f"CUDA_ON_CPU_EXPORT({name})" for name in KERNEL.findall(source))
    unit = f'{HEADER.read_text()}\n#line 1 "{path.name}"\n{source}\n{exports}\n'
    key = hashlib.sha256(repr((COMMAND, unit)).encode()).hexdigest()[:20]
    library = _folder() / f"{path.stem}-{key}.so"
    if not library.exists():
        _compile(unit, library)
    return library


def _compile(unit: str, library: Path) -> None:
    partial = library.with_suffix(f".{os.getpid()}")
    result = subprocess.run([*COMMAND, "-", "-o", str(partial)], input=unit, text=True, capture_output=True, check=False)
    if result.returncode:
        raise RuntimeError(f"g++ refused {library.stem}:\n{result.stderr}")
    os.replace(partial, library)  # whole or not at all, even where two test processes build at once


def _folder() -> Path:
    """A folder of this user's alone: a library planted by another would be run."""
    folder = Path(tempfile.gettempdir()) / f"minimoe-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user: remove it, or set TMPDIR")
    return folder
