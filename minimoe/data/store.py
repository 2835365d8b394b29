"""Tokens in files of the user's cache: encoded once, and mapped into memory by every run that reads the same text with the same tokenizer.

    ~/.cache/minimoe/data/
      9bc1d2e3f4a5-8c7d6e/      named by the SHA-256 of the text, and by that of the tokenizer and of how the text is laid out
        tokens                  the smallest unsigned integers that hold the vocabulary, in this machine's order of bytes
        domains learned documents     only where there is something to say: see `TokenArrays`
        header.json             what the files hold, and the SHA-256 of each
      index/                    what was found of a source's files: see content.py

    The images of a large folder lie there too: see image_store.py.

A folder is written under a hidden name and renamed when it is whole, by one process at a time; what a process that ended has left behind is
removed by the next one that prepares something.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from minimoe.caches import TOKENS, private_folder
from minimoe.data.alone import alone, folder_size, remove_folder, remove_unfinished
from minimoe.data.arrays import TokenArrays, gather
from minimoe.data.content import INDEX, Content, Pass, Reading, remove_unfinished_notes
from minimoe.data.encoding import encode_documents
from minimoe.data.progress import Progress, say
from minimoe.data.sources import Document
from minimoe.data.token_files import (
    FORMAT,
    HEADER,
    Damaged,
    Header,
    check_columns,
    mapped,
    read_header,
    token_type,
    write_columns,
)
from minimoe.data.tokenizer import Tokenizer
from minimoe.errors import UserError, nearest, notice
from minimoe.figures import file_size
from minimoe.files import HIDDEN, hidden_sibling, reason, sync_folder, to_json, write_synced

NAME = (12, 6)  # hexadecimal digits of the two parts of a name; the header has the whole of both


def store_folder(make: bool = True) -> Path | None:
    """Return the folder that all tokens are in, made if it is missing and wanted; None if this user can have none."""
    return private_folder(TOKENS, make)


# ---- what a run asks for -----------------------------------------------------------------------------------------------------------------


def stored_tokens(reading: Reading, name: str, tokenizer: Tokenizer) -> tuple[TokenArrays, dict[str, int]]:
    """Return the tokens of a source, from the cache or encoded now and kept there, and the characters that the tokenizer drops.

    Raises `UserError` if they cannot be kept, or if the source (`name`) changes while it is read.
    """
    began = time.monotonic()
    found = stored(reading, name, tokenizer)
    if found is None:
        notice(f"{name}: no folder for the cache can be written: its tokens are kept in memory (MINIMOE_CACHE_DIR names a folder)")
        return in_memory(reading, name, tokenizer)
    place, header, new = found
    if new:
        count, seconds = header.columns["tokens"].count, time.monotonic() - began
        say(f"{name}: {count:,} tokens ({tokenizer.name}) made in {seconds:.0f} s, kept in {place} ({file_size(header.size)})")
    return mapped(place, header), header.dropped


class Kept(NamedTuple):
    """Where tokens are kept, what is there, and whether it was made now."""

    place: Path
    header: Header
    new: bool


def stored(reading: Reading, name: str, tokenizer: Tokenizer, verify: bool = False) -> Kept | None:
    """Return the folder of a source's tokens, which is made if it is missing or damaged; None if this user can have no cache.

    With `verify` all its bytes are checked. Raises `UserError` as above.
    """
    folder = store_folder()
    if folder is None:
        return None
    expected = expected_header(reading.content, name, tokenizer)
    place = folder / place_of(expected)
    found = _usable(place, expected, verify)
    if found is not None:
        return Kept(place, found, new=False)
    remove_unfinished(folder)
    remove_unfinished_notes(folder)
    with alone(place, name):
        found = _usable(place, expected, verify, say_why=True)  # another process may have made it meanwhile
        return Kept(place, found or _prepare(place, expected, reading, tokenizer), new=found is None)


def room() -> float:
    """Return how many bytes of text the disk of the cache has room for: a token takes the least, a quarter of what its text does."""
    folder = store_folder()
    return float("inf") if folder is None else 4.0 * shutil.disk_usage(folder).free


def in_memory(reading: Reading, name: str, tokenizer: Tokenizer) -> tuple[TokenArrays, dict[str, int]]:
    """Return the tokens of a source, encoded now, and the characters that the tokenizer drops."""
    dropped: dict[str, int] = {}
    documents = reading.source.documents() if reading.held is None else iter(reading.held)
    stretches = encode_documents(noting_dropped(documents, tokenizer, dropped), tokenizer, name)
    return gather(stretches, bool(reading.source.domains)), dropped


def noting_dropped(documents: Iterator[Document], tokenizer: Tokenizer, dropped: dict[str, int]) -> Iterator[Document]:
    """Yield the documents, and add to `dropped` which of their characters the tokenizer drops, and how often each occurs."""
    for document in documents:
        for char, count in tokenizer.dropped(document.text).items():
            dropped[char] = dropped.get(char, 0) + count
        yield document


def expected_header(content: Content, name: str, tokenizer: Tokenizer) -> Header:
    """Return the header of a text's tokens without what is known only when they are encoded."""
    sha256 = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
    return Header(FORMAT, byteorder(), name, content.sha256, content.layout, content.size, tokenizer.name, sha256, {}, {})


