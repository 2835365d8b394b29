"""Dense products by cuBLAS, stored in `out` or added to it; bias addition and column sums by kernels (kernels/columns.cu)."""

import math

from minimoe.backend import Array
from minimoe_cupy.launch import FLOAT32, CudaLaunch, by_width, ceil_div, computed, instance, instances, kept, lanes, writable
from minimoe_cupy.loader import Source

BLOCK = 256
ROWS = 4  # rows per thread when a bias is added
PIECES = 512  # pieces of rows in a column sum, at most: a few per processor of a large card
PIECE = 64  # rows per piece, at least
SUMS = (*instances("column_sums", [1, 4], ["float"], ["float"]), *instances("column_sums", [1, 4], ["float"], ["bf16"]),
        *instances("column_sums", [1, 8], ["bf16"], ["float"]))  # fmt: skip
COLUMNS = Source("columns.cu", (*by_width("add_bias"), *by_width("add_into"), *SUMS))


class CudaLinear(CudaLaunch):
    def linear(self, x: Array, weight: Array, bias: Array | None = None, out: Array | None = None) -> Array:
        shape = (*x.shape[:-1], weight.shape[0])
        if not computed(x, weight, bias, out) or not writable(out, shape, x.dtype):
            return super().linear(x, weight, bias, out)
        y = self._product(self.rows(x), weight.T, shape, out)
        if bias is not None:
            self._add_bias(y, bias)
        return y

    def linear_dx(self, dy: Array, weight: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        shape = (*dy.shape[:-1], weight.shape[1])
        if not computed(dy, weight, out) or not writable(out, shape, dy.dtype):
            return super().linear_dx(dy, weight, out, accumulate)
        return self._product(self.rows(dy), weight, shape, out, accumulate)

    def linear_dw(self, dy: Array, x: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        shape = (dy.shape[-1], x.shape[-1])
        if not computed(dy, x) or not kept(out, shape, dy.dtype):
            return super().linear_dw(dy, x, out, accumulate)
        return self._product(self.rows(dy).T, self.rows(x), shape, out, accumulate)

    def linear_db(self, dy: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        if not computed(dy) or not kept(out, dy.shape[-1:], dy.dtype):
            return super().linear_db(dy, out, accumulate)
        (rows,) = self._contiguous(self.rows(dy))
        n, width = rows.shape
        db = self.xp.empty(width, dtype=dy.dtype) if out is None else out
        v = lanes(width, rows)
        columns = max(1, grid_columns(width, v)[0])
        pieces = max(1, min(ceil_div(n, PIECE), PIECES // columns))
        partial = self.xp.empty((pieces, width), dtype=FLOAT32)
        self._column_sums(rows, partial, v, ceil_div(n, pieces), False)
        self._column_sums(partial, db, lanes(width, partial), pieces, accumulate and out is not None)
        return db

    def _product(self, a: Array, b: Array, shape: tuple[int, ...], out: Array | None, accumulate: bool = False) -> Array:
        """Returns a b as `shape`: stored in `out` by the product itself, or added to it."""
        xp = self.xp
        if out is None:
            return xp.reshape(xp.matmul(a, b), shape)
        if accumulate:
            self._add_product(xp.reshape(out, (a.shape[0], b.shape[1])), a, b)
        else:
            xp.matmul(a, b, out=xp.reshape(out, (a.shape[0], b.shape[1])))
        return out

    def _add_product(self, inout_y: Array, a: Array, b: Array) -> None:
        """y += a b.   y [M,N], which may be float32 for bfloat16, a [M,K], b [K,N]"""
        product = self.xp.empty(inout_y.shape, dtype=inout_y.dtype)
        self.xp.matmul(a, b, out=product)
        self._add_into(inout_y, product)

    def _add_bias(self, inout_y: Array, bias: Array) -> None:
        (bias,) = self._contiguous(bias)
        width = bias.shape[0]
        n, v = math.prod(inout_y.shape[:-1]), lanes(width, inout_y, bias)
        columns, block = grid_columns(width, v)
        grid = columns, min(ceil_div(n, ROWS * block[1]), 65535)
        self._launch(COLUMNS, instance("add_bias", bias.dtype, v), grid, block, inout_y, bias, n, width)

    def _add_into(self, inout_y: Array, x: Array) -> None:
        """Adds x to y, both contiguous and of one size."""
        count, v = math.prod(x.shape), lanes(0, inout_y, x)
        self._launch(COLUMNS, instance("add_into", x.dtype, v), ceil_div(count, v * BLOCK), BLOCK, inout_y, x, count)

    def _column_sums(self, x: Array, out: Array, v: int, piece: int, accumulate: bool) -> None:
        """Sums each `piece` rows of x.   [N,O] -> out [S,O] or [O]; a piece without rows is zero"""
        n, width = x.shape
        columns, block = grid_columns(width, v)
        grid = columns, out.shape[0] if out.ndim == 2 else 1
        name = instance("column_sums", v, x.dtype, out.dtype)
        self._launch(COLUMNS, name, grid, block, x, out, n, width, piece, accumulate, shared=4 * v * BLOCK)


def grid_columns(width: int, v: int) -> tuple[int, tuple[int, int]]:
    """Returns how many blocks side by side cover a row of `width`, and a block's (columns, rows): a power of two up to 32 columns."""
    accesses = ceil_div(width, v)
    across = 1 << min(5, max(0, accesses - 1).bit_length())
    return ceil_div(accesses, across), (across, BLOCK // across)
