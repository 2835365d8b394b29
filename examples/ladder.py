"""ladder: one Mixture-of-Experts layer, forward and backward, written six times, each time faster and with the same results.

`python examples/ladder.py` checks every rung against the one before, times them in turn and prints the table. Read it from top to bottom:
rung 1 is the definition, and each rung keeps what the one before gained. docs/ladder.md says what a rung changes, and why it helps.

    p = softmax(x router^T); the K largest p of a token, divided by their sum, are its weights            (Jiang et al. 2024)
    expert_e(x) = (silu(g) * u) down_e^T,  [g | u] = x gate_up_e^T,  silu(g) = g sigmoid(g)          (SwiGLU: Shazeer 2020)
    y[n] = sum over its K experts of weight * expert(x[n])                                           (Shazeer et al. 2017)

Dimensions: N tokens, D model width, H hidden width of an expert, E experts, K experts per token, R = N*K rows sorted by
expert, R_e rows of expert e.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from threadpoolctl import ThreadpoolController

Array = npt.NDArray[Any]
Saved = tuple[Any, ...]  # what a forward keeps for its backward
Function = TypeVar("Function", bound=Callable[..., Any])
CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
BLAS = ThreadpoolController()
FIRST_TOKENS = 256  # for rung 1, which is slow and takes tokens one by one: its time is scaled up


class Weights(NamedTuple):
    """The layer's parameters."""

    router: Array  # [E,D]
    gate_up: Array  # [E,2H,D]: gate rows first
    down: Array  # [E,D,H]


class Grads(NamedTuple):
    """The gradients that a backward returns."""

    dx: Array  # [N,D]
    drouter: Array  # [E,D]
    dgate_up: Array  # [E,2H,D]
    ddown: Array  # [E,D,H]


# ---- what rungs 1 to 3 share: a router and an expert, in plain NumPy ------------------------------------------------------------------


def gate(x: Array, router: Array, k: int) -> tuple[Array, Array, Saved]:
    """x [N,D] -> weights [N,K], ids [N,K]; ties go to the lower expert"""
    z = x @ router.T  # [N,E]
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    ids = np.argsort(-p, axis=-1, kind="stable")[:, :k]
    chosen = np.take_along_axis(p, ids, -1)
    weights = chosen / chosen.sum(-1, keepdims=True)
    return weights, ids, (x, router, p, ids, chosen, weights)


def gate_backward(dweights: Array, saved: Saved) -> tuple[Array, Array]:
    """For w = c / sum(c): dc = (dw - <dw, w>) / sum(c); for p = softmax(z): dz = p * (dp - <dp, p>).   -> dx [N,D], drouter [E,D]"""
    x, router, p, ids, chosen, weights = saved
    dp = np.zeros_like(p)
    np.put_along_axis(dp, ids, (dweights - (dweights * weights).sum(-1, keepdims=True)) / chosen.sum(-1, keepdims=True), -1)
    dz = p * (dp - (dp * p).sum(-1, keepdims=True))
    return dz @ router, dz.T @ x


def expert(x: Array, gate_up: Array, down: Array) -> tuple[Array, Saved]:
    """(silu(g) * u) down^T, rows of one expert.   x [R_e,D], gate_up [2H,D], down [D,H] -> [R_e,D]"""
    h = down.shape[1]
    g, u = x @ gate_up[:h].T, x @ gate_up[h:].T  # [R,H] both
    s = 0.5 * (1 + np.tanh(0.5 * g))  # sigmoid(g), which cannot overflow when written so
    hidden = g * s * u
    return hidden @ down.T, (x, gate_up, down, g, u, s, hidden)