def place_of(header: Header) -> str:
    """Return the name of the folder that a header belongs to."""
    rest = hashlib.sha256(json.dumps([header.layout, header.tokenizer_sha256]).encode()).hexdigest()
    return f"{header.sha256[: NAME[0]]}-{rest[: NAME[1]]}"


def byteorder() -> str:
    return "little" if np.little_endian else "big"


def _usable(place: Path, expected: Header, verify: bool = False, say_why: bool = False) -> Header | None:
    """Return the header of a folder that holds what is expected; None if there is none, or none that can be used."""
    try:
        header = read_header(place)
        same = ("format", "byteorder", "sha256", "layout", "text_bytes", "tokenizer_sha256")
        wrong = next((field for field in same if getattr(header, field) != getattr(expected, field)), None)
        if wrong is not None:
            raise Damaged(f"its header has another {wrong}")
        if verify:
            check_columns(place, header)
        return header
    except FileNotFoundError:
        return None
    except Damaged as error:
        if say_why:
            notice(f"{place}: {error}: its tokens are made again")
        return None


# ---- preparing ---------------------------------------------------------------------------------------------------------------------------


def _prepare(place: Path, expected: Header, reading: Reading, tokenizer: Tokenizer) -> Header:
    """Encode a source into a folder."""
    name = expected.source
    temporary = hidden_sibling(place, "tmp")
    progress = Progress(f"tokenising {name}", reading.content.size)
    found, dropped = Pass(progress), dict[str, int]()
    try:
        temporary.mkdir(mode=0o700)
        documents = reading.source.documents() if reading.held is None else iter(reading.held)
        stretches = encode_documents(noting_dropped(found.over(documents), tokenizer, dropped), tokenizer, name)
        columns = write_columns(temporary, stretches, token_type(tokenizer.vocab_size), bool(reading.source.domains))
        content = found.content(reading.source)
        if (content.sha256, content.layout) != (expected.sha256, expected.layout):
            raise UserError(f"{name}: changed while it was read: start again when nothing writes to it")
        header = msgspec.structs.replace(expected, columns=columns, dropped=dropped)
        write_synced(temporary / HEADER, to_json(msgspec.to_builtins(header)).encode())
        sync_folder(temporary)
        _rename(temporary, place, header)
        sync_folder(place.parent)
    except OSError as error:
        free = shutil.disk_usage(place.parent).free
        raise UserError(
            f"{name}: its tokens cannot be written to {place.parent}: {reason(error)} ({file_size(free)} are free): "
            "minimoe data rm frees some, MINIMOE_CACHE_DIR names another place"
        ) from None
    finally:
        progress.close()
        shutil.rmtree(temporary, ignore_errors=True)
    return header


def _rename(temporary: Path, place: Path, header: Header) -> None:
    """Give a whole folder its name, unless another process was quicker. Raises `OSError`."""
    if place.exists() and _usable(place, header, verify=True) is None:
        remove_folder(place)
    try:
        os.rename(temporary, place)
    except OSError:
        if _usable(place, header) is None:
            raise


# ---- what is there -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A folder of tokens in the cache."""

    name: str
    path: Path
    size: int  # bytes
    header: Header | None  # None if it is damaged
    problem: str  # what is wrong with it; else empty

    def to_dict(self) -> dict[str, Any]:
        """Return what `minimoe data list --json` prints."""
        found: dict[str, Any] = {"name": self.name, "path": str(self.path), "size": self.size, "problem": self.problem}
        if self.header is not None:
            keys = ("source", "sha256", "text_bytes", "tokenizer", "tokenizer_sha256")
            found |= {key: getattr(self.header, key) for key in keys} | {"tokens": self.header.count}
        return found


def stored_folders() -> list[Stored]:
    """Return the folders of tokens in the cache, by name."""
    folder = store_folder(make=False)
    found = []
    for path in sorted(folder.iterdir()) if folder else ():
        if path.is_dir() and path.name != INDEX and HIDDEN.fullmatch(path.name) is None:
            header, problem = None, ""
            try:
                header = read_header(path)
            except (Damaged, FileNotFoundError) as error:
                problem = str(error)
            found.append(Stored(path.name, path, folder_size(path), header, problem))
    return found


def remove_stored(names: Iterable[str]) -> list[Stored]:
    """Remove the tokens of these names, or whose names begin so.   -> what was removed. Raises `UserError` for a name that is not one's."""
    there = stored_folders()
    chosen = [_chosen(name, there) for name in names]
    for one in chosen:
        if one.path.exists():
            remove_folder(one.path)
    return chosen


def remove_all() -> int:
    """Remove all tokens and notes that no process is writing.   -> the bytes that this frees"""
    folder = store_folder(make=False)
    if folder is None:
        return 0
    freed = remove_unfinished(folder) + sum(one.size for one in remove_stored([one.name for one in stored_folders()]))
    if (folder / INDEX).is_dir():
        freed += remove_folder(folder / INDEX)
    with suppress(OSError):  # somebody has written meanwhile
        folder.rmdir()
    return freed


def _chosen(name: str, there: list[Stored]) -> Stored:
    found = [one for one in there if one.name == name] or [one for one in there if name and one.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name!r} is the beginning of {len(found)} names: {', '.join(one.name for one in found)}")
    raise UserError(f"no tokens are called {name!r}{nearest(name, [one.name for one in there])}" if there else "no tokens are kept")
