"""Norms, alone and fused with the residual addition before them, with a row in registers: the launches of kernels/norm.cu.

Backward sums the weights' gradients while it has the rows, each block over a piece of them; a second launch adds the blocks' sums in order.
Rows too long for registers (HELD) are read again, from a cache, and their sums have a launch of their own.
"""

import math
from typing import Any, NamedTuple

from minimoe.backend import Array
from minimoe.reference.norm import NormSaved
from minimoe_cupy import linear
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import FLOAT32, CudaLaunch, ceil_div, computed, instance, instances, lanes, wide, writable
from minimoe_cupy.loader import Source

WARP, MOST, MOST_BACKWARD = (constant("norm.cu", name) for name in ("WARP", "MOST", "MOST_BACKWARD"))  # threads of a block, at most
BLOCK = 256  # threads of a block of narrow rows
HELD = {1: 8, 4: 4, 8: 4}  # accesses of V elements that a thread keeps of a row
WARPS = 2112  # warps that sum gradients: as many as the 132 processors of a large card hold
LONG_PIECES, LONG_PIECE = 512, 64  # blocks that sum long rows, at most, and rows per block, at least
ADDERS, ADDED = 64, 8  # (rows, accesses per row) of a block that adds the sums: many rows of threads, so that each adds few numbers


def _names(kernel: str, held: dict[int, int]) -> tuple[str, ...]:
    widths = (("float", 1), ("float", 4), ("bf16", 1), ("bf16", 8))
    return tuple(name for dtype, v in widths for name in instances(kernel, [dtype], ["true", "false"], [held[v]], [v]))


NORM = Source("norm.cu", _names("normalise", HELD) + _names("normalise_backward", HELD))
LONG_NORM = Source(
    "norm.cu",
    (*_names("normalise", dict.fromkeys(HELD, 0)), *_names("normalise_backward", dict.fromkeys(HELD, 0)),
     *instances("weight_sums", [1, 4], ["true", "false"], ["float"]), *instances("weight_sums", [1, 8], ["true", "false"], ["bf16"])),
)  # fmt: skip


class RowLayout(NamedTuple):
    """How a row is divided among threads."""

    v: int  # elements of an access
    held: int  # accesses that a thread keeps, 0 if there are too many
    across: int  # threads of a row
    down: int  # rows of a block

    def name(self, kernel: str, dtype: Any, centred: bool) -> str:
        return instance(kernel, dtype, "true" if centred else "false", self.held, self.v)

    @property
    def source(self) -> Source:
        return NORM if self.held else LONG_NORM


