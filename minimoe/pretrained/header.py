"""Reads the header of a safetensors file without trusting it, and writes one.

Every claim is checked before it is used. JSON is read one tensor at a time; each becomes a `TensorInfo` or is refused at once, so that a
deeply nested header cannot exhaust the memory. The offsets must tile the rest of the file, each tensor with the bytes that its dtype and
shape take. Sizes are Python's integers, which do not overflow.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from minimoe.errors import CheckpointError
from minimoe.signatures import START, what_it_is

# The format's dtypes, in the order in which its library lays tensors out (by dtype, then by name), and NumPy's dtype for the bytes.
# F4 and F6 are missing: their numbers do not fill bytes.
STORED: dict[str, np.dtype[Any]] = {
    word: np.dtype(dtype)
    for word, dtype in [
        ("U64", "<u8"), ("I64", "<i8"), ("F64", "<f8"), ("C64", "<c8"), ("F32", "<f4"), ("U32", "<u4"), ("I32", "<i4"), ("BF16", "<u2"),
        ("F16", "<f2"), ("U16", "<u2"), ("I16", "<i2"), ("F8_E5M2FNUZ", "u1"), ("F8_E4M3FNUZ", "u1"), ("F8_E8M0", "u1"), ("F8_E4M3", "u1"),
        ("F8_E5M2", "u1"), ("I8", "i1"), ("U8", "u1"), ("BOOL", "?"),
    ]
}  # fmt: skip

MOST_HEADER = 100_000_000  # bytes; the format's own limit
MOST_ENTRY = 4096  # characters of one tensor's entry: 64 dimensions of 20 digits, and room
MOST_METADATA = 10_000_000  # characters of `__metadata__`
MOST_BARE = 10_000  # tensors of any size; a file with more needs LEAST_BYTES for each, since an entry takes more memory than that
LEAST_BYTES = 32
MOST_DIMENSIONS = 64  # NumPy's limit
MOST_NUMBER = 2**63 - 1

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
PICKLE_MAGIC = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")  # a zip, as PyTorch writes it; a pickle of protocol 2 to 5
PICKLE = (
    "is a pickle, which runs whatever code is in it when it is opened: if you trust it, convert it with "
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other), which writes safetensors"
)
SPACE = re.compile(r"[ \t\n\r]*")
SURROGATE = re.compile("[\ud800-\udfff]")


class TensorInfo(NamedTuple):
    """The dtype of a tensor in safetensors' words, its shape, and its bytes as absolute offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def shown(text: object) -> str:
    """Return untrusted text for a message: a printable path unchanged, anything else quoted, escaped and shortened."""
    if isinstance(text, os.PathLike):
        if str(text).isprintable():
            return str(text)
        text = str(text)
    quoted = repr(text[:81] if isinstance(text, str) else text)
    return quoted if len(quoted) <= 80 else f"{quoted[:77]}..."


def refuse_pickle(name: str, start: bytes) -> None:
    """Raise `CheckpointError` if a file is a pickle by its name or by its first bytes."""
    if any(name.lower().endswith(ending) for ending in PICKLES) or PICKLE_MAGIC.match(start):
        raise CheckpointError(PICKLE)


# ---- reading -----------------------------------------------------------------------------------------------------------------


