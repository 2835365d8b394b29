"""Problems of all dense kernels: norms, activations, heads, attention, losses, the embedding's gradient, the optimizer, dropout.

Bytes: each array that goes in read once, each that comes out written once; what has a row's or a column's length is counted too.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from benchmarks.gpu.clocks import Call
from benchmarks.gpu.data import Data
from benchmarks.gpu.problems import SIZE, Peer, Problem
from benchmarks.gpu.torch_kernels import attention as torch_attention
from minimoe.backend import Backend
from minimoe.reference.random import Draw

EPS = 1e-5
DROPOUT_RATE = 0.1


class Rows(NamedTuple):
    """Rows of a width."""

    n: int
    width: int
    dtype: str


class Heads(NamedTuple):
    """Sequences, their length, query heads, key/value heads, width of a head."""

    b: int
    t: int
    q: int
    g: int
    c: int
    dtype: str

    @property
    def shown(self) -> dict[str, Any]:
        return {"B": self.b, "T": self.t, "Q": self.q, "G": self.g, "C": self.c}


class Head(NamedTuple):
    """Tokens, width, vocabulary."""

    n: int
    d: int
    v: int
    dtype: str


ROWS = {  # for norms, activations (whose hidden width it is) and dropout
    "full": [Rows(32_768, 2048, "bfloat16"), Rows(32_768, 2048, "float32"), Rows(8192, 4096, "bfloat16"), Rows(65_536, 1024, "bfloat16")],
    "quick": [],
    "tiny": [Rows(5, 48, "bfloat16"), Rows(3, 33, "float32")],
}
HEADS = {
    "full": [Heads(16, 2048, 16, 4, 128, "bfloat16"), Heads(16, 1024, 16, 16, 64, "float32")],
    "quick": [],
    "tiny": [Heads(2, 5, 4, 2, 16, "bfloat16"), Heads(1, 3, 2, 1, 6, "float32")],
}
TARGET_HEADS = Heads(8, 2048, 16, 16, 128, "bfloat16")
ATTENTIONS = {  # causal, whole sequences
    "full": [
        TARGET_HEADS,
        Heads(4, 4096, 16, 4, 128, "bfloat16"),
        Heads(16, 1024, 16, 16, 64, "bfloat16"),
        Heads(16, 512, 8, 4, 64, "bfloat16"),
        Heads(4, 1024, 16, 4, 64, "float32"),
    ],
    "quick": [TARGET_HEADS],
    "tiny": [Heads(1, 19, 2, 1, 16, "bfloat16"), Heads(1, 7, 2, 2, 5, "float32")],
}
VOCABULARIES = {
    "full": [Head(8192, 2048, 32_768, "bfloat16"), Head(8192, 1024, 32_768, "float32"), Head(32_768, 1024, 256, "bfloat16")],
    "quick": [],
    "tiny": [Head(5, 16, 40, "bfloat16"), Head(4, 9, 19, "float32")],
}
TABLES = {  # rows of gradients, their width, rows of the table: gradient and table are float32
    "full": [Head(32_768, 2048, 32_768, "float32"), Head(65_536, 1024, 256, "float32")],
    "quick": [],
    "tiny": [Head(7, 12, 5, "float32")],
}
BUFFERS = {"full": [2**26], "quick": [2**26], "tiny": [1003]}  # float32


def dense_problems(scale: str) -> Iterator[Problem]:
    """All problems of this file."""
    for heads in ATTENTIONS[scale]:
        yield from attention_problems(heads, heads == TARGET_HEADS)
    for rows in ROWS[scale]:
        yield from norm_problems(rows)
        yield from activation_problems(rows)
    for heads in HEADS[scale]:
        yield from head_problems(heads)
    for head in VOCABULARIES[scale]:
        yield from loss_problems(head)
    for table in TABLES[scale]:
        yield embedding_problem(table)
    for size in BUFFERS[scale]:
        yield from buffer_problems(size)


# ---- attention -----------------------------------------------------------------------------------------------------------------------


def attention_problems(h: Heads, target: bool) -> Iterator[Problem]:
    """Causal attention, half of whose scores are visible: two products forward, and the five that a backward pass needs."""
    product = h.b * h.q * h.t * h.t * h.c
    ends, keys = h.b * h.t * h.q * h.c * SIZE[h.dtype], h.b * h.t * h.g * h.c * SIZE[h.dtype]
    sums = 4 * h.b * h.q * h.t
    for kernel, backwards, flops, size in (
        ("attention", False, 2 * product, 2 * ends + 2 * keys + sums),
        ("attention_backward", True, 5 * product, 4 * ends + 4 * keys + sums),
    ):
        peer = Peer("PyTorch", partial(torch_attention, *h[:5], h.dtype, backwards))
        make = partial(attention, h, backwards)
        yield Problem(kernel, h.shown, h.dtype, make, size, flops, kernel if target else "", peer)


def attention(h: Heads, backwards: bool, backend: Backend, data: Data) -> Call:
    q, k, v = (data.normal(h.b, h.t, heads, h.c, dtype=h.dtype) for heads in (h.q, h.g, h.g))
    positions = data.numbers([range(h.t)], int)
    options = {"scale": h.c**-0.5, "causal": True, "q_pos": positions, "k_pos": positions}
    if not backwards:
        return lambda: backend.attention(q, k, v, **options)
    y, logsumexp = backend.attention(q, k, v, **options)
    dy = data.normal(h.b, h.t, h.q, h.c, dtype=h.dtype)
    return lambda: backend.attention_backward(dy, q, k, v, y, logsumexp, **options)


# ---- row by row ----------------------------------------------------------------------------------------------------------------------


def norm_problems(r: Rows) -> Iterator[Problem]:
    """Each norm and its backward, alone and after the residual addition."""
    array, width, per_row = r.n * r.width * SIZE[r.dtype], r.width * SIZE[r.dtype], 4 * r.n
    sizes = {"N": r.n, "D": r.width}
    for kernel, arrays, vectors, moments in (
        ("rms_norm", 2, 1, 1),
        ("rms_norm_backward", 3, 2, 1),
        ("layer_norm", 2, 2, 2),
        ("layer_norm_backward", 3, 3, 2),
        ("add_rms_norm", 4, 1, 1),
        ("add_rms_norm_backward", 4, 2, 1),
        ("add_layer_norm", 4, 2, 2),
        ("add_layer_norm_backward", 4, 3, 2),
    ):
        size = arrays * array + vectors * width + moments * per_row
        yield Problem(kernel, sizes, r.dtype, partial(norm, kernel, r), size)


def norm(kernel: str, r: Rows, backend: Backend, data: Data) -> Call:
    """The call of one of the eight kernels, by name."""
    forward = getattr(backend, kernel.removesuffix("_backward"))
    x, weight = data.normal(r.n, r.width, dtype=r.dtype), data.normal(r.width, dtype=r.dtype)
    vectors = (weight,) if "rms" in kernel else (weight, data.normal(r.width, dtype=r.dtype))
    fused = kernel.startswith("add_")
    inputs = (x, data.normal(r.n, r.width, dtype=r.dtype)) if fused else (x,)
    if not kernel.endswith("_backward"):
        return lambda: forward(*inputs, *vectors, EPS)
    backward, (_, *kept) = getattr(backend, kernel), forward(*inputs, *vectors, EPS)
    dy = data.normal(r.n, r.width, dtype=r.dtype)
    if fused:
        dtotal = data.normal(r.n, r.width, dtype=r.dtype)
        return lambda: backward(dtotal, dy, *kept)
    return lambda: backward(dy, x, weight, *kept)


def activation_problems(r: Rows) -> Iterator[Problem]:
    """Activations and dropout; swiglu reads twice the width it writes."""
    array, sizes = r.n * r.width * SIZE[r.dtype], {"N": r.n, "H": r.width}
    for kernel, arrays in (
        ("swiglu", 3), ("swiglu_backward", 5), ("gelu", 2), ("gelu_backward", 3), ("relu", 2), ("relu_backward", 3), ("dropout", 2),
    ):  # fmt: skip
        yield Problem(kernel, sizes, r.dtype, partial(activation, kernel, r), arrays * array)


def activation(kernel: str, r: Rows, backend: Backend, data: Data) -> Call:
    x = data.normal(r.n, 2 * r.width if kernel.startswith("swiglu") else r.width, dtype=r.dtype)
    function = getattr(backend, kernel)
    if kernel == "dropout":
        draw = Draw(0, 1, 0, 0)
        return lambda: function(x, DROPOUT_RATE, draw)
    if not kernel.endswith("_backward"):
        return lambda: function(x)
    dy = data.normal(r.n, r.width, dtype=r.dtype)
    return lambda: function(dy, x)


def head_problems(h: Heads) -> Iterator[Problem]:
    """Rotary positions, alone and while one projection's rows are split into heads."""
    head = h.b * h.t * h.c * SIZE[h.dtype]
    for kernel, heads in (("rope", h.q), ("rope_backward", h.q), ("split_heads", h.q + 2 * h.g), ("split_heads_backward", h.q + 2 * h.g)):
        yield Problem(kernel, h.shown, h.dtype, partial(turned, kernel, h), 2 * heads * head + 4 * h.t)


