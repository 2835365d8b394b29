"""Text from files, folders and pipes: UTF-8, UTF-16 with a byte order mark, gzip. Files are read in pieces, so they may exceed the memory.

A byte order mark is not a character of the text. Earlier versions took it for one, and skipped what is compressed or in UTF-16:
`decode_as_before` reads as they did, so that a run which began with such a text goes on with it.
"""

import codecs
import gzip
import io
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from minimoe.data.pipes import is_pipe, read_pipe, refuse_devices
from minimoe.errors import UserError
from minimoe.figures import file_size
from minimoe.machine import machine_memory

SEPARATOR = "\n\n"  # between topics and files
SHARE = 4  # of the memory that the bytes of a pipe may take: as tokens, 4 bytes each, they would fill it
GZIP = b"\x1f\x8b"  # no UTF-8 text begins with these
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CHUNK = 1 << 20  # bytes that are read or unpacked at once
SETTLED = 2 * 10**9  # nanoseconds: some file systems count times in whole seconds, or two
NAMED = 3  # files of a folder that a note names


class NotText(UserError):
    """Bytes that are not text; the message does not name the file."""

    def __init__(self, message: str, binary: bool) -> None:
        super().__init__(message)
        self.binary = binary  # rather than text in another encoding


Decode = Callable[[Iterable[bytes]], Iterator[str]]  # of bytes that come in chunks; only the last may be short
BINARY = "a binary file (it has NUL bytes): data.source needs UTF-8 text"


# ---- bytes to text ---------------------------------------------------------------------------------------------------------------


