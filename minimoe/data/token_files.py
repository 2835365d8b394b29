"""The files of a folder of tokens, or of images, and the header that says what they hold: written once, checked when they are opened."""

import hashlib
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from minimoe.data.arrays import TokenArrays
from minimoe.data.encoding import Stretch
from minimoe.files import reason
from minimoe.untrusted import MOST_JSON, Malformed, read_bounded

FORMAT = "minimoe tokens 1"
HEADER = "header.json"
TYPES = {"tokens": ("u1", "u2", "u4"), "domains": ("i1",), "learned": ("?",), "documents": ("i8",),
         "pixels": ("u1",), "classes": ("i4",), "names": ("u1",)}  # fmt: skip
BLOCK = 1 << 20  # bytes or numbers that are written or read at once


class Column(msgspec.Struct, frozen=True):
    """A file of numbers."""

    dtype: str
    count: int
    sha256: str

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.count * np.dtype(self.dtype).itemsize


class OfImages(msgspec.Struct, frozen=True):
    """What else is known of images."""

    classes: tuple[str, ...]  # their names
    notes: tuple[str, ...]  # what was read, and what was left out and why


class Header(msgspec.Struct, frozen=True):
    """What a folder of tokens holds, or one of images."""

    format: str
    byteorder: str
    source: str  # as it was called when it was prepared
    sha256: str  # of the text: `Content.sha256`
    layout: str  # `Content.layout`
    text_bytes: int
    tokenizer: str  # its name
    tokenizer_sha256: str  # of its tokenizer.json
    columns: dict[str, Column]
    dropped: dict[str, int]  # characters that the tokenizer has no token for, and how often each occurs
    images: OfImages | None = None  # of images, whose size stands in the tokenizer's place, and a digest of their files in that of `layout`

    @property
    def count(self) -> int:
        """Its tokens, or its images."""
        return self.columns["tokens" if self.images is None else "classes"].count

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(column.size for column in self.columns.values())


class Damaged(Exception):
    """A folder of tokens that cannot be used; says why."""


# ---- reading ----------------------------------------------------------------------------------------------------------------------


def read_header(place: Path) -> Header:
    """Return the header of a folder whose files have the sizes that it gives. Raises `Damaged`, or `FileNotFoundError` without a folder."""
    if not place.is_dir():
        raise FileNotFoundError(place)
    try:
        header = msgspec.json.decode(read_bounded(place / HEADER, MOST_JSON), type=Header)
    except FileNotFoundError:
        raise Damaged(f"{HEADER} is missing") from None
    except OSError as error:
        raise Damaged(f"{HEADER} cannot be read: {reason(error)}") from None
    except (Malformed, msgspec.MsgspecError, RecursionError) as error:
        raise Damaged(f"{HEADER} is damaged: {error}") from None
    for name, column in header.columns.items():
        if column.dtype not in TYPES.get(name, ()) or column.count < 0:
            raise Damaged(f"{HEADER} is damaged: no {name} of type {column.dtype}")
        try:
            size = (place / name).stat().st_size
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {reason(error)}") from None
        if size != column.size:
            raise Damaged(f"{name} has {size:,} bytes, not {column.size:,}: it is cut or damaged")
    missing = {"tokens"} if header.images is None else {"pixels", "classes", "names"}
    if missing - header.columns.keys():
        raise Damaged(f"{HEADER} is damaged: no {min(missing - header.columns.keys())}")
    return header


def mapped(place: Path, header: Header) -> TokenArrays:
    """Return the arrays of a folder, mapped into memory: pages are read when they are used, and belong to no process."""
    arrays = {name: map_column(place / name, column) for name, column in header.columns.items()}
    return TokenArrays(arrays["tokens"], arrays.get("domains"), arrays.get("learned"), arrays.get("documents"))


def map_column(path: Path, column: Column) -> npt.NDArray[Any]:
    if not column.count:
        return np.zeros(0, column.dtype)
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), column.dtype)


def check_columns(place: Path, header: Header) -> None:
    """Read all files of a folder. Raises `Damaged` if one does not have the bytes that were written."""
    for name, column in header.columns.items():
        found = hashlib.sha256()
        try:
            with open(place / name, "rb") as file:
                while block := file.read(BLOCK):
                    found.update(block)
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {reason(error)}") from None
        if found.hexdigest() != column.sha256:
            raise Damaged(f"{name} is damaged: its SHA-256 differs")


# ---- writing ----------------------------------------------------------------------------------------------------------------------


def token_type(vocab_size: int) -> str:
    """Return the smallest unsigned type that holds all ids."""
    return next(name for name in TYPES["tokens"] if vocab_size - 1 <= np.iinfo(name).max)


def write_columns(folder: Path, stretches: Iterable[Stretch], dtype: str, with_domains: bool) -> dict[str, Column]:
    """Write stretches of tokens, and what stands beside them, into the files of a folder. Raises `OSError`."""
    files = {"tokens": ColumnFile(folder / "tokens", dtype)}
    if with_domains:
        files["domains"] = ColumnFile(folder / "domains", "i1")
    try:
        for ids, domain, learned, begins in stretches:
            before = files["tokens"].count
            files["tokens"].add(ids)
            if with_domains:
                files["domains"].add(np.full(len(ids), domain))
            if learned is not None and "learned" not in files:
                files["learned"] = ColumnFile(folder / "learned", "?")
                files["learned"].add_ones(before)
            if "learned" in files:
                files["learned"].add(np.ones(len(ids)) if learned is None else learned)
            if begins and "documents" not in files:
                files["documents"] = ColumnFile(folder / "documents", "i8")
                files["documents"].add(np.zeros(1))
            if begins and before:
                files["documents"].add(np.array([before]))
        return {name: file.finish() for name, file in files.items()}
    finally:
        for file in files.values():
            file.close()


class ColumnFile:
    """A file of numbers that is being written."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file = open(path, "xb", buffering=BLOCK)  # noqa: SIM115 - `close` closes it
        self._dtype, self._sha256 = dtype, hashlib.sha256()
        self.count = 0

    def add(self, values: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(values.astype(self._dtype)).data
        self._file.write(data)
        self._sha256.update(data)
        self.count += len(values)

    def add_ones(self, count: int) -> None:
        for start in range(0, count, BLOCK):
            self.add(np.ones(min(BLOCK, count - start)))

    def finish(self) -> Column:
        self._file.flush()
        os.fsync(self._file.fileno())
        return Column(self._dtype, self.count, self._sha256.hexdigest())

    def close(self) -> None:
        with suppress(OSError):  # a full disk: what is left in the buffer
            self._file.close()