def turned(kernel: str, h: Heads, backend: Backend, data: Data) -> Call:
    positions = data.numbers([range(h.t)], int)
    frequencies = data.numbers([10_000.0 ** (-2.0 * i / h.c) for i in range(h.c // 2)])
    function = getattr(backend, kernel)
    if kernel.startswith("rope"):
        x = data.normal(h.b, h.t, h.q, h.c, dtype=h.dtype)
        return lambda: function(x, positions, frequencies)
    if kernel == "split_heads":
        rows = data.normal(h.b, h.t, (h.q + 2 * h.g) * h.c, dtype=h.dtype)
        return lambda: function(rows, positions, frequencies, heads=h.q, groups=h.g)
    parts = [data.normal(h.b, h.t, heads, h.c, dtype=h.dtype) for heads in (h.q, h.g, h.g)]
    return lambda: function(*parts, positions, frequencies)


# ---- the vocabulary ------------------------------------------------------------------------------------------------------------------


def loss_problems(p: Head) -> Iterator[Problem]:
    """The loss of given logits, and fused with the head's product: one product forward and two backward."""
    sizes, logits = {"N": p.n, "V": p.v}, p.n * p.v * SIZE[p.dtype]
    yield Problem("cross_entropy", sizes, p.dtype, partial(cross_entropy, p, False), logits + 8 * p.n)
    yield Problem("cross_entropy_backward", sizes, p.dtype, partial(cross_entropy, p, True), 2 * logits + 8 * p.n)
    sizes = {"N": p.n, "D": p.d, "V": p.v}
    product, size = 2 * p.n * p.d * p.v, (p.n * p.d + p.v * p.d) * SIZE[p.dtype] + logits
    yield Problem("linear_cross_entropy", sizes, p.dtype, partial(head_loss, p, False), size, product)
    both = partial(head_loss, p, True)
    watched = "linear_cross_entropy_backward"
    yield Problem("linear_cross_entropy and its backward", sizes, p.dtype, both, 3 * size, 3 * product, watched=watched)


def cross_entropy(p: Head, backwards: bool, backend: Backend, data: Data) -> Call:
    logits, targets = data.normal(p.n, p.v, dtype=p.dtype), data.integers(p.v, p.n)
    if not backwards:
        return lambda: backend.cross_entropy(logits, targets)
    _, _, logsumexp = backend.cross_entropy(logits, targets)
    dloss = data.numbers(1.0 / p.n)
    return lambda: backend.cross_entropy_backward(dloss, logits, targets, logsumexp)


def head_loss(p: Head, both: bool, backend: Backend, data: Data) -> Call:
    x, weight = data.normal(p.n, p.d, dtype=p.dtype), data.normal(p.v, p.d, dtype=p.dtype, scale=p.d**-0.5)
    targets, dloss = data.integers(p.v, p.n), data.numbers(1.0 / p.n)

    def call() -> None:
        _, saved = backend.linear_cross_entropy(x, weight, targets)
        if both:
            backend.linear_cross_entropy_backward(dloss, saved)

    return call


def embedding_problem(p: Head) -> Problem:
    """Rows of gradients, summed by their ids."""
    size = (p.n * p.d + p.v * p.d) * SIZE[p.dtype] + 4 * p.n
    sizes = {"N": p.n, "D": p.d, "V": p.v}
    return Problem("embedding_backward", sizes, p.dtype, partial(embedding_backward, p), size)


def embedding_backward(p: Head, backend: Backend, data: Data) -> Call:
    dy, ids = data.normal(p.n, p.d, dtype=p.dtype), data.integers(p.v, p.n)
    return lambda: backend.embedding_backward(dy, ids, p.v)


# ---- flat buffers --------------------------------------------------------------------------------------------------------------------


def buffer_problems(size: int) -> Iterator[Problem]:
    """The optimizer reads four arrays and writes three."""
    yield Problem("adamw", {"P": size}, "float32", partial(adamw, size), 28 * size)
    yield Problem("sum_of_squares", {"P": size}, "float32", partial(sum_of_squares, size), 4 * size)


def adamw(size: int, backend: Backend, data: Data) -> Call:
    buffers = data.normal(size), backend.xp.zeros(size, dtype=backend.xp.float32), backend.xp.zeros(size, dtype=backend.xp.float32)
    gradient = data.normal(size)
    lr, step, scale, ok = data.numbers(1e-3), data.numbers(3, int), data.numbers(1.0), data.numbers(True, bool)
    options = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    return lambda: backend.adamw(*buffers, gradient, lr=lr, step=step, scale=scale, ok=ok, **options)


def sum_of_squares(size: int, backend: Backend, data: Data) -> Call:
    x = data.normal(size)
    return lambda: backend.sum_of_squares(x)
