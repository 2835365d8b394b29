"""Batches of token windows as pure functions of (seed, step)."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from minimoe.engine.random import host_bits

Tokens = npt.NDArray[np.int32]
TokenRow = npt.NDArray[np.integer[Any]]  # the tokens of a text: int32 in memory, narrower types in a file that is mapped
Places = npt.NDArray[np.int64]
Kind = TypeVar("Kind", bound=np.generic)

IGNORE = -100  # the target of padding, which adds nothing to the loss


class Part(NamedTuple):
    """A source among several: where its tokens lie in the training split, and its share of the windows."""

    start: int
    stop: int
    share: float  # those of all parts add up to 1


# ---- batches -----------------------------------------------------------------------------------------------------------------


def batch_starts(n_tokens: int, seed: int, step: int, micro: int, batch_size: int, seq_len: int) -> npt.NDArray[np.int64]:
    """Return where the windows of a batch start, int64 [B], uniform in [0, n_tokens - seq_len - 1].

    start = floor(v * count / 2^64), where v is made of words 2i (high) and 2i + 1 (low) of the stream "data.batch", and count is the number
    of possible starts. These are integers, so every machine draws the same. Raises `ValueError` if there is no room for a window.
    """
    if n_tokens <= seq_len:
        raise ValueError(f"batch: {n_tokens} tokens hold no window of seq_len {seq_len} and its last target")
    count = n_tokens - seq_len
    words = host_bits(2 * batch_size, seed, "data.batch", micro, step).astype(np.uint64).reshape(batch_size, 2)
    if count >= 2**32:
        return np.array([(high << 32 | low) * count >> 64 for high, low in words.tolist()], np.int64)
    half, factor = np.uint64(32), np.uint64(count)
    starts = (words[:, 0] * factor + (words[:, 1] * factor >> half)) >> half  # the high half of the 96-bit product, without overflow
    return np.asarray(starts, np.int64)


def mixed_starts(parts: Sequence[Part], seed: int, step: int, micro: int, batch_size: int, seq_len: int) -> npt.NDArray[np.int64]:
    """Return where the windows of a batch start, int64 [B]: each lies in one part, which is drawn by the parts' shares.

    The part is that in whose stretch of [0, 2^32) a word of the stream "data.source" falls; `batch_starts` draws the start in it.
    """
    bounds = np.round(np.cumsum([part.share for part in parts])[:-1] * 2.0**32)
    chosen = np.searchsorted(bounds, host_bits(batch_size, seed, "data.source", micro, step).astype(np.float64), side="right")
    starts = np.array([part.start + batch_starts(part.stop - part.start, seed, step, micro, batch_size, seq_len) for part in parts])
    return np.asarray(np.take_along_axis(starts, chosen[None], axis=0)[0], np.int64)


def take_windows(values: npt.NDArray[Kind], starts: npt.NDArray[np.int64], seq_len: int) -> npt.NDArray[Kind]:
    """values [n], starts [B] -> [B, T+1]: inputs and, one position later, their targets. Values are tokens, or what stands beside them."""
    return np.asarray(values[starts[:, None] + np.arange(seq_len + 1)])


def inputs_and_targets(tokens: TokenRow, starts: npt.NDArray[np.int64], seq_len: int) -> tuple[Tokens, Tokens]:
    rows = take_windows(tokens, starts, seq_len)  # (B, T+1)
    return np.ascontiguousarray(rows[:, :-1], np.int32), np.ascontiguousarray(rows[:, 1:], np.int32)


def batch(tokens: TokenRow, seed: int, step: int, micro: int, batch_size: int, seq_len: int) -> tuple[Tokens, Tokens]:
    """Return the inputs and targets of a micro-batch, int32 [B,T] each: a pure function of the arguments."""
    return inputs_and_targets(tokens, batch_starts(len(tokens), seed, step, micro, batch_size, seq_len), seq_len)


def windows(tokens: TokenRow, seq_len: int, batch_size: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Yield a whole split, every target once: inputs and targets, int32 [B,T], in windows that do not overlap.

    The last batch is padded with 0 in the inputs and `IGNORE` in the targets. If domains are given instead of tokens, the second array has
    the domain of each target.
    """
    return (at_places(tokens, places) for places in places_in_order(len(tokens), seq_len, batch_size))


def sample_windows(tokens: TokenRow, seq_len: int, batch_size: int, n_batches: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Yield `n_batches` fixed batches of windows evenly spaced over a split, or all of a split that is no longer than that."""
    return (at_places(tokens, places) for places in places_in_order(len(tokens), seq_len, batch_size, n_batches))


def places_in_order(n_tokens: int, seq_len: int, batch_size: int, n_batches: int | None = None) -> Iterator[Places]:
    """Yield the places of the inputs of `windows`, or of `sample_windows`, int64 [B,T]; -1 is padding. A target is one place further."""
    n_targets, size = n_tokens - 1, batch_size * seq_len
    if n_batches is None or n_batches * size >= n_targets:
        for start in range(0, n_targets, size):
            flat = np.arange(start, start + size, dtype=np.int64)
            yield np.where(flat < n_targets, flat, -1).reshape(batch_size, seq_len)
        return
    count, last = n_batches * batch_size, n_tokens - seq_len - 1
    starts = np.arange(count, dtype=np.int64) * last // max(count - 1, 1)
    for first in range(0, count, batch_size):
        yield starts[first : first + batch_size, None] + np.arange(seq_len)


def at_places(tokens: TokenRow, places: Places) -> tuple[Tokens, Tokens]:
    """Return the inputs at these places, and their targets, int32 [B,T] each."""
    valid, inputs, targets = places >= 0, tokens[places].astype(np.int32), tokens[places + 1].astype(np.int32)
    return np.where(valid, inputs, np.int32(0)), np.where(valid, targets, np.int32(IGNORE))
