"""Ids in order of the rows that they name: a stable sort on the device that waits for nothing. The kernels stand in kernels/sort.cu.

A sort of the array library may wait for the device, or take memory beside its pool, while a step is being recorded.
"""

from minimoe.backend import Array
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import CudaLaunch, ceil_div
from minimoe_cupy.loader import Source

BLOCK, TILE, BITS, DIGITS = (constant("sort.cu", name) for name in ("BLOCK", "TILE", "BITS", "DIGITS"))  # a pass sorts by BITS
SORT = Source("sort.cu", ("count_digits", "scan_counts", "place_keys"))


class CudaSorting(CudaLaunch):
    def _sorted_keys(self, keys: Array, limit: int) -> tuple[Array, Array]:
        """The keys in ascending order, and where each stood; equal keys in the order in which they stood.   [N] int32 -> [N], [N] int32

        Keys in -limit .. -1 count from the end, as indices do; what is outside -limit .. limit-1 becomes `limit`, and comes last.
        """
        (keys,) = self._contiguous(keys)
        n = keys.shape[0]
        tiles = ceil_div(n, TILE)
        counts, totals = (self.xp.empty(shape, dtype=self.xp.int32) for shape in ((DIGITS, tiles), (DIGITS,)))
        turn = None
        for shift in range(0, max(1, limit.bit_length()), BITS):
            self._launch(SORT, "count_digits", tiles, BLOCK, keys, counts, n, limit, shift)
            self._launch(SORT, "scan_counts", DIGITS * 32 // BLOCK, BLOCK, counts, totals, tiles)
            to, to_turn = (self.xp.empty(n, dtype=self.xp.int32) for _ in range(2))
            self._launch(SORT, "place_keys", tiles, BLOCK, keys, turn, counts, totals, to, to_turn, n, limit, shift)
            keys, turn = to, to_turn
        return keys, turn
