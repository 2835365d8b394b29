"""The work of one kernel call, from the shapes of its arguments and results: FLOPs of matrix products, bytes of everything else.

A multiply-add counts as two FLOPs. Bytes are the least that can move: each input read once, each result written once; what a kernel
reads again or allocates in between is not counted. Rows of experts are counted as if all of them were used.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from minimoe.backend import Array, Backend


class Work(NamedTuple):
    """`flops` is 0 for a kernel without a matrix product, whose work is its `bytes`."""

    flops: int
    bytes: int


def work(kernel: str, arguments: dict[str, Any], result: Any, top_k: int = 1) -> Work:
    """Return the work of a call. `arguments` are by name, as `bind` returns them; `top_k`: experts per token of the model."""
    rule = FLOPS.get(kernel)
    return Work(rule(arguments, result, top_k) if rule else 0, moved_bytes(kernel, arguments, result))


@cache
def signature(kernel: str) -> inspect.Signature:
    """Return the contract's signature of a kernel, without self."""
    whole = inspect.signature(getattr(Backend, kernel))
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def bind(kernel: str, args: tuple[Any, ...], options: dict[str, Any]) -> inspect.BoundArguments:
    """Return the arguments of a call, defaults included."""
    bound = signature(kernel).bind(*args, **options)
    bound.apply_defaults()
    return bound


# ---- arrays ------------------------------------------------------------------------------------------------------------------------------


def is_array(value: Any) -> bool:
    """Return True for an array of any library: it has a shape and a dtype."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def arrays_of(value: Any) -> Iterator[Array]:
    """Yield the arrays in a value, also those in tuples and lists."""
    if is_array(value):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from arrays_of(part)


def size(x: Array) -> int:
    return math.prod(x.shape)


def byte_size(x: Array) -> int:
    bits = re.search(r"\d+$", str(x.dtype))  # float32: 32; bool has none and takes a byte
    return size(x) * (int(bits[0]) // 8 if bits else 1)


def moved_bytes(kernel: str, arguments: dict[str, Any], result: Any) -> int:
    if kernel == "embedding":  # reads as many rows of the table as it writes, not the whole table
        return byte_size(arguments["ids"]) + 2 * byte_size(result)
    total, seen = 0, set()
    for name, value in [*arguments.items(), ("result", result)]:
        for array in arrays_of(value):
            if id(array) not in seen:
                seen.add(id(array))
                total += byte_size(array) * (2 if name.startswith("inout_") else 1)
    return total


# ---- FLOPs: a rule for each kernel with a matrix product; a: arguments, r: result, k: experts per token ----------------------------------


def of_experts(rows: int, weights: Any) -> int:
    """Return the forward FLOPs of `rows` rows, each through the two products of one expert."""
    return 2 * rows * (size(weights.up) + size(weights.down)) // int(weights.up.shape[0])


def of_attention(a: dict[str, Any], with_k: int, with_v: int) -> int:
    """Return the FLOPs of `with_k` products of query rows over the width of keys, and `with_v` over that of values."""
    b, tq, heads, c = a["q"].shape
    return int(2 * b * heads * tq * a["k"].shape[1] * (with_k * c + with_v * a["v"].shape[3]))


def of_muon(a: dict[str, Any]) -> int:
    """Return the FLOPs of five Newton-Schulz steps of three products each."""
    *stack, rows, columns = a["inout_param"].shape
    m, n = min(rows, columns), max(rows, columns)
    return int(math.prod(stack) * 5 * (4 * m * m * n + 2 * m * m * m))


FLOPS: dict[str, Callable[[dict[str, Any], Any, int], int]] = {
    "linear": lambda a, r, k: 2 * size(a["x"]) * a["weight"].shape[0],
    "linear_dx": lambda a, r, k: 2 * size(a["dy"]) * a["weight"].shape[1],
    "linear_dw": lambda a, r, k: 2 * size(a["dy"]) * a["x"].shape[-1],
    "grouped_matmul": lambda a, r, k: 2 * size(a["x"]) * a["weight"].shape[2 if a["transpose"] else 1],
    "grouped_matmul_dw": lambda a, r, k: 2 * size(a["dy"]) * a["x"].shape[1],
    "ffn": lambda a, r, k: 2 * size(a["x"]) // a["x"].shape[-1] * (size(a["weights"].up) + size(a["weights"].down)),
    "ffn_backward": lambda a, r, k: 4 * size(a["dy"]) // a["dy"].shape[-1] * (size(r[1].up) + size(r[1].down)),
    "expert_ffn": lambda a, r, k: of_experts(a["rows"].shape[0], a["weights"]),
    "expert_ffn_backward": lambda a, r, k: 2 * of_experts(a["dy"].shape[0], r[1]),
    "moe_ffn": lambda a, r, k: of_experts(a["plan"].order.shape[0], a["weights"]),
    "moe_ffn_backward": lambda a, r, k: 2 * of_experts(a["dy"].shape[0] * k, r[2]),
    "attention": lambda a, r, k: of_attention(a, 1, 1),
    "attention_backward": lambda a, r, k: of_attention(a, 3, 2),  # the scores again, dP, dQ, dK, dV
    "linear_cross_entropy": lambda a, r, k: 2 * size(a["x"]) * a["weight"].shape[0],
    "linear_cross_entropy_backward": lambda a, r, k: 4 * size(r[0]) * r[1].shape[0],
    "muon": lambda a, r, k: of_muon(a),
}
