"""Files of a folder or of a pattern as documents: each text file is one, each file of rows has many."""

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minimoe.data.documents import Document, Form, Tally
from minimoe.data.rows import kind_of
from minimoe.data.structured import NoColumn, read_documents
from minimoe.data.text import NotText, begins_as_binary, decode, file_state, held_whole, read_chunks
from minimoe.errors import UserError

NAMED = 3  # files that a note names


def files_of_pattern(pattern: Path) -> list[Path]:
    """Return the files that a pattern names, sorted by path; `**` is any folder. Raises `UserError` if there is none."""
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True) if os.path.isfile(name))
    if not found:
        raise UserError(f"data.source = {str(pattern)!r} matches no file")
    return found


def has_rows(path: Path, form: Form) -> bool:
    """Return True if a file of a folder is read as rows: .json is, where a column is named, since many folders have settings in it."""
    return kind_of(path) is not None and (kind_of(path) != ".json" or form.column is not None)


class Documents:
    """The documents of some files. `notes` says what was left out; it is complete when the documents were read to their end."""

    def __init__(self, name: str, files: Callable[[], list[Path]], form: Form, in_folder: bool) -> None:
        self.name, self.files, self.form, self.in_folder = name, files, form, in_folder
        self.notes: list[str] = []

    def __call__(self) -> Iterator[Document]:
        """Read the documents anew. Raises `UserError`, naming the file and the line, for what cannot be read, and if there is no text."""
        tally, any_text, columns = Tally(), False, list[NoColumn]()
        left_out: dict[str, list[Path]] = {}
        self.notes.clear()
        for path in self.files():
            try:
                for document in self._read(path, tally):
                    any_text = True
                    yield document
            except NotText as error:
                left_out.setdefault("binary" if error.binary else "not UTF-8", []).append(path)
            except NoColumn as error:
                if not self.in_folder:
                    raise
                columns.append(error)
                left_out.setdefault("rows without a column of text that is clear (data.text_key names it)", []).append(path)
        if not any_text and columns:
            raise columns[0]
        if not any_text:
            why = f", only {tally.words()}" if tally.words() else ""
            raise UserError(f"{self.name}: no text{why}: data.source needs at least one document")
        if tally.words():
            self.notes.append(f"{self.name}: {tally.words()} left out")
        self.notes.extend(f"{self.name}: {_named(paths)} left out: {why}" for why, paths in left_out.items())

    def _read(self, path: Path, tally: Tally) -> Iterator[Document]:
        if has_rows(path, self.form) or (not self.in_folder and kind_of(path) is not None):
            yield from read_documents(path, self.form, tally)
            return
        if begins_as_binary(path):
            raise NotText("", binary=True)
        try:
            held = held_whole(decode(read_chunks(path)))  # only at its end it is known to be text
        except NotText:
            raise
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if held is None:
            yield Document("", ends=True)
            yield from (Document(piece, continues=True) for piece in decode(read_chunks(path)))
        elif "".join(held).strip():
            yield Document("".join(held), ends=True)
        else:
            tally.empty += 1

    def state(self) -> Any:
        """Return what tells without reading whether the documents are those of another time; None if nothing does."""
        try:
            return ["rows", self.in_folder, *self.form.state(), *map(file_state, self.files())]
        except UserError:
            return None


def _named(paths: list[Path]) -> str:
    more = [f"and {len(paths) - NAMED} more"] if len(paths) > NAMED else []
    return f"{len(paths)} file{'s' if len(paths) > 1 else ''} ({', '.join([*(path.name for path in paths[:NAMED]), *more])})"
