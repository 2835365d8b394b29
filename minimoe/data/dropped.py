"""Finds the characters of a text that a tokenizer.json drops without an error.

A byte-pair encoding that has neither an unknown token nor tokens for all bytes skips a character that is not among its symbols. Other
kinds of tokenizer put an unknown token in its place, or refuse the text.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def dropped_characters(library: Library, text: str) -> dict[str, int]:
    """Return the characters of a text that its tokenizer drops, and how often each occurs; the most frequent first.

    The cost is that of counting the text's characters: each distinct one is looked up once.
    """
    if not may_drop(library):
        return {}
    without = [char for char in sorted(set(text)) if _is_dropped(library, char)]
    counts = Counter(text) if without else {}  # one pass, however many they are
    dropped = {char: counts[char] for char in without}
    for token in library.get_added_tokens_decoder().values() if dropped else ():  # these are found before the text is split
        for char in set(token.content) & set(dropped):
            dropped[char] -= text.count(token.content) * token.content.count(char)
    return dict(sorted(((char, n) for char, n in dropped.items() if n > 0), key=lambda item: -item[1]))


def may_drop(library: Library) -> bool:
    """Return True if there may be characters that the tokenizer drops."""
    model = library.model
    if type(model).__name__ != "BPE" or model.unk_token is not None:
        return False
    return not (model.byte_fallback and all(model.token_to_id(token) is not None for token in BYTE_TOKENS))


def _is_dropped(library: Library, char: str) -> bool:
    """Return True if a symbol that the model sees of a character has no token.

    The character is doubled, since a mark that the pre-tokenizer puts before each text, and which is not its own, then counts once.
    """
    text = char * 2
    if library.normalizer is not None:
        text = library.normalizer.normalize_str(text)
    words = [word for word, _ in library.pre_tokenizer.pre_tokenize_str(text)] if library.pre_tokenizer is not None else [text]
    return any(n > 1 and not _has_token(library, symbol) for symbol, n in Counter("".join(words)).items())


def _has_token(library: Library, symbol: str) -> bool:
    """Return True if a symbol has a token in a word's beginning, middle or end, where a model may write it in different ways."""
    model = library.model
    before, after = ("", model.continuing_subword_prefix or ""), ("", model.end_of_word_suffix or "")
    return any(model.token_to_id(prefix + symbol + suffix) is not None for prefix in before for suffix in after)
