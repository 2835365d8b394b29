"""`CudaLaunch`: how an override of the contract finds its kernel, checks the arguments, and launches it.

A kernel's parameters are read from its declaration in the `.cu` file: an array of another dtype, or one that is not C-contiguous, is an
error before anything runs; plain numbers are converted to the parameter's type; None is a null pointer.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from minimoe.backend import Array, Backend
from minimoe_cupy.loader import Launch, Loader, Source

try:
    from ml_dtypes import bfloat16
except ImportError:  # without the package the kernels can still be listed
    bfloat16 = np.uint16

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(bfloat16)
C_NAMES = {FLOAT32: "float", BFLOAT16: "bf16"}  # the dtypes that kernels compute in, by the name of their template argument
DTYPES = {
    "float": FLOAT32, "bf16": BFLOAT16, "int": np.dtype(np.int32), "bool": np.dtype(np.bool_), "long long": np.dtype(np.int64),
    "unsigned": np.dtype(np.uint32), "double": np.dtype(np.float64),
}  # fmt: skip
WIDE = 16  # bytes of the widest access
DECLARATION = r"template\s*<([^>]*)>\s*__global__\s+void(?:\s+__launch_bounds__\([^)]*\))?\s+{0}\s*\(([^)]*)\)"
PLAIN = r"()__global__\s+void(?:\s+__launch_bounds__\([^)]*\))?\s+{0}\s*\(([^)]*)\)"


class Parameter(NamedTuple):
    """One parameter of a kernel."""

    name: str
    dtype: "np.dtype[Any]"
    pointer: bool


@cache
def parameters(source: Source, name: str) -> tuple[Parameter, ...]:
    """Returns a kernel's parameters, read from its declaration, with template parameters replaced by the arguments in its name."""
    text = re.sub(r"//[^\n]*", "", source.path.read_text(encoding="utf-8"))
    plain, _, given = name.partition("<")
    found = re.search((DECLARATION if given else PLAIN).format(plain), text)
    if found is None:
        raise LookupError(f"{source.file} declares no kernel {plain}")
    formal = [part.split()[-1] for part in found[1].split(",") if part.strip()]
    values = [part.strip() for part in given.removesuffix(">").split(",")] if given else []
    if len(values) != len(formal):
        raise LookupError(f"{source.file}: {plain} is a template of <{', '.join(formal)}>: {name} does not fit")
    actual = dict(zip(formal, values, strict=True))
    result = []
    for part in found[2].split(","):
        words = part.replace("*", " * ").replace("const ", " ").replace("__restrict__", " ").split()
        kind = " ".join(word for word in words[:-1] if word != "*")
        kind = actual.get(kind, kind)
        if kind not in DTYPES:
            raise LookupError(f"{source.file}: {plain} takes {words[-1]} as {kind}: wanted one of {', '.join(DTYPES)}")
        result.append(Parameter(words[-1], DTYPES[kind], "*" in words))
    return tuple(result)


class CudaLaunch(Backend):
    """A backend whose topics launch kernels, which `loader` compiles."""

    loader: Loader
    alignment = WIDE  # a parameter of an odd size would leave all after it to accesses of one element

    def _launch(
        self, source: Source, name: str, grid: int | tuple[int, ...], block: int | tuple[int, ...], *args: Any, shared: int = 0
    ) -> None:
        """Launches a kernel of a source, unless the grid is empty. Raises TypeError for arguments that do not fit its declaration."""
        sizes = grid if isinstance(grid, tuple) else (grid,)
        if not all(sizes):
            return
        expected = parameters(source, name)
        assert len(args) == len(expected), f"{name} takes {len(expected)} arguments, {len(args)} given"
        checked = [self._argument(name, parameter, value) for parameter, value in zip(expected, args, strict=True)]
        self._kernel(source, name)(sizes, block if isinstance(block, tuple) else (block,), checked, shared_mem=shared)

    def _argument(self, kernel: str, parameter: Parameter, value: Any) -> Any:
        if not parameter.pointer:
            return parameter.dtype.type(value)
        if value is None:
            return np.uintp(0)
        if isinstance(value, np.generic):  # NumPy gives 0-d results as scalars
            value = self.xp.asarray(value)
        if not hasattr(value, "flags") or value.dtype != parameter.dtype or not value.flags.c_contiguous:
            shown = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else type(value).__name__
            order = ", not contiguous" if hasattr(value, "flags") and not value.flags.c_contiguous else ""
            raise TypeError(f"{kernel}: {parameter.name} is {shown}{order}: wanted a contiguous array of {parameter.dtype}")
        return value

    def _kernel(self, source: Source, name: str) -> Launch:
        kernels: dict[tuple[str, str], Launch] = self.__dict__.setdefault("_kernels", {})
        if (source.file, name) not in kernels:
            modules: dict[Source, Callable[[str], Launch]] = self.__dict__.setdefault("_modules", {})
            if source not in modules:
                modules[source] = self.loader(source.path, source.names, source.architecture)
            kernels[source.file, name] = modules[source](name)
        return kernels[source.file, name]

    # ---- questions about arrays -----------------------------------------------------------------------------------------------------

    def _contiguous(self, *arrays: Array | None) -> tuple[Any, ...]:
        """Returns the arrays C-contiguous; None stays None."""
        return tuple(None if a is None else self.contiguous(a) for a in arrays)


