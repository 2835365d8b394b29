"""Text from files, folders and pipes: UTF-8, UTF-16 with a byte order mark, gzip; bounded by the machine's memory.

A byte order mark is not a character of the text. Earlier versions took it for one, and skipped what is compressed or in UTF-16:
`decode_as_before` reads as they did, so that a run which began with such a text goes on with it.
"""

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minimoe.data.pipes import is_pipe, read_pipe, refuse_devices, size_text
from minimoe.errors import UserError
from minimoe.machine import machine_memory

SEPARATOR = "\n\n"  # between topics and files
SHARE = 4  # of the memory that a text's bytes may take: as tokens, 4 bytes each, it would fill the memory
GZIP = b"\x1f\x8b"  # no UTF-8 text begins with these
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CHUNK = 1 << 20  # bytes that are looked at before more are read or unpacked
NAMED = 3  # files of a folder that a note names


@dataclass(frozen=True)
class Text:
    """A text, and what a user should know about how it was read."""

    text: str
    notes: tuple[str, ...] = ()


class NotText(UserError):
    """Bytes that are not text; the message does not name the file."""

    def __init__(self, message: str, binary: bool) -> None:
        super().__init__(message)
        self.binary = binary  # rather than text in another encoding


Decode = Callable[[bytes], str]
BINARY = "a binary file (it has NUL bytes): data.source needs UTF-8 text"


# ---- bytes to text ---------------------------------------------------------------------------------------------------------------


def decode(data: bytes) -> str:
    """Return the text of UTF-8, of UTF-16 that begins with a byte order mark, or of either compressed by gzip. Raises `NotText`."""
    if data.startswith(GZIP):
        data = unpack(data)
    if data.startswith(WIDE):
        return _checked(data, "utf-16", "UTF-16")
    return _checked(data, "utf-8-sig", "UTF-8")


def decode_as_before(data: bytes) -> str:
    """Return the text of UTF-8 with its byte order mark, if it has one, as earlier versions did. Raises `NotText`."""
    return _checked(data, "utf-8", "UTF-8")


def _checked(data: bytes, encoding: str, name: str) -> str:
    if encoding != "utf-16" and b"\0" in data:
        raise NotText(BINARY, binary=True)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        at = f"byte 0x{data[error.start]:02x} at {error.start}"
        raise NotText(f"not {name} ({at}): data.source needs UTF-8 text", binary=False) from None
    if encoding == "utf-16" and "\0" in text:
        raise NotText(BINARY, binary=True)
    return text


def unpack(data: bytes) -> bytes:
    """Return what gzip has compressed, in one part or several; what it unfolds to is bounded. Raises `NotText`."""
    most, found, wide = most_bytes(), io.BytesIO(), False
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while chunk := file.read(CHUNK):
                wide = wide or (not found.tell() and chunk.startswith(WIDE))
                found.write(chunk)
                if b"\0" in chunk and not wide:
                    raise NotText(BINARY, binary=True)  # a packed archive may be larger than memory
                if found.tell() > most:
                    raise UserError(f"more than {size_text(most)} of text when unpacked: this machine's memory cannot hold its tokens")
    except (OSError, EOFError, zlib.error) as error:
        raise NotText(f"damaged gzip data: {error}", binary=True) from None
    return found.getvalue()


def most_bytes() -> int:
    """Return how many bytes of text this machine can turn into tokens."""
    return (machine_memory() or 1 << 40) // SHARE


# ---- files, pipes, folders -------------------------------------------------------------------------------------------------------


def read_text(path: Path, as_text: Decode = decode) -> Text:
    """Return the text of a file or a pipe. Raises `UserError`, naming it, if it cannot be read or is not text."""
    data = read_bytes(path)
    try:
        text = as_text(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    has_mark = as_text is decode and data.startswith(codecs.BOM_UTF8)
    return Text(text, (f"{path}: its byte order mark is left out",) if has_mark else ())


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file or a pipe. Raises `UserError` for what cannot be read, is a device, or has more than memory can hold."""
    most = most_bytes()
    try:
        refuse_devices(path)
        if is_pipe(path):
            data = read_pipe(path, most)
        else:
            if path.stat().st_size > most:
                raise UserError(_too_large(path, most))
            data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise UserError(_too_large(path, most))
    return data


def _too_large(path: Path, most: int) -> str:
    return f"{path}: more than {size_text(most)}: this machine's memory cannot hold its tokens"


def read_folder(folder: Path, as_text: Decode = decode) -> Text:
    """Return the text files below a folder, sorted by path, and say what was left out.

    Hidden and empty files are skipped silently. Raises `UserError` if nothing is left, or if all together are too large.
    """
    paths = sorted((path for path in walk(folder, set()) if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())
    texts: list[str] = []
    other: list[tuple[str, int]] = []  # text in another encoding
    binary: list[tuple[str, int]] = []
    left = most_bytes()
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if begins_as_binary(path):
            binary.append((name, path.stat().st_size))
            continue
        data = read_bytes(path)
        try:
            text = as_text(data)
        except NotText as error:
            (binary if error.binary else other).append((name, len(data)))
            continue
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        left -= len(text)
        if left < 0:
            raise UserError(_too_large(folder, most_bytes()))
        if text:
            texts.append(text)
    if not texts:
        raise UserError(f"{folder}: no text in this folder: data.source needs at least one file of UTF-8 text that is not hidden")
    return Text(SEPARATOR.join(texts), tuple(_left_out(folder, other, binary)))


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
    size = size_text(sum(size for _, size in files))
    return f"{len(files)} {what}{'s' if len(files) > 1 else ''} ({size}) {'are' if len(files) > 1 else 'is'}"


def walk(root: Path, skip: set[str]) -> Iterator[Path]:
    """Yield the files below a folder, except hidden ones and those below a folder whose name is in `skip`."""
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in skip and not name.startswith(".")]
        yield from (Path(folder, file) for file in files if not file.startswith("."))
