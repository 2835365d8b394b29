"""Experts: the launches of grouped products (products.py), and the biases. Formulas: minimoe/reference/expert.py.

The experts' feed-forward is the reference's composition of these kernels and those of the activations.
"""

from minimoe.backend import Array
from minimoe_numba_cuda.activation import CudaActivation
from minimoe_numba_cuda.compiler import cuda, int64
from minimoe_numba_cuda.launch import I32, THREADS, blocks_of, singles
from minimoe_numba_cuda.products import BLOCK, TILE, grouped_registers, grouped_weight_gradient
from minimoe_numba_cuda.routing import CudaRouting, by_row
from minimoe_numba_cuda.sums import COLUMN_BLOCK
from minimoe_numba_cuda.warp import LANES, ROW_LANES, ZERO, sum_over_block_rows


@cuda.jit
def spread_bias(bias, offsets, y):  # type: ignore[no-untyped-def]
    """y[r] = bias[e] for the expert e of row r, zero for unused rows.   [E,O] -> [R,O]   Grid: (R, ceil(O / 128))."""
    r, column = int64(cuda.blockIdx.x), cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if column >= y.shape[1]:
        return
    e = 0
    while e < bias.shape[0] and r >= offsets[e + 1]:
        e += 1
    y[r, column] = bias[e, column] if e < bias.shape[0] else ZERO


@cuda.jit
def sum_rows_of_experts(dy, offsets, db):  # type: ignore[no-untyped-def]
    """db[e] = sum of the rows of e, in an order that their number fixes.   [R,O] -> [E,O]   Grid: (ceil(O / 32), E), block (32, 8)."""
    column, e = cuda.blockIdx.x * LANES + cuda.threadIdx.x, cuda.blockIdx.y
    total = ZERO
    if column < dy.shape[1]:
        for r in range(max(int64(offsets[e]), 0) + cuda.threadIdx.y, min(int64(offsets[e + 1]), dy.shape[0]), ROW_LANES):
            total += dy[r, column]
    total = sum_over_block_rows(total)
    if cuda.threadIdx.y == 0 and column < dy.shape[1]:
        db[e, column] = total


class CudaExpert(CudaRouting, CudaActivation):
    def grouped_matmul(self, x: Array, weight: Array, offsets: Array, transpose: bool = False, out: Array | None = None) -> Array:
        if not singles(x, weight):
            return super().grouped_matmul(x, weight, offsets, transpose, out)
        experts, o, i = weight.shape
        depth, width = (o, i) if transpose else (i, o)
        x = self._read("grouped_matmul", "x", x, (None, depth))
        weight = self._read("grouped_matmul", "weight", weight, (experts, o, i))
        offsets = self._read("grouped_matmul", "offsets", offsets, (experts + 1,), I32)
        y = self._result(out, (x.shape[0], width))
        if y.size:
            grid = blocks_of(x.shape[0], TILE) + experts + 1, blocks_of(width, TILE)
            self._launch(grouped_registers, grid, BLOCK, x, weight, offsets, int(transpose), y)
        return self._stored(y, out)

    def grouped_matmul_dw(self, dy: Array, x: Array, offsets: Array, out: Array | None = None, accumulate: bool = False) -> Array:
        if not singles(dy, x, out):
            return super().grouped_matmul_dw(dy, x, offsets, out, accumulate)
        experts = offsets.shape[0] - 1
        dy, x = self._read("grouped_matmul_dw", "dy", dy, (x.shape[0], None)), self._read("grouped_matmul_dw", "x", x, (dy.shape[0], None))
        offsets = self._read("grouped_matmul_dw", "offsets", offsets, (experts + 1,), I32)
        dw = self._result(out, (experts, dy.shape[1], x.shape[1]))
        grid = blocks_of(x.shape[1], TILE), blocks_of(dy.shape[1], TILE), experts
        self._launch(grouped_weight_gradient, grid, BLOCK, dy, x, offsets, int(accumulate and dw is out), dw)
        return dw if out is None or dw is out else self.store(dw, out, accumulate)

    def grouped_bias(self, bias: Array, offsets: Array, rows: int) -> Array:
        if not singles(bias):
            return super().grouped_bias(bias, offsets, rows)
        bias = self._read("grouped_bias", "bias", bias, (None, None))
        offsets = self._read("grouped_bias", "offsets", offsets, (bias.shape[0] + 1,), I32)
        y = self._empty(rows, bias.shape[1])
        self._launch(spread_bias, by_row(*y.shape), (THREADS,), bias, offsets, y)
        return y

    def grouped_bias_backward(self, dy: Array, offsets: Array) -> Array:
        if not singles(dy):
            return super().grouped_bias_backward(dy, offsets)
        dy = self._read("grouped_bias_backward", "dy", dy, (None, None))
        offsets = self._read("grouped_bias_backward", "offsets", offsets, (None,), I32)
        db = self._empty(offsets.shape[0] - 1, dy.shape[1])
        self._launch(sum_rows_of_experts, (blocks_of(dy.shape[1], LANES), db.shape[0]), COLUMN_BLOCK, dy, offsets, db)
        return db