def decode(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of UTF-8, of UTF-16 that begins with a byte order mark, or of either compressed by gzip. Raises `NotText`."""
    first, chunks = _first(chunks)
    if first.startswith(GZIP):
        first, chunks = _first(unpack(chunks))
    if first.startswith(WIDE):
        return _decoded(chunks, "utf-16", "UTF-16")
    return _decoded(chunks, "utf-8", "UTF-8", skip=len(codecs.BOM_UTF8) * first.startswith(codecs.BOM_UTF8))


def decode_as_before(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of UTF-8 with its byte order mark, if it has one, as earlier versions did. Raises `NotText`."""
    return _decoded(chunks, "utf-8", "UTF-8")


def _first(chunks: Iterable[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return the first chunk, and all of them."""
    rest = iter(chunks)
    first = next(rest, b"")
    return first, chain((first,), rest)


def _decoded(chunks: Iterable[bytes], encoding: str, name: str, skip: int = 0) -> Iterator[str]:
    """Yield the text of bytes in an encoding, without the first `skip` bytes."""
    decoder = codecs.getincrementaldecoder(encoding)()
    read = 0  # bytes before the chunk
    for chunk, last in chain(zip(chunks, repeat(False), strict=False), ((b"", True),)):
        if encoding != "utf-16" and b"\0" in chunk:
            raise NotText(BINARY, binary=True)
        held = len(decoder.getstate()[0])  # bytes of a character that the chunk completes
        try:
            text = decoder.decode(chunk if read else chunk[skip:], last)
        except UnicodeDecodeError as error:
            at = f"byte 0x{error.object[error.start]:02x} at {error.start + read - held + (0 if read else skip)}"
            raise NotText(f"not {name} ({at}): data.source needs UTF-8 text", binary=False) from None
        if encoding == "utf-16" and "\0" in text:
            raise NotText(BINARY, binary=True)
        read += len(chunk)
        if text:
            yield text


def unpack(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what gzip has compressed, in one part or several. Raises `NotText`."""
    try:
        with gzip.GzipFile(fileobj=io.BufferedReader(_Chunks(chunks), CHUNK)) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise NotText(f"damaged gzip data: {error}", binary=True) from None


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._rest = iter(chunks), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._chunks, b"")
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


# ---- files, pipes, folders -------------------------------------------------------------------------------------------------------


def read_pieces(path: Path, as_text: Decode = decode, notes: list[str] | None = None) -> Iterator[str]:
    """Yield the text of a file, or of a pipe, in pieces; `notes` gets what a user should know about how it was read.

    Raises `UserError`, naming the file, if it cannot be read or is not text.
    """
    first, chunks = _first(read_chunks(path))
    if notes is not None and as_text is decode and first.startswith(codecs.BOM_UTF8):
        notes.append(f"{path}: its byte order mark is left out")
    try:
        yield from as_text(chunks)
    except NotText as error:
        raise UserError(f"{path}: {error}") from None


def read_piped(path: Path, as_text: Decode = decode, notes: list[str] | None = None) -> str:
    """Return all text that comes through a pipe, unpacked. Raises `UserError` if it is more than the memory can hold, and as above."""
    pieces, left = [], most_bytes()
    for piece in read_pieces(path, as_text, notes):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise UserError(_too_large(path))
    return "".join(pieces)


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, or of a pipe. Raises `UserError` for what cannot be read, is a device, or is a pipe that has too many."""
    try:
        refuse_devices(path)
        if is_pipe(path):
            data = read_pipe(path, most_bytes())
            if len(data) > most_bytes():
                raise UserError(_too_large(path))
            yield data
            return
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file or a pipe. Raises `UserError` as `read_chunks` does."""
    return b"".join(read_chunks(path))


def most_bytes() -> int:
    """Return how many bytes of text from a pipe, which is kept in memory, this machine can turn into tokens."""
    return (machine_memory() or 1 << 40) // SHARE


def _too_large(path: Path) -> str:
    return f"{path}: more than {file_size(most_bytes())} through a pipe: this machine's memory cannot hold its tokens; give a file"


def read_folder(folder: Path, as_text: Decode = decode, notes: list[str] | None = None) -> Iterator[str]:
    """Yield the text files below a folder, sorted by path, in pieces; `notes` gets what was left out.

    Hidden and empty files are skipped silently. A file is read to its end before its text is yielded, since only then it is known to be
    text; a large one is read twice. Raises `UserError` if nothing is left.
    """
    other: list[tuple[str, int]] = []  # text in another encoding
    binary: list[tuple[str, int]] = []
    found = False
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        if begins_as_binary(path):
            binary.append((name, path.stat().st_size))
            continue
        try:
            held = held_whole(as_text(read_chunks(path)))
        except NotText as error:
            (binary if error.binary else other).append((name, path.stat().st_size))
            continue
        if held is None or held:
            yield from (SEPARATOR,) if found else ()
            yield from read_pieces(path, as_text) if held is None else held
            found = True
    if not found:
        raise UserError(f"{folder}: no text in this folder: data.source needs at least one file of UTF-8 text that is not hidden")
    if notes is not None:
        notes.extend(_left_out(folder, other, binary))


def held_whole(pieces: Iterator[str]) -> list[str] | None:
    """Read a text to its end.   -> its pieces, or None if they are more than should be held in memory"""
    held, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size <= CHUNK:
            held.append(piece)
    return held if size <= CHUNK else None


def files_below(folder: Path) -> list[Path]:
    """Return the files below a folder that are not hidden, sorted by path."""
    return sorted((path for path in walk(folder, set()) if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())


def file_state(path: Path) -> list[str | int]:
    """Return what changes with a file's content: its path, device, inode, size in bytes, and modification time in nanoseconds.

    The state of a file that was changed less than two seconds ago equals no other, since it may change again without a new time.
    """
    found, now = path.stat(), time.time_ns()
    settled = found.st_mtime_ns < now - SETTLED
    return [str(path.absolute()), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, *([] if settled else [now])]


def begins_as_binary(path: Path) -> bool:
    """Return True if the first bytes of a file show that it is binary, so that the rest, which may exceed the memory, is not read."""
    try:
        with open(path, "rb") as file:
            data = file.read(CHUNK)
    except OSError:  # `read_bytes` says so
        return False
    return b"\0" in data and not data.startswith((GZIP, *WIDE))


def _left_out(folder: Path, other: list[tuple[str, int]], binary: list[tuple[str, int]]) -> Iterator[str]:
    """Say how many files and bytes of a folder are not in its text."""
    if other:
        names = ", ".join(name for name, _ in other[:NAMED]) + (f", and {len(other) - NAMED} more" if len(other) > NAMED else "")
        since = "since they are" if len(other) > 1 else "since it is"
        yield f"{folder}: {_amount(other, 'file')} left out, {since} not UTF-8: {names}"
    if binary:
        yield f"{folder}: {_amount(binary, 'binary file')} left out"


def _amount(files: list[tuple[str, int]], what: str) -> str:
    size = file_size(sum(size for _, size in files))
    return f"{len(files)} {what}{'s' if len(files) > 1 else ''} ({size}) {'are' if len(files) > 1 else 'is'}"


def walk(root: Path, skip: set[str]) -> Iterator[Path]:
    """Yield the files below a folder, except hidden ones and those below a folder whose name is in `skip`."""
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in skip and not name.startswith(".")]
        yield from (Path(folder, file) for file in files if not file.startswith("."))
