"""What kernels that choose from a row share on the host: how the row lies in a warp (kernels/select.cuh), and the sums over blocks.

A warp holds a row of E numbers, PER_LANE of them a lane, V neighbours an access. Sums over tokens are made by each block and then added in
a fixed order (kernels/partials.cu): no atomics on floats.
"""

from minimoe.backend import Array
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import CudaLaunch, ceil_div, instances, lanes
from minimoe_cupy.loader import Source

WARPS = constant("gate.cuh", "WARPS")  # rows of a block at a time
BLOCK = 32 * WARPS
MOST_BLOCKS = 528  # of a grid whose warps stride over the rows: a few to each processor of a large card
MOST_COLUMNS = 1024  # of a row that a warp can hold
NARROW = 64  # columns up to which single accesses are as good
EXPERTS = constant("partials.cu", "EXPERTS")  # columns of a block that adds partial sums
LAYOUTS = ((1, 1), (2, 1), (8, 1), (32, 1), (4, 4), (8, 4), (16, 4), (32, 4))  # PER_LANE, V
PARTIALS = Source("partials.cu", ("add_partials",))


def layout(columns: int, *arrays: Array) -> tuple[int, int]:
    """PER_LANE and V for rows of so many columns, up to MOST_COLUMNS; `arrays` are what is read and written 16 bytes at a time."""
    wide = columns > NARROW and lanes(columns, *arrays) > 1
    return next((held, v) for held, v in LAYOUTS if (v > 1) == wide and 32 * held >= columns)


def by_layout(kernel: str, *before: object) -> tuple[str, ...]:
    """The instances of `kernel<..., PER_LANE, V>` for all layouts."""
    return tuple(name for held, v in LAYOUTS for name in instances(kernel, *([choice] for choice in before), [held], [v]))


class CudaSelection(CudaLaunch):
    def _add_partials(self, parts: Array, count_parts: Array | None = None) -> tuple[Array, Array | None]:
        """Sums over the blocks.   [blocks,E] float32, [blocks,E] int32 -> [E] of each"""
        xp, (blocks, width) = self.xp, parts.shape
        sums = xp.empty(width, dtype=xp.float32)
        counts = None if count_parts is None else xp.empty(width, dtype=xp.int32)
        self._launch(PARTIALS, "add_partials", ceil_div(width, EXPERTS), 32 * EXPERTS, parts, count_parts, sums, counts, blocks, width)
        return sums, counts


def blocks_for(rows: int) -> int:
    """How many blocks stride over so many rows."""
    return min(MOST_BLOCKS, ceil_div(rows, WARPS))
