"""A safetensors file, read through a memory map and written tensor by tensor.

The file is eight bytes (the header's length N, little-endian), N bytes of JSON, and the tensors' bytes without a gap:

    {"__metadata__": {"format": "pt"}, "embed.weight": {"dtype": "BF16", "shape": [5, 3], "data_offsets": [0, 30]}, ...}

(https://github.com/huggingface/safetensors, "Format".) The header is not trusted: all of it is checked before anything in it is
used (`header.py`). A tensor is a view of the map, so opening takes no memory, and pages are loaded when they are read. If another process
shortens the file while it is mapped, this process ends with SIGBUS; no reader of maps can prevent that.
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

    Opening reads only the header. Raises `CheckpointError`, in one line, if the file is missing, is a pickle, or contradicts itself.
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
        """Return what the header says about a tensor. Raises `CheckpointError` if there is no tensor of that name."""
        if name not in self.entries:
            raise CheckpointError(f"{shown(self.path)}: has no tensor {shown(name)}")
        return self.entries[name]

    def raw(self, name: str) -> Array:
        """Return a tensor as it is stored: a read-only view of the map, C-contiguous, in NumPy's dtype.

        BF16 comes as uint16 and F8_* as uint8 (`fill` converts them to numbers). A tensor may begin at any byte of a file, so the view may
        be unaligned: NumPy can read it, compiled code may not be able to.
        """
        entry = self.entry(name)
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        return self._bytes[entry.start : entry.stop].view(STORED[entry.dtype]).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Let the system drop a tensor's pages; reading them again reads the file again."""
        entry = self.entry(name)
        start, stop = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE, entry.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and start < stop and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        """Close the map. Existing views stay valid and keep it open."""
        self._map = self._bytes = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _open(path: Path) -> BinaryIO:
    """Open a regular file whose name is not a pickle's. A pipe is refused before it is opened, which would wait for a writer."""
    refuse_pickle(path.name, b"")
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError("is not a file")
    return open(path, "rb")


def fill(out: Array, raw: Array, dtype: str) -> None:
    """Write the numbers of a raw tensor into `out`: float32 or float64, of the same shape, with any strides.

    dtype: the dtype of `raw` in the file, one of `FLOATS`. Numbers that float32 cannot hold become inf or the nearest one; NaN stays NaN.
    Raises `CheckpointError` for any other dtype, or if the shapes differ.
    """
    if dtype not in FLOATS:
        raise CheckpointError(f"dtype {dtype} cannot be the dtype of a weight: expected one of {', '.join(sorted(FLOATS))}")
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
    """Convert numbers to F64, F32, F16, or BF16 (as uint16), rounded to nearest, ties to even.   float [...] -> [...]

    A number that is too large becomes inf, and NaN stays NaN. The result is C-contiguous; it is `values` itself if nothing changes.
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
    """Return the bits of float32 as uint32. A float64 between two of them gives the odd one, so that rounding again rounds correctly."""
    with np.errstate(all="ignore"):
        near = np.asarray(values, np.float32)
    bits = near.view(np.uint32)
    if values.dtype != np.float64:
        return bits
    between = (near != values) & (near == near) & (bits & 1 == 0)
    return np.where(between, np.where(np.abs(near) < np.abs(values), bits + 1, bits - 1), bits)


def write_tensor_file(path: Path | str, specs: Specs, produce: Callable[[str], Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, one tensor in memory at a time; equal contents give equal bytes, those of the safetensors library.

    specs: {name: (dtype, shape)}, of which the header is made. produce(name) returns the tensor in the dtype that `TensorFile.raw` gives.
    An existing file is replaced once the new one is complete and on disk. Raises `CheckpointError` if it cannot be written.
    """
    path = Path(path)
    temporary = temporary_sibling(path)
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
    """Write to a new file directly, as `write_tensor_file` does through a temporary one. Raises `OSError`."""
    header, order = write_header(specs, metadata)
    with open(path, "xb") as file:
        file.write(header)
        for name in order:
            file.write(_bytes(name, produce(name), *specs[name]))
        file.flush()
        os.fsync(file.fileno())


def temporary_sibling(path: Path) -> Path:
    """Return a hidden name in the same folder for a file that is renamed to `path` when it is complete."""
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")


def _bytes(name: str, array: Array, dtype: str, shape: tuple[int, ...]) -> memoryview:
    if array.shape != tuple(shape) or array.dtype.newbyteorder("<") != STORED[dtype]:
        raise ValueError(f"{name}: planned {dtype} ({STORED[dtype]}) {list(shape)}, produced {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array, STORED[dtype]).reshape(-1).view(np.uint8).data
