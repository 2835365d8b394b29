"""The text of a source as one row of tokens, split into training and validation.

Batches are pure functions of (seed, step, micro-batch) and there is no sampler state, so a resumed run reads the same windows.
"""

import hashlib
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from minimoe.config import DataConfig
from minimoe.data.batches import Tokens
from minimoe.data.pipes import is_pipe
from minimoe.data.text import SEPARATOR, Decode, NotText, decode, decode_as_before, read_bytes, read_folder, read_text, walk
from minimoe.data.tokenizer import Tokenizer, make_tokenizer, note_of_dropped
from minimoe.errors import UserError, nearest

Domains = npt.NDArray[np.int8]
Piece = tuple[str, int]  # a stretch of text and its domain
CODE_BYTES = 4_000_000  # python-code takes whole files, in order, up to this
MIX_CHUNK = 4096  # characters after which python-mix changes domain, at the end of a line
IMAGE_SOURCES = ("digits",)  # no text: minimoe/training/tasks/digits.py
NOT_LIBRARY_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in tokens: the first part is for training, the last for validation. Domain numbers index `domains`."""

    train: Tokens  # [n]
    val: Tokens  # [m]
    train_domains: Domains | None  # [n]
    val_domains: Domains | None  # [m]
    domains: tuple[str, ...]  # empty if the source has none
    tokenizer: Tokenizer
    sha256: str  # of the text's UTF-8 bytes: built-in sources differ between Python versions
    source: str
    notes: tuple[str, ...] = ()  # what a user should know about how the text was read
    kept: bytes | None = None  # the text that came through a pipe, which cannot be read again


def load_corpus(
    data: DataConfig, base: Path | None = None, tokenizer: Tokenizer | None = None, *, seq_len: int | None = None,
    sha256: str | None = None,
) -> Corpus:  # fmt: skip
    """Load `data.source`; relative paths start at `base` (default: the working directory).

    A given `tokenizer` (of a resumed run, of a model to evaluate) replaces `data.tokenizer`. With `seq_len` both splits must have
    seq_len + 2 tokens. For `sha256` see `whole_corpus`. Raises `UserError`, naming the source, if it is missing, binary, empty or too
    short.
    """
    whole = whole_corpus(data.source, data.tokenizer, base, tokenizer, sha256)
    tokens, labels = whole.val, whole.val_domains
    n_train = int(len(tokens) * (1 - data.val_fraction))
    check_length(data, n_train, len(tokens) - n_train, seq_len)
    return replace(
        whole,
        train=tokens[:n_train],
        val=tokens[n_train:],
        train_domains=None if labels is None else labels[:n_train],
        val_domains=None if labels is None else labels[n_train:],
    )


def whole_corpus(
    source: str, tokenizer_name: str, base: Path | None = None, tokenizer: Tokenizer | None = None, sha256: str | None = None
) -> Corpus:
    """Load all of a source as both splits, to measure a trained model on.

    With `sha256`, the digest that a run recorded, a text that has this digest only as earlier versions of minimoe read it is read that way.
    Raises `UserError` if the source is missing, binary or empty.
    """
    found = read_as_recorded(source, base, sha256)
    pieces, domains, text = found.pieces, found.domains, found.text
    if not text:
        raise UserError(f"{source}: empty: data.source needs text")
    tokenizer = tokenizer or make_tokenizer(tokenizer_name, text, base)
    parts = [tokenizer.encode(piece, source) for piece, _ in pieces]
    tokens = np.concatenate(parts)
    labels = np.repeat(np.array([domain for _, domain in pieces], np.int8), [len(part) for part in parts]) if domains else None
    notes = (*found.notes, *note_of_dropped(tokenizer, text, source))
    kept = to_keep(text) if found.piped else None
    return Corpus(tokens, tokens, labels, labels, domains, tokenizer, digest(text), source, notes, kept)


def digest(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def to_keep(text: str) -> bytes:
    """Return the bytes of a file that reads back as this text: one that begins with a byte order mark needs another before it."""
    return text.encode("utf-8-sig" if text.startswith("\ufeff") else "utf-8")


def check_length(data: DataConfig, n_train: int, n_val: int, seq_len: int | None) -> None:
    """Raise `UserError` if a split is too short to draw windows from."""
    needed, why, shorter = 2, "a prediction needs", ""
    if seq_len is not None:
        needed, why, shorter = seq_len + 2, f"windows of train.seq_len = {seq_len} need", ", a shorter train.seq_len"
    for split, length, change in (("training", n_train, "smaller"), ("validation", n_val, "larger")):
        if length < needed:
            raise UserError(
                f"{data.source}: too short: the {split} split has {length} tokens, {why} {needed}: "
                f"use more text{shorter} or a {change} data.val_fraction ({data.val_fraction})"
            )


# ---- sources -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A source as it was read: pieces of text, the names of their domains (none if there is only one), and what to say about it."""

    pieces: list[Piece]
    domains: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    piped: bool = False

    @property
    def text(self) -> str:
        """All pieces, joined."""
        return "".join(piece for piece, _ in self.pieces)


def read_source(source: str, base: Path | None = None, as_text: Decode = decode) -> Source:
    """Read a built-in source, a file, a folder or a pipe. Raises `UserError`, naming the source, if there is no text."""
    if source == "python-mix":
        return Source(python_mix(), ("docs", "code"))
    if source in SOURCES:
        return Source([(SOURCES[source](), 0)])
    path = (base or Path()) / os.path.expanduser(source)
    if path.exists():
        piped = is_pipe(path)
        found = read_folder(path, as_text) if path.is_dir() else read_text(path, as_text)
        return Source([(found.text, 0)], notes=found.notes, piped=piped)
    if path.suffix or path.name != source:
        hint = "put the text there, or name another with --data"
        if not source.isprintable():
            hint = "a backslash begins an escape between TOML's double quotes: write the path in single quotes"
        raise UserError(f"data.source = {source!r}: no such file or folder ({hint})")
    raise UserError(f"data.source = {source!r} is not a file, a folder or a built-in source{nearest(source, [*SOURCES, 'python-mix'])}")


def read_as_recorded(source: str, base: Path | None, sha256: str | None) -> Source:
    """Read a source; if its text has the digest `sha256` only as earlier versions of minimoe read it, read it that way."""
    found = read_source(source, base)
    if sha256 is None or found.piped or digest(found.text) == sha256:
        return found
    try:
        before = read_source(source, base, decode_as_before)
    except UserError:
        return found
    if digest(before.text) != sha256:
        return found
    note = f"{source}: read as when the run began: byte order marks are kept, and compressed or UTF-16 files are left out"
    return replace(before, notes=(note, *before.notes))


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
            text = decode_as_before(read_bytes(path))
        except NotText:
            continue
        size += len(text.encode("utf-8")) + len(SEPARATOR)
        if size > CODE_BYTES:
            break
        texts.append(text)
    if not texts:
        raise UserError("data.source = 'python-code': this Python comes without its sources; give a text file")
    return SEPARATOR.join(texts)


def python_mix() -> list[Piece]:
    """Return chunks of docs (domain 0) and code (domain 1) in turn, in equal number; those of the longer one are evenly spread."""
    docs, code = chunks(python_docs()), chunks(python_code())
    count = min(len(docs), len(code))
    pairs = ((docs[i * len(docs) // count], code[i * len(code) // count]) for i in range(count))
    return [piece for prose, program in pairs for piece in ((prose, 0), (program, 1))]


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
