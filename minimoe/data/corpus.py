"""The text of a source as one row of tokens, split into training and validation.

Batches are pure functions of (seed, step, micro-batch) and there is no sampler state, so a resumed run reads the same windows. The tokens
of a short text are made at each start and kept in memory; those of a longer one are made once, and mapped from a file of the user's cache.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from minimoe.config import DataConfig
from minimoe.data.arrays import Domains, Starts, TokenArrays
from minimoe.data.batches import Part, TokenRow
from minimoe.data.content import Reading, read_through
from minimoe.data.documents import Form
from minimoe.data.encoding import Flags
from minimoe.data.forms import form_of
from minimoe.data.sources import read_source
from minimoe.data.store import in_memory, room, stored_tokens
from minimoe.data.text import Decode, decode, decode_as_before
from minimoe.data.tokenizer import BUILT_IN, Tokenizer, make_tokenizer, note_of_counts
from minimoe.errors import UserError

MOST_IN_MEMORY = 8_000_000  # bytes of a text whose bytes or characters are made tokens at each start, in a tenth of a second
MOST_TO_ENCODE = 1_000_000  # the same for a tokenizer.json, in about a second
AS_BEFORE = (
    (decode, "rows of JSON or CSV are learned as the text that they are written in"),
    (decode_as_before, "byte order marks are kept, and compressed or UTF-16 files are left out"),
)  # how earlier versions read


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in tokens: the first part is for training, the last for validation. Domain numbers index `domains`."""

    train: TokenRow  # [n]
    val: TokenRow  # [m]
    train_domains: Domains | None  # [n]
    val_domains: Domains | None  # [m]
    domains: tuple[str, ...]  # empty if the source has none
    tokenizer: Tokenizer
    sha256: str  # of the text's UTF-8 bytes: built-in sources differ between Python versions
    source: str
    notes: tuple[str, ...] = ()  # what a user should know about how the text was read
    kept: bytes | None = None  # the text that came through a pipe, which cannot be read again
    train_learned: Flags | None = None  # [n]: the tokens that the loss counts as targets; None: all
    val_learned: Flags | None = None  # [m]
    train_documents: Starts | None = None  # where documents that are set apart begin, rising from 0; None: there is only one
    val_documents: Starts | None = None
    files: tuple[str, ...] = ()  # of a source that has documents: what was read, in order
    parts: tuple[Part, ...] = ()  # of several sources: where the windows of each are drawn from
    summary: tuple[str, ...] = ()  # what was read, a line for each source that has documents


def load_corpus(
    data: DataConfig, base: Path | None = None, tokenizer: Tokenizer | None = None, *, seq_len: int | None = None,
    sha256: str | None = None,
) -> Corpus:  # fmt: skip
    """Load `data.source`; relative paths start at `base` (default: the working directory).

    A given `tokenizer` (of a resumed run, of a model to evaluate) replaces `data.tokenizer`. With `seq_len` both splits must have
    seq_len + 2 tokens. For `sha256` see `whole_corpus`. Raises `UserError`, naming the source, if it is missing, binary, empty or too
    short.
    """
    if data.sources:
        raise ValueError("load_corpus reads one source: load_data of minimoe.data.mixture reads several")
    found, arrays = read_corpus(data, base, tokenizer, sha256)
    n = len(arrays.tokens)
    n_train = int(n * (1 - data.val_fraction))
    check_length(data, n_train, n - n_train, seq_len)
    return with_splits(found, arrays.part(0, n_train), arrays.part(n_train, n))


def whole_corpus(data: DataConfig, base: Path | None = None, tokenizer: Tokenizer | None = None, sha256: str | None = None) -> Corpus:
    """Load all of a source as both splits, to measure a trained model on.

    With `sha256`, the digest that a run recorded, a text that has this digest only as earlier versions of minimoe read it is read that way.
    Raises `UserError` if the source is missing, binary or empty.
    """
    found, arrays = read_corpus(data, base, tokenizer, sha256)
    return with_splits(found, arrays, arrays)


def with_splits(corpus: Corpus, train: TokenArrays, val: TokenArrays) -> Corpus:
    """Return a corpus with these splits."""
    return replace(
        corpus,
        train=train.tokens, train_domains=train.domains, train_learned=train.learned, train_documents=train.documents,
        val=val.tokens, val_domains=val.domains, val_learned=val.learned, val_documents=val.documents,
    )  # fmt: skip


def read_corpus(data: DataConfig, base: Path | None, tokenizer: Tokenizer | None, sha256: str | None) -> tuple[Corpus, TokenArrays]:
    """Read a source, in memory or into the cache.   -> a corpus whose splits are still to be made, all tokens"""
    source = data.source
    reading, tokenizer = read_with_tokenizer(data, base, tokenizer, sha256)
    content = reading.content
    if reading.held is not None:
        arrays, dropped = in_memory(reading, source, tokenizer)
    else:
        arrays, dropped = stored_tokens(reading, source, tokenizer)
    notes = (*content.notes, *note_of_counts(tokenizer, dropped, source))
    kept = to_keep("".join(document.text for document in reading.held or ())) if reading.source.piped else None
    none = arrays.tokens[:0]
    domains, files = reading.source.domains, reading.source.files
    return Corpus(none, none, None, None, domains, tokenizer, content.sha256, source, notes, kept, files=files), arrays


def read_with_tokenizer(
    data: DataConfig, base: Path | None = None, tokenizer: Tokenizer | None = None, sha256: str | None = None, *, anew: bool = False
) -> tuple[Reading, Tokenizer]:
    """Find what a source holds and, unless it is given, make the tokenizer. Raises `UserError` for a source without text."""
    source = data.source
    chars = tokenizer is None and data.tokenizer == "char"  # its vocabulary is that of the text
    if tokenizer is None and not chars:
        tokenizer = make_tokenizer(data.tokenizer, "", base)
    most = MOST_IN_MEMORY if tokenizer is None or tokenizer.name in BUILT_IN else MOST_TO_ENCODE
    form = form_of(data, base, tokenizer)

    def read(as_text: Decode = decode, form: Form | None = form) -> Reading:
        found = read_source(source, base, as_text, form)
        return read_through(found, source, float("inf") if found.piped else most, chars, room, anew)

    reading = _as_recorded(read, source, sha256)
    if not reading.content.size:
        raise UserError(f"{source}: empty: data.source needs text")
    return reading, tokenizer or make_tokenizer(data.tokenizer, reading.content.chars or "", base)


def _as_recorded(read: Callable[..., Reading], source: str, sha256: str | None) -> Reading:
    """Read a source; if it has the digest `sha256` only as earlier versions of minimoe read it, read it that way."""
    found, refused = None, UserError(source)
    try:
        found = read()
    except UserError as error:  # rows that earlier versions took for text may have no column of text
        if sha256 is None:
            raise
        refused = error
    if found is not None and (sha256 is None or found.source.piped or found.content.sha256 == sha256):
        return found
    for as_text, how in AS_BEFORE:
        with suppress(UserError):
            before = read(as_text, None)
            if before.content.sha256 == sha256:
                notes = (f"{source}: read as when the run began: {how}", *before.content.notes)
                return replace(before, content=structs.replace(before.content, notes=notes))
    if found is None:
        raise refused
    return found


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
