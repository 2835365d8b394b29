"""Problems of the routed layer: gate, route, dispatch and combine with their backwards, grouped products, the whole layer."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from benchmarks.gpu.clocks import Call
from benchmarks.gpu.data import Data
from benchmarks.gpu.problems import SIZE, Peer, Problem
from benchmarks.gpu.torch_kernels import grouped_dw, grouped_dx, grouped_forward
from minimoe.backend import Backend
from minimoe.reference.expert import ExpertWeights
from minimoe.reference.gating import Rule
from minimoe.reference.routing import Plan


class Move(NamedTuple):
    """Tokens, width, experts, experts per token, and how even the load is."""

    n: int
    d: int
    e: int
    k: int
    load: str
    dtype: str


TARGET_MOVE = Move(32_768, 2048, 8, 2, "balanced", "bfloat16")
MOVES = {
    "full": [
        TARGET_MOVE,
        TARGET_MOVE._replace(dtype="float32"),
        TARGET_MOVE._replace(load="skewed"),
        Move(8192, 4096, 64, 8, "balanced", "bfloat16"),
        Move(65_536, 1024, 256, 1, "balanced", "bfloat16"),
        Move(65_536, 1024, 64, 8, "skewed", "float32"),
        Move(4096, 1024, 8, 2, "balanced", "bfloat16"),
    ],
    "quick": [TARGET_MOVE, TARGET_MOVE._replace(dtype="float32")],
    "tiny": [Move(37, 32, 4, 2, "balanced", "bfloat16"), Move(37, 33, 4, 2, "skewed", "float32")],
}
GATES = {  # tokens, experts, experts per token
    "full": [(65_536, 256, 8), (65_536, 64, 8), (65_536, 64, 1), (65_536, 8, 2), (8192, 256, 8)],
    "quick": [(65_536, 256, 8)],
    "tiny": [(37, 8, 2)],
}
ROUTES = {  # tokens, experts, experts per token, how even
    "full": [(65_536, 256, 8, "balanced"), (65_536, 256, 8, "skewed"), (65_536, 8, 2, "balanced"), (8192, 64, 8, "balanced")],
    "quick": [(65_536, 256, 8, "balanced")],
    "tiny": [(37, 8, 2, "skewed")],
}


class Product(NamedTuple):
    """Rows, widths of input and output, experts, and how even the load is."""

    r: int
    i: int
    o: int
    e: int
    load: str
    dtype: str


TARGET_PRODUCT = Product(32_768, 2048, 4096, 8, "balanced", "bfloat16")
PRODUCTS = {
    "full": [
        TARGET_PRODUCT,
        TARGET_PRODUCT._replace(e=64),
        TARGET_PRODUCT._replace(r=8192, i=1024, o=2048, dtype="float32"),
        TARGET_PRODUCT._replace(e=64, load="skewed"),
        Product(65_536, 2048, 1024, 256, "balanced", "bfloat16"),
        Product(65_536, 4096, 2048, 64, "balanced", "bfloat16"),
        Product(16_384, 512, 2048, 8, "balanced", "bfloat16"),
        Product(8192, 1024, 2048, 64, "skewed", "float32"),
    ],
    "quick": [TARGET_PRODUCT, TARGET_PRODUCT._replace(e=64)],
    "tiny": [Product(64, 32, 48, 4, "balanced", "bfloat16"), Product(33, 17, 19, 4, "skewed", "float32")],
}
LAYERS = {  # tokens, width, hidden width, experts, experts per token, dtype
    "full": [(16_384, 2048, 2048, 8, 2, "bfloat16"), (8192, 2048, 1024, 64, 8, "bfloat16"), (4096, 1024, 1024, 8, 2, "float32")],
    "quick": [],
    "tiny": [(37, 16, 24, 4, 2, "float32")],
}


def routed_problems(scale: str) -> Iterator[Problem]:
    """All problems of this file."""
    for move in MOVES[scale]:
        yield from move_problems(move, move == MOVES[scale][0])
    for n, e, k in GATES[scale]:
        yield from gate_problems(n, e, k, (n, e, k) == GATES[scale][0])
    for n, e, k, load in ROUTES[scale]:
        yield route_problem(n, e, k, load, (n, e, k, load) == ROUTES[scale][0])
    for product in PRODUCTS[scale]:
        yield from product_problems(product, product in PRODUCTS[scale][:2])
    for n, d, h, e, k, dtype in LAYERS[scale]:
        yield from layer_problems(n, d, h, e, k, dtype)


# ---- moving rows -------------------------------------------------------------------------------------------------------------------------


def move_problems(move: Move, target: bool) -> Iterator[Problem]:
    """Bytes as in the heads of kernels/dispatch.cu and kernels/combine.cu; dropless, so that all N K slots are used."""
    n, d, _, k, _, dtype = move
    row, slots = d * SIZE[dtype], n * k
    sizes = {"N": n, "D": d, "E": move.e, "K": k, "load": move.load}
    count = {
        "dispatch": (n + slots) * row + 4 * slots,
        "dispatch_backward": (slots + n) * row + 4 * slots,
        "combine": (slots + n) * row + 8 * slots,
        "combine_backward": (2 * slots + n) * row + 12 * slots,
    }
    for kernel, size in count.items():
        yield Problem(kernel, sizes, dtype, partial(MAKE_MOVE[kernel], move), size, goal=kernel if target else "")


def dispatch(m: Move, backend: Backend, data: Data) -> Call:
    x, plan = data.normal(m.n, m.d, dtype=m.dtype), data.plan(m.n, m.e, m.k, m.load)
    return lambda: backend.dispatch(x, plan)


def dispatch_backward(m: Move, backend: Backend, data: Data) -> Call:
    rows, plan = data.normal(m.n * m.k, m.d, dtype=m.dtype), data.plan(m.n, m.e, m.k, m.load)
    return lambda: backend.dispatch_backward(rows, plan)


def combine(m: Move, backend: Backend, data: Data) -> Call:
    rows, weights, plan = data.normal(m.n * m.k, m.d, dtype=m.dtype), data.normal(m.n, m.k), data.plan(m.n, m.e, m.k, m.load)
    return lambda: backend.combine(rows, weights, plan)


def combine_backward(m: Move, backend: Backend, data: Data) -> Call:
    dy, rows = data.normal(m.n, m.d, dtype=m.dtype), data.normal(m.n * m.k, m.d, dtype=m.dtype)
    weights, plan = data.normal(m.n, m.k), data.plan(m.n, m.e, m.k, m.load)
    return lambda: backend.combine_backward(dy, rows, weights, plan)


MAKE_MOVE = {
    "dispatch": dispatch, "dispatch_backward": dispatch_backward, "combine": combine, "combine_backward": combine_backward,
}  # fmt: skip


# ---- choosing ----------------------------------------------------------------------------------------------------------------------------


def gate_problems(n: int, e: int, k: int, target: bool) -> Iterator[Problem]:
    """Logits are float32 whatever the model's dtype. Forward writes scores [N,E]; backward reads them and writes the logits' gradient."""
    rules = {"softmax_topk": Rule("softmax_topk", k)}
    if target and e >= 64:
        rules["sigmoid_bias"] = Rule("sigmoid_bias", k, n_groups=8, top_groups=4)
    forward, backward = 8 * n * e + 8 * n * k + 8 * e, 8 * n * e + 12 * n * k + 4 * e
    for router, rule in rules.items():
        sizes = {"N": n, "E": e, "K": k, "router": router}
        goal = "gate" if target and router == "softmax_topk" else ""
        yield Problem("gate", sizes, "float32", partial(gate, n, e, rule, False), forward, goal=goal)
        yield Problem("gate_backward", sizes, "float32", partial(gate, n, e, rule, True), backward)


def gate(n: int, e: int, rule: Rule, backwards: bool, backend: Backend, data: Data) -> Call:
    logits = data.normal(n, e)
    bias = data.normal(e, scale=0.1) if rule.router == "sigmoid_bias" else None
    if not backwards:
        return lambda: backend.gate(logits, bias, None, rule=rule)
    chosen = backend.gate(logits, bias, None, rule=rule)
    dweights, dsum = data.normal(n, rule.top_k), data.normal(e)
    return lambda: backend.gate_backward(dweights, dsum, chosen, None, rule=rule)


def route_problem(n: int, e: int, k: int, load: str, target: bool) -> Problem:
    """Ids in, order and inverse out."""
    sizes = {"N": n, "E": e, "K": k, "load": load}
    return Problem("route", sizes, "float32", partial(route, n, e, k, load), 12 * n * k + 4 * e, goal="route" if target else "")


def route(n: int, e: int, k: int, load: str, backend: Backend, data: Data) -> Call:
    ids, weights = data.ids(n, e, k, load), data.normal(n, k)
    return lambda: backend.route(ids, weights, None, n_experts=e, rows=n * k)


# ---- multiplying -------------------------------------------------------------------------------------------------------------------------


def product_problems(p: Product, target: bool) -> Iterator[Problem]:
    """y = x W_e', dx = dy W_e, dW_e = dy' x: the same FLOPs, and the same arrays in other roles."""
    flops, size = 2 * p.r * p.i * p.o, (p.r * (p.i + p.o) + p.e * p.i * p.o) * SIZE[p.dtype]
    sizes = {"R": p.r, "I": p.i, "O": p.o, "E": p.e, "load": p.load}
    for kernel, make, peer in (
        ("grouped_matmul", grouped_matmul, grouped_forward),
        ("grouped_matmul, transpose", grouped_transpose, grouped_dx),
        ("grouped_matmul_dw", grouped_matmul_dw, grouped_dw),
    ):
        goal = f"{kernel}, E {p.e}" if target else ""
        beside = Peer("PyTorch grouped_mm", partial(peer, p.r, p.i, p.o, p.e, p.load)) if p.dtype == "bfloat16" else None
        yield Problem(kernel, sizes, p.dtype, partial(make, p), size, flops, goal, beside, kernel.partition(",")[0])


def grouped_matmul(p: Product, backend: Backend, data: Data) -> Call:
    x, weight, offsets = data.normal(p.r, p.i, dtype=p.dtype), weights_of(p, data), data.offsets(p.r, p.e, p.load)
    return lambda: backend.grouped_matmul(x, weight, offsets)


def grouped_transpose(p: Product, backend: Backend, data: Data) -> Call:
    dy, weight, offsets = data.normal(p.r, p.o, dtype=p.dtype), weights_of(p, data), data.offsets(p.r, p.e, p.load)
    return lambda: backend.grouped_matmul(dy, weight, offsets, True)


def grouped_matmul_dw(p: Product, backend: Backend, data: Data) -> Call:
    dy, x, offsets = data.normal(p.r, p.o, dtype=p.dtype), data.normal(p.r, p.i, dtype=p.dtype), data.offsets(p.r, p.e, p.load)
    return lambda: backend.grouped_matmul_dw(dy, x, offsets)


def weights_of(p: Product, data: Data) -> Any:
    return data.normal(p.e, p.o, p.i, dtype=p.dtype, scale=p.i**-0.5)


# ---- the whole layer's kernels, without its router ---------------------------------------------------------------------------------------


def layer_problems(n: int, d: int, h: int, e: int, k: int, dtype: str) -> Iterator[Problem]:
    """moe_ffn forward, and both halves: three products of 2 N K D H forward, twice as many backward."""
    forward, weights = 6 * n * k * d * h, 3 * e * d * h
    size = (2 * n * d + weights) * SIZE[dtype]
    sizes = {"N": n, "D": d, "H": h, "E": e, "K": k}
    yield Problem("moe_ffn", sizes, dtype, partial(moe_ffn, n, d, h, e, k, dtype, False), size, forward)
    both = partial(moe_ffn, n, d, h, e, k, dtype, True)
    yield Problem("moe_ffn and its backward", sizes, dtype, both, 3 * size, 3 * forward, watched="moe_ffn_backward")


def moe_ffn(n: int, d: int, h: int, e: int, k: int, dtype: str, both: bool, backend: Backend, data: Data) -> Call:
    x, dy = data.normal(n, d, dtype=dtype), data.normal(n, d, dtype=dtype)
    plan: Plan = data.plan(n, e, k, "balanced")
    gate_weights = data.normal(n, k)
    weights = ExpertWeights(data.normal(e, 2 * h, d, dtype=dtype, scale=d**-0.5), data.normal(e, d, h, dtype=dtype, scale=h**-0.5))

    def call() -> None:
        _, saved = backend.moe_ffn(x, gate_weights, plan, weights, "swiglu")
        if both:
            backend.moe_ffn_backward(dy, saved, "swiglu")

    return call