def row_layout(width: int, v: int, most: int) -> RowLayout:
    """Gives a row one thread per access up to a warp, then a warp with several accesses per thread, then several warps, which are a block.

    Rows that need more than `most` threads are not kept in registers.
    """
    accesses, held = ceil_div(width, v), HELD[v]
    across = WARP * ceil_div(accesses, held * WARP)
    if across > most:
        return RowLayout(v, 0, most, 1)
    if across == WARP:
        across = 1 << min(5, (accesses - 1).bit_length())
        return RowLayout(v, held, across, BLOCK // across)
    return RowLayout(v, held, across, 1)


class CudaNorm(CudaLaunch):
    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array | None = None) -> tuple[Array, Array]:
        if not normal(x, (out,), (weight,)) or not writable(out, x.shape, x.dtype):
            return super().rms_norm(x, weight, eps, out)
        _, y, (rstd,) = self._normalised(x, None, weight, None, eps, False, out)
        return y, rstd

    def rms_norm_backward(self, dy: Array, x: Array, weight: Array, rstd: Array) -> tuple[Array, Array]:
        if not normal(x, (dy,), (weight,), (rstd,)):
            return super().rms_norm_backward(dy, x, weight, rstd)
        dx, dweight = self._gradients(None, dy, x, weight, (rstd,))
        return dx, dweight

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float, out: Array | None = None) -> tuple[Array, Array, Array]:
        if not normal(x, (out,), (weight, bias)) or not writable(out, x.shape, x.dtype):
            return super().layer_norm(x, weight, bias, eps, out)
        _, y, (mean, rstd) = self._normalised(x, None, weight, bias, eps, True, out)
        return y, mean, rstd

    def layer_norm_backward(self, dy: Array, x: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, Array, Array]:
        if not normal(x, (dy,), (weight,), (mean, rstd)):
            return super().layer_norm_backward(dy, x, weight, mean, rstd)
        dx, dweight, dbias = self._gradients(None, dy, x, weight, (mean, rstd))
        return dx, dweight, dbias

    def add_rms_norm(self, x: Array, delta: Array, weight: Array, eps: float) -> tuple[tuple[Array, Array], Any]:
        if not normal(x, (delta,), (weight,)):
            return super().add_rms_norm(x, delta, weight, eps)
        total, y, moments = self._normalised(x, delta, weight, None, eps, False, None)
        return (total, y), NormSaved(total, weight, moments)

    def add_rms_norm_backward(self, dtotal: Array | None, dy: Array, saved: Any) -> tuple[Array, Array]:
        if not normal(saved.total, (dtotal, dy), (saved.weight,), saved.moments):
            return super().add_rms_norm_backward(dtotal, dy, saved)
        dx, dweight = self._gradients(dtotal, dy, *saved)
        return dx, dweight

    def add_layer_norm(self, x: Array, delta: Array, weight: Array, bias: Array | None, eps: float) -> tuple[tuple[Array, Array], Any]:
        if not normal(x, (delta,), (weight, bias)):
            return super().add_layer_norm(x, delta, weight, bias, eps)
        total, y, moments = self._normalised(x, delta, weight, bias, eps, True, None)
        return (total, y), NormSaved(total, weight, moments)

    def add_layer_norm_backward(self, dtotal: Array | None, dy: Array, saved: Any) -> tuple[Array, Array, Array]:
        if not normal(saved.total, (dtotal, dy), (saved.weight,), saved.moments):
            return super().add_layer_norm_backward(dtotal, dy, saved)
        dx, dweight, dbias = self._gradients(dtotal, dy, *saved)
        return dx, dweight, dbias

    # ---- launches of kernels on arrays of one dtype, which the kernels compute in, and of fitting shapes ------------------------------

    def _normalised(
        self, x: Array, delta: Array | None, weight: Array, bias: Array | None, eps: float, centred: bool, out: Array | None
    ) -> tuple[Array, Array, tuple[Array, ...]]:
        """-> total (None without delta), y, the moments [...,1]: rstd, or mean and rstd"""
        xp = self.xp
        x, delta, weight, bias = self._contiguous(x, delta, weight, bias)
        total = None if delta is None else xp.empty(x.shape, dtype=x.dtype)
        y = xp.empty(x.shape, dtype=x.dtype) if out is None else out
        *mean, rstd = (xp.empty((*x.shape[:-1], 1), dtype=xp.float32) for _ in range(2 if centred else 1))
        width, n, arrays = x.shape[-1], math.prod(x.shape[:-1]), (x, delta, weight, bias, total, y)
        layout = row_layout(width, lanes(width, *(a for a in arrays if a is not None)), MOST)
        self._launch(
            layout.source, layout.name("normalise", x.dtype, centred), ceil_div(n, layout.down), (layout.across, layout.down),
            *arrays, mean[0] if mean else None, rstd, eps, n, width,
        )  # fmt: skip
        return total, y, (*mean, rstd)

    def _gradients(self, dtotal: Array | None, dy: Array, x: Array, weight: Array, moments: tuple[Array, ...]) -> tuple[Array, ...]:
        """-> dx, to which dtotal is added; dweight [D]; dbias [D] where a mean is among the moments"""
        dtotal, dy, x, weight, *mean, rstd = self._contiguous(dtotal, dy, x, weight, *moments)
        dx = self.xp.empty(x.shape, dtype=x.dtype)
        width, n, centred = x.shape[-1], math.prod(x.shape[:-1]), bool(mean)
        v = lanes(width, dy, x, weight, dx, *(() if dtotal is None else (dtotal,)))
        layout = row_layout(width, v, MOST_BACKWARD)
        middle = mean[0] if centred else None
        rows = dy, x, weight, middle, rstd, dtotal, dx
        name, block = layout.name("normalise_backward", x.dtype, centred), (layout.across, layout.down)
        if layout.held:
            piece, pieces = cut(n, WARPS * WARP // (layout.across * layout.down), layout.down)
            partial = self.xp.empty((pieces, len(moments) * width), dtype=self.xp.float32)
            self._launch(NORM, name, pieces, block, *rows, partial, n, width, piece)
        else:
            self._launch(LONG_NORM, name, n, block, *rows, None, n, width, 1)
            columns, block = linear.grid_columns(width, v)
            piece, pieces = cut(n, max(1, LONG_PIECES // columns), LONG_PIECE)
            partial = self.xp.empty((pieces, len(moments) * width), dtype=self.xp.float32)
            name = instance("weight_sums", v, "true" if centred else "false", x.dtype)
            self._launch(LONG_NORM, name, (columns, pieces), block, dy, x, middle, rstd, partial, n, width, piece)
        sums = self._sum_of(partial)
        return dx, *(sums[i * width : (i + 1) * width] for i in range(len(moments)))

    def _sum_of(self, partial: Array) -> Array:
        """Returns the sum of few rows, in their order.   [S,P] float32 -> [P] float32"""
        pieces, width = partial.shape
        sums = self.xp.empty(width, dtype=FLOAT32)
        v, down = lanes(width, partial), min(ADDERS, max(WARP // ADDED, 1 << (pieces - 1).bit_length()))
        name, block = instance("column_sums", v, partial.dtype, sums.dtype), (ADDED, down)
        grid, shared = (ceil_div(width, v * ADDED), 1), 4 * v * ADDED * down
        self._launch(linear.COLUMNS, name, grid, block, partial, sums, pieces, width, pieces, False, shared=shared)
        return sums


def normal(x: Array, alike: tuple[Array | None, ...], columns: tuple[Array | None, ...], moments: tuple[Array, ...] = ()) -> bool:
    """Returns True if kernels take x [...,D], arrays of its shape, of [D], and float32 moments [...,1]."""
    if not computed(x, *alike, *columns) or not wide(*moments) or not x.shape or not x.shape[-1]:
        return False
    *lead, width = x.shape
    shapes = ((alike, x.shape), (columns, (width,)), (moments, (*lead, 1)))
    return all(a is None or a.shape == shape for arrays, shape in shapes for a in arrays)


def cut(n: int, most: int, least: int) -> tuple[int, int]:
    """Divides n rows among at most `most` blocks, with at least `least` each.   -> rows per block, blocks (one if there are no rows)"""
    piece = max(least, ceil_div(n, most))
    return piece, max(1, ceil_div(n, piece))
