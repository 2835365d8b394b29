"""Encodes a long text in windows that overlap, with the ids that the whole text has.

A tokenizer may put a token across any place at which a text is cut, so two windows share some text. One is left for the other where a word
of the pre-tokenizer begins at the same place in both, and `AGREE` tokens before that place and as many after it are the same. Words are
encoded apart from each other, and a pre-tokenizer reads on from the end of a word, so only one that looks further back or ahead than all of
these tokens would see that a window is not the whole. (Where there is no pre-tokenizer, any token may begin there: a byte-pair encoding
merges nothing across the end of a token, so what stands on either side has the tokens of its own text.)

Where two windows do not agree, as within a run of spaces that is longer than what they share, they are encoded as one.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]
Window = tuple[Ids, Places, npt.NDArray[np.bool_]]  # ids [n], the characters of each, from and to [n,2], whether it may begin a window [n]
Encode = Callable[[list[str]], list[Window]]

SIZE = 1 << 18  # characters of a window; no shorter text is cut
SHARED = 1 << 13  # characters that a window shares with the next
AGREE = 32  # tokens
TOGETHER = 4  # windows that are encoded side by side


def encode_in_windows(
    encode: Encode, pieces: Iterable[str], size: int = SIZE, shared: int = SHARED, agree: int = AGREE
) -> Iterator[Ids]:
    """Yield the ids of a text that comes in pieces, joined those of the whole."""
    text, entered = "", 0  # the window that is not left yet, and its first token that belongs to it
    window: Window = np.zeros(0, np.int32), np.zeros((0, 2), np.int64), np.zeros(0, np.bool_)
    for texts in in_groups(cut(pieces, size, shared), TOGETHER):
        for following, next_window in zip(texts, encode(texts), strict=True):
            found = meeting(window, next_window, len(text) - shared, shared, agree) if text else (0, 0)
            if found is None:
                text += following[shared:]
                window = encode([text])[0]
            else:
                yield window[0][entered : found[0]]
                text, entered, window = following, found[1], next_window
    yield window[0][entered:]


def cut(pieces: Iterable[str], size: int, shared: int) -> Iterator[str]:
    """Yield windows of `size` characters, each of which begins with the last `shared` ones of the window before."""
    rest = ""
    for piece in pieces:
        rest += piece
        start = 0
        while len(rest) - start > size:
            yield rest[start : start + size]
            start += size - shared
        rest = rest[start:]
    yield rest


def meeting(window: Window, following: Window, at: int, shared: int, agree: int) -> tuple[int, int] | None:
    """Return at which token to leave a window, and to enter the one that begins at its character `at`; None if they do not agree."""
    left, tokens, begins = shared_tokens(window, at, at + shared)
    right, others, other_begins = shared_tokens(following, 0, shared)
    middle = int(np.searchsorted(tokens[:, 1], shared // 2))
    places = np.flatnonzero(begins[agree : len(begins) - agree]) + agree
    for i in places[np.argsort(np.abs(places - middle), kind="stable")].tolist():
        for j in np.flatnonzero((others == tokens[i]).all(axis=1) & other_begins).tolist():
            if j >= agree and np.array_equal(tokens[i - agree : i + agree], others[j - agree : j + agree]):
                return left + i, right + j
    return None


def shared_tokens(window: Window, start: int, stop: int) -> tuple[int, Places, npt.NDArray[np.bool_]]:
    """Return the tokens between two characters: the number of the first, (id, from, to) [n,3] counted from `start`, begins [n]."""
    ids, places, begins = window
    first, last = np.searchsorted(places[:, 0], [start, stop])
    return int(first), np.column_stack([ids.astype(np.int64), places - start])[first:last], begins[first:last]


def in_groups(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield the items in lists of this size; the last may be shorter."""
    group: list[str] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
