"""Attention without the matrix of its scores: tile by tile, in float32 on the multipliers, in bfloat16 on the tensor cores.

The kernels stand in kernels/attention_float.cu, attention_bf16.cu, their attention_backward_*.cu, and attention_delta.cu. They take head
widths up to 128; wider heads, dropout, and shapes that the reference would broadcast go to the reference. Their memory is linear in T.
"""

from typing import Any, NamedTuple

from minimoe.backend import Array
from minimoe.reference.random import Draw
from minimoe_cupy.launch import BFLOAT16, C_NAMES, FLOAT32, CudaTopic, ceil_div, computed, instance, instances, lanes, wide
from minimoe_cupy.loader import Source

WIDTHS = (32, 64, 96, 128)  # of heads, in shared memory: a narrower head is filled up with zeros there
THREADS, DELTA_THREADS, DELTA_ROWS = 128, 256, 32
AHEAD = 32  # tiles whose positions are looked at together
BOTH = ("true", "false")
SUFFIX = {FLOAT32: "float", BFLOAT16: "bf16"}


def _sources(file: str, *choices: tuple[str, ...]) -> tuple[Source, ...]:
    """A source a width, so that a model waits for its own alone."""
    return tuple(Source(f"{file}.cu", instances(file, [width], *choices)) for width in WIDTHS)


FLOAT_32, FLOAT_64, FLOAT_96, FLOAT_128 = _sources("attention_float")
BF16_32, BF16_64, BF16_96, BF16_128 = _sources("attention_bf16")
BACKWARD_FLOAT_32, BACKWARD_FLOAT_64, BACKWARD_FLOAT_96, BACKWARD_FLOAT_128 = _sources("attention_backward_float", BOTH)
BACKWARD_BF16_32, BACKWARD_BF16_64, BACKWARD_BF16_96, BACKWARD_BF16_128 = _sources("attention_backward_bf16", BOTH)
DELTAS = (*instances("attention_delta", [1, 4], ["float"]), *instances("attention_delta", [1, 8], ["bf16"]))
DELTA = Source("attention_delta.cu", (*DELTAS, "attention_dsinks"))

FORWARD = {
    FLOAT32: dict(zip(WIDTHS, (FLOAT_32, FLOAT_64, FLOAT_96, FLOAT_128), strict=True)),
    BFLOAT16: dict(zip(WIDTHS, (BF16_32, BF16_64, BF16_96, BF16_128), strict=True)),
}
BACKWARD = {
    FLOAT32: dict(zip(WIDTHS, (BACKWARD_FLOAT_32, BACKWARD_FLOAT_64, BACKWARD_FLOAT_96, BACKWARD_FLOAT_128), strict=True)),
    BFLOAT16: dict(zip(WIDTHS, (BACKWARD_BF16_32, BACKWARD_BF16_64, BACKWARD_BF16_96, BACKWARD_BF16_128), strict=True)),
}


class Tile(NamedTuple):
    """A block's own rows (or keys), and the bytes of shared memory that it asks for."""

    own: int
    shared: int


def forward_tile(dtype: Any, width: int) -> Tile:
    """As the kernels' first lines have it."""
    if dtype == FLOAT32:
        own, other = 64, 32
        return Tile(own, 4 * ((own + 2 * other) * (width + 4) + own * (other + 4) + own + AHEAD * other + 2 * AHEAD))
    own, other = 128, 64 if width <= 64 else 32
    return Tile(own, 2 * (own + 4 * other) * (width + 8) + 4 * (own + AHEAD * other + 2 * AHEAD))


def backward_tile(dtype: Any, width: int, keys: bool) -> Tile:
    """As the kernels' first lines have it."""
    if dtype == FLOAT32:
        own, other = 64, 32 if width < 128 else 16
        return Tile(own, 4 * (2 * (own + other) * (width + 4) + own * (other + 4) + own + AHEAD * other + 2 * AHEAD + 2 * other))
    own, other = 128 if width <= 64 or not keys else 64, 64 if width == 32 or (width == 64) != keys else 32
    stages = 2 if width <= 64 else 1
    return Tile(own, 4 * (own + stages * other) * (width + 8) + 4 * (own + AHEAD * other + 2 * AHEAD + 2 * stages * other))


