"""Keys and values of earlier positions, kept so that a new token costs one position's work, in buffers that do not grow.

A column is an index into a batch's padded rows. Its position differs from row to row if prompts have unequal lengths, since padding does
not count. Column n lies in slot n mod S of every buffer with S slots. A layer without a window has a slot for each column. A layer with
a window needs only as many slots as the window: a new column overwrites the one that no query sees any longer. Attention compares
positions, so it does not matter in which slot a column lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

from minimoe.backend import Array, Backend
from minimoe.errors import ConfigError
from minimoe.layers.module import Module


def pieces(first: int, columns: int, slots: int) -> Iterator[tuple[slice, slice]]:
    """Yield (slots, columns): where the last `slots` of the new columns from `first` on go; twice if they wrap around."""
    column = max(0, columns - slots)
    while column < columns:
        slot = (first + column) % slots
        count = min(columns - column, slots - slot)
        yield slice(slot, slot + count), slice(column, column + count)
        column += count


class Ring:
    """The columns in the slots of all buffers of one size.   positions [B,S] int32, valid [B,S] bool: columns that count"""

    def __init__(self, batch: int, slots: int, backend: Backend) -> None:
        xp = self.xp = backend.xp
        self.slots = slots
        self.positions = xp.zeros((batch, slots), dtype=xp.int32)
        self.valid = xp.zeros((batch, slots), dtype=xp.bool)
        self.filled = 0  # slots with earlier columns, when new ones were last added
        self.writes: list[tuple[Any, Any]] = []  # slots, and which of the new columns go there
        self.seen: tuple[Array, Array] = (self.positions, self.valid)  # of all keys that the new columns may see

    def add_columns(self, first: int, positions: Array, valid: Array, slot: Array | None) -> None:
        """Add columns with positions [B,T]; valid [B,T], or [B,first + T] of all so far. `slot` [1]: where a single column goes."""
        xp, t = self.xp, positions.shape[1]
        if valid.shape[1] > t:
            for slots, columns in pieces(0, first, self.slots):
                self.valid[:, slots] = valid[:, columns]
            valid = valid[:, first:]
        self.filled = min(first, self.slots)
        self.seen = positions, valid
        if t > 1 and self.filled:
            kept = slice(0, self.filled)
            self.seen = xp.concat([self.positions[:, kept], positions], axis=1), xp.concat([self.valid[:, kept], valid], axis=1)
        self.writes = list(pieces(first, t, self.slots)) if slot is None else [(slot, slice(0, 1))]
        for slots, columns in self.writes:
            self.positions[:, slots] = positions[:, columns]
            self.valid[:, slots] = valid[:, columns]
        if t == 1:
            self.seen = self.positions, self.valid


class KeyValueCache:
    """Keys and values of one layer from earlier calls.   k [B,S,G,C], v [B,S,G,Cv]"""

    def __init__(self, batch: int, slots: int, groups: int, widths: tuple[int, int], dtype: Any, backend: Backend, rolls: bool) -> None:
        """`rolls`: old columns may be overwritten. `widths`: of keys and of values."""
        self.xp = backend.xp
        self.k, self.v = (self.xp.zeros((batch, slots, groups, width), dtype=dtype) for width in widths)
        self.slots, self.rolls = slots, rolls
        self.ring = Ring(batch, slots, backend)

    def append(self, k: Array, v: Array) -> tuple[Array, Array, Array, Array]:
        """Add new columns [B,T,G,C]; return the keys and values that they see, with positions and whether they count [B,Tk].

        A single new column sees the whole buffers, whose size never changes. Several see each other and the columns that were there
        before, because they may overwrite columns that some of them still see.
        """
        ring, single = self.ring, k.shape[1] == 1
        seen = k, v
        if ring.filled and not single:
            kept = slice(0, ring.filled)
            seen = self.xp.concat([self.k[:, kept, :, :], k], axis=1), self.xp.concat([self.v[:, kept, :, :], v], axis=1)
        for slots, columns in ring.writes:
            self.k[:, slots, :, :] = k[:, columns, :, :]
            self.v[:, slots, :, :] = v[:, columns, :, :]
        return (*((self.k, self.v) if single else seen), *ring.seen)


class CachingLayer(Module):
    """A layer that attends to earlier positions, and makes the cache for its keys and values: `Attention`."""

    max_seq_len: int

    def make_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """Return an empty cache for this many sequences and columns."""
        raise NotImplementedError


class Cache:
    """Keys and values of earlier positions for every attention layer of a model. `length`: columns so far."""

    def __init__(self, model: Module, batch: int = 1, capacity: int | None = None) -> None:
        """`capacity`: columns of layers without a window, by default max_seq_len. If all layers have a window there is no limit.

        Raises `ConfigError` if there is no room for them: a folder may claim any max_seq_len.
        """
        makers = [module for _, module in model.named_modules() if isinstance(module, CachingLayer)]
        capacity = capacity or max(layer.max_seq_len for layer in makers)
        self.batch, self.length = batch, 0
        try:
            self.layers = [layer.make_cache(batch, capacity) for layer in makers]
        except (MemoryError, ValueError, OverflowError) as error:
            raise ConfigError(f"cache: no memory for {batch} x {capacity} positions of {len(makers)} layers: give it a capacity") from error
        self.capacity = None if all(layer.rolls for layer in self.layers) else capacity
        by_size: dict[int, Ring] = {}
        for layer in self.layers:
            layer.ring = by_size.setdefault(layer.slots, layer.ring)
        self.rings = list(by_size.values())
        self.given_slots: Sequence[Array | None] = [None] * len(self.rings)  # of a recorded step

    def add_columns(self, positions: Array, valid: Array | None, b: int, t: int) -> None:
        """Add columns with positions [B or 1,T]; `valid` as in `Ring.add_columns`, None if all count."""
        stop = self.length + t
        if b != self.batch or (self.capacity is not None and stop > self.capacity):
            raise ValueError(f"cache: {b} sequences of {stop} positions do not fit into {self.batch} of {self.capacity or 'any number'}")
        xp = self.rings[0].xp
        positions = xp.broadcast_to(positions, (b, t))
        valid = xp.ones((b, t), dtype=xp.bool) if valid is None else valid
        for ring, slot in zip(self.rings, self.given_slots, strict=True):
            ring.add_columns(self.length, positions, valid, slot)
        self.length = stop

    def clear(self) -> None:
        """Forget all columns; the buffers keep their addresses."""
        self.length = 0
        for ring in self.rings:
            ring.valid[...] = False

    def arrays(self) -> list[Array]:
        """Return the buffers of all layers, which a recorded step reads and updates."""
        rings = [array for ring in self.rings for array in (ring.positions, ring.valid)]
        return rings + [array for layer in self.layers for array in (layer.k, layer.v)]

    def next_slots(self) -> list[int]:
        """Return where the next column goes, in each ring."""
        return [self.length % ring.slots for ring in self.rings]

    def at(self, slots: Sequence[Array]) -> Cache:
        """Return this cache for one more column, whose slots are given as arrays [1] int32, so that such a step can be recorded.

        The caller that repeats the step must increase `length`.
        """
        step = copy(self)
        step.given_slots = slots
        return step
