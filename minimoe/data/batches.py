"""Batches of token windows as pure functions of (seed, step)."""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from minimoe.engine.random import host_bits

Tokens = npt.NDArray[np.int32]
Kind = TypeVar("Kind", np.int32, np.int8)

IGNORE = -100  # the target of padding, which adds nothing to the loss


# ---- batches -----------------------------------------------------------------------------------------------------------------


def batch_starts(n_tokens: int, seed: int, step: int, micro: int, batch_size: int, seq_len: int) -> npt.NDArray[np.int64]:
    """Return where the windows of a batch start, int64 [B], uniform in [0, n_tokens - seq_len - 1].

    start = floor(v * count / 2^64), where v is made of words 2i (high) and 2i + 1 (low) of the stream "data.batch", and count < 2^32 is the
    number of possible starts. These are integers, so every machine draws the same. Raises `ValueError` if there is no room for a window.
    """
    if n_tokens <= seq_len:
        raise ValueError(f"batch: {n_tokens} tokens hold no window of seq_len {seq_len} and its last target")
    count = np.uint64(n_tokens - seq_len)
    words = host_bits(2 * batch_size, seed, "data.batch", micro, step).astype(np.uint64).reshape(batch_size, 2)
    half = np.uint64(32)
    starts = (words[:, 0] * count + (words[:, 1] * count >> half)) >> half  # the high half of the 96-bit product, without overflow
    return np.asarray(starts, np.int64)


def take_windows(values: npt.NDArray[Kind], starts: npt.NDArray[np.int64], seq_len: int) -> npt.NDArray[Kind]:
    """values [n], starts [B] -> [B, T+1]: inputs and, one position later, their targets. Values are tokens or domains."""
    return np.asarray(values[starts[:, None] + np.arange(seq_len + 1)])


def inputs_and_targets(tokens: Tokens, starts: npt.NDArray[np.int64], seq_len: int) -> tuple[Tokens, Tokens]:
    rows = take_windows(tokens, starts, seq_len)  # (B, T+1)
    return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def batch(tokens: Tokens, seed: int, step: int, micro: int, batch_size: int, seq_len: int) -> tuple[Tokens, Tokens]:
    """Return the inputs and targets of a micro-batch, int32 [B,T] each: a pure function of the arguments."""
    return inputs_and_targets(tokens, batch_starts(len(tokens), seed, step, micro, batch_size, seq_len), seq_len)


def windows(tokens: Tokens, seq_len: int, batch_size: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Yield a whole split, every target once: inputs and targets, int32 [B,T], in windows that do not overlap.

    The last batch is padded with 0 in the inputs and `IGNORE` in the targets. If domains are given instead of tokens, the second array has
    the domain of each target.
    """
    n_targets, size = len(tokens) - 1, batch_size * seq_len
    for start in range(0, n_targets, size):
        stop = min(start + size, n_targets)
        inputs, targets = np.zeros(size, np.int32), np.full(size, IGNORE, np.int32)
        inputs[: stop - start], targets[: stop - start] = tokens[start:stop], tokens[start + 1 : stop + 1]
        yield inputs.reshape(batch_size, seq_len), targets.reshape(batch_size, seq_len)


def sample_windows(tokens: Tokens, seq_len: int, batch_size: int, n_batches: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Yield `n_batches` fixed batches of windows evenly spaced over a split, or all of a split that is no longer than that."""
    count, last = n_batches * batch_size, len(tokens) - seq_len - 1
    if count * seq_len >= len(tokens) - 1:
        yield from windows(tokens, seq_len, batch_size)
        return
    starts = np.arange(count, dtype=np.int64) * last // max(count - 1, 1)
    for first in range(0, count, batch_size):
        yield inputs_and_targets(tokens, starts[first : first + batch_size], seq_len)
