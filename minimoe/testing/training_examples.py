"""Inputs for comparing the kernels of loss, embedding, randomness and optimizers with their references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.reference.random import Draw
from minimoe.testing.conformance import Wide
from minimoe.testing.dense_examples import Example, Examples, Floats, floats, gradients_of, outputs_of, reference

# ---- loss, embedding, random ------------------------------------------------------------------------------------------------------------


def loss_inputs() -> Iterator[tuple[str, Floats, npt.NDArray[np.int32]]]:
    for n, v in [(1, 1), (31, 33), (33, 32), (2, 257), (0, 5)]:
        targets = np.random.default_rng([n, v]).integers(0, v, n).astype(np.int32)
        yield f"logits [{n},{v}]", 3.0 * floats(1, n, v), targets
        targets = targets.copy()
        targets[::2] = -100
        yield f"logits [{n},{v}], every other target ignored", 3.0 * floats(1, n, v), targets
    yield "logits [3,5], no target", floats(1, 3, 5), np.full(3, -100, dtype=np.int32)
    large = np.array([[1e4, 0.0, -1e4], [80.0, 90.0, 100.0]])
    yield "logits [2,3], large", large, np.array([0, 1], dtype=np.int32)
    yield "logits [1,3], one -inf", np.array([[0.5, -np.inf, 1.0]]), np.array([2], dtype=np.int32)


def cross_entropy() -> Iterator[Example]:
    for label, logits, targets in loss_inputs():
        yield Example(label, (logits, targets))


def cross_entropy_backward() -> Iterator[Example]:
    for label, logits, targets in loss_inputs():
        _, _, lse = reference().cross_entropy(logits, targets)
        yield Example(label, (Wide(np.array(0.7)), logits, targets, Wide(lse)))


def linear_cross_entropy() -> Iterator[Example]:
    for label, logits, targets in loss_inputs():
        weight = floats(2, logits.shape[1], 9)
        yield Example(label, (floats(3, logits.shape[0], 9), weight, targets), call=outputs_of("linear_cross_entropy"))


def linear_cross_entropy_backward() -> Iterator[Example]:
    call = gradients_of("linear_cross_entropy", 3)
    for label, logits, targets in loss_inputs():
        args = floats(3, logits.shape[0], 9), floats(2, logits.shape[1], 9), targets, Wide(np.array(0.7))
        yield Example(label, args, call=call)


def embedding_inputs() -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    for shape, v, d in [((1,), 1, 1), ((31,), 7, 33), ((2, 33), 40, 32), ((0,), 3, 4)]:
        yield f"ids {list(shape)}, weight [{v},{d}]", shape, v, d


def embedding() -> Iterator[Example]:
    for label, shape, v, d in embedding_inputs():
        ids = np.random.default_rng(v).integers(0, v, shape).astype(np.int32)
        yield Example(label, (ids, floats(1, v, d)))


def embedding_backward() -> Iterator[Example]:
    for label, shape, v, d in embedding_inputs():
        ids = np.random.default_rng(v).integers(0, v, shape).astype(np.int32)
        yield Example(label, (floats(1, *shape, d), ids, v, None))
        yield Example(f"{label}, padding 0", (floats(1, *shape, d), ids, v, 0))


DRAWS = (Draw(0, 0, 0, 0), Draw(2**64 - 1, 2**32 - 1, 3, 1000), Draw(0x123456789ABCDEF0, 0x9E3779B9, 1, 2**31))


def random_numbers() -> Iterator[Example]:
    for count in (0, 1, 3, 4, 31, 33, 1000):
        for draw in DRAWS:
            yield Example(f"count {count}, {draw}", (count, draw))


def dropout() -> Iterator[Example]:
    for shape in [(1,), (31, 3), (2, 33), (0, 4)]:
        for rate in (0.1, 0.5):
            yield Example(f"x {list(shape)}, rate {rate}", (floats(1, *shape), rate, DRAWS[1]))


# ---- optimizer --------------------------------------------------------------------------------------------------------------------------


def sum_of_squares() -> Iterator[Example]:
    for shape in [(0,), (1,), (33,), (31, 32), (1000,)]:
        yield Example(f"x {list(shape)}", (floats(1, *shape),))


def steps(shapes: list[tuple[int, ...]], moments: int, **options: Any) -> Iterator[Example]:
    """Return optimizer steps: plain, clipped, and skipped with a NaN in the gradient."""
    for shape in shapes:
        state = [np.abs(floats(2 + i, *shape)) for i in range(moments)]
        grad = floats(9, *shape)
        bad = grad.copy()
        bad.reshape(-1)[:1] = np.nan
        for what, g, scale, ok in [("taken", grad, 1.0, True), ("clipped", grad, 0.3, True), ("skipped", bad, 0.5, False)]:
            given = {"lr": Wide(np.array(0.01)), "scale": Wide(np.array(scale)), "ok": np.array(ok), **options}
            yield Example(f"param {list(shape)}, {what}", (floats(1, *shape), *state, g), given)


FLAT: list[tuple[int, ...]] = [(1,), (31,), (33,), (1000,), (0,)]


def adamw() -> Iterator[Example]:
    for step in (1, 100):
        options = {"step": np.array(step, dtype=np.int32), "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
        yield from steps(FLAT, 2, **options)


def sgd() -> Iterator[Example]:
    yield from steps(FLAT, 1, momentum=0.9, weight_decay=0.1)


def lion() -> Iterator[Example]:
    yield from steps(FLAT, 1, beta1=0.9, beta2=0.99, weight_decay=0.1)


def muon() -> Iterator[Example]:
    yield from steps([(1, 1), (3, 4), (33, 5), (2, 8, 8)], 1, momentum=0.9, weight_decay=0.1)


TRAINING: dict[str, Examples] = {
    "cross_entropy": cross_entropy, "cross_entropy_backward": cross_entropy_backward, "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy_backward": linear_cross_entropy_backward, "embedding": embedding, "embedding_backward": embedding_backward,
    "random_bits": random_numbers, "uniform": random_numbers, "normal": random_numbers, "dropout": dropout, "dropout_backward": dropout,
    "adamw": adamw, "sgd": sgd, "lion": lion, "muon": muon, "sum_of_squares": sum_of_squares,
}  # fmt: skip