class Problem(NamedTuple):
    """What the kernels of one call share."""

    batch: int
    n_q: int
    n_k: int
    queries: int
    groups: int
    positions: tuple[Array | None, ...]  # q_pos, k_pos, k_valid
    numbers: tuple[float, ...]  # scale, causal, window, and what lies between two rows of q_pos, k_pos, k_valid

    @property
    def sizes(self) -> tuple[int, ...]:
        """groups, heads of a group, ceil(2^32 / heads) (by whose product kernels divide; 0: by 1), n_q, n_k"""
        heads = self.queries // self.groups
        return self.groups, heads, ceil_div(2**32, heads) if heads > 1 else 0, self.n_q, self.n_k

    def blocks(self, tile: Tile, keys: bool) -> int:
        """One for each tile of keys, or of rows, in every sequence and group."""
        rows = self.n_k if keys else self.n_q * self.queries // self.groups
        return self.batch * self.groups * ceil_div(rows, tile.own)


class CudaAttention(CudaTopic):
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
        y = out if out is not None and out.shape == shape and in_pieces(out) else self.xp.empty(shape, dtype=kind)
        logsumexp = self.xp.empty((problem.batch, problem.queries, problem.n_q), dtype=FLOAT32)
        wanted = padded_width(q, v)
        tile = forward_tile(kind, wanted)
        name = instance(f"attention_{SUFFIX[kind]}", wanted)
        self._launch(
            FORWARD[kind][wanted], name, problem.blocks(tile, False), THREADS, q, k, v, *problem.positions, self._sinks(sinks), y,
            logsumexp, *problem.sizes, q.shape[3], v.shape[3], *problem.numbers, *vector(q, k, v, y), shared=tile.shared,
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
        wanted = padded_width(q, v)
        for keys, gradient in ((False, dq), (True, dk)):
            tile = backward_tile(kind, wanted, keys)
            name = instance(f"attention_backward_{SUFFIX[kind]}", wanted, BOTH[not keys])
            self._launch(
                BACKWARD[kind][wanted], name, problem.blocks(tile, keys), THREADS, q, k, v, dy, logsumexp, delta, *problem.positions,
                gradient, dv if keys else None, *problem.sizes, q.shape[3], v.shape[3], *problem.numbers, *vector(q, k, v, dy, dq, dk, dv),
                shared=tile.shared,
            )  # fmt: skip
        return self._narrowed(dq, widths[0]), self._narrowed(dk, widths[0]), self._narrowed(dv, widths[1]), dsinks

    # ---- parts -----------------------------------------------------------------------------------------------------------------------

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
        """x as its kernels read it: contiguous; bfloat16 with rows at multiples of 16 bytes, filled up with zeros where they are not."""
        (x,) = self._contiguous(x)
        if in_pieces(x):
            return x
        width = x.shape[3]
        filled = self.xp.zeros((*x.shape[:3], 8 * ceil_div(width, 8)), dtype=x.dtype)
        filled[..., :width] = x
        return filled

    def _narrowed(self, x: Array, width: int) -> Array:
        """x without what filled up its rows."""
        return x if x.shape[3] == width else self.contiguous(x[..., :width])


def covered(
    q: Array, k: Array, v: Array, scale: float, window: int, q_pos: Array, k_pos: Array, k_valid: Array | None, sinks: Array | None
) -> bool:
    """Do the kernels take this: dtypes, head widths, and shapes that fit one another without broadcasting?"""
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
    rows = n_q * (queries // groups)  # of a group; kernels count them in 32 bits
    return fits and scale > 0 and window >= 0 and rows * (queries // groups) < 2**32 and max(rows, n_k) < 2**31 - 2**12


def results_of(q: Array, v: Array, dy: Array, y: Array, logsumexp: Array) -> bool:
    """Are dy, y and logsumexp of the shapes and dtypes that the forward gives?"""
    b, n_q, queries, _ = q.shape
    shapes = dy.shape == y.shape == (b, n_q, queries, v.shape[3]) and logsumexp.shape == (b, queries, n_q)
    return shapes and computed(q, dy, y) and wide(logsumexp)


def in_pieces(x: Array) -> bool:
    """Can the kernels of its dtype read and write it where it is? Those of bfloat16 take 16 bytes at a time only."""
    return bool(x.flags.c_contiguous) and (x.dtype == FLOAT32 or lanes(x.shape[3], x) > 1)


def vector(*arrays: Array) -> tuple[bool, ...]:
    """What kernels of float32 take as `vector`: do all rows begin at multiples of 16 bytes? Those of bfloat16 have no such argument."""
    return (all(lanes(a.shape[3], a) > 1 for a in arrays),) if arrays[0].dtype == FLOAT32 else ()


def padded_width(q: Array, v: Array) -> int:
    """The least of WIDTHS that holds a head."""
    return min(width for width in WIDTHS if width >= max(q.shape[3], v.shape[3]))
