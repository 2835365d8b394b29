"""A safetensors file, read through a memory map and written tensor by tensor.

The file is eight bytes (the header's length N, little-endian), N bytes of JSON, and the tensors' bytes without a gap:

    {"__metadata__": {"format": "pt"}, "embed.weight": {"dtype": "BF16", "shape": [5, 3], "data_offsets": [0, 30]}, ...}

(https://github.com/huggingface/safetensors, "Format".) Whoever made a file may have lied in it: the header is checked in whole before
anything it says is used (`minimoe.tensorheader`). A tensor is a view of the map, so opening costs no memory, and pages come and go as they
are read. A file that another process shortens while it is mapped ends this one (SIGBUS): no reader of maps can prevent that.
"""


import contextlib
import mmap
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from minimoe.errors import CheckpointError
from minimoe.files import reason, sync_folder
from minimoe.pretrained.header import STORED, TensorInfo, read_header, refuse_pickle, shown, write_header
from minimoe.pretrained.quantised import FLOAT8, fill_float8, pieces

__all__ = ["TensorFile", "TensorInfo", "fill", "pack", "write_tensor_file"]

Array: TypeAlias = NDArray[Any]
Specs: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"})  # what `fill` reads


class TensorFile:
    """One safetensors file. `entries` is by tensor name, in the order of the header; `metadata` is what its writer noted.

    Opening reads the header alone. Raises `CheckpointError`, one line, where the file is missing, a pickle, or not what it says it is.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        self._bytes: Array | None = None
        try:
            with _open(self.path) as file:
                size = os.fstat(file.fileno()).st_size
                self.entries, self.metadata = read_header(file, size)
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(self._map, np.uint8)  # holds the map for its views
        except CheckpointError as error:
            raise CheckpointError(f"{shown(self.path)}: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{shown(self.path)}: cannot be read: {reason(error)}") from error
        except ValueError as error:  # a path with a NUL; a file that shrank
            raise CheckpointError(f"{shown(self.path)}: cannot be read: {error}") from error

    def entry(self, name: str) -> TensorInfo:
        """What the header says of a tensor. Raises `CheckpointError` where there is none of that name."""
        if name not in self.entries:
            raise CheckpointError(f"{shown(self.path)}: has no tensor {shown(name)}")
        return self.entries[name]

    def raw(self, name: str) -> Array:
        """A tensor as it lies in the file: a read-only view of the map, C-contiguous, in NumPy's dtype.

        BF16 is given as uint16 and F8_* as uint8 (`fill` makes numbers of them). A file may lay a tensor at any byte, so that the view may
        be unaligned: NumPy reads it, compiled code may not.
        """
        entry = self.entry(name)
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        return self._bytes[entry.start : entry.stop].view(STORED[entry.dtype]).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Tell the system that a tensor's pages need not stay in memory; reading them again reads the file again."""
        entry = self.entry(name)
        start, stop = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE, entry.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and start < stop and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        """Let the map go. Views of it that are still held stay valid, and keep it until they go."""
        self._map = self._bytes = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _open(path: Path) -> BinaryIO:
    """An ordinary file that is no pickle by its name. A pipe is refused unopened: opening one waits for a writer."""
    refuse_pickle(path.name, b"")
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError("is not a file")
    return open(path, "rb")


def fill(out: Array, raw: Array, dtype: str) -> None:
    """Write the numbers of a raw tensor into `out`: float32 or float64, of the same shape, with any strides.

    dtype: the file's word for `raw`, one of `FLOATS`. What float32 cannot hold becomes inf or the nearest number; NaN stays NaN. Raises
    `CheckpointError` where the dtype is none of them, or the shapes differ.
    """
    if dtype not in FLOATS:
        raise CheckpointError(f"dtype {dtype} holds no numbers that a weight can be: expected one of {', '.join(sorted(FLOATS))}")
    if out.shape != raw.shape:
        raise CheckpointError(f"a tensor of shape {list(raw.shape)} where {list(out.shape)} is expected")
    if dtype in FLOAT8:
        fill_float8(out, raw, dtype)
    elif dtype == "BF16" and out.dtype == np.float32:
        np.left_shift(raw, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(all="ignore"):
            for at in pieces(raw.shape):
                out[at] = raw[at] if dtype != "BF16" else np.left_shift(raw[at], 16, dtype=np.uint32).view(np.float32)


def pack(values: Array, dtype: str) -> Array:
    """Numbers as a file holds them, rounded to the nearest, ties to even: F64, F32, F16, or BF16 (as uint16).   float [...] -> [...]

    Too large a number becomes inf, and NaN stays NaN. C-contiguous; `values` itself where it is so already.
    """
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"numbers are written as F64, F32, F16 or BF16, not {dtype}")
    if dtype != "BF16":
        with np.errstate(all="ignore"):
            return np.asarray(values, STORED[dtype], order="C")
    out = np.empty(values.shape, STORED["BF16"])
    for at in pieces(values.shape):
        bits, nan = _float32_bits(values[at]), np.isnan(values[at])
        out[at] = np.where(nan, bits >> 16 | 0x40, bits + 0x7FFF + (bits >> 16 & 1) >> 16)
    return out


def _float32_bits(values: Array) -> Array:
    """The bits of float32, uint32. A float64 between two of them gives the odd one: rounded again it rounds as if it were rounded once."""
    with np.errstate(all="ignore"):
        near = np.asarray(values, np.float32)
    bits = near.view(np.uint32)
    if values.dtype != np.float64:
        return bits
    between = (near != values) & (near == near) & (bits & 1 == 0)
    return np.where(between, np.where(np.abs(near) < np.abs(values), bits + 1, bits - 1), bits)


def write_tensor_file(path: Path | str, specs: Specs, produce: Callable[[str], Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor in memory at a time; equal contents give equal bytes, those of the safetensors library.

    specs: {name: (dtype, shape)}, from which the header is made. produce(name): the tensor, in the dtype that `TensorFile.raw` gives.
    A file of that name is replaced when the new one is whole and on the disk. Raises `CheckpointError` where it cannot be written.
    """
    path = Path(path)
    temporary = beside(path)
    try:
        stream(temporary, specs, produce, metadata)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{shown(path)}: cannot be written: {reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def stream(path: Path, specs: Specs, produce: Callable[[str], Array], metadata: Mapping[str, str] | None) -> None:
    """As `write_tensor_file`, into a new file in place. Raises `OSError`."""
    header, order = write_header(specs, metadata)
    with open(path, "xb") as file:
        file.write(header)
        for name in order:
            file.write(_bytes(name, produce(name), *specs[name]))
        file.flush()
        os.fsync(file.fileno())


def beside(path: Path) -> Path:
    """A hidden name in the same folder, for what takes the name `path` when it is whole."""
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")


def _bytes(name: str, array: Array, dtype: str, shape: tuple[int, ...]) -> memoryview:
    if array.shape != tuple(shape) or array.dtype.newbyteorder("<") != STORED[dtype]:
        raise ValueError(f"{name}: planned {dtype} ({STORED[dtype]}) {list(shape)}, produced {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array, STORED[dtype]).reshape(-1).view(np.uint8).data
