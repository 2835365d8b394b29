"""Attention without the matrix of its scores: tile by tile, in float32 on the ordinary multipliers, in bfloat16 on the tensor cores.

The kernels are kernels/attention_float.cu and attention_bf16.cu, attention_dq_*.cu and attention_dkv_*.cu for their gradients, and
attention_delta.cu. They take heads of up to 128; wider heads, dropout, and shapes that the reference would broadcast go to the reference.
They need memory that is linear in T.
"""

from typing import Any, NamedTuple

from minimoe.backend import Array
from minimoe.reference.random import Draw
from minimoe_cupy.constants import constant
from minimoe_cupy.launch import BFLOAT16, C_NAMES, FLOAT32, CudaLaunch, ceil_div, computed, instance, instances, lanes, wide, writable
from minimoe_cupy.loader import Source

WIDTHS = (32, 64, 96, 128)  # widths of heads in shared memory, where narrower heads are padded with zeros
DELTA_THREADS, DELTA_ROWS = constant("attention_delta.cu", "BLOCK"), constant("attention_delta.cu", "ROWS")
SUFFIX = {FLOAT32: "float", BFLOAT16: "bf16"}


class Tiled(NamedTuple):
    """A kernel for heads of one width: a source of its own, so that a model compiles only the widths that it has."""

    source: Source
    name: str
    keys: bool  # whether a block has a tile of keys, and not of rows
    own: int  # rows, or keys, of a block
    threads: int
    shared: int  # bytes of shared memory that a launch asks for


def _tiled(kernel: str, keys: bool = False) -> dict[tuple[Any, int], Tiled]:
    """The instances of a kernel by dtype and width."""
    found = {}
    for dtype, suffix in SUFFIX.items():
        file = f"{kernel}_{suffix}.cu"
        for width in WIDTHS:
            name = instance(f"{kernel}_{suffix}", width)
            numbers = (constant(file, number, W=width) for number in ("OWN", "THREADS", "SHARED"))
            found[dtype, width] = Tiled(Source(file, (name,)), name, keys, *numbers)
    return found


FORWARD, DQ, DKV = _tiled("attention"), _tiled("attention_dq"), _tiled("attention_dkv", keys=True)
DELTAS = (*instances("attention_delta", [1, 4], ["float"]), *instances("attention_delta", [1, 8], ["bf16"]))
DELTA = Source("attention_delta.cu", (*DELTAS, "attention_dsinks"))


class Problem(NamedTuple):
    """The sizes, positions and options of one call, which all its kernels take."""

    batch: int
    n_q: int
    n_k: int
    queries: int
    groups: int
    positions: tuple[Array | None, ...]  # q_pos, k_pos, k_valid
    numbers: tuple[float, ...]  # scale, causal, window, and the strides of q_pos, k_pos, k_valid from one sequence to the next

    @property
    def sizes(self) -> tuple[int, ...]:
        """groups, heads per group, ceil(2^32 / heads) (kernels divide by multiplying with it; 0 divides by 1), n_q, n_k"""
        heads = self.queries // self.groups
        return self.groups, heads, ceil_div(2**32, heads) if heads > 1 else 0, self.n_q, self.n_k

    def blocks(self, kernel: Tiled) -> int:
        """The number of blocks: one for each tile of rows, or of keys, in every sequence and group."""
        count = self.n_k if kernel.keys else self.n_q * self.queries // self.groups
        return self.batch * self.groups * ceil_div(count, kernel.own)


