"""The host side that kernels which choose from a row share: how a warp holds the row (kernels/select.cuh), and the sums over blocks.

A warp holds a row of E numbers, PER_LANE of them per lane, V neighbours per access. Each block sums over its tokens, and the blocks' sums
are then added in a fixed order (kernels/partials.cu), without atomics on floats.
"""

from minimoe.backend import Array
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import CudaLaunch, ceil_div, instances, lanes
from minimoe_cupy.loader import Source

WARPS = constant("gate.cuh", "WARPS")  # rows of a block at a time
BLOCK = 32 * WARPS
MOST_BLOCKS = 528  # of a grid whose warps stride over the rows: a few per processor of a large card
MOST_COLUMNS = 1024  # of a row that a warp can hold, at most
NARROW = 64  # columns up to which single accesses are as fast
EXPERTS = constant("partials.cu", "EXPERTS")  # columns of a block that adds partial sums
LAYOUTS = ((1, 1), (2, 1), (8, 1), (32, 1), (4, 4), (8, 4), (16, 4), (32, 4))  # PER_LANE, V
PARTIALS = Source("partials.cu", ("add_partials",))


def layout(columns: int, *arrays: Array) -> tuple[int, int]:
    """Returns PER_LANE and V for rows of up to MOST_COLUMNS columns; `arrays` are those that are accessed 16 bytes at a time."""
    wide = columns > NARROW and lanes(columns, *arrays) > 1
    return next((held, v) for held, v in LAYOUTS if (v > 1) == wide and 32 * held >= columns)


def by_layout(kernel: str, *leading: object) -> tuple[str, ...]:
    """Returns the instances of `kernel<leading..., PER_LANE, V>` for all layouts."""
    return tuple(name for held, v in LAYOUTS for name in instances(kernel, *([choice] for choice in leading), [held], [v]))


class CudaSelection(CudaLaunch):
    def _add_partials(self, parts: Array, count_parts: Array | None = None) -> tuple[Array, Array | None]:
        """Returns the sums over the blocks.   [blocks,E] float32, [blocks,E] int32 -> [E] of each"""
        xp, (blocks, width) = self.xp, parts.shape
        sums = xp.empty(width, dtype=xp.float32)
        counts = None if count_parts is None else xp.empty(width, dtype=xp.int32)
        self._launch(PARTIALS, "add_partials", ceil_div(width, EXPERTS), 32 * EXPERTS, parts, count_parts, sums, counts, blocks, width)
        return sums, counts


def blocks_for(rows: int) -> int:
    """Returns how many blocks stride over so many rows."""
    return min(MOST_BLOCKS, ceil_div(rows, WARPS))
