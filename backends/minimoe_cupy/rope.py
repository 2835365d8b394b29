"""Rotary positions, and the split of one projection's rows into heads in the same pass: the launches of kernels/rope.cu."""

import math

import numpy as np

from minimoe.backend import Array
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import CudaLaunch, by_width, ceil_div, check_shape, computed, instance, lanes, wide, writable
from minimoe_cupy.loader import Source

WARP, BLOCK = constant("rope.cu", "WARP"), constant("rope.cu", "BLOCK")
DEEPEST = 64  # tokens per block, at most: CUDA's limit of a block's third dimension
HEADS = 8  # heads per thread, which computes its angles once
ROPE = Source("rope.cu", (*by_width("rope"), *by_width("split_heads"), *by_width("split_heads_backward")))


class CudaRope(CudaLaunch):
    def rope(
        self, x: Array, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False, out: Array | None = None
    ) -> Array:
        check_shape("rope", x.shape, out=out)
        if not computed(x, out) or not angles(positions, inv_freq) or not writable(out, x.shape, x.dtype):
            return super().rope(x, positions, inv_freq, scale, interleaved, out)
        return self._turned("rope", x, positions, inv_freq, scale, interleaved, 1.0, out)

    def rope_backward(self, dy: Array, positions: Array, inv_freq: Array, scale: float = 1.0, interleaved: bool = False) -> Array:
        if not computed(dy) or not angles(positions, inv_freq):
            return super().rope_backward(dy, positions, inv_freq, scale, interleaved)
        return self._turned("rope_backward", dy, positions, inv_freq, scale, interleaved, -1.0, None)

    def split_heads(self, qkv: Array, positions: Array, inv_freq: Array | None, *, heads: int, groups: int) -> tuple[Array, Array, Array]:
        if not computed(qkv) or not angles(positions, inv_freq):
            return super().split_heads(qkv, positions, inv_freq, heads=heads, groups=groups)
        (qkv,) = self._contiguous(qkv)
        b, t, row = qkv.shape
        c = row // (heads + 2 * groups)
        check_shape("split_heads", (b, t, (heads + 2 * groups) * c), qkv=qkv)
        angle, pairs = self._angles("split_heads", (b, t, c), positions, inv_freq)
        q, k, v = (self.xp.empty((b, t, count, c), dtype=qkv.dtype) for count in (heads, groups, groups))
        name, grid, block = launch_shape("split_heads", b * t, heads + 2 * groups, c, pairs, qkv, q, k, v)
        self._launch(ROPE, name, grid, block, qkv, *angle, q, k, v, b * t, positions.size, heads, groups, c, pairs)
        return q, k, v

    def split_heads_backward(self, dq: Array, dk: Array, dv: Array, positions: Array, inv_freq: Array | None) -> Array:
        if not computed(dq, dk, dv) or not angles(positions, inv_freq):
            return super().split_heads_backward(dq, dk, dv, positions, inv_freq)
        dq, dk, dv = self._contiguous(dq, dk, dv)
        b, t, heads, c = dq.shape
        groups = dk.shape[2]
        check_shape("split_heads_backward", (b, t, groups, c), dk=dk, dv=dv)
        angle, pairs = self._angles("split_heads_backward", (b, t, c), positions, inv_freq)
        dqkv = self.xp.empty((b, t, (heads + 2 * groups) * c), dtype=dq.dtype)
        name, grid, block = launch_shape("split_heads_backward", b * t, heads + 2 * groups, c, pairs, dq, dk, dv, dqkv)
        self._launch(ROPE, name, grid, block, dq, dk, dv, *angle, dqkv, b * t, positions.size, heads, groups, c, pairs)
        return dqkv

    def _turned(
        self, kernel: str, x: Array, positions: Array, inv_freq: Array, scale: float, interleaved: bool, turn: float, out: Array | None
    ) -> Array:
        (x,) = self._contiguous(x)
        b, t, heads, c = x.shape
        angle, pairs = self._angles(kernel, (b, t, c), positions, inv_freq)
        y = self.xp.empty(x.shape, dtype=x.dtype) if out is None else out
        name, grid, block = launch_shape("rope", b * t, heads, c, pairs, x, y)
        self._launch(ROPE, name, grid, block, x, *angle, y, b * t, positions.size, heads, c, pairs, scale, turn, interleaved)
        return y

    def _angles(
        self, kernel: str, shape: tuple[int, int, int], positions: Array, inv_freq: Array | None
    ) -> tuple[tuple[Array | None, Array | None], int]:
        """Returns positions and frequencies as the kernels take them, and the number of pairs, 0 without frequencies.   shape (B, T, C)"""
        b, t, c = shape
        check_shape(kernel, (1 if positions.shape[0] == 1 else b, t), positions=positions)
        if inv_freq is None:
            return (None, None), 0
        pairs = inv_freq.shape[0]
        if inv_freq.ndim != 1 or 2 * pairs > c:
            raise ValueError(f"{kernel}: inv_freq is {list(inv_freq.shape)}: wanted at most [{c // 2}], half of a head's width")
        positions, inv_freq = self._contiguous(positions, inv_freq)
        return (positions, inv_freq), pairs


def angles(positions: Array, inv_freq: Array | None) -> bool:
    """Returns True if positions and frequencies have the dtypes that kernels take."""
    return bool(positions.dtype == np.int32) and wide(inv_freq)


def launch_shape(
    kernel: str, tokens: int, heads: int, width: int, pairs: int, first: Array, *others: Array
) -> tuple[str, int, tuple[int, int, int]]:
    """Returns the kernel's instance, its grid, and its block: (accesses of a head, heads, tokens)."""
    v = lanes(math.gcd(width, pairs), first, *others)
    across = min(WARP, power_of_two(ceil_div(max(pairs, width - 2 * pairs), v)))
    down = min(BLOCK // across, power_of_two(ceil_div(heads, HEADS)))
    deep = min(DEEPEST, BLOCK // (across * down))
    return instance(kernel, first.dtype, v), ceil_div(tokens, deep) if heads and width else 0, (across, down, deep)


def power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()
