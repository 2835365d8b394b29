"""Rows added to the rows that ids name: the gradient of an embedding, and `scatter_add`. Formulas: minimoe/reference/embedding.py.

The ids are sorted first, stably. Each row of the table then finds its ids by bisection and adds their rows in their original order, so
nothing is added atomically and equal inputs give equal bits.
"""

import math

from minimoe.backend import Array
from minimoe_numba_cuda.compiler import cuda
from minimoe_numba_cuda.launch import F32, F64, I32, I64, THREADS, CudaKernels, blocks_of, expect, singles


@cuda.jit(device=True)
def first_at_least(ids, turn, wanted):  # type: ignore[no-untyped-def]
    """Returns the first index in the sorted order with an id of at least `wanted`."""
    low, high = 0, turn.size
    while low < high:
        middle = (low + high) // 2
        if ids[turn[middle]] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@cuda.jit
def add_rows(values, ids, turn, padding, inout_target):  # type: ignore[no-untyped-def]
    """target[v] += sum of values[i] for ids[i] = v, in the order of i; rows without an id, and `padding`, are unchanged.

    values [N,D], ids [N], turn [N] sorts them -> [V,D].   Grid: (V, ceil(D / 128)). Bytes: N*D read, min(N, V)*D read and written.
    """
    v, d = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if v == padding or d >= inout_target.shape[1]:
        return
    i = first_at_least(ids, turn, v)
    if i == turn.size or ids[turn[i]] != v:
        return
    total = inout_target[v, d]
    while i < turn.size and ids[turn[i]] == v:
        total += values[turn[i], d]
        i += 1
    inout_target[v, d] = total


class CudaEmbedding(CudaKernels):
    def scatter_add(self, inout_target: Array, index: Array, values: Array) -> None:
        """Sums float32 and float64 in their dtype, and narrower floating types in float32, rounded once. Raises TypeError for integers."""
        if not self.xp.isdtype(inout_target.dtype, "real floating"):
            raise TypeError(f"scatter_add: inout_target must be of a floating type, not {inout_target.dtype}")
        if inout_target.dtype not in (F32, F64):
            total = self.xp.astype(inout_target, F32)
            self.scatter_add(total, index, self.xp.astype(values, F32))
            inout_target[...] = self.xp.astype(total, inout_target.dtype)
            return
        shape = tuple(inout_target.shape)
        expect("scatter_add", "inout_target", inout_target, shape, inout_target.dtype)
        values = self._read("scatter_add", "values", values, (index.shape[0], *shape[1:]), inout_target.dtype)
        self._add(inout_target, index, values, math.prod(shape[1:]), None)

    def embedding_backward(
        self, dy: Array, ids: Array, vocab: int, padding: int | None = None, out: Array | None = None, accumulate: bool = False
    ) -> Array:
        if not singles(dy, out) or (out is not None and not out.flags.c_contiguous):
            return super().embedding_backward(dy, ids, vocab, padding, out, accumulate)
        width = dy.shape[-1]
        target = self.xp.zeros((vocab, width), dtype=F32) if out is None else out
        expect("embedding_backward", "out", target, (vocab, width))
        if out is not None and not accumulate:
            target[...] = 0.0
        flat = self.xp.reshape(ids, (-1,))
        self._add(target, flat, self._read("embedding_backward", "dy", self._flat_rows(dy), (flat.shape[0], width)), width, padding)
        return target

    def _add(self, inout_target: Array, ids: Array, values: Array, width: int, padding: int | None) -> None:
        """Adds values [N,...] to the rows of target [V,...] that ids [N] name."""
        if not values.size:
            return
        n, v = ids.shape[0], inout_target.shape[0]
        ids = self._read("scatter_add", "ids", ids, (n,), I32)
        ids = self.xp.where(ids < 0, ids + v, ids)  # a negative id counts from the end
        order = self.xp.argsort(ids, stable=True)  # can be recorded: CuPy 14.2 sorts without waiting
        turn = self._read("scatter_add", "argsort(ids)", order, (n,), I64)
        target, rows = self.xp.reshape(inout_target, (v, width)), self.xp.reshape(values, (n, width))
        grid = v, blocks_of(width)
        self._launch(add_rows, grid, (THREADS,), rows, ids, turn, -1 if padding is None else padding % v, target)
