"""Products of rows grouped by expert: the launches of kernels/grouped_float.cu, grouped_bf16.cu, grouped_wgmma.cu and grouped_bias.cu.

Kernels read `offsets` on the device: grids are sized for the worst case, and blocks without a tile return at once. Large products in
bfloat16 use Hopper's wgmma where `device.wgmma_wanted` says so, mma.sync elsewhere.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from minimoe.backend import Array
from minimoe_cupy.constants import constant
from minimoe_cupy.device import wgmma_wanted
from minimoe_cupy.launch import BFLOAT16, FLOAT32, CudaLaunch, by_width, ceil_div, computed, instance, instances, lanes, quotient, writable
from minimoe_cupy.loader import Source

WARPS, SUM_WARPS = constant("grouped_bias.cu", "WARPS"), constant("grouped_bias.cu", "SUM_WARPS")
ENOUGH = 132  # tiles that occupy every processor of a large card: with fewer large tiles, many small ones are faster
FORWARD, TRANSPOSED, ACTIVATE, BACKWARD = (
    constant("grouped_finish.cuh", name) for name in ("FORWARD", "TRANSPOSED", "ACTIVATE", "BACKWARD")
)


def _names(dtype: str, height: int, width: int, vector: str) -> tuple[str, ...]:
    rows = instances(f"grouped_rows_{dtype}", [height], [width], [vector], [FORWARD, TRANSPOSED, ACTIVATE, BACKWARD])
    return (*rows, *instances(f"grouped_dw_{dtype}", [height], [width], [vector], ["true", "false"]))


def _wgmma_names(width: int) -> tuple[str, ...]:
    rows = instances("grouped_rows_wgmma", [width], [FORWARD, TRANSPOSED, ACTIVATE, BACKWARD])
    return (*rows, *instances("grouped_dw_wgmma", [width], ["true", "false"]))


FLOAT_LARGE = Source("grouped_float.cu", _names("float", 128, 128, "true"))
FLOAT_SMALL = Source("grouped_float.cu", _names("float", 64, 64, "true"))
FLOAT_ODD = Source("grouped_float.cu", _names("float", 64, 64, "false"))
BF16_LARGE = Source("grouped_bf16.cu", _names("bf16", 128, 256, "true"))
BF16_SMALL = Source("grouped_bf16.cu", _names("bf16", 64, 64, "true"))
BF16_ODD = Source("grouped_bf16.cu", _names("bf16", 64, 64, "false"))
WGMMA_LARGE = Source("grouped_wgmma.cu", _wgmma_names(256), "sm_90a")
WGMMA_MEDIUM = Source("grouped_wgmma.cu", _wgmma_names(128), "sm_90a")
BIAS = Source("grouped_bias.cu", by_width("grouped_bias") + by_width("grouped_bias_backward"))


class Tiling(NamedTuple):
    """How a product is divided into tiles, one per block of threads."""

    source: Source
    height: int
    width: int
    threads: int
    shared: int  # bytes that a launch asks for

    def name(self, kernel: str, last: object) -> str:
        """Returns the C++ name of an instance of `kernel`, grouped_rows or grouped_dw."""
        if self.source in (WGMMA_LARGE, WGMMA_MEDIUM):
            return instance(f"{kernel}_wgmma", self.width, last)
        kind = self.source.file.removeprefix("grouped_").removesuffix(".cu")
        odd = self.source in (FLOAT_ODD, BF16_ODD)
        return instance(f"{kernel}_{kind}", self.height, self.width, "false" if odd else "true", last)


def _tiling_of(source: Source, height: int, width: int) -> Tiling:
    """Returns the tiling in height x width for a source; float32 needs no shared memory beyond what its kernels declare."""
    threads = constant(source.file, "THREADS", BM=height, BN=width)
    shared = 0 if source.file == "grouped_float.cu" else constant(source.file, "SHARED", BM=height, BN=width)
    return Tiling(source, height, width, threads, shared)


TILINGS = {  # for rows at multiples of 16 bytes, many large tiles or few; for all others
    FLOAT32: (_tiling_of(FLOAT_LARGE, 128, 128), _tiling_of(FLOAT_SMALL, 64, 64), _tiling_of(FLOAT_ODD, 64, 64)),
    BFLOAT16: (_tiling_of(BF16_LARGE, 128, 256), _tiling_of(BF16_SMALL, 64, 64), _tiling_of(BF16_ODD, 64, 64)),
}
WGMMA_HEIGHT = constant("grouped_wgmma.cu", "HEIGHT")
WGMMA = (_tiling_of(WGMMA_LARGE, WGMMA_HEIGHT, 256), _tiling_of(WGMMA_MEDIUM, WGMMA_HEIGHT, 128))


class CudaGrouped(CudaLaunch):
    def grouped_matmul(self, x: Array, weight: Array, offsets: Array, transpose: bool = False, out: Array | None = None) -> Array:
        shape = x.shape[0], weight.shape[2] if transpose else weight.shape[1]
        if not computed(x, weight, out) or not writable(out, shape, x.dtype):
            return super().grouped_matmul(x, weight, offsets, transpose, out)
        y = self.xp.empty(shape, dtype=x.dtype) if out is None else out
        self._rows(TRANSPOSED if transpose else FORWARD, x, weight, offsets, y, zeros=True)
        return y

    def grouped_matmul_dw(self, dy: Array, x: Array, offsets: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        if not computed(dy, x):
            return super().grouped_matmul_dw(dy, x, offsets, out, accumulate)
        return self._dw(dy, x, offsets, out, accumulate)

    def grouped_bias(self, bias: Array, offsets: Array, rows: int) -> Array:
        if not computed(bias):
            return super().grouped_bias(bias, offsets, rows)
        bias, offsets = self._contiguous(bias, offsets)
        experts, width = bias.shape
        y = self.xp.empty((rows, width), dtype=bias.dtype)
        name = instance("grouped_bias", bias.dtype, lanes(width, bias, y))
        self._launch(BIAS, name, ceil_div(rows, WARPS) if width else 0, 32 * WARPS, bias, offsets, y, rows, experts, width)
        return y

    def grouped_bias_backward(self, dy: Array, offsets: Array) -> Array:
        if not computed(dy):
            return super().grouped_bias_backward(dy, offsets)
        return self._db(dy, offsets, None, False)

    # ---- launches of kernels on arrays that have one dtype, which the kernels compute in ----------------------------------------------

    def _rows(
        self, product: int, a: Array, weight: Array, offsets: Array, y: Array, *, bias: Array | None = None,
        pre_activation: Array | None = None, hidden: Array | None = None, order: Array | None = None, slots: int = 1, zeros: bool = False,
        kind: int = 0, limit: float = 0.0,
    ) -> None:  # fmt: skip
        """Computes `product` into `y` (and `hidden`).   a [R,K], or rows order[r] // slots of it; `zeros`: unused rows become zeros"""
        a, weight, offsets, bias, pre_activation, order = self._contiguous(a, weight, offsets, bias, pre_activation, order)
        experts, depth, rows = weight.shape[0], a.shape[1], y.shape[0]
        width = weight.shape[2] if product in (TRANSPOSED, BACKWARD) else y.shape[1] if hidden is None else hidden.shape[1]
        columns = weight.shape[1] if product == ACTIVATE else width  # with swiglu both gate and up columns
        others = [array for array in (y, bias, pre_activation, hidden) if array is not None]
        vector = min(lanes(depth, a, weight), lanes(width, weight, *others)) > 1

        def tiles(tiling: Tiling) -> tuple[int, int]:
            groups = min(experts, rows) + zeros
            return (rows + groups * (tiling.height - 1)) // tiling.height, ceil_div(columns, tiling.width)

        tiling = self._tiling(a.dtype, vector, tiles, rows, experts)
        down, across = tiles(tiling)
        self._launch(
            tiling.source, tiling.name("grouped_rows", product), down * across if rows else 0, tiling.threads,
            a, order, slots, weight, bias, offsets, pre_activation, y, hidden, rows if zeros else 0, experts, depth, width, down, across,
            kind, limit, shared=tiling.shared,
        )  # fmt: skip

    def _dw(
        self, left: Array, right: Array, offsets: Array, out: Array | None, accumulate: bool, order: Array | None = None, slots: int = 1
    ) -> Array:
        """Computes dw[e] = left_e^T right_e, in `out` if given.   left [R,M], right [R,N], or rows order[r] // slots of it -> [E,M,N]

        Kernels write float32, as gradients are kept: another result is rounded from it.
        """
        experts, height, width = shape = offsets.shape[0] - 1, left.shape[1], right.shape[1]
        if not writable(out, shape, FLOAT32):
            return self.store(self._dw(left, right, offsets, None, False, order, slots), out, accumulate)
        left, right, offsets, order = self._contiguous(left, right, offsets, order)
        dw = self.xp.empty(shape, dtype=FLOAT32) if out is None else out
        vector = min(lanes(height, left), lanes(width, right), lanes(width, dw)) > 1

        def tiles(tiling: Tiling) -> tuple[int, int, int]:
            return experts, ceil_div(height, tiling.height), ceil_div(width, tiling.width)

        tiling = self._tiling(left.dtype, vector, tiles)
        _, down, across = tiles(tiling)
        name = tiling.name("grouped_dw", "false" if order is None else "true")
        numbers = height, width, down, across, accumulate and out is not None
        args: tuple[Any, ...] = (left, right, order, *quotient(slots), offsets, dw, *numbers)
        self._launch(tiling.source, name, experts * down * across, tiling.threads, *args, shared=tiling.shared)
        return self.xp.astype(dw, left.dtype, copy=False) if out is None else dw

    def _tiling(
        self, dtype: Any, vector: bool, tiles: Callable[[Tiling], tuple[int, ...]], rows: int | None = None, experts: int = 0
    ) -> Tiling:
        """Returns the largest tiles of which there are enough and which an expert's share of `rows` half fills; `tiles` counts them."""
        large, small, odd = TILINGS[dtype]
        if not vector:
            return odd
        for tiling in WGMMA if dtype == BFLOAT16 and wgmma_wanted() else (large,):
            if prod(tiles(tiling)) >= ENOUGH and (rows is None or 2 * rows >= experts * tiling.height):
                return tiling
        return small

    def _db(self, dy: Array, offsets: Array, out: Array | None, accumulate: bool) -> Array:
        """Computes db[e] = sum(dy_e), in `out` if given.   dy [R,O] -> [E,O]"""
        experts, width = shape = offsets.shape[0] - 1, dy.shape[1]
        if not writable(out, shape, FLOAT32):
            return self.store(self._db(dy, offsets, None, False), out, accumulate)
        dy, offsets = self._contiguous(dy, offsets)
        db = self.xp.empty(shape, dtype=FLOAT32) if out is None else out
        v = lanes(width, dy) if lanes(width, db) > 1 else 1
        grid, name = (ceil_div(width, 32 * v), experts), instance("grouped_bias_backward", dy.dtype, v)
        self._launch(BIAS, name, grid, 32 * SUM_WARPS, dy, offsets, db, width, accumulate and out is not None)
        return self.xp.astype(db, dy.dtype, copy=False) if out is None else db