def read_header(file: BinaryIO, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors by name, and the metadata, of a file of `size` bytes that is open at its start. Only the header is read.

    Raises `CheckpointError` with one line that says what is wrong, without the file's name.
    """
    start = file.read(9)
    if start[8:] != b"{":  # every safetensors header begins so; the length of one may look like a pickle's first bytes
        refuse_pickle("", start)
        odd = what_it_is(start + file.read(START - len(start)))
        if odd:
            raise CheckpointError(odd)
    if len(start) < 9:
        raise CheckpointError(f"has {len(start)} bytes: too short to be a safetensors file")
    length = int.from_bytes(start[:8], "little")
    if length > MOST_HEADER:
        raise CheckpointError(f"is not a safetensors file: it claims a header of {length} bytes (at most {MOST_HEADER})")
    if not 2 <= length <= size - 8:
        raise CheckpointError(f"claims a header of {length} bytes and has {size - 8} after its length: truncated, or not safetensors")
    if start[8:] != b"{":
        raise CheckpointError("is not a safetensors file: its header does not begin with {")
    try:
        text = (start[8:] + file.read(length - 1)).decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError("its header is not UTF-8") from None
    entries, metadata = _read_entries(text, 8 + length, size - 8 - length)
    _check_layout(entries, 8 + length, size)
    return entries, metadata


def _read_entries(text: str, data: int, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Parse the header's text; `data` is the offset at which the tensors' bytes begin, `size` their number."""
    entries: dict[str, TensorInfo] = {}
    metadata: dict[str, str] | None = None
    most = max(MOST_BARE, size // LEAST_BYTES)
    for name, value in _members(text):
        if name in entries or (name == "__metadata__" and metadata is not None):
            raise CheckpointError(f"its header names {shown(name)} twice")
        if name == "__metadata__":
            metadata = _metadata(value)
            continue
        entries[name] = _entry(name, value, data)
        if len(entries) > most:
            raise CheckpointError(f"its header names more than {most} tensors, and the file has {size} bytes for all of them")
    return entries, metadata or {}


def _members(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the members of a JSON object one at a time, so that a wrong one is refused before those after it are read."""
    at = _after(text, 0, "{")
    if text[at : at + 1] == "}":
        at += 1
    else:
        while True:
            name, at = _value(text, at, MOST_ENTRY)
            if not isinstance(name, str) or SURROGATE.search(name):
                _broken(at)
            at = _after(text, at, ":")
            value, at = _value(text, at, MOST_METADATA if name == "__metadata__" else MOST_ENTRY)
            yield name, value
            if text[at : at + 1] != ",":
                break
            at = _after(text, at, ",")
        at = _after(text, at, "}")
    if SPACE.fullmatch(text, at) is None:
        _broken(at)


def _after(text: str, at: int, expected: str) -> int:
    """Return where the text after one expected character begins."""
    if text[at : at + 1] != expected:
        _broken(at)
    return _skip(text, at + 1)


def _value(text: str, at: int, most: int) -> tuple[Any, int]:
    """Return the JSON value at an offset, of at most `most` characters, and where the text after it begins."""
    try:
        value, length = DECODER.raw_decode(text[at : at + most])
    except (ValueError, RecursionError):
        _broken(at)
    return value, _skip(text, at + length)


def _skip(text: str, at: int) -> int:
    space = SPACE.match(text, at)
    return at if space is None else space.end()


def _broken(at: int) -> NoReturn:
    raise CheckpointError(f"its header is not the JSON that a safetensors file has, from character {at} on")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name occurs twice")
    return members


def _whole(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is not a whole number in this format")
    return int(text)


def _not_whole(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a whole number")


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_int=_whole, parse_float=_not_whole, parse_constant=_not_whole)


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) and not SURROGATE.search(key + text) for key, text in value.items()):
        raise CheckpointError("its __metadata__ must map names to text")
    return value


def _entry(name: str, value: Any, data: int) -> TensorInfo:
    """Check one member of the header by itself."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {shown(name)}: expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED:
        known = ", ".join(STORED)
        raise CheckpointError(f"tensor {shown(name)}: dtype {shown(dtype)} is not known (known: {known})")
    if not _whole_numbers(shape) or len(shape) > MOST_DIMENSIONS:
        raise CheckpointError(f"tensor {shown(name)}: its shape must be a list of at most {MOST_DIMENSIONS} whole numbers, none negative")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"tensor {shown(name)}: its data_offsets must be two whole numbers, none negative")
    start, stop = offsets
    if start > stop:
        raise CheckpointError(f"tensor {shown(name)}: its data_offsets are reversed: {start} to {stop}")
    if math.prod(max(size, 1) for size in shape) * STORED[dtype].itemsize > MOST_NUMBER:  # as NumPy counts, also where a size is 0
        raise CheckpointError(f"tensor {shown(name)}: its shape is too large for any memory")
    needed = math.prod(shape) * STORED[dtype].itemsize
    if needed != stop - start:
        raise CheckpointError(f"tensor {shown(name)}: {dtype} {shown(shape)} takes {needed} bytes, its data_offsets give {stop - start}")
    return TensorInfo(dtype, tuple(shape), data + start, data + stop)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number <= MOST_NUMBER for number in value)


def _check_layout(entries: Mapping[str, TensorInfo], data: int, size: int) -> None:
    """Check that tensors follow each other without gap or overlap, from where the data begins to the end of the file."""
    end, before = data, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.stop > size:
            raise CheckpointError(f"tensor {shown(name)} would end at byte {entry.stop}, the file has {size}: truncated")
        if entry.start < end:
            raise CheckpointError(f"tensor {shown(name)} overlaps tensor {shown(before)}")
        if entry.start > end:
            raise CheckpointError(f"{entry.start - end} bytes before tensor {shown(name)} belong to no tensor")
        end, before = entry.stop, name
    if end != size:
        raise CheckpointError(f"{size - end} bytes at the end of the file belong to no tensor")


# ---- writing -----------------------------------------------------------------------------------------------------------------


def write_header(specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> tuple[bytes, list[str]]:
    """Return the bytes before the tensors, and the order of the tensors: by dtype, the widest first, then by name.

    specs: {name: (dtype, shape)}. The header is padded with spaces to a multiple of 8, so that tensors in that order are aligned.
    """
    rank = {word: index for index, word in enumerate(STORED)}
    order = sorted(specs, key=lambda name: (rank[specs[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in order:
        dtype, shape = specs[name]
        stop = start + math.prod(shape) * STORED[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MOST_HEADER:
        raise CheckpointError(f"the header would take {len(text)} bytes (at most {MOST_HEADER})")
    return len(text).to_bytes(8, "little") + text, order
