"""Reads the rows of JSON Lines, a JSON list, CSV and TSV, one at a time, each with the place that an error in it names.

A file may be compressed by gzip, and in UTF-8 or, with a byte order mark, in UTF-16. A row is an object, or a value of its own.
"""

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from minimoe.data.documents import Tally
from minimoe.data.pipes import is_pipe, refuse_devices
from minimoe.data.text import GZIP, WIDE, most_bytes
from minimoe.errors import UserError
from minimoe.figures import file_size
from minimoe.untrusted import Malformed, parse_json

MOST_LINE = 256_000_000  # characters of one line, or of one field of a table
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Row(NamedTuple):
    """A row of a file: its value, and where it is."""

    value: Any
    place: str  # "notes.jsonl, line 3"


def kind_of(path: Path) -> str | None:
    """Return the kind of a file of rows, by its name: .jsonl, .json, .csv or .tsv; None if it is plain text."""
    suffixes = path.name.lower().removesuffix(".gz").rpartition(".")
    kind = "." + suffixes[2] if suffixes[0] else ""
    return {".ndjson": ".jsonl"}.get(kind, kind) if kind in (".jsonl", ".ndjson", ".json", *DELIMITERS) else None


def read_rows(path: Path, tally: Tally) -> Iterator[Row]:
    """Yield the rows of a file. Raises `UserError`, naming the file and the line, for one that is not what its name says."""
    kind = kind_of(path)
    if is_pipe(path):
        raise UserError(f"{path}: a pipe of rows: save what it delivers to a file, which can be read again, and give that")
    with _opened(path) as file:
        if kind == ".json":
            yield from _json_list(path, file)
        elif kind == ".jsonl":
            yield from _json_lines(path, file, tally)
        else:
            yield from _table(path, file, DELIMITERS[kind or ".csv"], tally)


# ---- kinds -----------------------------------------------------------------------------------------------------------------------


def _json_lines(path: Path, file: BinaryIO, tally: Tally) -> Iterator[Row]:
    for number, line in _lines(path, file):
        if not line.strip():
            tally.blank += 1
            continue
        try:
            yield Row(parse_json(line.encode("utf-8")), f"{path}, line {number}")
        except Malformed as error:
            raise UserError(f"{path}, line {number}: {_first_line_only(str(error))}") from None


def _first_line_only(message: str) -> str:
    """Return a message of the JSON reader without its line, which is always the first."""
    return message.replace(": line 1 column", ": column")


def _json_list(path: Path, file: BinaryIO) -> Iterator[Row]:
    most = most_bytes() // 4  # Python's objects take more memory than their text
    with _readable(path):
        data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{path}: more than {file_size(most)} as one JSON value: write it as .jsonl, a row in each line")
    try:
        value = parse_json(data)
    except Malformed as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(value, list):
        raise UserError(f"{path}: holds a JSON {type_name(value)}, not a list of rows: {plain_text_hint(path)}")
    yield from (Row(row, f"{path}, row {number}") for number, row in enumerate(value, 1))


def _table(path: Path, file: BinaryIO, delimiter: str, tally: Tally) -> Iterator[Row]:
    csv.field_size_limit(MOST_LINE)  # of the whole process; Python's own limit is 131,072 characters
    reader = csv.reader((line for _, line in _lines(path, file)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1  # a field between quotes may have several lines
        try:
            cells = next(reader, None)
        except csv.Error as error:
            unclosed = "a quote that is not closed" if "end of data" in str(error) else f"a broken quote: {error}"
            raise UserError(f"{path}, line {first}: {unclosed}") from None
        if cells is None:
            return
        if not cells:
            tally.blank += 1
        elif header is None:
            header = _header(path, cells)
        elif len(cells) != len(header):
            named = ", ".join(map(repr, header))
            raise UserError(f"{path}, line {first}: has {_count(cells)}, the columns are {len(header)}: {named}")
        else:
            yield Row(dict(zip(header, cells, strict=True)), f"{path}, line {first}")


def _header(path: Path, cells: list[str]) -> list[str]:
    twice = next((cell for cell in cells if cells.count(cell) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two columns are called {twice!r}: the first line names the columns")
    return cells


def _count(cells: list[str]) -> str:
    return f"{len(cells)} cell{'s' * (len(cells) != 1)}"


# ---- bytes to lines ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file at the first byte of its text: unpacked, and after its byte order mark unless that says UTF-16."""
    try:
        refuse_devices(path)
        raw = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with raw:
        packed = raw.peek(2).startswith(GZIP)
        file: BinaryIO = io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(fileobj=raw))) if packed else raw
        yield file


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield each line with its number, from 1."""
    with _readable(path):
        start = cast("io.BufferedReader", file).peek(3)[:3]
    wide = io.TextIOWrapper(file, "utf-16", newline="") if start.startswith(WIDE) else None
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    number = 0
    while True:
        number += 1
        try:
            with _readable(path):
                line = wide.readline(MOST_LINE + 1) if wide is not None else file.readline(MOST_LINE + 1).decode()
        except UnicodeDecodeError as error:
            what = "UTF-8" if wide is None else "UTF-16"
            raise UserError(f"{path}, line {number}: not {what} text (byte 0x{error.object[error.start]:02x})") from None
        if not line:
            return
        if len(line) > MOST_LINE:
            raise UserError(f"{path}, line {number}: has more than {MOST_LINE:,} characters")
        if "\0" in line:
            raise UserError(f"{path}, line {number}: a binary file (it has NUL bytes), not text")
        yield number, line


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise `UserError` for a file that cannot be read on, or whose compression is damaged."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip data: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


# ---- words for messages ------------------------------------------------------------------------------------------------------------


def type_name(value: Any) -> str:
    """Return JSON's name of a value's type."""
    names = ((bool, "boolean"), (int | float, "number"), (str, "string"), (list, "list"), (dict, "object"))
    return next((name for kind, name in names if isinstance(value, kind)), "null")


def plain_text_hint(path: Path) -> str:
    """Return how the bytes of a file of rows can be learned as they are."""
    return f"to learn its raw text, copy it to {path.name}.txt"
