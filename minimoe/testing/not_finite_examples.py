"""Inputs with NaN and infinity: what a number that is not finite must reach, so that a step which meets one is skipped.

The references decide, but not all that they do is a promise. These are:

- A NaN in a row of a norm, a product or an attention query makes the row's result NaN, and no other row's; one in a gradient reaches
  every sum that it is a term of. Activations and rotations pass it on elementwise, gathers with its row.
- A NaN in a row of logits makes the row's logsumexp NaN, and if the row counts, its gradient and the loss.
- The weights of a token whose logits are all NaN are NaN if the router chooses for tokens (`gate`'s examples check its ids).
- Infinity: gelu, relu and swiglu of +infinity are infinite, as is a product with one; the sum of its square is infinite.

These are not, since fused kernels may skip what they need not read: a NaN at a masked key or in a dropped element; a NaN times a weight or
a gradient of zero, as in an ignored row's gradient; gelu and swiglu of -infinity, where the reference multiplies it by zero; which of NaN
and infinity a softmax or a norm makes of an infinite input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minimoe.reference.routing import Plan
from minimoe.testing.conformance import Wide
from minimoe.testing.dense_examples import EPS, Example, Examples, Floats, floats, gradients_of, outputs_of, reference
from minimoe.testing.routed_examples import expert_weights

NAN, INF = float("nan"), float("inf")
N, D = 5, 33
BAD = (2, 7)  # where the number lies that is not finite


def with_bad(array: Floats, bad: float = NAN, at: tuple[int, ...] = BAD) -> Floats:
    """Return a copy with a number that is not finite."""
    array = array.copy()
    array[at] = bad
    return array


# ---- dense ---------------------------------------------------------------------------------------------------------------------------


def rms_norm() -> Iterator[Example]:
    yield Example(f"x [{N},{D}] with NaN", (with_bad(floats(1, N, D)), floats(2, D), EPS))


def layer_norm() -> Iterator[Example]:
    yield Example(f"x [{N},{D}] with NaN", (with_bad(floats(1, N, D)), floats(2, D), floats(3, D), EPS))


def rms_norm_backward() -> Iterator[Example]:
    x, w = floats(1, N, D), floats(2, D)
    yield Example(f"dy [{N},{D}] with NaN", (with_bad(floats(3, N, D)), x, w, Wide(reference().rms_norm(x, w, EPS)[1])))


def layer_norm_backward() -> Iterator[Example]:
    x, w = floats(1, N, D), floats(2, D)
    saved = map(Wide, reference().layer_norm(x, w, None, EPS)[1:])
    yield Example(f"dy [{N},{D}] with NaN", (with_bad(floats(3, N, D)), x, w, *saved))


def add_rms_norm() -> Iterator[Example]:
    args = floats(1, N, D), with_bad(floats(3, N, D)), floats(2, D), EPS
    yield Example(f"delta [{N},{D}] with NaN", args, call=outputs_of("add_rms_norm"))


def add_layer_norm() -> Iterator[Example]:
    args = floats(1, N, D), with_bad(floats(3, N, D)), floats(2, D), None, EPS
    yield Example(f"delta [{N},{D}] with NaN", args, call=outputs_of("add_layer_norm"))


def add_rms_norm_backward() -> Iterator[Example]:
    args = floats(1, N, D), floats(3, N, D), floats(2, D), EPS, floats(4, N, D)
    call = gradients_of("add_rms_norm", 4)
    yield Example(f"dy [{N},{D}] with NaN", (*args, with_bad(floats(5, N, D))), call=call)
    yield Example(f"dtotal [{N},{D}] with NaN", (*args[:4], with_bad(args[4]), floats(5, N, D)), call=call)


def add_layer_norm_backward() -> Iterator[Example]:
    args = floats(1, N, D), floats(3, N, D), floats(2, D), None, EPS, floats(4, N, D)
    yield Example(f"dy [{N},{D}] with NaN", (*args, with_bad(floats(5, N, D))), call=gradients_of("add_layer_norm", 5))


def swiglu() -> Iterator[Example]:
    for column in (BAD[1], D + BAD[1]):
        for limit in (0.0, 2.0):
            x = with_bad(floats(1, N, 2 * D), at=(BAD[0], column))
            yield Example(f"x [{N},{2 * D}] with NaN in column {column}, limit {limit}", (x, limit))
    yield Example(f"x [{N},{2 * D}] with infinity", (with_bad(floats(1, N, 2 * D), INF), 0.0))


def swiglu_backward() -> Iterator[Example]:
    yield Example(f"dy [{N},{D}] with NaN", (with_bad(floats(2, N, D)), floats(1, N, 2 * D), 0.0))


def gelu() -> Iterator[Example]:
    for bad in (NAN, INF):
        for tanh in (False, True):
            yield Example(f"x [{N},{D}] with {bad}, tanh {tanh}", (with_bad(floats(1, N, D), bad), tanh))


def gelu_backward() -> Iterator[Example]:
    for tanh in (False, True):
        yield Example(f"dy [{N},{D}] with NaN, tanh {tanh}", (with_bad(floats(2, N, D)), floats(1, N, D), tanh))
        yield Example(f"x [{N},{D}] with NaN, tanh {tanh}", (floats(2, N, D), with_bad(floats(1, N, D)), tanh))


def relu() -> Iterator[Example]:
    for bad in (NAN, INF, -INF):
        yield Example(f"x [{N},{D}] with {bad}", (with_bad(floats(1, N, D), bad),))


def relu_backward() -> Iterator[Example]:
    yield Example(f"dy [{N},{D}] with NaN", (with_bad(floats(2, N, D)), np.abs(floats(1, N, D)) + 0.1))


def rope() -> Iterator[Example]:
    x = with_bad(floats(1, 2, N, 1, 8), at=(1, 2, 0, 3))
    positions = np.arange(N, dtype=np.int32)[None]
    yield Example(f"x [2,{N},1,8] with NaN", (x, positions, Wide(10.0 ** -np.linspace(0.0, 2.0, 4)), 1.0, False))


def linear() -> Iterator[Example]:
    for bad in (NAN, INF):
        yield Example(f"x [{N},{D}] with {bad}", (with_bad(floats(1, N, D), bad), floats(2, 9, D), None))
    yield Example(f"weight [9,{D}] with NaN", (floats(1, N, D), with_bad(floats(2, 9, D)), None))


def linear_dx() -> Iterator[Example]:
    yield Example(f"dy [{N},{D}] with NaN", (with_bad(floats(1, N, D)), floats(2, D, 9)))


def linear_dw() -> Iterator[Example]:
    yield Example(f"dy [{N},{D}] with NaN", (with_bad(floats(1, N, D)), floats(2, N, 9)))


def linear_db() -> Iterator[Example]:
    yield Example(f"dy [{N},{D}] with NaN", (with_bad(floats(1, N, D)),))


def attention() -> Iterator[Example]:
    positions = np.arange(N, dtype=np.int32)[None]
    for causal in (False, True):
        options = {"scale": 0.5, "causal": causal, "q_pos": positions, "k_pos": positions}
        q, k, v = floats(1, 1, N, 2, 4), floats(2, 1, N, 1, 4), floats(3, 1, N, 1, 4)
        yield Example(f"q [1,{N},2,4] with NaN, causal {causal}", (with_bad(q, at=(0, 3, 1, 2)), k, v), options)
        if not causal:
            yield Example(f"k [1,{N},1,4] with NaN", (q, with_bad(k, at=(0, 3, 0, 2)), v), options)
            yield Example(f"v [1,{N},1,4] with NaN", (q, k, with_bad(v, at=(0, 3, 0, 2))), options)


def attention_backward() -> Iterator[Example]:
    positions = np.arange(N, dtype=np.int32)[None]
    options: dict[str, Any] = {"scale": 0.5, "causal": False, "q_pos": positions, "k_pos": positions}
    q, k, v = floats(1, 1, N, 2, 4), floats(2, 1, N, 1, 4), floats(3, 1, N, 1, 4)
    y, lse = reference().attention(q, k, v, **options)
    dy = with_bad(floats(5, *y.shape), at=(0, 3, 1, 2))
    yield Example(f"dy [1,{N},2,4] with NaN", (dy, q, k, v, y, Wide(lse)), options)


# ---- loss, embedding, optimizer ------------------------------------------------------------------------------------------------------

TARGETS = np.array([3, -100, 1, 0, -100], dtype=np.int32)


def cross_entropy() -> Iterator[Example]:
    yield Example(f"logits [{N},{D}] with NaN", (with_bad(floats(1, N, D)), TARGETS))
    yield Example(f"logits [{N},{D}] with NaN at the target", (with_bad(floats(1, N, D), at=(2, 1)), TARGETS))
    yield Example(f"logits [{N},{D}] with NaN in an ignored row", (with_bad(floats(1, N, D), at=(1, 7)), TARGETS))
    nothing = floats(1, N, D)
    nothing[1, :] = -INF
    yield Example(f"logits [{N},{D}], -inf alone in an ignored row", (nothing, TARGETS))
    yield Example(f"logits [{N},{D}] with infinity", (with_bad(floats(1, N, D), INF), TARGETS))


def cross_entropy_backward() -> Iterator[Example]:
    logits = with_bad(floats(1, N, D))
    with np.errstate(all="ignore"):
        _, _, lse = reference().cross_entropy(logits, TARGETS)
    yield Example(f"logits [{N},{D}] with NaN", (Wide(np.array(0.7)), logits, TARGETS, Wide(lse)))


def linear_cross_entropy() -> Iterator[Example]:
    call = outputs_of("linear_cross_entropy")
    yield Example(f"x [{N},9] with NaN", (with_bad(floats(1, N, 9)), floats(2, D, 9), TARGETS), call=call)
    yield Example(f"weight [{D},9] with NaN", (floats(1, N, 9), with_bad(floats(2, D, 9)), TARGETS), call=call)


def linear_cross_entropy_backward() -> Iterator[Example]:
    targets = np.array([3, 2, 1, 0, 4], dtype=np.int32)
    args = with_bad(floats(1, N, 9)), floats(2, D, 9), targets, Wide(np.array(0.7))
    yield Example(f"x [{N},9] with NaN", args, call=gradients_of("linear_cross_entropy", 3))


def embedding() -> Iterator[Example]:
    yield Example(f"weight [4,{D}] with NaN", (np.array([2, 0, 3, 2], dtype=np.int32), with_bad(floats(1, 4, D))))


def embedding_backward() -> Iterator[Example]:
    yield Example(f"dy [4,{D}] with NaN", (with_bad(floats(1, 4, D)), np.array([2, 0, 3, 2], dtype=np.int32), 5, None))


def sum_of_squares() -> Iterator[Example]:
    for bad in (NAN, INF, -INF):
        yield Example(f"x [1000] with {bad}", (with_bad(floats(1, 1000), bad, at=(997,)),))


# ---- routed --------------------------------------------------------------------------------------------------------------------------

OFFSETS = np.array([0, 2, 2, 5], dtype=np.int32)


def grouped_matmul() -> Iterator[Example]:
    for transpose in (False, True):
        weight = floats(2, 3, D, 9) if transpose else floats(2, 3, 9, D)
        yield Example(f"x [{N},{D}] with NaN, transpose {transpose}", (with_bad(floats(1, N, D)), weight, OFFSETS, transpose))


def grouped_matmul_dw() -> Iterator[Example]:
    yield Example(f"dy [{N},{D}] with NaN", (with_bad(floats(1, N, D)), floats(2, N, 9), OFFSETS))


def grouped_bias_backward() -> Iterator[Example]:
    yield Example(f"dy [{N},{D}] with NaN", (with_bad(floats(1, N, D)), OFFSETS))


IDS = np.array([[2, 0], [1, 2], [0, 1], [1, 0], [2, 1]], dtype=np.int32)
WEIGHTS = Wide(np.linspace(0.1, 1.0, 2 * N).reshape(N, 2))


def plan() -> Plan:
    return reference().route(IDS, WEIGHTS.array, None, n_experts=3, rows=2 * N)


def dispatch() -> Iterator[Example]:
    yield Example(f"x [{N},{D}] with NaN", (with_bad(floats(1, N, D)), plan()))


def dispatch_backward() -> Iterator[Example]:
    yield Example(f"drows [{2 * N},{D}] with NaN", (with_bad(floats(1, 2 * N, D)), plan()))


def combine() -> Iterator[Example]:
    yield Example(f"rows [{2 * N},{D}] with NaN", (with_bad(floats(1, 2 * N, D)), WEIGHTS, plan()))


def combine_backward() -> Iterator[Example]:
    yield Example(f"dy [{N},{D}] with NaN", (with_bad(floats(1, N, D)), floats(2, 2 * N, D), WEIGHTS, plan()))


def ffn() -> Iterator[Example]:
    weights = expert_weights(1, 9, 11, "gelu", True)
    one = type(weights)(*(None if w is None else w[0] for w in weights))
    yield Example(f"x [{N},9] with NaN, H 11", (with_bad(floats(1, N, 9)), one), call=outputs_of("ffn", "gelu"))


def ffn_backward() -> Iterator[Example]:
    weights = expert_weights(1, 9, 11, "gelu", True)
    one = type(weights)(*(None if w is None else w[0] for w in weights))
    args = floats(1, N, 9), one, with_bad(floats(3, N, 9))
    yield Example(f"dy [{N},9] with NaN, H 11", args, call=gradients_of("ffn", 2, "gelu"))


def expert_ffn() -> Iterator[Example]:
    args = with_bad(floats(1, N, 9)), expert_weights(3, 9, 11, "gelu", True), OFFSETS
    yield Example(f"rows [{N},9] with NaN, H 11", args, call=outputs_of("expert_ffn", "gelu"))


def expert_ffn_backward() -> Iterator[Example]:
    args = floats(1, N, 9), expert_weights(3, 9, 11, "gelu", True), OFFSETS, with_bad(floats(3, N, 9))
    yield Example(f"dy [{N},9] with NaN, H 11", args, call=gradients_of("expert_ffn", 3, "gelu"))


def moe_ffn() -> Iterator[Example]:
    args = with_bad(floats(1, N, 9)), WEIGHTS, plan(), expert_weights(3, 9, 11, "gelu", True)
    yield Example(f"x [{N},9] with NaN, H 11", args, call=outputs_of("moe_ffn", "gelu"))


def moe_ffn_backward() -> Iterator[Example]:
    args = floats(1, N, 9), WEIGHTS, plan(), expert_weights(3, 9, 11, "gelu", True), with_bad(floats(3, N, 9))
    yield Example(f"dy [{N},9] with NaN, H 11", args, call=gradients_of("moe_ffn", 4, "gelu"))


NOT_FINITE: dict[str, Examples] = {
    "rms_norm": rms_norm, "rms_norm_backward": rms_norm_backward, "layer_norm": layer_norm, "layer_norm_backward": layer_norm_backward,
    "add_rms_norm": add_rms_norm, "add_rms_norm_backward": add_rms_norm_backward, "add_layer_norm": add_layer_norm,
    "add_layer_norm_backward": add_layer_norm_backward, "swiglu": swiglu, "swiglu_backward": swiglu_backward, "gelu": gelu,
    "gelu_backward": gelu_backward, "relu": relu, "relu_backward": relu_backward, "rope": rope, "linear": linear,
    "linear_dx": linear_dx, "linear_dw": linear_dw, "linear_db": linear_db, "attention": attention,
    "attention_backward": attention_backward, "cross_entropy": cross_entropy, "cross_entropy_backward": cross_entropy_backward,
    "linear_cross_entropy": linear_cross_entropy, "linear_cross_entropy_backward": linear_cross_entropy_backward,
    "embedding": embedding, "embedding_backward": embedding_backward, "sum_of_squares": sum_of_squares,
    "grouped_matmul": grouped_matmul, "grouped_matmul_dw": grouped_matmul_dw, "grouped_bias_backward": grouped_bias_backward,
    "dispatch": dispatch, "dispatch_backward": dispatch_backward, "combine": combine, "combine_backward": combine_backward,
    "ffn": ffn, "ffn_backward": ffn_backward, "expert_ffn": expert_ffn, "expert_ffn_backward": expert_ffn_backward,
    "moe_ffn": moe_ffn, "moe_ffn_backward": moe_ffn_backward,
}  # fmt: skip
