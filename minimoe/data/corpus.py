"""The text of a source as one row of tokens, split into training and validation.

Batches are pure functions of (seed, step, micro-batch) and there is no sampler state, so a resumed run reads the same windows.
"""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from minimoe.config import DataConfig
from minimoe.data.batches import Tokens
from minimoe.data.tokenizer import Tokenizer, make_tokenizer, note_of_lost
from minimoe.errors import UserError, nearest

Domains = npt.NDArray[np.int8]
Piece = tuple[str, int]  # a stretch of text and its domain
SEPARATOR = "\n\n"  # between topics and files
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
    notes: tuple[str, ...] = ()  # what a user should know of how the text was read


def load_corpus(data: DataConfig, base: Path | None = None, tokenizer: Tokenizer | None = None, *, seq_len: int | None = None) -> Corpus:
    """Load `data.source`; relative paths start at `base` (default: the working directory).

    A given `tokenizer` (of a resumed run, of a model to evaluate) replaces `data.tokenizer`. With `seq_len` both splits must have
    seq_len + 2 tokens. Raises `UserError`, naming the source, if it is missing, binary, empty or too short.
    """
    whole = whole_corpus(data.source, data.tokenizer, base, tokenizer)
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


def whole_corpus(source: str, tokenizer_name: str, base: Path | None = None, tokenizer: Tokenizer | None = None) -> Corpus:
    """Load all of a source as both splits, to measure a trained model on. Raises `UserError` if it is missing, binary or empty."""
    pieces, domains = read_source(source, base)
    text = "".join(piece for piece, _ in pieces)
    if not text:
        raise UserError(f"{source}: empty: data.source needs text")
    tokenizer = tokenizer or make_tokenizer(tokenizer_name, text, base)
    parts = [tokenizer.encode(piece, source) for piece, _ in pieces]
    tokens = np.concatenate(parts)
    labels = np.repeat(np.array([domain for _, domain in pieces], np.int8), [len(part) for part in parts]) if domains else None
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return Corpus(tokens, tokens, labels, labels, domains, tokenizer, digest, source, note_of_lost(tokenizer, text, source))


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


def read_source(source: str, base: Path | None = None) -> tuple[list[Piece], tuple[str, ...]]:
    """Return the text of a source in pieces, and the names of its domains (none if there is only one)."""
    if source == "python-mix":
        return python_mix(), ("docs", "code")
    if source in SOURCES:
        return [(SOURCES[source](), 0)], ()
    path = (base or Path()) / os.path.expanduser(source)
    if path.is_dir():
        return [(read_folder(path), 0)], ()
    if path.exists():
        return [(read_text(path), 0)], ()
    if path.suffix or path.name != source:
        raise UserError(f"data.source = {source!r}: no such file or folder (put the text there, or name another with --data)")
    raise UserError(f"data.source = {source!r} is not a file, a folder or a built-in source{nearest(source, [*SOURCES, 'python-mix'])}")


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
        text = try_text(path)
        if text is None:
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


def walk(root: Path, skip: set[str]) -> Iterator[Path]:
    """Yield the files below a folder, except hidden ones and those below a folder whose name is in `skip`."""
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in skip and not name.startswith(".")]
        yield from (Path(folder, file) for file in files if not file.startswith("."))


def read_folder(folder: Path) -> str:
    """Return the text files below a folder, sorted by path. Hidden, binary and empty files are skipped; if none is left, raise."""
    paths = sorted((path for path in walk(folder, set()) if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())
    texts = [text for text in map(try_text, paths) if text]
    if not texts:
        raise UserError(f"{folder}: no text in this folder: data.source needs at least one file of UTF-8 text that is not hidden")
    return SEPARATOR.join(texts)


def try_text(path: Path) -> str | None:
    """Return the text of a file, or None if it is binary or not UTF-8."""
    data = read_bytes(path)
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def read_text(path: Path) -> str:
    """Return the text of a file, byte for byte. Raises `UserError` if it is binary or not UTF-8."""
    data = read_bytes(path)
    if b"\0" in data:
        raise UserError(f"{path}: a binary file (it has NUL bytes): data.source needs UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte 0x{data[error.start]:02x} at {error.start}): data.source needs UTF-8 text") from None


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