def computed(*arrays: Array | None) -> bool:
    """Returns True if all arrays that are not None have one dtype, which kernels compute in. Any other call goes to the reference."""
    kinds = {a.dtype for a in arrays if a is not None}
    return len(kinds) == 1 and kinds <= C_NAMES.keys()


def wide(*arrays: Array | None) -> bool:
    """Returns True if all arrays that are not None are float32, as accumulators are."""
    return all(a is None or a.dtype == FLOAT32 for a in arrays)


def check_shape(kernel: str, shape: tuple[int, ...], **arrays: Array | None) -> None:
    """Raises ValueError for an array of another shape, past whose end a kernel would read or write. None is skipped."""
    for name, array in arrays.items():
        if array is not None and tuple(array.shape) != shape:
            raise ValueError(f"{kernel}: {name} has the shape {tuple(array.shape)}: wanted {shape}")


def writable(out: Array | None, shape: tuple[int, ...], dtype: Any) -> bool:
    """Returns True if a kernel can write a result of this shape and dtype into `out`, or if `out` is None: the kernel then gets new memory.

    Any other buffer (strided, of another shape or dtype) is left to the reference, which converts or refuses.
    """
    return out is None or (out.shape == shape and out.dtype == dtype and bool(out.flags.c_contiguous))


def kept(out: Array | None, shape: tuple[int, ...], dtype: Any) -> bool:
    """Returns True if a kernel can write, or add, a weight's gradient to `out`, or if `out` is None: float32 is never rounded."""
    return writable(out, shape, dtype) or writable(out, shape, FLOAT32)


def lanes(extent: int, *arrays: Array) -> int:
    """Returns the elements per access: 16 bytes' worth if rows of `extent` elements begin at multiples of 16 bytes, else 1."""
    size = arrays[0].dtype.itemsize
    fits = (extent * size) % WIDE == 0 and all(address(a) % WIDE == 0 for a in arrays)
    return WIDE // size if fits else 1


def address(array: Array) -> int:
    """Returns the address of an array's first element, on the device or the host."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def quotient(divisor: int) -> tuple[int, int]:
    """Returns the factor and the shift with which kernels divide by a number (kernels/quotient.cuh).   1 <= divisor < 2^31"""
    shift = (divisor - 1).bit_length()
    return (1 << 31 + shift) // divisor + 1, shift


def instances(kernel: str, *choices: Sequence[object]) -> tuple[str, ...]:
    """Returns the C++ names for every combination of template arguments: instances("f", ["float"], [1, 4]) -> f<float, 1>, f<float, 4>."""
    names = [""]
    for choice in choices:
        names = [f"{name}, {value}" if name else str(value) for name in names for value in choice]
    return tuple(f"{kernel}<{name}>" for name in names)


def by_width(kernel: str) -> tuple[str, ...]:
    """Returns the instances of `kernel<T, V>` for both dtypes, with V of 1 and of 16 bytes."""
    return (*instances(kernel, ["float"], [1, 4]), *instances(kernel, ["bf16"], [1, 8]))


def instance(kernel: str, *arguments: object) -> str:
    """Returns the C++ name of a template's instance; a dtype becomes the C++ type."""
    return f"{kernel}<{', '.join(C_NAMES.get(a, str(a)) if isinstance(a, np.dtype) else str(a) for a in arguments)}>"
