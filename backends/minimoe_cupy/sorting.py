"""A stable sort of ids by the rows that they name, on the device and without waiting for it: the launches of kernels/sort.cu.

The array library's sort may wait for the device, or allocate outside of its pool, while a step is being recorded.
"""

from minimoe.backend import Array
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import CudaLaunch, ceil_div
from minimoe_cupy.loader import Source

BLOCK, TILE, BITS, DIGITS = (constant("sort.cu", name) for name in ("BLOCK", "TILE", "BITS", "DIGITS"))  # a pass sorts by BITS
SORT = Source("sort.cu", ("count_digits", "scan_counts", "place_keys"))


class CudaSorting(CudaLaunch):
    def _sorted_keys(self, keys: Array, limit: int) -> tuple[Array, Array]:
        """Returns the keys in ascending order and the index of each; equal keys keep their order.   [N] int32 -> [N], [N] int32

        Keys in -limit .. -1 count from the end, as indices do; keys outside of -limit .. limit-1 become `limit`, and come last.
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
