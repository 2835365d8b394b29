"""Where a gradient is added up, without a new array for each part.

The plain rule is `total = total + part`. A Buffer does the same arithmetic in the same order, and reuses arrays that nothing else holds.
`backward.py` has one for each output of a node while it walks; a leaf keeps its own, so that `.grad` stays at one address.

    owned             only the buffer holds the array, so a part may be added in place
    zeroed            the array counts as zero, whatever it holds: the next part is written over it
    out, accumulate   the keywords of a kernel: where it writes its part, and whether it adds to what is there
"""

from __future__ import annotations

from typing import Any

from minimoe.backend import Array

Out = dict[str, Any]
"""`out` and `accumulate` for the kernel that computes a gradient, or {}: it then returns a new array."""


class Buffer:
    """The sum of the parts of one gradient that have been added so far."""

    __slots__ = ("array", "owned", "zeroed")

    def __init__(self, array: Array, owned: bool) -> None:
        self.array, self.owned, self.zeroed = array, owned, False

    def add(self, part: Array, owned: bool) -> None:
        """Add a part; `owned` says that nothing else holds its array."""
        if owned and part is self.array:  # a kernel has written it here, as `outs` allowed
            self.zeroed = False
        elif self.zeroed:
            self.array[...] = part
            self.zeroed = False
        elif self.owned:
            self.array += part
        else:
            self.array, self.owned = self.array + part, True

    @staticmethod
    def outs(buffers: list[Buffer]) -> list[Out]:
        """Return, for each buffer, the keywords with which a kernel adds its part there itself.

        A part may be written into an array that its buffer owns. If a buffer comes twice, its first part is written and its second added.
        """
        return [
            {"out": buffer.array, "accumulate": not buffer.zeroed} if buffer.owned and buffer not in buffers[:i] else {}
            for i, buffer in enumerate(buffers)
        ]

    def read(self) -> Array:
        """Return the array as others may see it: zeros where it counts as zero."""
        if self.zeroed:
            self.array[...] = 0.0
            self.zeroed = False
        return self.array

    @staticmethod
    def of_leaf(leaf: Any) -> Buffer:
        """Return a leaf's buffer, or NOTHING if its array does not have the leaf's dtype, in which a kernel would write.

        Where models compute in bfloat16, a leaf without a gradient gets an array, since the first part may come from a kernel that would
        otherwise round it.
        """
        buffer: Buffer | None = leaf.buffer
        if buffer is None and "bfloat16" in leaf.backend.dtypes:
            buffer = Buffer(leaf.backend.xp.empty(leaf.shape, dtype=leaf.dtype), owned=True)
            buffer.zeroed = True
        return NOTHING if buffer is None or buffer.array.dtype != leaf.dtype else buffer

    @classmethod
    def add_to_leaf(cls, leaf: Any, part: Array, owned: bool) -> None:
        """Add a part to a leaf's gradient, in the leaf's dtype; from the first part on its array is the leaf's own."""
        buffer, xp, dtype = leaf.buffer, leaf.backend.xp, leaf.data.dtype
        if part.dtype != dtype:
            part, owned = xp.astype(part, dtype), True
        if buffer is None:
            own = xp.asarray(part, copy=None if owned else True)  # NumPy returns 0-d results as scalars, which have no address
            leaf.buffer = cls(own, True)
        else:
            buffer.add(part, owned)


NOTHING = Buffer(None, owned=False)
"""The buffer of a gradient that has no part yet."""
