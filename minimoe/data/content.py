"""What a source holds, found by reading it once: the SHA-256 of its text, its size, what to say about it.

What was found of files is noted in the user's cache, and believed as long as their device, inode, size and modification time are the same.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from minimoe.caches import TOKENS, private_folder
from minimoe.data.encoding import EMPTY_LINE
from minimoe.data.progress import Progress
from minimoe.data.sources import Document, Source
from minimoe.errors import UserError
from minimoe.figures import file_size
from minimoe.files import HIDDEN, to_json, write_atomically
from minimoe.untrusted import MOST_JSON, Malformed, read_bounded

INDEX = "index"  # the folder of the notes


class Content(msgspec.Struct, frozen=True):
    """What a source holds."""

    sha256: str  # of the text's UTF-8 bytes, and of the ends of documents and what is learned of them, where these are given
    layout: str  # SHA-256 of where documents begin in the text and of their domains: what else the tokens depend on
    size: int  # bytes of text
    notes: tuple[str, ...] = ()  # what a user should know about how it was read
    chars: str | None = None  # its distinct characters, sorted, if they were asked for


class Note(msgspec.Struct, frozen=True):
    """A content with a digest of it: a damaged note is as none."""

    content: Content
    digest: str

    @classmethod
    def of(cls, content: Content) -> "Note":
        return cls(content, hashlib.sha256(msgspec.json.encode(content)).hexdigest())


class Pass:
    """One pass over documents that finds what they hold."""

    def __init__(self, progress: Progress, chars: bool = False) -> None:
        self.progress = progress
        self.text, self.layout, self.size = hashlib.sha256(), hashlib.sha256(), 0
        self.chars: set[str] | None = set() if chars else None

    def over(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents."""
        for document in documents:
            data = document.text.encode("utf-8", errors="surrogatepass")
            if not document.continues:
                self.layout.update(f"{self.size} {document.domain}\n".encode())
            self.text.update(data)
            self.size += len(data)
            if document.ends or document.learned is not None:  # NUL is in no text
                self.text.update(f"\0{json.dumps([document.ends, document.learned, document.continues])}\0".encode())
            if self.chars is not None:
                self.chars.update(document.text, EMPTY_LINE if document.ends else "")
            self.progress.add(len(data))
            yield document

    def content(self, source: Source) -> Content:
        """Return what a source holds, when all its documents have been yielded."""
        chars = None if self.chars is None else "".join(sorted(self.chars))
        return Content(self.text.hexdigest(), self.layout.hexdigest(), self.size, tuple(source.notes), chars)


@dataclass(frozen=True)
class Reading:
    """A source, what it holds, and its documents if they are few enough to be kept in memory."""

    source: Source
    content: Content
    held: list[Document] | None


def read_through(source: Source, name: str, most: float, chars: bool, room: Callable[[], float], anew: bool = False) -> Reading:
    """Find what a source holds, from the notes or, also if `anew`, by reading it.

    most: the bytes of text that may be held. chars: whether its characters are needed. Raises `UserError` as reading does, and if there are
    more than `room()` bytes of text, which may come from a small compressed file.
    """
    key = _key(source)
    known = None if anew else _recall(key)
    if known is not None and known.size > most and (known.chars is not None or not chars):
        return Reading(source, known, None)
    progress, bound = Progress(f"reading {name}"), most
    found, held = Pass(progress, chars), list[Document]()
    try:
        for document in found.over(source.documents()):
            if found.size <= most:
                held.append(document)
            elif held:
                held.clear()
            if found.size > bound:
                bound = room() if bound == most else bound
            if found.size > bound:
                raise UserError(f"{name}: more than {file_size(bound)} of text: the disk of the cache has no room for its tokens")
    finally:
        progress.close()
    content = found.content(source)
    if content.size <= most:
        return Reading(source, content, held)
    if key is not None and key == _key(source):  # they did not change meanwhile
        _note(key, content)
    return Reading(source, content, None)


# ---- notes -------------------------------------------------------------------------------------------------------------------------------


def _key(source: Source) -> str | None:
    """Return the name of the note on a source in the state that it is in; None if only reading tells what it holds."""
    try:
        state = None if source.state is None else source.state()
    except OSError:
        return None
    return None if state is None else hashlib.sha256(json.dumps(state).encode()).hexdigest()


def noted(source: Source) -> Content | None:
    """Return what is noted of a source in the state that it is in."""
    return _recall(_key(source))


def _recall(key: str | None) -> Content | None:
    folder = None if key is None else private_folder(TOKENS, make=False)
    if folder is None:
        return None
    try:
        note = msgspec.json.decode(read_bounded(folder / INDEX / f"{key}.json", MOST_JSON), type=Note)
    except (OSError, Malformed, msgspec.MsgspecError, RecursionError):
        return None
    return note.content if note == Note.of(note.content) else None


def _note(key: str, content: Content) -> None:
    """Write a note; where that fails, the source is read again at the next start."""
    folder = private_folder(TOKENS)
    if folder is not None:
        with suppress(OSError):
            (folder / INDEX).mkdir(exist_ok=True, mode=0o700)
            write_atomically(folder / INDEX / f"{key}.json", to_json(msgspec.to_builtins(Note.of(content))))


def remove_unfinished_notes(folder: Path) -> None:
    """Remove notes that were not written to their end; a process that is writing one goes without it."""
    with suppress(OSError):
        for path in list((folder / INDEX).iterdir()):
            if HIDDEN.fullmatch(path.name):
                path.unlink(missing_ok=True)