def expert_backward(dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
    """silu'(g) = s + g s (1 - s).   -> dx [R_e,D], dgate_up [2H,D], ddown [D,H]"""
    x, gate_up, down, g, u, s, hidden = saved
    dhidden = dy @ down
    dg, du = dhidden * u * s * (1 + g * (1 - s)), dhidden * g * s
    h = down.shape[1]
    return dg @ gate_up[:h] + du @ gate_up[h:], np.concatenate([dg.T @ x, du.T @ x]), dy.T @ hidden


# ---- rung 1: a loop over tokens, the definition ---------------------------------------------------------------------------------------


def tokens_forward(x: Array, w: Weights, k: int) -> tuple[Array, Saved]:
    y, saved = np.zeros_like(x), []
    for n in range(len(x)):
        weights, ids, gated = gate(x[n : n + 1], w.router, k)
        slots = []
        for weight, e in zip(weights[0], ids[0], strict=True):
            out, saved_expert = expert(x[n : n + 1], w.gate_up[e], w.down[e])  # [1,D]
            y[n] += weight * out[0]
            slots.append((weight, e, out, saved_expert))
        saved.append((gated, slots))
    return y, (saved, w)


def tokens_backward(dy: Array, saved: Saved) -> Grads:
    tokens, w = saved
    dx, drouter, dgate_up, ddown = np.zeros_like(dy), np.zeros_like(w.router), np.zeros_like(w.gate_up), np.zeros_like(w.down)
    for n, (gated, slots) in enumerate(tokens):
        dweights = np.array([[(out[0] * dy[n]).sum() for _, _, out, _ in slots]])  # [1,K]: d (weight * out) / d weight = out
        for weight, e, _, saved_expert in slots:
            dx_e, dgate_up_e, ddown_e = expert_backward(weight * dy[n : n + 1], saved_expert)
            dx[n] += dx_e[0]
            dgate_up[e] += dgate_up_e
            ddown[e] += ddown_e
        dx_gate, drouter_n = gate_backward(dweights, gated)
        dx[n] += dx_gate[0]
        drouter += drouter_n
    return Grads(dx, drouter, dgate_up, ddown)


# ---- rung 2: a loop over experts, each with all of its tokens at once -----------------------------------------------------------------


def experts_forward(x: Array, w: Weights, k: int) -> tuple[Array, Saved]:
    weights, ids, gated = gate(x, w.router, k)
    y, groups = np.zeros_like(x), []
    for e in range(len(w.router)):
        token, slot = np.nonzero(ids == e)  # who chose e, and as which of its K
        out, saved_expert = expert(x[token], w.gate_up[e], w.down[e])  # [R_e,D]
        y[token] += weights[token, slot, None] * out  # no token occurs twice in `token`
        groups.append((token, slot, out, saved_expert))
    return y, (weights, gated, groups, w)


def experts_backward(dy: Array, saved: Saved) -> Grads:
    weights, gated, groups, w = saved
    dx, dweights, dgate_up, ddown = np.zeros_like(dy), np.empty_like(weights), np.empty_like(w.gate_up), np.empty_like(w.down)
    for e, (token, slot, out, saved_expert) in enumerate(groups):
        dweights[token, slot] = (out * dy[token]).sum(-1)
        dx_e, dgate_up[e], ddown[e] = expert_backward(weights[token, slot, None] * dy[token], saved_expert)
        dx[token] += dx_e
    dx_gate, drouter = gate_backward(dweights, gated)
    return Grads(dx + dx_gate, drouter, dgate_up, ddown)


# ---- rung 3: sorted by expert, so that each expert's rows are a slice -----------------------------------------------------------------


def sorted_forward(x: Array, w: Weights, k: int) -> tuple[Array, Saved]:
    weights, ids, gated = gate(x, w.router, k)
    order = np.argsort(ids.ravel(), kind="stable")  # [R]: the slot n*K + j of each row
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))  # the row of each slot
    inverse = inverse.reshape(ids.shape)  # [N,K]
    ends = np.cumsum(np.bincount(ids.ravel(), minlength=len(w.router)))
    out, saved_experts = np.empty((len(order), x.shape[1]), x.dtype), []  # [R,D]
    for e, own in enumerate(map(slice, [0, *ends], ends)):
        out[own], saved_expert = expert(x[order[own] // k], w.gate_up[e], w.down[e])
        saved_experts.append((own, saved_expert))
    y = sum(weights[:, j, None] * out[inverse[:, j]] for j in range(k))  # [N,D]
    return np.asarray(y), (weights, gated, order, inverse, out, saved_experts, w)


def sorted_backward(dy: Array, saved: Saved) -> Grads:
    weights, gated, order, inverse, out, saved_experts, w = saved
    k, dslots = weights.shape[1], np.empty_like(weights.ravel())  # [R] by slot
    drows, dgate_up, ddown = np.empty_like(out), np.empty_like(w.gate_up), np.empty_like(w.down)
    for e, (own, saved_expert) in enumerate(saved_experts):
        slot = order[own]
        dout = dy[slot // k]  # [R_e,D]
        dslots[slot] = (out[own] * dout).sum(-1)
        drows[own], dgate_up[e], ddown[e] = expert_backward(weights.ravel()[slot, None] * dout, saved_expert)
    dx, drouter = gate_backward(dslots.reshape(weights.shape), gated)
    for j in range(k):
        dx += drows[inverse[:, j]]
    return Grads(dx, drouter, dgate_up, ddown)


# ---- rung 4: grouped, with one function for the products of all experts, and no new memory ---------------------------------------------


def compiled(function: Function) -> Function:
    """Numba's njit without the GIL, with the type of the function that it compiles.

    So that loops vectorise: sums may be reordered (`fastmath`), and x / 0 is inf instead of an exception (`error_model`).
    """
    return cast(Function, njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})(function))


class Buffers(dict[str, Array]):
    """Arrays by name that the next call uses again, since used memory costs no page faults. They hold the results of one call."""

    def like(self, name: str, shape: Iterable[int], dtype: Any) -> Array:
        """The array `name`, with arbitrary contents; it is made again only if its shape or dtype has changed."""
        held, shape = self.get(name), tuple(shape)
        if held is None or held.shape != shape or held.dtype != dtype:
            held = self[name] = np.empty(shape, dtype)
        return held


@compiled
def counting_sort(ids: Array, order: Array, inverse: Array, ends: Array) -> None:
    """A stable sort of slots by expert: count, sum, place.   ids [N,K] -> order [R], inverse [N,K], ends [E+1]: e has ends[e]:ends[e+1]"""
    n, k = ids.shape
    ends[:] = 0
    for i in range(n):
        for j in range(k):
            ends[ids[i, j] + 1] += 1
    for e in range(1, len(ends)):
        ends[e] += ends[e - 1]
    place = ends[:-1].copy()
    for i in range(n):
        for j in range(k):
            row = place[ids[i, j]]
            place[ids[i, j]] += 1
            order[row] = i * k + j
            inverse[i, j] = row


def plan(ids: Array, n_experts: int, b: Buffers) -> tuple[Array, Array, Array]:
    """-> order [R], inverse [N,K], ends [E+1]"""
    made = b.like("order", (ids.size,), np.int64), b.like("inverse", ids.shape, np.int64), b.like("ends", (n_experts + 1,), np.int64)
    counting_sort(ids, *made)
    return made


def products(rows: Array, matrices: Array, ends: Array, out: Array) -> Array:
    """out[r] = rows[r] M_e for the expert e of the row.   rows [R,I], matrices [E,I,O] -> [R,O]"""
    for e in range(len(matrices)):
        np.matmul(rows[ends[e] : ends[e + 1]], matrices[e], out=out[ends[e] : ends[e + 1]])
    return out


def outer_products(left: Array, right: Array, ends: Array, out: Array) -> Array:
    """out[e] = left_e^T right_e.   left [R,O], right [R,I] -> [E,O,I]"""
    for e in range(len(out)):
        np.matmul(left[ends[e] : ends[e + 1]].T, right[ends[e] : ends[e + 1]], out=out[e])
    return out


def grouped_forward(x: Array, w: Weights, k: int, b: Buffers) -> tuple[Array, Saved]:
    (n, d), h, like = x.shape, w.down.shape[2], partial(b.like, dtype=x.dtype)
    weights, ids, gated = gate(x, w.router, k)
    order, inverse, ends = plan(ids, len(w.router), b)
    rows = np.take(x, order // k, axis=0, out=like("rows", (n * k, d)), mode="clip")
    g_u = products(rows, w.gate_up.swapaxes(1, 2), ends, like("g_u", (n * k, 2 * h)))
    s, hidden = like("s", (n * k, h)), like("hidden", (n * k, h))
    np.multiply(g_u[:, :h], 0.5, out=s)
    np.tanh(s, out=s)
    s += 1
    s *= 0.5
    np.multiply(g_u[:, :h], s, out=hidden)
    hidden *= g_u[:, h:]
    out = products(hidden, w.down.swapaxes(1, 2), ends, like("out", (n * k, d)))
    slots = np.take(out, inverse, axis=0, out=like("slots", (n, k, d)), mode="clip")
    y = np.einsum("nk,nkd->nd", weights, slots, out=like("y", x.shape))
    return y, (weights, gated, order, inverse, ends, rows, g_u, s, hidden, out, w, b)


def grouped_backward(dy: Array, saved: Saved) -> Grads:
    """May run once after each forward, since it overwrites the forward's s."""
    weights, gated, order, inverse, ends, rows, g_u, s, hidden, out, w, b = saved
    (n, d), k, h, like = dy.shape, weights.shape[1], w.down.shape[2], partial(b.like, dtype=dy.dtype)
    dout = np.take(dy, order // k, axis=0, out=like("dout", rows.shape), mode="clip")
    dweights = np.einsum("rd,rd->r", out, dout)[inverse]
    dout *= weights.ravel()[order, None]
    ddown = outer_products(dout, hidden, ends, like("ddown", w.down.shape))
    dhidden, dg_u = products(dout, w.down, ends, like("dhidden", hidden.shape)), like("dg_u", g_u.shape)
    dg, du, g, u = dg_u[:, :h], dg_u[:, h:], g_u[:, :h], g_u[:, h:]
    np.subtract(1, s, out=dg)  # becomes dhidden * u * s * (1 + g * (1 - s))
    dg *= g
    dg += 1
    s *= dhidden
    dg *= s
    dg *= u
    np.multiply(s, g, out=du)
    dgate_up = outer_products(dg_u, rows, ends, like("dgate_up", w.gate_up.shape))
    drows = products(dg_u, w.gate_up, ends, like("drows", rows.shape))
    dx_gate, drouter = gate_backward(dweights, gated)
    dx = np.sum(np.take(drows, inverse, axis=0, out=like("slots", (n, k, d)), mode="clip"), axis=1, out=like("dx", dy.shape))
    dx += dx_gate
    return Grads(dx, drouter, dgate_up, ddown)


# ---- rung 5: fused, with everything between two products compiled into one pass --------------------------------------------------------


@compiled
def sigmoid(x: Any, real: Any) -> Any:
    """1 / (1 + exp(-x)) without a call or a branch: so a loop over it vectorises. exp(t) = 2^m exp(r), |r| <= ln(2)/2, exp(r) by Taylor.

    `real` is x's type: a plain 0.5 would be float64 and drag float32 along. 2^m is made of its bits: m + 127 is a float32's exponent.
    """
    t = max(min(-x, real(87)), real(-87))
    m = np.floor(t * real(1.4426950408889634) + real(0.5))  # t / ln(2), rounded
    r = (t - m * real(0.693145751953125)) - m * real(1.4286068203094173e-6)  # ln(2) in two parts: the first product is exact
    p = real(1 / 3628800)
    for c in (1 / 362880, 1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = p * r + real(c)
    return real(1) / (real(1) + p * real(np.int32((np.int32(m) + 127) << 23).view(np.float32)))


@compiled
def gather(x: Array, order: Array, k: int, rows: Array, start: int, stop: int) -> None:
    """rows[r] = x[order[r] // K] for start <= r < stop"""
    for r in range(start, stop):
        source, row = x[order[r] // k], rows[r]
        for i in range(len(row)):
            row[i] = source[i]


@compiled
def swiglu(g_u: Array, order: Array, weights: Array, hidden: Array, start: int, stop: int) -> None:
    """hidden = weight * g * sigmoid(g) * u: down_e then gives weighted rows.   g_u [R,2H], weights [R] by slot -> hidden [R,H]"""
    real, h = g_u.dtype.type, hidden.shape[1]
    for r in range(start, stop):
        g, u, out, weight = g_u[r, :h], g_u[r, h:], hidden[r], weights[order[r]]
        for i in range(h):
            out[i] = weight * g[i] * sigmoid(g[i], real) * u[i]


@compiled
def swiglu_backward(g_u: Array, order: Array, weights: Array, v: Array, dweights: Array, start: int, stop: int) -> None:
    """One pass reads g, u, v = down_e^T dy and leaves dg, du, weight * hidden there; dweight = <hidden, v>, that is <down_e hidden, dy>."""
    real, h = g_u.dtype.type, v.shape[1]
    for r in range(start, stop):
        g, u, row, weight, dweight = g_u[r, :h], g_u[r, h:], v[r], weights[order[r]], real(0)
        for i in range(h):
            s = sigmoid(g[i], real)
            silu = g[i] * s
            hidden, dhidden = silu * u[i], weight * row[i]
            dweight += hidden * row[i]
            g[i], u[i], row[i] = dhidden * u[i] * (s + silu * (real(1) - s)), dhidden * silu, weight * hidden
        dweights[order[r]] = dweight


@compiled
def add_slots(rows: Array, inverse: Array, y: Array, start: int, stop: int) -> None:
    """y[n] += sum_j rows[inverse[n,j]] for start <= n < stop: the combine, and the gradient of the gather"""
    for n in range(start, stop):
        out = y[n]
        for j in range(inverse.shape[1]):
            row = rows[inverse[n, j]]
            for i in range(len(out)):
                out[i] += row[i]


Work = Callable[[int, int, int], None]


def in_turn(work: Work, bounds: Array) -> None:
    """work(i, bounds[i], bounds[i + 1]) for each i"""
    for i in range(len(bounds) - 1):
        work(i, bounds[i], bounds[i + 1])


def fused_forward(x: Array, w: Weights, k: int, b: Buffers, run: Callable[[Work, Array], None] = in_turn) -> tuple[Array, Saved]:
    (n, d), h, like = x.shape, w.down.shape[2], partial(b.like, dtype=x.dtype)
    weights, ids, gated = gate(x, w.router, k)
    order, inverse, ends = plan(ids, len(w.router), b)
    rows, g_u, hidden, out = (like(name, (n * k, c)) for name, c in (("rows", d), ("g_u", 2 * h), ("hidden", h), ("out", d)))
    y = like("y", x.shape)

    def one_expert(e: int, start: int, stop: int) -> None:
        own = slice(start, stop)
        gather(x, order, k, rows, start, stop)
        np.matmul(rows[own], w.gate_up[e].T, out=g_u[own])
        swiglu(g_u, order, weights.ravel(), hidden, start, stop)
        np.matmul(hidden[own], w.down[e].T, out=out[own])

    run(one_expert, ends)
    y.fill(0)
    run(lambda _, start, stop: add_slots(out, inverse, y, start, stop), token_blocks(n))
    return y, (weights, gated, order, inverse, ends, rows, g_u, w, b, run)  # hidden and out are free again


def fused_backward(dy: Array, saved: Saved) -> Grads:
    """May run once after each forward, since it overwrites the forward's g_u."""
    weights, gated, order, inverse, ends, rows, g_u, w, b, run = saved
    (n, k), like, dweights = weights.shape, partial(b.like, dtype=dy.dtype), np.empty_like(weights)
    dout, v, dgate_up, ddown = like("out", rows.shape), b["hidden"], like("dgate_up", w.gate_up.shape), like("ddown", w.down.shape)

    def one_expert(e: int, start: int, stop: int) -> None:
        own = slice(start, stop)
        gather(dy, order, k, dout, start, stop)
        np.matmul(dout[own], w.down[e], out=v[own])
        swiglu_backward(g_u, order, weights.ravel(), v, dweights.ravel(), start, stop)  # v is now weight * hidden, g_u its gradient
        np.matmul(dout[own].T, v[own], out=ddown[e])
        np.matmul(g_u[own].T, rows[own], out=dgate_up[e])
        np.matmul(g_u[own], w.gate_up[e], out=dout[own])  # the gradient of rows, in the place of dy's

    run(one_expert, ends)
    dx, drouter = gate_backward(dweights, gated)
    run(lambda _, start, stop: add_slots(dout, inverse, dx, start, stop), token_blocks(n))
    return Grads(dx, drouter, dgate_up, ddown)


# ---- rung 6: threaded, whole experts and blocks of tokens side by side -----------------------------------------------------------------


@cache
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CORES)


def token_blocks(n: int) -> Array:
    """Bounds of one block of tokens for each core.   [CORES+1]"""
    return np.linspace(0, n, CORES + 1).astype(np.int64)


def side_by_side(work: Work, bounds: Array) -> None:
    """Like `in_turn`, on all cores: neither NumPy's products nor these kernels hold the GIL. The largest expert starts first."""
    largest_first = np.argsort(-np.diff(bounds), kind="stable").tolist()
    done = pool().map(lambda i: work(i, int(bounds[i]), int(bounds[i + 1])), largest_first)
    list(done)  # waits, and raises what a thread raised


def threaded_forward(x: Array, w: Weights, k: int, b: Buffers) -> tuple[Array, Saved]:
    with BLAS.limit(limits=1, user_api="blas"):  # the router's too: BLAS's own threads would wait busily on a core that an expert wants
        return fused_forward(x, w, k, b, in_turn if CORES == 1 else side_by_side)


def threaded_backward(dy: Array, saved: Saved) -> Grads:
    with BLAS.limit(limits=1, user_api="blas"):
        return fused_backward(dy, saved)


# ---- checking and timing -------------------------------------------------------------------------------------------------------------


class Rung(NamedTuple):
    """One way to write the layer."""

    name: str
    forward: Callable[..., tuple[Array, Saved]]
    backward: Callable[[Array, Saved], Grads]
    why: str
    has_buffers: bool = True

    def layer(self) -> Callable[[Array, Array, Weights, int], tuple[Array, Grads]]:
        """x, dy [N,D] -> y [N,D] and the gradients of <y, dy>, with buffers of its own, which hold the results until the next call."""
        buffers = (Buffers(),) if self.has_buffers else ()

        def forward_backward(x: Array, dy: Array, w: Weights, k: int) -> tuple[Array, Grads]:
            y, saved = self.forward(x, w, k, *buffers)
            return y, self.backward(dy, saved)

        return forward_backward


RUNGS = (
    Rung("1 tokens", tokens_forward, tokens_backward, "the definition: each token alone", False),
    Rung("2 experts", experts_forward, experts_backward, "an expert's weights are read once for all its tokens", False),
    Rung("3 sorted", sorted_forward, sorted_backward, "an expert's rows are a slice; results are gathered, not added in", False),
    Rung("4 grouped", grouped_forward, grouped_backward, "one wide product for gate and up; memory is used again"),
    Rung("5 fused", fused_forward, fused_backward, "one pass between two products; experts' outputs are not kept"),
    Rung("6 threaded", threaded_forward, threaded_backward, "whole experts side by side, one BLAS thread each"),
)


def make_case(n: int, d: int, h: int, e: int, dtype: Any = np.float32) -> tuple[Array, Array, Weights]:
    """x, dy [N,D] and weights, all random."""
    rng = np.random.default_rng(0)
    shapes = (n, d), (n, d), (e, d), (e, 2 * h, d), (e, d, h)
    x, dy, router, gate_up, down = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return x, dy, Weights(router / np.sqrt(d, dtype=dtype), gate_up / np.sqrt(d, dtype=dtype), down / np.sqrt(h, dtype=dtype))


def difference(one: tuple[Array, Grads], other: tuple[Array, Grads]) -> float:
    """The largest difference in the output or a gradient, relative to the largest number of that array."""
    pairs = zip((one[0], *one[1]), (other[0], *other[1]), strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(b).max() or 1)) for a, b in pairs)


def flops(n: int, d: int, h: int, e: int, k: int) -> int:
    """FLOPs of the products: 2 per weight and token forward, twice that backward."""
    return 3 * 2 * n * (3 * k * d * h + e * d)


def page_faults() -> int:
    """Page faults of this process so far; 0 where the system does not count them."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def check(case: tuple[Array, Array, Weights], k: int, say: Callable[[str], None]) -> None:
    """Check each rung against the one before; the first two on few tokens."""
    x, dy, w = case
    tolerance = 2e-5 if x.dtype == np.float32 else 1e-10
    for before, rung in zip(RUNGS, RUNGS[1:], strict=False):
        n = min(FIRST_TOKENS, len(x)) if before is RUNGS[0] else len(x)
        one, other = (each.layer()(x[:n], dy[:n], w, k) for each in (rung, before))
        found = difference(one, other)
        say(f"{rung.name} gives what {before.name} gives: {n} tokens, largest relative difference {found:.1e}")
        assert found < tolerance, f"{rung.name} differs from {before.name} by {found:.1e}"


def measure(case: tuple[Array, Array, Weights], k: int, rounds: int, console: Console) -> tuple[list[float], list[int]]:
    """Each rung's median seconds, forward and backward, and page faults. Rungs alternate, with two calls each; the second counts."""
    x, dy, w = case
    layers = [rung.layer() for rung in RUNGS]
    seconds: list[list[float]] = [[] for _ in RUNGS]
    faults: list[list[int]] = [[] for _ in RUNGS]
    for _ in track(range(rounds), "timing", console=console, transient=True):
        for i, layer in enumerate(layers):
            n = min(FIRST_TOKENS, len(x)) if i == 0 else len(x)
            time.sleep(0.1)  # BLAS's threads wait busily for a while after a product; the next rung needs their core
            layer(x[:n], dy[:n], w, k)  # makes its buffers and wakes its threads
            start, faults_before = time.perf_counter(), page_faults()
            layer(x[:n], dy[:n], w, k)
            seconds[i].append((time.perf_counter() - start) * len(x) / n)
            faults[i].append((page_faults() - faults_before) * len(x) // n)
    return [statistics.median(times) for times in seconds], [int(statistics.median(counts)) for counts in faults]


def table(times: list[float], faults: list[int], n_flops: int, title: str) -> Table:
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("rung", "ms", "GFLOP/s", "x before", "x first", "page faults", "why"):
        made.add_column(name, justify="left" if name in ("rung", "why") else "right", no_wrap=name != "why")
    for i, (rung, seconds) in enumerate(zip(RUNGS, times, strict=True)):
        ratios = f"{times[max(i - 1, 0)] / seconds:.2f}", f"{times[0] / seconds:.1f}"
        made.add_row(rung.name, f"{seconds * 1e3:.1f}", f"{n_flops / seconds / 1e9:.1f}", *ratios, str(faults[i]), rung.why)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="A Mixture-of-Experts layer, forward and backward, in six rungs, each checked and timed.")
    sizes = (("tokens", 2048), ("d-model", 128), ("d-hidden", 256), ("experts", 8), ("top-k", 2), ("rounds", 11))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"(default {default})")
    parser.add_argument("--blas-threads", type=int, default=1, metavar="N", help="of rungs 1 to 5: products on N cores (default 1)")
    args = parser.parse_args()
    if min(vars(args).values()) < 1 or args.top_k > args.experts:
        parser.error("all numbers must be at least 1, and --top-k at most --experts")
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    case = make_case(args.tokens, args.d_model, args.d_hidden, args.experts)
    with BLAS.limit(limits=args.blas_threads, user_api="blas"):
        console.print("checking; the first time the kernels of rungs 4 to 6 are compiled, which takes a while")
        check(case, args.top_k, console.print)
        times, faults = measure(case, args.top_k, args.rounds, console)
    counted = flops(args.tokens, args.d_model, args.d_hidden, args.experts, args.top_k)
    shape = f"N {args.tokens}, D {args.d_model}, H {args.d_hidden}, E {args.experts}, K {args.top_k}, float32, {CORES} cores"
    console.print(table(times, faults, counted, f"forward + backward, median of {args.rounds}: {shape}, BLAS threads {args.blas_threads}"))
    if args.tokens > FIRST_TOKENS:
        console.print(f"{RUNGS[0].name} ran {FIRST_TOKENS} of the {args.tokens} tokens; its time and its faults are scaled up.")


if __name__ == "__main__":
    main()
