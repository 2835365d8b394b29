"""Inputs beyond what tiles and counters of fast kernels assume, and sums so long that the order of their additions shows.

More rows than a counter of 16 bits or a grid of 65,535 blocks has, more columns than a block has threads, more experts than a register
or a warp holds, more targets than float32 counts one by one (2^24), and long sums of terms of one sign, whose rounding errors add up
instead of cancelling. Small in every other axis, so that most take a fraction of a second.

A sum along the last axis, or of a whole array, must be taken in blocks, by halves, or by vectors and threads (`blocked`). A product may be
one chain of additions, in at least float32: several libraries for linear algebra add so where a matrix is thin. Sums over the rows of a
matrix (the gradients of biases and of norms' weights, `prob_sum`, the sums of embedding_backward, which have the order of the ids) are not
among the long ones: libraries add row after row, and a promise would cost every one of them a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from minimoe.reference.optimizers import OPTIMIZERS
from minimoe.testing.conformance import Wide
from minimoe.testing.dense_examples import EPS, Example, Examples, Floats, floats, generator, gradients_of, outputs_of, reference
from minimoe.testing.routed_examples import Ints
from minimoe.testing.training_examples import draws, optimizer_steps

ROWS = 70_001  # more than 65,535
COLUMNS = 5_003  # more than four blocks of 1,024 threads
EXPERTS = 1_100
TERMS = 1_000_000
CHAIN = 100_000  # terms of a product
WIDE = 2**18  # columns of a norm whose sums are long: the 32 lanes of a warp may share a row
COUNTED = 2**24 + 2**18  # if ones are added up in float32 one by one, the sum stays at 2^24


def blocked(terms: int) -> int:
    """Return how many additions, one after the other, a term of a long sum may pass through: blocks of sqrt(n) need 2 sqrt(n).

    One chain of a million numbers like `terms` is off by 10 to 40 times the tolerance that follows.
    """
    return int(4 * terms**0.5)


SHAPES = ((ROWS, 3), (3, COLUMNS))


def terms(*shape: int) -> Floats:
    """Return numbers of one sign for long sums: 0.1, 0.3, 0.1, ..."""
    return np.resize(np.array([0.1, 0.3]), shape)


# ---- dense ---------------------------------------------------------------------------------------------------------------------------


def norm_inputs() -> Iterator[tuple[str, Floats, Floats, Floats, int]]:
    """-> label, x, weight, dy, additions.   Rows are spread out: the norm of nearly equal numbers magnifies their rounding."""
    for n, d in SHAPES:
        x = 0.3 * floats(1, n, d) + np.linspace(-1.5, 2.0, d)
        yield f"x [{n},{d}]", x, 1.0 + 0.1 * floats(2, d), 0.3 * floats(3, n, d), blocked(max(n, d))
    yield f"x [1,{WIDE}], a long sum", terms(1, WIDE), np.ones(WIDE), floats(3, 1, WIDE), WIDE // 32


def rms_norm() -> Iterator[Example]:
    for label, x, w, _, n in norm_inputs():
        yield Example(label, (x, w, EPS), additions=n)


def layer_norm() -> Iterator[Example]:
    for label, x, w, _, n in norm_inputs():
        yield Example(label, (x, w, None, EPS), additions=n)


def rms_norm_backward() -> Iterator[Example]:
    for label, x, w, dy, n in norm_inputs():
        yield Example(label, (dy, x, w, Wide(reference().rms_norm(x, w, EPS)[1])), additions=n)


def layer_norm_backward() -> Iterator[Example]:
    for label, x, w, dy, n in norm_inputs():
        yield Example(label, (dy, x, w, *map(Wide, reference().layer_norm(x, w, None, EPS)[1:])), additions=n)


def add_rms_norm() -> Iterator[Example]:
    for label, x, w, dy, n in norm_inputs():
        yield Example(label, (x, dy, w, EPS), call=outputs_of("add_rms_norm"), additions=n)


def add_rms_norm_backward() -> Iterator[Example]:
    for label, x, w, dy, n in norm_inputs():
        yield Example(label, (x, dy, w, EPS, None, floats(4, *x.shape)), call=gradients_of("add_rms_norm", 4), additions=n)


def add_layer_norm() -> Iterator[Example]:
    for label, x, w, dy, n in norm_inputs():
        yield Example(label, (x, dy, w, None, EPS), call=outputs_of("add_layer_norm"), additions=n)


def add_layer_norm_backward() -> Iterator[Example]:
    for label, x, w, dy, n in norm_inputs():
        yield Example(label, (x, dy, w, None, EPS, None, floats(4, *x.shape)), call=gradients_of("add_layer_norm", 5), additions=n)


def swiglu() -> Iterator[Example]:
    for n, h in SHAPES:
        yield Example(f"x [{n},{2 * h}]", (floats(1, n, 2 * h), 0.0))


def swiglu_backward() -> Iterator[Example]:
    for n, h in SHAPES:
        yield Example(f"x [{n},{2 * h}]", (floats(2, n, h), floats(1, n, 2 * h), 0.0))


def elementwise() -> Iterator[Example]:
    for shape in SHAPES:
        yield Example(f"x {list(shape)}", (floats(1, *shape),))


def elementwise_backward() -> Iterator[Example]:
    for shape in SHAPES:
        yield Example(f"x {list(shape)}", (floats(2, *shape), floats(1, *shape)))


POSITIONS = (np.arange(ROWS, dtype=np.int32) % 97)[None]  # small: a large angle has a large error in float32
FREQUENCY = Wide(np.array([1.0]))


def rope() -> Iterator[Example]:
    yield Example(f"x [1,{ROWS},1,2]", (floats(1, 1, ROWS, 1, 2), POSITIONS, FREQUENCY, 1.0, False))


def split_heads() -> Iterator[Example]:
    yield Example(f"qkv [1,{ROWS},(2+2*1)*2]", (floats(1, 1, ROWS, 8), POSITIONS, FREQUENCY), {"heads": 2, "groups": 1})


def split_heads_backward() -> Iterator[Example]:
    gradients = (floats(i, 1, ROWS, n, 2) for i, n in enumerate((2, 1, 1)))
    yield Example(f"dq [1,{ROWS},2,2]", (*gradients, POSITIONS, FREQUENCY))


def linear() -> Iterator[Example]:
    yield Example(f"x [{ROWS},3], weight [5,3]", (floats(1, ROWS, 3), floats(2, 5, 3), floats(3, 5)))
    yield Example(f"x [3,5], weight [{COLUMNS},5]", (floats(1, 3, 5), floats(2, COLUMNS, 5), None))
    yield Example(f"x [2,{CHAIN}], a long sum", (terms(2, CHAIN), np.full((2, CHAIN), 0.01), None), additions=CHAIN)


def linear_dx() -> Iterator[Example]:
    yield Example(f"dy [{ROWS},3], weight [3,5]", (floats(1, ROWS, 3), floats(2, 3, 5)))
    yield Example(f"dy [3,5], weight [5,{COLUMNS}]", (floats(1, 3, 5), floats(2, 5, COLUMNS)))


def linear_dw() -> Iterator[Example]:
    yield Example(f"dy [{ROWS},3], x [{ROWS},5]", (floats(1, ROWS, 3), floats(2, ROWS, 5)), additions=blocked(ROWS))
    yield Example(f"dy [3,5], x [3,{COLUMNS}]", (floats(1, 3, 5), floats(2, 3, COLUMNS)))
    yield Example(f"dy [{CHAIN},4], x [{CHAIN},4], a long sum", (terms(4, CHAIN).T, np.full((CHAIN, 4), 0.01)), additions=CHAIN)


def linear_db() -> Iterator[Example]:
    for shape in SHAPES:
        yield Example(f"dy {list(shape)}", (floats(1, *shape),), additions=blocked(ROWS))


def attention_inputs() -> Iterator[tuple[str, tuple[Floats, Floats, Floats], dict[str, Any], int]]:
    """-> label, (q, k, v), options, terms"""
    for b, tq, tk in [(ROWS, 1, 2), (1, EXPERTS, EXPERTS), (1, 1, ROWS)]:
        arrays = floats(1, b, tq, 1, 2), floats(2, b, tk, 1, 2), floats(3, b, tk, 1, 2)
        positions = np.arange(tk, dtype=np.int32)[None]
        options = {"scale": 0.7, "causal": True, "q_pos": positions[:, tk - tq :], "k_pos": positions}
        yield f"q [{b},{tq},1,2], k [{b},{tk},1,2]", arrays, options, tk


def attention() -> Iterator[Example]:
    for label, arrays, options, n in attention_inputs():
        yield Example(label, arrays, options, additions=blocked(n))


def attention_backward() -> Iterator[Example]:
    for label, (q, k, v), options, n in attention_inputs():
        y, lse = reference().attention(q, k, v, **options)
        yield Example(label, (floats(5, *y.shape), q, k, v, y, Wide(lse)), options, additions=blocked(n))


# ---- loss, embedding, random, optimizer ----------------------------------------------------------------------------------------------


def loss_inputs() -> Iterator[tuple[str, Floats, Ints, int]]:
    """-> label, logits, targets, terms"""
    for n, v in ((ROWS, 3), (3, 10 * COLUMNS)):
        targets = generator(n, v).integers(0, v, n).astype(np.int32)
        targets[1::7] = -100
        yield f"logits [{n},{v}]", floats(1, n, v), targets, max(n, v)
    first = np.where(np.arange(TERMS) == 0, 0.0, -2.3)[None]  # exp(-2.3) is about 0.1
    yield f"logits [1,{TERMS}], a long sum", first, np.array([5], dtype=np.int32), TERMS


def cross_entropy() -> Iterator[Example]:
    for label, logits, targets, n in loss_inputs():
        yield Example(label, (logits, targets), additions=blocked(n))
    targets = np.zeros(COUNTED, dtype=np.int32)
    yield Example(
        f"logits [{COUNTED},1]: more targets than float32 counts one by one", (np.zeros((COUNTED, 1)), targets), additions=blocked(TERMS)
    )


def cross_entropy_backward() -> Iterator[Example]:
    for label, logits, targets, n in loss_inputs():
        yield Example(
            label, (Wide(np.array(0.7)), logits, targets, Wide(reference().cross_entropy(logits, targets)[2])), additions=blocked(n)
        )


def linear_cross_entropy() -> Iterator[Example]:
    for label, logits, targets, n in loss_inputs():
        args = floats(3, logits.shape[0], 2), floats(2, logits.shape[1], 2), targets
        yield Example(label, args, call=outputs_of("linear_cross_entropy"), additions=blocked(n))


def linear_cross_entropy_backward() -> Iterator[Example]:
    for label, logits, targets, n in loss_inputs():
        args = floats(3, logits.shape[0], 2), floats(2, logits.shape[1], 2), targets, Wide(np.array(0.7))
        yield Example(label, args, call=gradients_of("linear_cross_entropy", 3), additions=blocked(n))


def embedding_inputs() -> Iterator[tuple[Ints, int, int]]:
    """-> ids, V, D"""
    for n, v, d in [(ROWS, 3, 2), (50, ROWS, 2), (3, 5, COLUMNS)]:
        ids = generator(n, v).integers(0, v, n).astype(np.int32)
        ids[-1] = v - 1
        yield ids, v, d


def embedding() -> Iterator[Example]:
    for ids, v, d in embedding_inputs():
        yield Example(f"ids [{len(ids)}], weight [{v},{d}]", (ids, floats(1, v, d)), exact=True)


def embedding_backward() -> Iterator[Example]:
    for ids, v, d in embedding_inputs():
        yield Example(f"ids [{len(ids)}], weight [{v},{d}]", (floats(1, len(ids), d), ids, v, None), additions=blocked(ROWS))


MANY = 300_007


def random_numbers() -> Iterator[Example]:
    yield Example(f"count {MANY}", (MANY, draws()[1]))


def dropout() -> Iterator[Example]:
    for shape in SHAPES:
        yield Example(f"x {list(shape)}", (floats(1, *shape), 0.1, draws()[1]))


def sum_of_squares() -> Iterator[Example]:
    yield Example(f"x [{MANY}]", (floats(1, MANY),), additions=blocked(MANY))
    yield Example(f"x [{TERMS}], a long sum", (terms(TERMS),), additions=blocked(TERMS))


def optimizer(name: str) -> Iterator[Example]:
    yield from optimizer_steps(name, flat=[(MANY,)], matrices=[(130, 70)])


LARGE_DENSE: dict[str, Examples] = {
    "rms_norm": rms_norm, "rms_norm_backward": rms_norm_backward, "layer_norm": layer_norm, "layer_norm_backward": layer_norm_backward,
    "add_rms_norm": add_rms_norm, "add_rms_norm_backward": add_rms_norm_backward, "add_layer_norm": add_layer_norm,
    "add_layer_norm_backward": add_layer_norm_backward, "swiglu": swiglu, "swiglu_backward": swiglu_backward, "gelu": elementwise,
    "gelu_backward": elementwise_backward, "relu": elementwise, "relu_backward": elementwise_backward, "rope": rope, "rope_backward": rope,
    "split_heads": split_heads, "split_heads_backward": split_heads_backward, "linear": linear,
    "linear_dx": linear_dx, "linear_dw": linear_dw, "linear_db": linear_db, "attention": attention,
    "attention_backward": attention_backward, "cross_entropy": cross_entropy, "cross_entropy_backward": cross_entropy_backward,
    "linear_cross_entropy": linear_cross_entropy, "linear_cross_entropy_backward": linear_cross_entropy_backward,
    "embedding": embedding, "embedding_backward": embedding_backward, "random_bits": random_numbers, "uniform": random_numbers,
    "normal": random_numbers, "dropout": dropout, "dropout_backward": dropout, "sum_of_squares": sum_of_squares,
    **{name: partial(optimizer, name) for name in OPTIMIZERS},
}  # fmt: skip
