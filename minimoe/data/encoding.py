"""Turns the documents of a source into tokens, a stretch at a time, so that a text larger than memory can be encoded.

Beside each token stands whether the loss counts it: a token is learned if its last character is. What ends a document (the tokenizer's end
of text or, if it has none, an empty line) is learned if the document's last character is.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minimoe.data.sources import Document
from minimoe.data.tokenizer import Ids, Tokenizer

Flags = npt.NDArray[np.bool_]

GROUP = 1 << 20  # characters: shorter documents are encoded side by side, this many at once
EMPTY_LINE = "\n\n"


class Stretch(NamedTuple):
    """Tokens that follow each other in the corpus."""

    ids: Ids  # [n]
    domain: int
    learned: Flags | None  # [n]; None: all of them
    begins: bool  # whether a document that is set apart from the one before begins with the first of them


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer, what: str) -> Iterator[Stretch]:
    """Yield the tokens of the documents, in order, in stretches that are not empty.

    Raises `UserError` for text that the vocabulary lacks; the message calls it `what`.
    """
    begins = False
    for stretch in _stretches(documents, tokenizer, what):
        begins = begins or stretch.begins
        if len(stretch.ids):
            yield stretch._replace(begins=begins)
            begins = False


def _stretches(documents: Iterable[Document], tokenizer: Tokenizer, what: str) -> Iterator[Stretch]:
    short: list[Document] = []
    size, apart = 0, False
    for pieces in joined(documents):
        first, second = next(pieces), next(pieces, None)
        begins, apart = apart or first.ends, first.ends
        long = second is not None or (len(first.text) >= GROUP and first.learned is None)
        if not long:
            short.append(first._replace(continues=not begins))
            size += len(first.text)
        if short and (long or size >= GROUP):
            yield from _side_by_side(short, tokenizer, what)
            short, size = [], 0
        if long:
            yield from _piece_by_piece(first, chain(() if second is None else (second,), pieces), begins, tokenizer, what)
    yield from _side_by_side(short, tokenizer, what)


def joined(documents: Iterable[Document]) -> Iterator[Iterator[Document]]:
    """Yield for each document the pieces that it comes in: itself, and those that continue it."""
    number = 0

    def place(document: Document) -> int:
        nonlocal number
        number += not document.continues
        return number

    for _, pieces in groupby(documents, place):
        yield pieces


def _side_by_side(documents: list[Document], tokenizer: Tokenizer, what: str) -> Iterator[Stretch]:
    """Encode whole documents; `continues` is False for those that are set apart from the one before."""
    line = EMPTY_LINE if tokenizer.end_id is None else ""
    texts = [document.text + line * document.ends for document in documents]
    learning = any(document.learned is not None for document in documents)
    for document, (ids, places) in zip(documents, tokenizer.encode_many(texts, what, learning), strict=True):
        learned = None if places is None or document.learned is None else inside(places, _to_the_end(document))
        if document.ends and tokenizer.end_id is not None:
            ids = np.append(ids, np.int32(tokenizer.end_id))
            if learned is not None:
                learned = np.append(learned, inside(np.array([len(document.text)]), _to_the_end(document)))
        yield Stretch(ids, document.domain, learned, not document.continues)


def _to_the_end(document: Document) -> Iterator[tuple[int, int]]:
    """Yield the stretches of a document that are learned; one that reaches its last character goes on over what ends it."""
    size = len(document.text)
    for start, stop in document.learned or ():
        yield start, stop if stop < size else size + len(EMPTY_LINE) * (start < size)


def _piece_by_piece(first: Document, rest: Iterator[Document], begins: bool, tokenizer: Tokenizer, what: str) -> Iterator[Stretch]:
    """Encode a document that is long, or comes in pieces; the loss counts all of it."""
    line = (EMPTY_LINE,) if first.ends and tokenizer.end_id is None else ()
    for ids in tokenizer.encode_pieces(chain((first.text,), (piece.text for piece in rest), line), what):
        yield Stretch(ids, first.domain, None, begins)
        begins = False
    if first.ends and tokenizer.end_id is not None:
        yield Stretch(np.array([tokenizer.end_id], np.int32), first.domain, None, False)


def inside(places: npt.NDArray[np.int64], spans: Iterable[tuple[int, int]]) -> Flags:
    """Return which places lie in one of the spans (from, to).   [n] -> [n]"""
    found = np.zeros(len(places), np.bool_)
    for start, stop in spans:
        found |= (places >= start) & (places < stop)
    return found
