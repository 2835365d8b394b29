"""Reads rows by id, and adds rows to the rows that ids name: the launches of kernels/embedding.cu and kernels/add_rows.cu.

Ids are sorted (sorting.py) before anything is added, so that each row's sum has one order: equal inputs give equal bits. Negative ids
count from the end, as indices do; an id that names no row gives NaN (a kernel cannot raise), and adds nothing.
"""

import math

import numpy as np

from minimoe.backend import Array
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import BFLOAT16, FLOAT32, by_width, ceil_div, check_shape, computed, instance, instances, lanes, writable
from minimoe_cupy.loader import Source
from minimoe_cupy.sorting import CudaSorting

WARP, WARPS = constant("embedding.cu", "WARP"), constant("embedding.cu", "WARPS")
ADD_WARPS, JOIN_WARPS = constant("add_rows.cu", "WARPS"), constant("add_rows.cu", "JOIN_WARPS")
PIECES = 8192  # pieces of the sorted ids, at most: with many ids they are longer
MOST = 65535  # blocks along a grid's second axis, at most
KINDS = {FLOAT32: ("float", "float"), BFLOAT16: ("bf16", "float"), np.dtype(np.float64): ("double", "double")}  # values, sums
EMBEDDING = Source("embedding.cu", by_width("embedding"))


def _adding(kernel: str) -> tuple[str, ...]:
    widths = {"float": (1, 4), "bf16": (1, 8), "double": (1,)}
    return tuple(name for values, sums in KINDS.values() for name in instances(kernel, [values], [sums], widths[values]))


ADD_ROWS = Source("add_rows.cu", (*_adding("sum_pieces"), *_adding("join_pieces")))


class CudaEmbedding(CudaSorting):
    def embedding(self, ids: Array, weight: Array, out: Array | None = None) -> Array:
        shape = (*ids.shape, weight.shape[1])
        check_shape("embedding", shape, out=out)
        if not computed(weight, out) or ids.dtype != np.int32 or not writable(out, shape, weight.dtype):
            return super().embedding(ids, weight, out)
        ids, weight = self._contiguous(ids, weight)
        rows, width = weight.shape
        y = self.xp.empty(shape, dtype=weight.dtype) if out is None else out
        name = instance("embedding", weight.dtype, lanes(width, weight, y))
        self._launch(EMBEDDING, name, ceil_div(ids.size, WARPS) if width else 0, WARP * WARPS, weight, ids, y, ids.size, rows, width)
        return y

    def embedding_backward(
        self, dy: Array, ids: Array, vocab: int, padding: int | None = None, out: Array | None = None, accumulate: bool = False
    ) -> Array:
        width = dy.shape[-1]
        check_shape("embedding_backward", (vocab, width), out=out)
        if not computed(dy, out) or ids.dtype != np.int32 or not writable(out, (vocab, width), dy.dtype):
            return super().embedding_backward(dy, ids, vocab, padding, out, accumulate)
        check_shape("embedding_backward", (*ids.shape, width), dy=dy)
        if out is None:
            out = self.xp.zeros((vocab, width), dtype=dy.dtype)
        elif not accumulate:
            out[...] = 0.0
        skip = vocab if padding is None else padding % vocab
        self._add_rows(out, self.xp.reshape(ids, (-1,)), dy, vocab, width, skip, accumulate)
        return out

    def scatter_add(self, inout_target: Array, index: Array, values: Array) -> None:
        """Sums bfloat16 in float32, rounded once. Raises TypeError for dtypes that the kernels do not have."""
        if inout_target.dtype not in KINDS:
            raise TypeError(f"scatter_add: inout_target is {inout_target.dtype}: wanted one of {', '.join(str(dtype) for dtype in KINDS)}")
        rows, *rest = inout_target.shape
        check_shape("scatter_add", (index.shape[0], *rest), values=values)
        (target,) = self._contiguous(inout_target)
        self._add_rows(target, index, values, rows, math.prod(rest), rows, True)
        if target is not inout_target:
            inout_target[...] = target

    def _add_rows(self, inout_target: Array, ids: Array, values: Array, rows: int, width: int, skip: int, accumulate: bool) -> None:
        """Adds its values to target[id], or stores their sum; skips row `skip`.   [rows,...], ids [N], values [N,...]"""
        (values,) = self._contiguous(values)
        keys, turn = self._sorted_keys(ids, rows)
        n = keys.shape[0]
        piece = WARP * max(1, ceil_div(n, WARP * PIECES))
        pieces = ceil_div(n, piece)
        kinds = KINDS[inout_target.dtype]
        v = 1 if kinds[0] == "double" else lanes(width, inout_target, values)
        across = min(MOST, ceil_div(width, WARP * v))
        partial = self.xp.empty((pieces if pieces > 1 else 0, 2, width), dtype=np.float64 if kinds[1] == "double" else FLOAT32)
        numbers = n, piece, rows, skip, width, accumulate
        name, grid = instance("sum_pieces", *kinds, v), (ceil_div(pieces, ADD_WARPS), across)
        self._launch(ADD_ROWS, name, grid, WARP * ADD_WARPS, values, keys, turn, inout_target, partial, *numbers)
        name = instance("join_pieces", *kinds, v)
        self._launch(ADD_ROWS, name, (max(0, pieces - 1), across), WARP * JOIN_WARPS, keys, partial, inout_target, *numbers)
