"""Where text comes from: a name becomes documents, which are read anew whenever they are asked for.

A source is a built-in one, a file, a folder or a pipe. What it holds is known only while it is read, so that a text larger than memory can
be turned into tokens piece by piece.
"""

import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from minimoe.config.data_names import is_pattern, split_column
from minimoe.data.documents import PLAINLY, Form
from minimoe.data.documents import Document as Document
from minimoe.data.listing import Documents, files_of_pattern, has_rows
from minimoe.data.pipes import is_pipe
from minimoe.data.rows import kind_of
from minimoe.data.text import (
    SEPARATOR,
    Decode,
    NotText,
    decode,
    decode_as_before,
    file_state,
    files_below,
    read_chunks,
    read_folder,
    read_pieces,
    read_piped,
    walk,
)
from minimoe.errors import UserError, nearest

CODE_BYTES = 4_000_000  # python-code takes whole files, in order, up to this
MIX_CHUNK = 4096  # characters after which python-mix changes domain, at the end of a line
IMAGE_SOURCES = ("digits",)  # no text: minimoe/training/tasks/digits.py
NOT_LIBRARY_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}


@dataclass(frozen=True)
class Source:
    """A source that was found: its documents in order, the names of their domains (none if there is only one), and what to say about it.

    `state` tells without reading whether the content is that of another time, in values that JSON has: each file's path, device, inode,
    size and time (`text.file_state`), and how it is read. None, or a result of None: only reading tells.
    """

    documents: Callable[[], Iterator[Document]]  # reads them anew at each call
    domains: tuple[str, ...] = ()
    notes: Sequence[str] = ()  # complete when the documents were read to their end
    piped: bool = False
    state: Callable[[], Any] | None = None
    files: tuple[str, ...] = ()  # of a source that has documents: what is read, in order


def read_source(source: str, base: Path | None = None, as_text: Decode = decode, form: Form | None = PLAINLY) -> Source:
    """Read a built-in source, a file, a folder, a pattern of file names or a pipe.

    With `form` None, files of rows are plain text, as for earlier versions. Raises `UserError`, naming the source, if there is no text.
    """
    if source == "python-mix":
        return Source(lambda: iter(python_mix()), ("docs", "code"))
    if source in SOURCES:
        return Source(lambda: iter((Document(SOURCES[source]()),)))
    name, column = (source, None) if form is None else split_column(source, base or Path())
    path = (base or Path()) / os.path.expanduser(name)
    found = None if form is None else from_documents(source, path, replace(form, column=column or form.column), column is not None)
    if found is not None:
        return found
    if path.exists():
        return from_pipe(path, as_text) if is_pipe(path) else from_files(path, as_text)
    if path.suffix or path.name != source:
        hint = "put the text there, or name another with --data"
        if not source.isprintable():
            hint = "a backslash begins an escape between TOML's double quotes: write the path in single quotes"
        raise UserError(f"data.source = {source!r}: no such file or folder ({hint})")
    raise UserError(f"data.source = {source!r} is not a file, a folder or a built-in source{nearest(source, [*SOURCES, 'python-mix'])}")


def from_documents(source: str, path: Path, form: Form, named: bool) -> Source | None:
    """Return the documents of a file of rows, of files that a pattern names, or of a folder that has rows or is to be read apart.

    None if it is plain text, which has no documents. `named`: the source names a column.
    """
    in_folder = path.is_dir()
    if is_pattern(str(path)):
        files = partial(files_of_pattern, path)
    elif in_folder:
        files = partial(files_below, path)
        if not form.apart and not any(has_rows(file, form) for file in files()):
            return None
    elif path.exists() and kind_of(path) is not None:
        files = partial(list[Path], (path,))
    elif path.exists() and named:
        raise UserError(f"data.source = {source!r}: {path.name} is plain text, which has no columns: leave out ':{form.column}'")
    else:
        return None
    documents = Documents(source, files, form, in_folder)
    return Source(documents, notes=documents.notes, state=documents.state, files=tuple(map(str, files())))


def from_pipe(path: Path, as_text: Decode) -> Source:
    """Read a pipe to its end, since it can be read only once."""
    notes: list[str] = []
    text = read_piped(path, as_text, notes)
    return Source(lambda: iter((Document(text),)), notes=notes, piped=True)


def from_files(path: Path, as_text: Decode) -> Source:
    """Return a file, or the text files of a folder, as one document that is read in pieces."""
    notes: list[str] = []
    read = read_folder if path.is_dir() else read_pieces

    def documents() -> Iterator[Document]:
        notes.clear()
        for number, piece in enumerate(read(path, as_text, notes)):
            yield Document(piece, continues=number > 0)

    def state() -> list[Any]:
        return [as_text.__name__, str(path.absolute()), *map(file_state, files_below(path) if path.is_dir() else [path])]

    return Source(documents, notes=notes, state=state)


def python_docs() -> str:
    """Return CPython's language reference as `help()` shows it: the topics of `pydoc_data.topics` in sorted order."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("data.source = 'python-docs': this Python comes without pydoc_data; give a text file") from None
    return SEPARATOR.join(topics[name] for name in sorted(topics))


def python_code() -> str:
    """Return the standard library's sources: top-level modules, then packages, sorted by path, whole files up to `CODE_BYTES`.

    Tests, installed packages, the documentation of python-docs, build settings and files that are not UTF-8 are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in walk(root, NOT_LIBRARY_CODE) if path.suffix == ".py" and not path.name.startswith("_sysconfigdata")]
    texts, size = [], 0
    for path in sorted(paths, key=lambda path: (len(path.parts), path.as_posix())):
        try:
            text = "".join(decode_as_before(read_chunks(path)))
        except NotText:
            continue
        size += len(text.encode("utf-8")) + len(SEPARATOR)
        if size > CODE_BYTES:
            break
        texts.append(text)
    if not texts:
        raise UserError("data.source = 'python-code': this Python comes without its sources; give a text file")
    return SEPARATOR.join(texts)


def python_mix() -> list[Document]:
    """Return chunks of docs (domain 0) and code (domain 1) in turn, in equal number; those of the longer one are evenly spread."""
    docs, code = chunks(python_docs()), chunks(python_code())
    count = min(len(docs), len(code))
    pairs = ((docs[i * len(docs) // count], code[i * len(code) // count]) for i in range(count))
    return [document for prose, program in pairs for document in (Document(prose, 0), Document(program, 1))]


def chunks(text: str) -> list[str]:
    """Cut a text at ends of lines into pieces of at least `MIX_CHUNK` characters; a shorter rest is left out."""
    found, lines, size = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= MIX_CHUNK:
            found.append("".join(lines))
            lines, size = [], 0
    return found


SOURCES: dict[str, Callable[[], str]] = {"python-docs": python_docs, "python-code": python_code}
