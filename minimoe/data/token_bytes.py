"""How many UTF-8 bytes of the text each token stands for: with them, losses of different tokenizers compare, in bits per byte.

A token's bytes follow from the tokenizer alone, so any sample of targets can be counted. Special tokens (an end of text) stand for no byte.
A tokenizer that changes the text, or drops a part of it, has no count: its tokens do not say which bytes they stand for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimoe.data.tokenizer import ByteTokenizer, CharTokenizer, Ids, Tokenizer
from minimoe.untrusted import Malformed, parse_json

SPACE = "\u2581"  # what SentencePiece writes for a space
KEEPING_NORMALIZERS = {"NFC", "Prepend", "Replace", "ByteLevel"}  # of Replace, only a space by SPACE
KEEPING_SPLITS = {"ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts"}  # unless what they find is `Removed`


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of each token [V], int32; None where there is no count, and then the reason."""

    counts: Ids | None = None
    why_not: str = ""


class _NoCount(Exception):
    """The reason why a tokenizer's tokens have no bytes."""


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """Return how many bytes of the text each token of a tokenizer stands for, or why that cannot be said."""
    if isinstance(tokenizer, ByteTokenizer):
        return TokenBytes(np.ones(tokenizer.vocab_size, np.int32))
    if isinstance(tokenizer, CharTokenizer):
        return TokenBytes(np.array([len(char.encode("utf-8", "surrogatepass")) for char in tokenizer.chars], np.int32))
    try:
        return TokenBytes(_of_json(parse_json(tokenizer.to_json().encode()), tokenizer.vocab_size))
    except _NoCount as why:
        return TokenBytes(None, f"{tokenizer.name} {why}")
    except (Malformed, AttributeError, KeyError, TypeError, ValueError):  # the library reads more than is described here
        return TokenBytes(None, f"{tokenizer.name} is of a kind whose bytes are not counted")


def _of_json(table: Any, rows: int) -> Ids:
    """Return the bytes of each token of a tokenizer.json.   -> [rows]"""
    normalizers, splits, decoders = (list(_parts(table.get(key))) for key in ("normalizer", "pre_tokenizer", "decoder"))
    _refuse_changes(normalizers, splits)
    model, byte_level = table["model"], any(part["type"] == "ByteLevel" for part in (*normalizers, *splits))
    if model["type"] not in ("BPE", "Unigram"):
        raise _NoCount(f"has a {model['type']} model, which drops spaces")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _NoCount("marks the parts of words")
    spaced = any(part["type"] in ("Metaspace", "Replace") for part in (*normalizers, *splits, *decoders))
    vocab = model["vocab"]
    pieces = dict(vocab.items()) if isinstance(vocab, dict) else {piece: id for id, (piece, _) in enumerate(vocab)}
    counts = np.zeros(rows, np.int32)
    for piece, id in pieces.items():
        if byte_level:
            counts[id] = len(piece)  # one character for each byte
        elif model.get("byte_fallback") and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            counts[id] = 1
        else:
            counts[id] = len((piece.replace(SPACE, " ") if spaced else piece).encode())
    for token in table.get("added_tokens") or ():
        counts[token["id"]] = 0 if token.get("special") else len(token["content"].encode())
    return counts


def _parts(table: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer, a pre-tokenizer or a decoder, those of sequences one by one."""
    if table is None:
        return
    if table["type"] != "Sequence":
        yield table
        return
    for key in ("normalizers", "pretokenizers", "decoders"):
        for part in table.get(key, ()):
            yield from _parts(part)


def _refuse_changes(normalizers: list[dict[str, Any]], splits: list[dict[str, Any]]) -> None:
    """Raise `_NoCount` if a step changes the text, or drops a part of it."""
    for part in normalizers:
        is_space = part["type"] != "Replace" or (part["pattern"] == {"String": " "} and part["content"] == SPACE)
        if part["type"] not in KEEPING_NORMALIZERS or not is_space:
            raise _NoCount(f"changes the text ({part['type']})")
    for part in splits:
        if part["type"] not in KEEPING_SPLITS or part.get("behavior") == "Removed":
            raise _NoCount(f"drops the spaces of the text ({part['type']})")
