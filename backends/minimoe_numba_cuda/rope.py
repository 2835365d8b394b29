"""Rotary positions, and the split of one projection's rows into heads. Formulas: minimoe/reference/rope.py.

The cosines and sines of all positions, [B or 1,T,pairs], come from the array library: they are few, all heads share them, and a device's
cos of a large angle uses local memory. One block per token; its threads are the pairs of all heads.
"""

from typing import Any

from minimoe.backend import Array
from minimoe_numba_cuda.compiler import cuda
from minimoe_numba_cuda.launch import F32, I32, THREADS, CudaKernels, singles
from minimoe_numba_cuda.warp import ONE


@cuda.jit(device=True, forceinline=True)
def turn_pair(x, row, start, y, to, begin, cos, sin, angles, i, step, interleaved):  # type: ignore[no-untyped-def]
    """Rotates pair i of the head that begins at x[row, start] into y[to, begin].   step 1 or -1"""
    pairs = cos.shape[1]
    first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
    a, b, c, s = x[row, start + first], x[row, start + second], cos[angles, i], sin[angles, i] * step
    y[to, begin + first] = a * c - b * s
    y[to, begin + second] = b * c + a * s


@cuda.jit
def turn(x, cos, sin, width, step, interleaved, y):  # type: ignore[no-untyped-def]
    """Rotates each head of x and copies its elements past the pairs.   x [N,heads*C], cos, sin [B*T or T,pairs] -> [N,heads*C]

    Grid: N, block 128. Bytes: N*heads*C read and written.
    """
    n, pairs = cuda.blockIdx.x, cos.shape[1]
    angles = n % cos.shape[0]
    rest = width - 2 * pairs  # of a head's numbers
    heads = x.shape[1] // width
    for i in range(cuda.threadIdx.x, heads * pairs, THREADS):
        head = i // pairs
        turn_pair(x, n, head * width, y, n, head * width, cos, sin, angles, i - head * pairs, step, interleaved)
    for i in range(cuda.threadIdx.x, heads * rest, THREADS):
        column = (i // rest) * width + 2 * pairs + i % rest
        y[n, column] = x[n, column]


@cuda.jit
def split(qkv, cos, sin, q, k, v):  # type: ignore[no-untyped-def]
    """qkv [N,(Q+2G)*C] -> q [N,Q*C], k and v [N,G*C], q and k rotated unless the tables are empty.   Grid: N, block 128."""
    n, pairs = cuda.blockIdx.x, cos.shape[1]
    queries, keys = q.shape[1], k.shape[1]
    if cos.size == 0:
        for i in range(cuda.threadIdx.x, queries, THREADS):
            q[n, i] = qkv[n, i]
        for i in range(cuda.threadIdx.x, keys, THREADS):
            k[n, i] = qkv[n, queries + i]
    else:
        angles, width = n % cos.shape[0], 2 * pairs
        for i in range(cuda.threadIdx.x, (queries + keys) // 2, THREADS):
            head = i // pairs
            start, pair = head * width, i - head * pairs
            if start < queries:
                turn_pair(qkv, n, start, q, n, start, cos, sin, angles, pair, ONE, 0)
            else:
                turn_pair(qkv, n, start, k, n, start - queries, cos, sin, angles, pair, ONE, 0)
    for i in range(cuda.threadIdx.x, keys, THREADS):
        v[n, i] = qkv[n, queries + keys + i]


@cuda.jit
def join(dq, dk, dv, cos, sin, dqkv):  # type: ignore[no-untyped-def]
    """The backward of `split`: dq and dk rotated back, all three side by side.   Grid: N, block 128."""
    n, pairs = cuda.blockIdx.x, cos.shape[1]
    queries, keys = dq.shape[1], dk.shape[1]
    if cos.size == 0:
        for i in range(cuda.threadIdx.x, queries, THREADS):
            dqkv[n, i] = dq[n, i]
        for i in range(cuda.threadIdx.x, keys, THREADS):
            dqkv[n, queries + i] = dk[n, i]
    else:
        angles, width = n % cos.shape[0], 2 * pairs
        for i in range(cuda.threadIdx.x, (queries + keys) // 2, THREADS):
            head = i // pairs
            start, pair = head * width, i - head * pairs
            if start < queries:
                turn_pair(dq, n, start, dqkv, n, start, cos, sin, angles, pair, -ONE, 0)
            else:
                turn_pair(dk, n, start - queries, dqkv, n, start, cos, sin, angles, pair, -ONE, 0)
    for i in range(cuda.threadIdx.x, keys, THREADS):
        dqkv[n, queries + keys + i] = dv[n, i]


class CudaRope(CudaKernels):
    def rope(
        self, x: Array, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False, out: Array | None = None
    ) -> Array:
        if not singles(x, inv_freq):
            return super().rope(x, positions, inv_freq, scale, interleaved, out)
        y = self._turned("rope", x, positions, inv_freq, scale, interleaved, 1.0, out)
        return self._stored(y, out)

    def rope_backward(self, dy: Array, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False) -> Array:
        if not singles(dy, inv_freq):
            return super().rope_backward(dy, positions, inv_freq, scale, interleaved)
        return self._turned("rope_backward", dy, positions, inv_freq, scale, interleaved, -1.0, None)

    def split_heads(self, qkv: Array, positions: Array, inv_freq: Array | None, *, heads: int, groups: int) -> tuple[Array, Array, Array]:
        b, t, width = qkv.shape
        c, rest = divmod(width, heads + 2 * groups)
        if rest:
            raise ValueError(f"split_heads: rows of {width} cannot be cut into {heads} + 2 * {groups} heads")
        if not singles(qkv, inv_freq) or (inv_freq is not None and 2 * inv_freq.shape[0] != c):
            return super().split_heads(qkv, positions, inv_freq, heads=heads, groups=groups)
        rows = self._flat_rows(qkv)
        cos, sin = self._tables("split_heads", (b, t), positions, inv_freq, 1.0)
        q, k, v = (self._empty(b * t, count * c) for count in (heads, groups, groups))
        self._launch(split, (b * t,), (THREADS,), rows, cos, sin, q, k, v)
        return tuple(self.xp.reshape(part, (b, t, -1, c)) for part in (q, k, v))

    def split_heads_backward(self, dq: Array, dk: Array, dv: Array, positions: Array, inv_freq: Array | None) -> Array:
        if not singles(dq, dk, dv, inv_freq) or (inv_freq is not None and 2 * inv_freq.shape[0] != dq.shape[-1]):
            return super().split_heads_backward(dq, dk, dv, positions, inv_freq)
        b, t, heads, c = dq.shape
        n, groups = b * t, dk.shape[2]
        parts = [
            self._read("split_heads_backward", name, self.xp.reshape(d, (n, d.shape[2] * c)), (n, count * c))
            for name, d, count in (("dq", dq, heads), ("dk", dk, groups), ("dv", dv, groups))
        ]
        cos, sin = self._tables("split_heads_backward", (b, t), positions, inv_freq, 1.0)
        dqkv = self._empty(n, (heads + 2 * groups) * c)
        self._launch(join, (n,), (THREADS,), *parts, cos, sin, dqkv)
        return self.xp.reshape(dqkv, (b, t, dqkv.shape[1]))

    def _turned(
        self, kernel: str, x: Array, positions: Array, inv_freq: Array, scale: float, interleaved: bool, step: float, out: Array | None
    ) -> Array:
        b, t, heads, c = x.shape
        if 2 * inv_freq.shape[0] > c:
            raise ValueError(f"{kernel}: inv_freq rotates {inv_freq.shape[0]} pairs, heads of {c} have {c // 2}")
        rows = self.xp.reshape(self.contiguous(x), (b * t, heads * c))
        cos, sin = self._tables(kernel, (b, t), positions, inv_freq, scale)
        y = self._result(out, (b, t, heads, c))
        self._launch(turn, (b * t,), (THREADS,), rows, cos, sin, c, step, int(interleaved), self.xp.reshape(y, rows.shape))
        return y

    def _tables(self, kernel: str, size: tuple[int, int], positions: Array, inv_freq: Array | None, scale: float) -> tuple[Any, Any]:
        """Returns scale * cos and scale * sin of each position's angles.   -> [B*T or T,pairs] twice, empty without inv_freq"""
        if inv_freq is None:
            return self._empty(0, 0), self._empty(0, 0)
        xp, (b, t), p = self.xp, size, positions.shape[0]
        positions = self._read(kernel, "positions", positions, (b if p > 1 else 1, t), I32)
        angle = xp.reshape(xp.astype(positions, F32), (-1, 1)) * inv_freq
        return self.contiguous(xp.cos(angle) * scale), self.contiguous(xp.sin(angle) * scale)
