"""Keys and values of earlier positions, kept so that a new token costs one position's work, in buffers that do not grow.

A column is one place of a batch's padded rows; its position differs from row to row where prompts are of unequal length, and padding counts
nowhere. Column n lies in slot n mod S of every buffer with S slots. A layer that sees all has a slot for each column, one that slides has
no more than its window: there a new column is written over the one that no query sees any longer. Attention compares positions, not
places, so it does not matter where in a buffer a column lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, Protocol

from minimoe.backend import Array, Backend


def pieces(first: int, columns: int, slots: int) -> Iterator[tuple[slice, slice]]:
    """Where the last of so many columns go, the first of which is column `first`.   -> slots, columns; twice where they go round"""
    column = max(0, columns - slots)
    while column < columns:
        slot = (first + column) % slots
        count = min(columns - column, slots - slot)
        yield slice(slot, slot + count), slice(column, column + count)
        column += count


class Ring:
    """What stands in the slots of all buffers of one size.   positions [B,S] int32, valid [B,S] bool: columns that count"""

    def __init__(self, batch: int, slots: int, backend: Backend) -> None:
        xp = self.xp = backend.xp
        self.slots = slots
        self.positions = xp.zeros((batch, slots), dtype=xp.int32)
        self.valid = xp.zeros((batch, slots), dtype=xp.bool)
        self.held = 0  # slots that are seen beside new columns; None: a new column is seen in its slot, with all others
        self.writes: list[tuple[Any, Any]] = []  # slots, and which of the new columns go there
        self.seen: tuple[Array, Array] = (self.positions, self.valid)  # of all keys that the call under way may see

    def place(self, first: int, positions: Array, valid: Array, slot: Array | None) -> None:
        """Take up columns whose positions are [B,T]; valid [B,T], or [B,first + T] of all so far. `slot` [1]: where a single one goes."""
        xp, t = self.xp, positions.shape[1]
        if valid.shape[1] > t:
            for slots, columns in pieces(0, first, self.slots):
                self.valid[:, slots] = valid[:, columns]
            valid = valid[:, first:]
        self.held = min(first, self.slots)
        self.seen = positions, valid
        if t > 1 and self.held:
            kept = slice(0, self.held)
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
        """`rolls`: old columns may be written over. `widths`: of keys and of values."""
        self.xp = backend.xp
        self.k, self.v = (self.xp.zeros((batch, slots, groups, width), dtype=dtype) for width in widths)
        self.slots, self.rolls = slots, rolls
        self.ring = Ring(batch, slots, backend)

    def append(self, k: Array, v: Array) -> tuple[Array, Array, Array, Array]:
        """Add the keys and values of new columns [B,T,G,C]; gives those that are seen, their positions and whether they count [B,Tk].

        A single new column is seen with the whole buffers, whose size never changes; more of them beside what was there before, some
        of which they may take the place of.
        """
        ring, single = self.ring, k.shape[1] == 1
        seen = k, v
        if ring.held and not single:
            kept = slice(0, ring.held)
            seen = self.xp.concat([self.k[:, kept, :, :], k], axis=1), self.xp.concat([self.v[:, kept, :, :], v], axis=1)
        for slots, columns in ring.writes:
            self.k[:, slots, :, :] = k[:, columns, :, :]
            self.v[:, slots, :, :] = v[:, columns, :, :]
        return (*((self.k, self.v) if single else seen), *ring.seen)


class Cached(Protocol):
    """A model whose layers can make caches: a `Transformer`."""

    dtype: Any
    blocks: Any
    config: Any

    @property
    def backend(self) -> Backend: ...


class Cache:
    """Keys and values of a whole model's earlier positions. `length`: columns so far."""

    def __init__(self, model: Cached, batch: int = 1, capacity: int | None = None) -> None:
        """`capacity`: columns of the layers that see all, by default the model's max_seq_len; where every layer slides there is no end."""
        capacity = capacity or model.config.max_seq_len
        self.batch, self.length = batch, 0
        self.layers = [block.attention.make_cache(batch, capacity, model.dtype, model.backend) for block in model.blocks]
        self.capacity = None if all(layer.rolls for layer in self.layers) else capacity
        by_size: dict[int, Ring] = {}
        for layer in self.layers:
            layer.ring = by_size.setdefault(layer.slots, layer.ring)
        self.rings = list(by_size.values())
        self.told: Sequence[Array | None] = [None] * len(self.rings)

    def place(self, positions: Array, valid: Array | None, b: int, t: int) -> None:
        """Take up columns of positions [B or 1,T]; valid as `Ring.place` has it, None where all count."""
        stop = self.length + t
        if b != self.batch or (self.capacity is not None and stop > self.capacity):
            raise ValueError(f"cache: {b} sequences of {stop} positions do not fit into {self.batch} of {self.capacity or 'any number'}")
        xp = self.rings[0].xp
        positions = xp.broadcast_to(positions, (b, t))
        valid = xp.ones((b, t), dtype=xp.bool) if valid is None else valid
        for ring, slot in zip(self.rings, self.told, strict=True):
            ring.place(self.length, positions, valid, slot)
        self.length = stop

    def clear(self) -> None:
        """Forget all; the buffers stay where they are."""
        self.length = 0
        for ring in self.rings:
            ring.valid[...] = False

    def next_slots(self) -> list[int]:
        """Where the next column goes, in each ring."""
        return [self.length % ring.slots for ring in self.rings]

    def at(self, slots: Sequence[Array]) -> Cache:
        """This cache for one more column, whose slots are told by arrays [1] int32: what such a step does can be recorded.

        `length` is then for whoever repeats the step to count.
        """
        step = copy(self)
        step.told = slots
        return step
