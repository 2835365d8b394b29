"""Prepares a source ahead of training: reads it, makes its tokens where they are worth keeping, and says what was found."""

from dataclasses import dataclass
from pathlib import Path

from minimoe.config import DataConfig
from minimoe.data.content import noted
from minimoe.data.corpus import read_with_tokenizer
from minimoe.data.forms import form_of
from minimoe.data.sources import read_source
from minimoe.data.store import in_memory, stored
from minimoe.data.tokenizer import make_tokenizer, note_of_counts
from minimoe.errors import notice


@dataclass(frozen=True)
class Prepared:
    """A source whose tokens are there."""

    source: str
    sha256: str  # of its text
    text_bytes: int
    tokenizer: str
    tokens: int
    path: Path | None  # the folder of the tokens; None: they are made at each start
    size: int  # bytes of that folder
    notes: tuple[str, ...]


def prepare(data: DataConfig, base: Path | None = None, verify: bool = False) -> Prepared:
    """Make the tokens of `data.source`, unless they are kept already or are made so quickly that they are not kept.

    With `verify` the source is read anew even if its files seem unchanged, and all kept bytes are checked. Raises `UserError` as
    `load_corpus` does.
    """
    given = None if data.tokenizer == "char" else make_tokenizer(data.tokenizer, "", base)
    before = noted(read_source(data.source, base, form=form_of(data, base, given))) if verify else None
    reading, tokenizer = read_with_tokenizer(data, base, given, anew=verify)
    content = reading.content
    if before is not None and before.sha256 != content.sha256:
        notice(
            f"{data.source}: its content has changed, though its size and modification time have not: SHA-256 {before.sha256[:12]} before, "
            f"{content.sha256[:12]} now"
        )
    kept = stored(reading, data.source, tokenizer, verify) if reading.held is None else None
    if kept is None:
        arrays, dropped = in_memory(reading, data.source, tokenizer)
        path, size, tokens = None, 0, len(arrays.tokens)
    else:
        path, header, _ = kept
        size, tokens, dropped = header.size, header.columns["tokens"].count, header.dropped
    notes = (*content.notes, *note_of_counts(tokenizer, dropped, data.source))
    return Prepared(data.source, content.sha256, content.size, tokenizer.name, tokens, path, size, notes)