class CudaAttention(CudaLaunch):
    def attention(
        self, q: Array, k: Array, v: Array, *, scale: float, causal: bool, window: int = 0, q_pos: Array, k_pos: Array,
        k_valid: Array | None = None, sinks: Array | None = None, dropout: float = 0.0, rng: Draw | None = None, out: Array | None = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        if dropout or not covered(q, k, v, scale, window, q_pos, k_pos, k_valid, sinks) or not (out is None or computed(q, out)):
            return super().attention(
                q, k, v, scale=scale, causal=causal, window=window, q_pos=q_pos, k_pos=k_pos, k_valid=k_valid, sinks=sinks, dropout=dropout,
                rng=rng, out=out,
            )  # fmt: skip
        width, kind = v.shape[3], q.dtype
        problem = self._problem(q, k, scale, causal, window, q_pos, k_pos, k_valid)
        q, k, v = (self._in_pieces(a) for a in (q, k, v))
        shape = (*q.shape[:3], v.shape[3])
        direct = out is not None and writable(out, shape, kind) and in_pieces(out)
        y = out if direct else self.xp.empty(shape, dtype=kind)
        logsumexp = self.xp.empty((problem.batch, problem.queries, problem.n_q), dtype=FLOAT32)
        kernel = FORWARD[kind, padded_width(q, v)]
        self._launch(
            kernel.source, kernel.name, problem.blocks(kernel), kernel.threads, q, k, v, *problem.positions, self._sinks(sinks), y,
            logsumexp, *problem.sizes, q.shape[3], v.shape[3], *problem.numbers, *vector(q, k, v, y), shared=kernel.shared,
        )  # fmt: skip
        y = self._narrowed(y, width)
        return (y if y is out else self.store(y, out)), logsumexp

    def attention_backward(
        self, dy: Array, q: Array, k: Array, v: Array, y: Array, logsumexp: Array, *, scale: float, causal: bool, window: int = 0,
        q_pos: Array, k_pos: Array, k_valid: Array | None = None, sinks: Array | None = None, dropout: float = 0.0, rng: Draw | None = None,
    ) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
        if dropout or not covered(q, k, v, scale, window, q_pos, k_pos, k_valid, sinks) or not results_of(q, v, dy, y, logsumexp):
            return super().attention_backward(
                dy, q, k, v, y, logsumexp, scale=scale, causal=causal, window=window, q_pos=q_pos, k_pos=k_pos, k_valid=k_valid,
                sinks=sinks, dropout=dropout, rng=rng,
            )  # fmt: skip
        (logsumexp,) = self._contiguous(logsumexp)
        problem = self._problem(q, k, scale, causal, window, q_pos, k_pos, k_valid)
        delta = self._delta(dy, y, problem)
        dsinks = None
        if sinks is not None:
            dsinks = self.xp.empty(problem.queries, dtype=FLOAT32)
            args = self._sinks(sinks), logsumexp, delta, dsinks, problem.batch, problem.n_q
            self._launch(DELTA, "attention_dsinks", problem.queries, DELTA_THREADS, *args)

        widths, kind = (q.shape[3], v.shape[3]), q.dtype
        dy, q, k, v = (self._in_pieces(a) for a in (dy, q, k, v))
        dq, dk, dv = (self.xp.empty(a.shape, dtype=kind) for a in (q, k, v))
        padded = padded_width(q, v)
        for kernel, gradients in ((DQ[kind, padded], (dq,)), (DKV[kind, padded], (dk, dv))):
            self._launch(
                kernel.source, kernel.name, problem.blocks(kernel), kernel.threads, q, k, v, dy, logsumexp, delta, *problem.positions,
                *gradients, *problem.sizes, q.shape[3], v.shape[3], *problem.numbers, *vector(q, k, v, dy, dq, dk, dv),
                shared=kernel.shared,
            )  # fmt: skip
        return self._narrowed(dq, widths[0]), self._narrowed(dk, widths[0]), self._narrowed(dv, widths[1]), dsinks

    # ---- helpers -----------------------------------------------------------------------------------------------------------------------

    def _problem(
        self, q: Array, k: Array, scale: float, causal: bool, window: int, q_pos: Array, k_pos: Array, k_valid: Array | None
    ) -> Problem:
        (batch, n_q, queries, _), (_, n_k, groups, _) = q.shape, k.shape
        positions = self._contiguous(q_pos, k_pos, k_valid)
        steps = (0 if a is None or a.shape[0] == 1 else a.shape[1] for a in positions)
        return Problem(batch, n_q, n_k, queries, groups, positions, (scale, causal, min(window, 2**31 - 1), *steps))

    def _delta(self, dy: Array, y: Array, problem: Problem) -> Array:
        """sum(dy * y) over a head's width.   [B,Tq,Q,Cv] -> [B,Q,Tq]"""
        dy, y = self._contiguous(dy, y)
        delta = self.xp.empty((problem.batch, problem.queries, problem.n_q), dtype=FLOAT32)
        width, rows = dy.shape[3], problem.batch * problem.n_q * problem.queries
        name = instance("attention_delta", lanes(width, dy, y), dy.dtype)
        self._launch(DELTA, name, ceil_div(rows, DELTA_ROWS), DELTA_THREADS, dy, y, delta, problem.n_q, problem.queries, width, rows)
        return delta

    def _sinks(self, sinks: Array | None) -> Array | None:
        return None if sinks is None else self._contiguous(self.wide(sinks))[0]

    def _in_pieces(self, x: Array) -> Array:
        """Returns x as its kernels read it: contiguous; in bfloat16 with rows padded with zeros to a multiple of 16 bytes."""
        (x,) = self._contiguous(x)
        if in_pieces(x):
            return x
        width = x.shape[3]
        filled = self.xp.zeros((*x.shape[:3], 8 * ceil_div(width, 8)), dtype=x.dtype)
        filled[..., :width] = x
        return filled

    def _narrowed(self, x: Array, width: int) -> Array:
        """Returns x without the padding of its rows."""
        return x if x.shape[3] == width else self.contiguous(x[..., :width])


def covered(
    q: Array, k: Array, v: Array, scale: float, window: int, q_pos: Array, k_pos: Array, k_valid: Array | None, sinks: Array | None
) -> bool:
    """Returns True if the kernels take this call: its dtypes, head widths, and shapes that fit one another without broadcasting."""
    if not (q.ndim == k.ndim == v.ndim == 4 and computed(q, k, v) and q.size and k.size and v.size):
        return False
    (b, n_q, queries, c), (_, n_k, groups, _) = q.shape, k.shape
    if k.shape != (b, n_k, groups, c) or v.shape[:3] != k.shape[:3] or max(c, v.shape[3]) > WIDTHS[-1] or queries % groups:
        return False
    fits = all(
        a is None or (a.dtype == kind and a.shape in ((1, n), (b, n)))
        for a, n, kind in ((q_pos, n_q, "int32"), (k_pos, n_k, "int32"), (k_valid, n_k, "bool"))
    )
    if sinks is not None and (sinks.shape != (queries,) or sinks.dtype not in C_NAMES):
        return False
    rows = n_q * (queries // groups)  # per group; kernels count them in 32 bits
    return fits and scale > 0 and window >= 0 and rows * (queries // groups) < 2**32 and max(rows, n_k) < 2**31 - 2**12


def results_of(q: Array, v: Array, dy: Array, y: Array, logsumexp: Array) -> bool:
    """Returns True if dy, y and logsumexp have the shapes and dtypes that the forward pass returns."""
    b, n_q, queries, _ = q.shape
    shapes = dy.shape == y.shape == (b, n_q, queries, v.shape[3]) and logsumexp.shape == (b, queries, n_q)
    return shapes and computed(q, dy, y) and wide(logsumexp)


def in_pieces(x: Array) -> bool:
    """Returns True if the kernels of its dtype can use x without a copy. Those of bfloat16 access memory only 16 bytes at a time."""
    return bool(x.flags.c_contiguous) and (x.dtype == FLOAT32 or lanes(x.shape[3], x) > 1)


def vector(*arrays: Array) -> tuple[bool, ...]:
    """Returns `vector` for float32 kernels: True if all rows begin at multiples of 16 bytes. Those of bfloat16 take no such argument."""
    return (all(lanes(a.shape[3], a) > 1 for a in arrays),) if arrays[0].dtype == FLOAT32 else ()


def padded_width(q: Array, v: Array) -> int:
    """Returns the least of WIDTHS that holds a head."""
    return min(width for width in WIDTHS if width >= max(q.shape[3], v.shape[3]))
