"""Guarded memory: an allocator for CuPy whose pieces are filled with NaN and lie between margins."""

from typing import Any

MARGIN = 512  # bytes; CuPy's own pieces begin at multiples of as many
POISON = 0xFF  # every byte: NaN in each floating type, -1 in integers
AT_ONCE = 256  # pieces whose margins are looked at together


class Guard:
    """`malloc` for `cupy.cuda.using_allocator`. Pieces are kept until their margins have been checked, so that nothing else uses them."""

    def __init__(self, cupy: Any) -> None:
        self.cupy, self.pool = cupy, cupy.cuda.MemoryPool()
        self.given: list[tuple[Any, int]] = []

    def malloc(self, size: int) -> Any:
        """Return a pointer to a piece of that many bytes."""
        if len(self.given) >= AT_ONCE and not self.cupy.cuda.get_current_stream().is_capturing():
            self.check()
        whole = -(-size // MARGIN) * MARGIN + 2 * MARGIN
        memory = self.pool.malloc(whole)
        memory.memset_async(POISON, whole, self.cupy.cuda.get_current_stream())
        self.given.append((memory, size))
        return memory + MARGIN

    def check(self) -> None:
        """Raise AssertionError if a byte beside a piece was written."""
        given, self.given = self.given, []
        margins = [margin for memory, size in given for margin in self._margins(memory, size)]
        if margins and not self._whole(self.cupy.concatenate(margins)):
            sizes = [size for memory, size in given if not all(map(self._whole, self._margins(memory, size)))]
            raise AssertionError(f"a kernel wrote beside arrays of {sizes} bytes")

    def _margins(self, memory: Any, size: int) -> tuple[Any, Any]:
        """Return the bytes before and after a piece."""
        behind = -(-size // MARGIN) * MARGIN - size + MARGIN
        return self._bytes(memory, MARGIN), self._bytes(memory + (MARGIN + size), behind)

    def _whole(self, margin: Any) -> bool:
        return bool((margin == POISON).all())

    def _bytes(self, memory: Any, count: int) -> Any:
        return self.cupy.ndarray((count,), dtype=self.cupy.uint8, memptr=memory)
