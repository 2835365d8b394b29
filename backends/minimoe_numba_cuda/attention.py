"""Attention: the launches of the kernels in attention_forward.py and attention_backward.py.

Memory grows with Tq + Tk, not with their product. Heads of up to 128 are tiled; wider ones use the first rung, one thread per row.
Calls with dropout go to the reference.
"""

from typing import NamedTuple

from minimoe.backend import Array
from minimoe.reference.random import Draw
from minimoe_numba_cuda.attention_backward import keys_by_thread, keys_tiled, queries_by_thread, queries_tiled, row_products, sink_gradient
from minimoe_numba_cuda.attention_forward import BLOCK_ROWS, TILE, WIDEST, attention_by_thread, attention_tiled
from minimoe_numba_cuda.launch import BOOL, I32, THREADS, CudaKernels, blocks_of, singles
from minimoe_numba_cuda.warp import LANES, WARPS

BLOCK = (LANES * WARPS,)


class Inputs(NamedTuple):
    """Checked inputs, in the order in which kernels take them."""

    q: Array  # [B,Tq,Q,C]
    k: Array  # [B,Tk,G,C]
    v: Array  # [B,Tk,G,Cv]
    q_pos: Array  # [B or 1,Tq]
    k_pos: Array  # [B or 1,Tk]
    k_valid: Array  # [B or 1,Tk], or empty
    sinks: Array  # [Q], or empty

    @property
    def masks(self) -> tuple[Array, Array, Array]:
        return self.q_pos, self.k_pos, self.k_valid

    def tiled(self, factors: int) -> int:
        """Returns the bytes of shared memory of a tiled kernel with so many factors per pair of rows; 0 if the heads are too wide."""
        width, values = self.q.shape[3], self.v.shape[3]
        return 4 * TILE * (width + values + 2 + factors * BLOCK_ROWS) if max(width, values) <= WIDEST else 0


class CudaAttention(CudaKernels):
    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        scale: float,
        causal: bool,
        window: int = 0,
        q_pos: Array,
        k_pos: Array,
        k_valid: Array | None = None,
        sinks: Array | None = None,
        dropout: float = 0.0,
        rng: Draw | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Array]:
        if dropout or not singles(q, k, v, sinks):
            return super().attention(
                q, k, v, scale=scale, causal=causal, window=window, q_pos=q_pos, k_pos=k_pos, k_valid=k_valid, sinks=sinks,
                dropout=dropout, rng=rng, out=out,
            )  # fmt: skip
        inputs = self._inputs("attention", q, k, v, q_pos, k_pos, k_valid, sinks)
        b, tq, heads, _ = q.shape
        y, logsumexp = self._result(out, (b, tq, heads, v.shape[3])), self._empty(b, heads, tq)
        options, shared = (float(scale), int(causal), window), inputs.tiled(1)
        if shared:
            grid = blocks_of(tq, BLOCK_ROWS), heads, b
            self._launch(attention_tiled, grid, BLOCK, *inputs, *options, y, logsumexp, shared=shared)
        else:
            self._launch(attention_by_thread, (blocks_of(b * heads * tq),), (THREADS,), *inputs, *options, y, logsumexp)
        return self._stored(y, out), logsumexp

    def attention_backward(
        self, dy: Array, q: Array, k: Array, v: Array, y: Array, logsumexp: Array, *, scale: float, causal: bool, window: int = 0,
        q_pos: Array, k_pos: Array, k_valid: Array | None = None, sinks: Array | None = None, dropout: float = 0.0, rng: Draw | None = None,
    ) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
        if dropout or not singles(dy, q, k, v, y, logsumexp, sinks):
            return super().attention_backward(
                dy, q, k, v, y, logsumexp, scale=scale, causal=causal, window=window, q_pos=q_pos, k_pos=k_pos, k_valid=k_valid,
                sinks=sinks, dropout=dropout, rng=rng,
            )  # fmt: skip
        where = "attention_backward"
        inputs = self._inputs(where, q, k, v, q_pos, k_pos, k_valid, sinks)
        (b, tq, heads, _), (_, tk, groups, _) = q.shape, k.shape
        dy, y = (self._read(where, name, array, (b, tq, heads, v.shape[3])) for name, array in (("dy", dy), ("y", y)))
        logsumexp, delta = self._read(where, "logsumexp", logsumexp, (b, heads, tq)), self._empty(b, heads, tq)
        self._launch(row_products, (blocks_of(delta.size, WARPS),), BLOCK, dy, y, delta)
        dq, dk, dv = self._empty(*q.shape), self._empty(*k.shape), self._empty(*v.shape)
        args = (dy, *inputs[:3], logsumexp, delta, *inputs.masks, float(scale), int(causal), window)
        if inputs.tiled(1):
            tiles = blocks_of(tq, BLOCK_ROWS), blocks_of(tk, BLOCK_ROWS)
            self._launch(queries_tiled, (tiles[0], heads, b), BLOCK, *args, dq, shared=inputs.tiled(1))
            self._launch(keys_tiled, (tiles[1], groups, b), BLOCK, *args, dk, dv, shared=inputs.tiled(2))
        else:
            self._launch(queries_by_thread, (blocks_of(b * heads * tq),), (THREADS,), *args, dq)
            self._launch(keys_by_thread, (blocks_of(b * groups * tk),), (THREADS,), *args, dk, dv)
        if sinks is None:
            return dq, dk, dv, None
        dsinks = self._empty(heads)
        self._launch(sink_gradient, (heads,), BLOCK, inputs.sinks, logsumexp, delta, dsinks)
        return dq, dk, dv, dsinks

    def _inputs(
        self, kernel: str, q: Array, k: Array, v: Array, q_pos: Array, k_pos: Array, k_valid: Array | None, sinks: Array | None
    ) -> Inputs:
        (b, tq, heads, width), (tk, groups) = q.shape, k.shape[1:3]
        if not groups or heads % groups:
            raise ValueError(f"{kernel}: the heads of q ({heads}) must be a multiple of those of k ({groups})")
        return Inputs(
            self._read(kernel, "q", q, (b, tq, heads, width)),
            self._read(kernel, "k", k, (b, tk, groups, width)),
            self._read(kernel, "v", v, (b, tk, groups, None)),
            self._read(kernel, "q_pos", q_pos, (b if q_pos.shape[0] > 1 else 1, tq), I32),
            self._read(kernel, "k_pos", k_pos, (b if k_pos.shape[0] > 1 else 1, tk), I32),
            self._read(kernel, "k_valid", k_valid, (b if k_valid is not None and k_valid.shape[0] > 1 else 1, tk), BOOL),
            self._read(kernel, "sinks", sinks, (heads,)),
        )
